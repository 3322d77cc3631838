"""Takes optimizer steps: backward passes, the guards that may refuse a step, and the count of those taken."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from atpo_async.config import Config
from atpo_async.core.schedule import learning_rate
from atpo_async.status import waits
from learner.loss import guards
from learner.loss.correction import Temperings
from learner.memory.out_of_memory import explained
from learner.policy.accelerator import is_sharded
from learner.policy.half import HalfPolicy
from learner.policy.optimizer import set_rate
from learner.training.pass_loss import PassLoss
from learner.training.passes import Pass
from learner.training.reductions import Reductions
from learner.training.report import Abandoned


@dataclass(slots=True)
class UpdateHistory:
    """Counters of the run's updates so far; a checkpoint holds them."""

    updates: int = 0
    """Optimizer steps taken."""
    skips: guards.SkipCount = field(default_factory=guards.SkipCount)
    overflows: int = 0
    """Updates left out because a gradient did not fit fp16 under the loss scale of that moment."""
    grad_norms: guards.GradNorms = field(default_factory=guards.GradNorms)

    def snapshot(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "updates": self.updates,
            "skips": [self.skips.in_a_row, self.skips.total],
            "grad_norms": list(self.grad_norms.norms),
            "overflows": self.overflows,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """From a snapshot.  Checkpoints from before there was such a guard lack the last two: they begin anew."""
        self.updates = int(state["updates"])
        self.skips = guards.SkipCount(*state["skips"])
        self.grad_norms = guards.GradNorms.of(state.get("grad_norms", ()))
        self.overflows = int(state.get("overflows", 0))


@dataclass(slots=True)
class BatchTotals:
    """Sums over the optimizer steps of a batch."""

    losses: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    terms: list[list[float]] = field(default_factory=list)
    """Of each further term, in their order."""
    grad_norms: list[float] = field(default_factory=list)
    tempering: list[Temperings] = field(default_factory=list)
    lr: float = 0.0
    fault: str | None = None
    forward_tokens: int = 0
    """Padded, of the passes with a gradient."""
    rows: list[Tensor] = field(default_factory=list)
    """float64[``len(imitation.loss.SUMS)``] each, of this rank's passes over rows that are imitated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """The results of the backward passes of one optimizer step."""

    loss: Tensor
    kl: Tensor
    entropy: Tensor
    terms: Tensor
    """float64[number of further terms]."""
    sums: Tensor
    """float64[``PassLoss.num_sums``]: diagnostics of this rank."""
    log_weights: list[Tensor]
    """Of the passes over trees."""
    row_log_weights: list[Tensor]
    """Of those over rows that are imitated."""
    row_sums: list[Tensor]
    """Of the same."""


@dataclass(kw_only=True)
class OptimizerSteps:
    """Takes optimizer steps."""

    config: Config
    total_updates: int
    """Of the whole run, for the schedule of the learning rate."""
    accelerator: Accelerator
    model: nn.Module
    """As ``accelerate`` has prepared it; the optimizer too."""
    optimizer: AcceleratedOptimizer
    loss: PassLoss
    reductions: Reductions
    half: HalfPolicy | None = None
    """What the passes go through, where that is not the model itself."""
    history: UpdateHistory = field(default_factory=UpdateHistory)
    before_update: Callable[[], None] = lambda: None
    """Called before weights change: returns once nothing reads the present ones any more."""

    def take(
        self, passes: list[Pass], totals: BatchTotals, tempering: Temperings | None, should_stop: Callable[[], bool]
    ) -> Tensor:
        """Take one optimizer step, or none where a guard refuses it.  Returns the diagnostics' sums of this rank.

        Args:
            passes: of the step.
            totals: of the batch; this step is added.
            tempering: of the batch; None: not measured, the guard looks at this step's own ratios.
            should_stop: asked between passes.

        Raises:
            Abandoned: ``should_stop`` said so.
            SetupError: memory ran out after the passes: moments and gradients do not fit, whatever a pass is.
        """
        attempt = self.attempt(passes, tempering or Temperings(), should_stop)
        if tempering is None and self.loss.correction.guards_ess:
            tempering = self.loss.temper(attempt.log_weights, attempt.row_log_weights)
            if tempering.changes:
                attempt = self.attempt(passes, tempering, should_stop)
        totals.tempering.append(tempering or Temperings())
        totals.rows += attempt.row_sums
        totals.forward_tokens += sum(item.inputs["tokens"].numel() for item in passes)
        # From here on the step cannot be begun anew: gradients are scaled, and weights may have changed in part.
        with explained("the optimizer's step", self.config, self.accelerator.device):
            self._conclude(attempt, totals)
        return attempt.sums

    def _conclude(self, attempt: Attempt, totals: BatchTotals) -> None:
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.learner.max_grad_norm)
        grad_norm = float(norm) if norm is not None else float("nan")
        scalars = torch.stack([attempt.loss, attempt.kl, attempt.entropy])
        loss, kl, entropy, *terms = self.reductions.sum_of(torch.cat([scalars, attempt.terms]))
        totals.losses.append(loss)
        totals.kl.append(kl)
        totals.entropy.append(entropy)
        totals.terms.append(terms)
        self._judge(loss, grad_norm, totals)

    def attempt(self, passes: list[Pass], tempering: Temperings, should_stop: Callable[[], bool]) -> Attempt:
        """Forward and backward through every pass; the gradient is on the parameters afterwards.

        Raises:
            Abandoned: ``should_stop`` said so.
        """
        accelerator, device = self.accelerator, self.accelerator.device
        self.optimizer.zero_grad()
        zero = torch.zeros((), dtype=torch.float64, device=device)
        loss, kl, entropy = zero.clone(), zero.clone(), zero.clone()
        sums = torch.zeros(self.loss.num_sums, dtype=torch.float64, device=device)
        terms = zero.new_zeros(len(self.loss.parts.terms))
        log_weights: list[Tensor] = []
        row_log_weights: list[Tensor] = []
        row_sums: list[Tensor] = []
        # Data parallelism averages gradients over ranks; the loss is a sum over them, and so is what the copy does.
        ranks = accelerator.num_processes if self.half is None else 1
        for i, item in enumerate(passes):
            if accelerator.num_processes == 1 and should_stop():
                self.optimizer.zero_grad()
                raise Abandoned
            # Whole gradients are exchanged in the step's last backward pass alone; shards are in each, or every rank
            # would hold a gradient as large as the whole policy.  All ranks have equally many passes.
            exchanges = is_sharded(accelerator) or i + 1 == len(passes)
            with contextlib.nullcontext() if exchanges else accelerator.no_sync(self.model):
                found = self.loss(item, tempering)
                accelerator.backward(found.loss.loss * ranks)
            loss += found.loss.loss.detach().double()
            kl += found.loss.kl.double()
            entropy += found.loss.entropy.double()
            if len(terms) and not item.imitated:
                terms += torch.stack(list(found.loss.terms.values())).double()
            (row_log_weights if item.imitated else log_weights).append(found.log_weights)
            waits.progress("micro-batches")
            if found.sums is not None:
                sums += found.sums
            if found.row_sums is not None:
                row_sums.append(found.row_sums)
        if self.half is not None and accelerator.num_processes > 1:
            self.half.sum_over_ranks()
        return Attempt(
            loss=loss,
            kl=kl,
            entropy=entropy,
            terms=terms,
            sums=sums,
            log_weights=log_weights,
            row_log_weights=row_log_weights,
            row_sums=row_sums,
        )

    def count_as_skipped(self, reason: str) -> None:
        """Count a batch without an optimizer step as a skipped update."""
        self.history.skips = self.history.skips.after(reason)

    def _judge(self, loss: float, grad_norm: float, totals: BatchTotals) -> None:
        """Apply the gradient, or leave it out where it overflowed or a guard refuses it."""
        history, scaler = self.history, self.accelerator.scaler
        if guards.overflowed(loss=loss, grad_norm=grad_norm, scale=None if scaler is None else scaler.get_scale()):
            history.overflows += 1
            self._leave_out()
            return
        totals.grad_norms.append(grad_norm)
        fault = guards.fault(
            loss=loss, grad_norm=grad_norm, history=history.grad_norms, max_spike=self.config.learner.max_grad_spike
        )
        if fault is None:
            totals.lr = self._apply()
        else:
            totals.fault = fault
            self._leave_out()
        history.skips = history.skips.after(fault)
        history.grad_norms = history.grad_norms.after(grad_norm)

    def _apply(self) -> float:
        """The step; returns its learning rate."""
        settings = self.config.learner
        lr = learning_rate(
            self.history.updates,
            peak=settings.lr,
            warmup=settings.warmup_steps,
            total=self.total_updates,
            schedule=settings.schedule,
        )
        set_rate(self.optimizer, lr)
        self.before_update()
        self.optimizer.step()
        if self.half is not None:
            self.half.is_stale = True
        self.history.updates += 1
        self.optimizer.zero_grad()
        return lr

    def _leave_out(self) -> None:
        """No step with the gradients as they are."""
        if self.accelerator.scaler is not None:
            # The scaler has checked the gradients (clipping unscales them) and sets its scale accordingly; a step would
            # apply the finite ones.
            self.accelerator.scaler.update()
        self.optimizer.zero_grad()
