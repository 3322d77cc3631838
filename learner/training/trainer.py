"""One batch: trees -> rows -> log-probs -> loss -> optimizer steps.  Synchronous; the same on every rank.

The loss is a mean over the global batch, whatever part of it a rank or a micro-batch holds.  With ``minibatches`` > 1
each optimizer step's loss is the mean over its own leaves; with ``epochs`` > 1 the parts come round again.

What the whole batch decides (the exponent that keeps the effective sample size, M2PO's threshold, ratios for the tree
trace) is measured in a pass without gradient before the first step.  The guard against a collapsed effective sample
size needs no such pass: it looks after the backward passes, and takes them again, tempered, where it must.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor

from atpo_async.config import Config
from atpo_async.config.credit_rule import credit_rule
from atpo_async.config.rules import needs_log_probs
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.core.priorities import tree_priority
from atpo_async.core.schedule import learning_rate
from atpo_async.core.tree import lag_versions
from atpo_async.models import causal_lm
from atpo_async.status import waits
from atpo_async.wire.messages import Batch
from learner.batches.intake import REASONS, Sifted, sift
from learner.loss import correction, guards
from learner.loss.correction import Tempering
from learner.loss.objective import MAX_LOG_RATIO, Surrogate, atpo_loss
from learner.packing.attention import to_device
from learner.packing.rows import (
    CreditedTree,
    MicroBatch,
    Normaliser,
    Staleness,
    idle_micro_batch,
    leaf_rows,
    micro_batches,
)
from learner.packing.tree import tree_micro_batches
from learner.policy import precision
from learner.policy.model import Policy, is_sharded, is_tied, layout_for, make_optimizer
from learner.training.report import Abandoned, StepReport


@dataclass(slots=True)
class _Totals:
    """What is added up over the optimizer steps of a batch."""

    losses: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    tempering: list[Tempering] = field(default_factory=list)
    lr: float = 0.0
    fault: str | None = None
    forward_tokens: int = 0
    """Padded, of the passes with a gradient."""


@dataclass(slots=True, kw_only=True)
class _Pass:
    """A micro-batch on its device."""

    inputs: dict[str, Any]
    occurrence: Tensor | None
    mu: Tensor
    advantage: Tensor
    weight: Tensor
    turn: Tensor
    row: Tensor
    number: Tensor
    counted: Tensor
    lag: Tensor
    prox: Tensor | None = None
    """Once it is known; before that the pass's own log-probs are it."""
    reference: Tensor | None = None

    def spread(self, scored: Tensor) -> Tensor:
        """A number for each scored token (last dimension) -> for each place of the loss."""
        return scored if self.occurrence is None else scored[..., self.occurrence]


@dataclass(slots=True, kw_only=True)
class _Part:
    """The trees of one optimizer step."""

    trees: list[CreditedTree]
    passes: list[_Pass]
    row_tokens: int
    """Of the flat layout, whatever the layout is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    """What the backward passes of one optimizer step gave."""

    loss: Tensor
    kl: Tensor
    entropy: Tensor
    diagnostics: Tensor
    log_ratios: list[Tensor]


class Trainer:
    """The policy, its optimizer, and how a batch changes them.

    Raises SetupError if Accelerate unties the policy's output head from its embeddings; ConfigError or SetupError if a
    mode of credit that the configuration names cannot be loaded.
    """

    def __init__(self, config: Config, *, accelerator: Accelerator, policy: Policy) -> None:
        self.config = config
        self.accelerator = accelerator
        self.policy = policy
        self.updates = 0
        """Optimizer steps taken."""
        self.skips = guards.SkipCount()
        self.overflows = 0
        """Updates left out because a gradient did not fit fp16 under the loss scale of that moment."""
        self.grad_norms = guards.GradNorms()
        self.names = tuple(policy.hf.state_dict())
        """Every tensor an engine needs, aliases of tied ones too."""
        self._alias = _aliases(policy.hf)
        self._credit = credit_rule(config.credit)
        if self._credit.reads_ratio and config.correction.prox == "interpolate":
            raise ConfigError(needs_log_probs(self._credit.value_setting))
        self._vocab_size = int(policy.hf.config.vocab_size)
        self._reference = _frozen_copy(policy, accelerator) if config.objective.kl_coef else None
        self.sharded = is_sharded(accelerator)
        optimizer = make_optimizer(policy, config.learner, sharded=self.sharded)
        tied = is_tied(policy)
        precision.keep_outputs(accelerator)
        self.model, self.optimizer = accelerator.prepare(policy, optimizer)
        # On the device, and through the wrappers where only those can run the model: what is tried is what trains.
        self.layout, self.layout_reason = layout_for(policy, config, self.model if self.sharded else None)
        if tied and not is_tied(policy):
            # A head of its own would be no parameter of the optimizer, and its gradient would never be zeroed.
            raise SetupError(
                f"accelerate untied the output head from the embeddings (learner.accelerate_config = "
                f"{config.learner.accelerate_config!r}): set fsdp_cpu_ram_efficient_loading to false there"
            )

    @property
    def updates_per_batch(self) -> int:
        return self.config.learner.minibatches * self.config.learner.epochs

    @property
    def total_updates(self) -> int:
        settings = self.config
        return (settings.learner.schedule_steps or settings.run.steps) * self.updates_per_batch

    @property
    def _measures_first(self) -> bool:
        """Whether log-probs of the whole batch must be known before its first optimizer step."""
        prox = self.config.correction.prox
        recompute = prox == "recompute" or (prox == "auto" and self.updates_per_batch > 1)
        return recompute or self._credit.reads_ratio or correction.needs_batch(self.config.correction)

    @property
    def _guards_ess(self) -> bool:
        settings = self.config.correction
        return settings.action != "none" and settings.ess_floor > 0

    def warm_up(self) -> None:
        """One pass on made-up rows, so that the first batch does not pay for allocation and lazy set-up.

        Weights, optimizer and generators of random numbers stay as they are.  Every rank calls it.
        """
        settings = self.config
        length = min(64, settings.model.max_context_tokens)
        rows = max(1, min(64, settings.learner.micro_batch_tokens // length))
        places = torch.arange(rows * length, device=self.accelerator.device)
        tokens = torch.zeros((rows, length), dtype=torch.int64, device=self.accelerator.device)
        logp = self.model(tokens=tokens, predictor=places, target=torch.zeros_like(places))
        precision.check_outputs(logp)
        self.accelerator.backward(logp.sum() * 0.0)
        self.optimizer.zero_grad()

    def train(self, batch: Batch, *, version: int, should_stop: Callable[[], bool] = lambda: False) -> StepReport:
        """Train on this rank's share of a batch.  Every rank calls it for every batch, with a share or without.

        Args:
            batch: its trees may be empty.
            version: of the weights now; lag is measured against it.
            should_stop: asked between forward passes, in a run of one process only (ranks must stay in step).

        Raises:
            Abandoned: ``should_stop`` said so before any weight changed.
        """
        settings = self.config
        sifted = sift(batch, version=version, vocab_size=self._vocab_size, max_lag=settings.staleness.max_lag)
        trees = [CreditedTree.of(tree, self._credit) for tree in sifted.batch.trees]
        order = np.random.default_rng((settings.run.seed, batch.step, self.accelerator.process_index))
        parts = [self._plan(share, batch, version) for share in _split(trees, settings.learner.minibatches, order)]
        tempering = None
        if self._measures_first:
            self._measure(parts)
            if self._credit.reads_ratio:
                for part in parts:
                    self._recredit(part)
                trees = [tree for part in parts for tree in part.trees]
            if correction.needs_batch(settings.correction) or self._guards_ess:
                tempering = self._temper([ratios for part in parts for ratios in self._ratios_of(part)])
        totals = _Totals(fault=self._all_refused(len(trees), sifted))
        diagnostics = torch.zeros(len(correction.SUMS), dtype=torch.float64, device=self.accelerator.device)
        for _ in range(settings.learner.epochs):
            for part in parts:
                if part.passes:
                    # Once a weight has changed, the batch is seen through to its end.
                    first = not totals.losses
                    diagnostics += self._update(part.passes, totals, tempering, should_stop if first else lambda: False)
        metrics = self._metrics(trees, version, totals, diagnostics, sum(part.row_tokens for part in parts))
        return StepReport(
            metrics=metrics | self._dropped(sifted.metrics()),
            priorities={
                tree.tree.tree_id: tree_priority(tree.advantages, max_share=settings.buffer.priority_max_share)
                for tree in trees
            }
            | dict.fromkeys((tree_id for ids in sifted.dropped.values() for tree_id in ids), 0.0),
            trained=frozenset(tree.tree.tree_id for tree in trees),
            fault=totals.fault,
            warnings=tuple(sifted.messages),
        )

    def _plan(self, trees: Sequence[CreditedTree], batch: Batch, version: int) -> _Part:
        """This rank's forward passes for one optimizer step: as many as every other rank, none if nobody has rows."""
        settings = self.config
        normaliser = Normaliser(
            num_trees=batch.num_trees,
            num_leaves=batch.num_leaves,
            num_action_tokens=batch.num_action_tokens,
            num_turn_tokens=batch.num_turn_tokens,
        )
        if settings.learner.minibatches > 1:
            own = Normaliser.of(trees)
            counts = [own.num_trees, own.num_leaves, own.num_action_tokens, own.num_turn_tokens]
            total = [int(v) for v in self._sum(np.array(counts, dtype=np.float64))]
            normaliser = Normaliser(
                num_trees=total[0], num_leaves=total[1], num_action_tokens=total[2], num_turn_tokens=total[3]
            )
        rows = leaf_rows(
            trees,
            version=version,
            max_lag=settings.staleness.max_lag,
            aggregation=settings.objective.aggregation,
            normaliser=normaliser,
            keep_idle=self._credit.reads_ratio or settings.objective.kl_coef > 0 or settings.objective.entropy_coef > 0,
        )
        max_tokens = settings.learner.micro_batch_tokens
        if self.layout == "tree":
            packed = tree_micro_batches(
                rows, max_tokens=max_tokens, pack_tokens=settings.learner.pack_tokens, version=version
            )
        else:
            packed = micro_batches(rows, max_tokens=max_tokens, version=version)
        count = int(max(self._gather(len(packed))))
        packed += [idle_micro_batch() for _ in range(count - len(packed))]
        return _Part(
            trees=list(trees),
            passes=[self._on_device(item) for item in packed],
            row_tokens=sum(len(row.tokens) - 1 for row in rows),
        )

    def _on_device(self, batch: MicroBatch) -> _Pass:
        dtype = next(self.policy.parameters()).dtype
        dtype = dtype if dtype == torch.float64 else torch.float32
        device = self.accelerator.device

        def number(values: Any) -> Tensor:
            return torch.from_numpy(values).to(dtype)

        inputs: dict[str, Any] = {
            "tokens": torch.from_numpy(batch.tokens),
            "predictor": torch.from_numpy(batch.predictor),
            "target": torch.from_numpy(batch.target),
        }
        rest: dict[str, Any] = {
            "occurrence": None if batch.occurrence is None else torch.from_numpy(batch.occurrence),
            "mu": number(batch.mu),
            "advantage": number(batch.advantage),
            "weight": number(batch.weight),
            "turn": torch.from_numpy(batch.turn),
            "row": torch.from_numpy(batch.row),
            "number": torch.from_numpy(batch.number),
            "counted": torch.from_numpy(batch.counted),
            "lag": torch.from_numpy(batch.lag),
        }
        inputs = send_to_device(inputs, device)
        if batch.layout is not None:
            inputs["layout"] = to_device(batch.layout, device)
        return _Pass(inputs=inputs, **send_to_device(rest, device))

    def _all_refused(self, num_kept: int, sifted: Sifted) -> str | None:
        """Why a batch counts as a skipped update though it had none: over all ranks no tree of it was fit to train on.

        Once in a while that is bad luck; batch after batch it is a wrong tokenizer or a broken environment, and the run
        should stop.  Trees that are only too old say nothing of the kind.
        """
        unfit = [len(ids) for reason, ids in sifted.dropped.items() if reason != "all_stale"]
        kept, refused = self._sum(np.array([num_kept, sum(unfit)], dtype=np.float64)).tolist()
        if kept or not refused:
            return None
        reason = f"trees were all unfit to train on, {int(refused)} of them; the log names each"
        self.skips = self.skips.after(reason)
        return reason

    # --- before the first step

    def _measure(self, parts: Sequence[_Part]) -> None:
        """Proximal log-probs of the whole batch, without a gradient."""
        with torch.no_grad():
            for part in parts:
                for item in part.passes:
                    item.prox = item.spread(self.model(**item.inputs)).detach()
                    waits.progress("micro-batches")

    def _recredit(self, part: _Part) -> None:
        """Credit again, with each turn's ratio.  Turns without a token in the loss count as ratio 1."""
        num_turns = sum(len(tree.tree) for tree in part.trees)
        total = torch.zeros(num_turns, dtype=torch.float64, device=self.accelerator.device)
        for item in part.passes:
            assert item.prox is not None
            difference = torch.where(item.counted, (item.prox - item.mu).double(), 0.0)
            total.index_add_(0, item.number, difference)
        ratio = total.clamp(max=MAX_LOG_RATIO).exp().cpu().numpy()
        part.trees = [
            tree.recredited(own, self._credit)
            for tree, own in zip(part.trees, _by_tree(ratio, part.trees), strict=True)
        ]
        advantage = np.concatenate([np.zeros(0), *(tree.advantages for tree in part.trees)])
        for item in part.passes:
            found = torch.from_numpy(advantage).to(item.advantage)
            item.advantage = found[item.number]

    def _ratios_of(self, part: _Part) -> Iterable[Tensor]:
        for item in part.passes:
            assert item.prox is not None
            yield correction.batch_log_ratios(
                item.prox, item.mu, item.turn, item.row, item.counted, self.config.correction
            )

    def _temper(self, log_ratios: Sequence[Tensor]) -> Tempering:
        """What the global batch's ratios ask for."""
        none = torch.zeros(0, dtype=torch.float64, device=self.accelerator.device)
        return correction.temper(self._concatenated(torch.cat([none, *log_ratios])), self.config.correction)

    # --- one optimizer step

    def _update(
        self, passes: list[_Pass], totals: _Totals, tempering: Tempering | None, should_stop: Callable[[], bool]
    ) -> Tensor:
        """One optimizer step, or none if it would be a bad one.  Returns the diagnostics' sums of this rank.

        Args:
            tempering: of the batch; None: not measured, the guard looks at this step's own ratios.
        """
        settings = self.config
        attempt = self._attempt(passes, tempering or Tempering(), should_stop)
        if tempering is None and self._guards_ess:
            tempering = self._temper(attempt.log_ratios)
            if tempering.scale < 1:
                attempt = self._attempt(passes, tempering, should_stop)
        totals.tempering.append(tempering or Tempering())
        totals.forward_tokens += sum(item.inputs["tokens"].numel() for item in passes)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), settings.learner.max_grad_norm)
        sums = torch.stack([attempt.loss, attempt.kl, attempt.entropy])
        loss, kl, entropy = self.accelerator.reduce(sums, reduction="sum").tolist()
        grad_norm = float(norm) if norm is not None else float("nan")
        totals.losses.append(loss)
        totals.kl.append(kl)
        totals.entropy.append(entropy)
        scaler = self.accelerator.scaler
        if guards.overflowed(loss=loss, grad_norm=grad_norm, scale=None if scaler is None else scaler.get_scale()):
            self.overflows += 1
            self._leave_out()
            return attempt.diagnostics
        totals.grad_norms.append(grad_norm)
        self._apply(
            guards.fault(
                loss=loss, grad_norm=grad_norm, history=self.grad_norms, max_spike=settings.learner.max_grad_spike
            ),
            totals,
        )
        self.grad_norms = self.grad_norms.after(grad_norm)
        return attempt.diagnostics

    def _attempt(self, passes: list[_Pass], tempering: Tempering, should_stop: Callable[[], bool]) -> _Attempt:
        """Forward and backward through every pass; the gradient is on the parameters afterwards.

        Raises:
            Abandoned: ``should_stop`` said so.
        """
        accelerator, device = self.accelerator, self.accelerator.device
        self.optimizer.zero_grad()
        zero = torch.zeros((), dtype=torch.float64, device=device)
        loss, kl, entropy = zero.clone(), zero.clone(), zero.clone()
        diagnostics = torch.zeros(len(correction.SUMS), dtype=torch.float64, device=device)
        log_ratios: list[Tensor] = []
        for i, item in enumerate(passes):
            if accelerator.num_processes == 1 and should_stop():
                self.optimizer.zero_grad()
                raise Abandoned
            # Only the last backward pass of the step exchanges gradients: ranks then agree on their number.
            last = i + 1 == len(passes)
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                result, ratios, sums = self._surrogate(item, tempering)
                # Data parallelism averages gradients over ranks; the loss is a sum over them.
                accelerator.backward(result.loss * accelerator.num_processes)
            loss += result.loss.detach().double()
            kl += result.kl.double()
            entropy += result.entropy.double()
            log_ratios.append(ratios)
            waits.progress("micro-batches")
            if sums is not None:
                diagnostics += sums
        return _Attempt(loss=loss, kl=kl, entropy=entropy, diagnostics=diagnostics, log_ratios=log_ratios)

    def _surrogate(self, item: _Pass, tempering: Tempering) -> tuple[Surrogate, Tensor, Tensor | None]:
        """The loss of one pass, its units' log-ratios, and its diagnostics (None without tokens)."""
        settings = self.config
        with_entropy = settings.objective.entropy_coef > 0
        scored = item.spread(self.model(**item.inputs, **({"with_entropy": True} if with_entropy else {})))
        logp, entropy = (scored[0], scored[1]) if with_entropy else (scored, None)
        own = logp.detach()
        prox = self._prox(item, own)
        numerator = own if settings.correction.numerator == "policy" else prox
        weights = correction.importance_weights(
            numerator, item.mu, item.advantage, item.turn, item.row, settings.correction, tempering
        )
        result = atpo_loss(
            logp,
            prox,
            item.mu,
            item.advantage,
            item.turn,
            item.row,
            item.weight,
            weights.per_token,
            settings.objective,
            reference=self._reference_logprobs(item),
            entropy=entropy,
        )
        ratios = correction.batch_log_ratios(numerator, item.mu, item.turn, item.row, item.counted, settings.correction)
        if not item.turn.numel():
            return result, ratios, None
        sums = correction.sums(
            prox=prox,
            mu=item.mu,
            advantage=item.advantage,
            turn=item.turn,
            row=item.row,
            counted=item.counted,
            lag=item.lag,
            clipped=result.clipped,
            weights=weights,
            settings=settings.correction,
        )
        return result, ratios, sums

    def _prox(self, item: _Pass, own: Tensor) -> Tensor:
        """Proximal log-probs of a pass, given its log-probs under the weights now."""
        if self.config.correction.prox == "interpolate":
            return correction.interpolated_prox(own, item.mu, item.lag)
        if item.prox is None:
            item.prox = own
        return item.prox

    def _reference_logprobs(self, item: _Pass) -> Tensor | None:
        """Under the weights of ``model.path``; they never change, so once a batch is enough."""
        if self._reference is None:
            return None
        if item.reference is None:
            # In the precision of the policy's own pass: their difference is to be the weights' alone.
            with torch.no_grad(), self.accelerator.autocast():
                item.reference = item.spread(self._reference(**item.inputs)).to(item.mu)
        return item.reference

    def _apply(self, fault: str | None, totals: _Totals) -> None:
        settings = self.config.learner
        if fault is None:
            totals.lr = learning_rate(
                self.updates,
                peak=settings.lr,
                warmup=settings.warmup_steps,
                total=self.total_updates,
                schedule=settings.schedule,
            )
            for group in self.optimizer.param_groups:
                group["lr"] = totals.lr
            self.optimizer.step()
            self.updates += 1
            self.optimizer.zero_grad()
        else:
            totals.fault = fault
            self._leave_out()
        self.skips = self.skips.after(fault)

    def _leave_out(self) -> None:
        """No step with the gradients as they are."""
        if self.accelerator.scaler is not None:
            # It has looked at the gradients (clipping unscales them) and sets its scale by what it saw; a step would
            # apply whatever is finite.
            self.accelerator.scaler.update()
        self.optimizer.zero_grad()

    def _metrics(
        self, trees: Sequence[CreditedTree], version: int, totals: _Totals, diagnostics: Tensor, row_tokens: int
    ) -> dict[str, float]:
        max_lag = self.config.staleness.max_lag
        staleness = Staleness.of(trees, version=version, max_lag=max_lag).to_vector()
        counts = Staleness.from_vector(self._sum(staleness))
        served = [max(0, lag_versions(turn, current=version)) for tree in trees for turn in tree.tree]
        served_max = max(self._gather(max(served, default=-1)))
        total = self.accelerator.reduce(diagnostics, reduction="sum").tolist()
        out = counts.metrics() | correction.summary(total, self.config.correction)
        if served_max >= 0:
            # Over all turns of the batch, those masked too: lag/max is within max_lag by construction.
            out["lag/served_max"] = served_max
        out["tokens/trained"] = counts.action_tokens
        forward, rows = self._sum(np.array([totals.forward_tokens, row_tokens], dtype=np.float64)).tolist()
        out["tokens/forward"] = forward
        if rows:
            # Below 1: what the tree layout saves; above: what padding and repeated prefixes cost.
            out["pack/token_ratio"] = forward / (rows * self.config.learner.epochs)
        out["train/updates"] = self.updates
        out["guard/skipped_updates"] = self.skips.total
        if self.accelerator.scaler is not None:
            out["guard/fp16_overflows"] = self.overflows
            out["guard/fp16_scale"] = self.accelerator.scaler.get_scale()
        if totals.grad_norms:
            out["grad_norm"] = float(np.mean(totals.grad_norms))
        if totals.losses:
            out["train/loss"] = float(np.mean(totals.losses))
            out["lr"] = totals.lr
            out["is/exponent_scale"] = min(t.scale for t in totals.tempering)
            exponent = self.config.correction.exponent
            out["guard/tempered"] = float(exponent != "ess" and self._guards_ess and out["is/exponent_scale"] < 1)
            if self.config.objective.kl_coef:
                out["loss/kl_reference"] = float(np.mean(totals.kl))
            if self.config.objective.entropy_coef:
                out["loss/entropy"] = float(np.mean(totals.entropy))
            if self.config.correction.action == "m2po":
                out["is/m2po_max_abs"] = min(t.max_abs for t in totals.tempering)
        return out

    def _dropped(self, own: dict[str, float]) -> dict[str, float]:
        """Trees left out, by reason, over all ranks; reasons that no rank has are left out."""
        total = self._sum(np.array([own.get(f"dropped/{reason}", 0.0) for reason in REASONS])).tolist()
        return {f"dropped/{reason}": count for reason, count in zip(REASONS, total, strict=True) if count}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor an engine needs, whole: tied ones under each of their names.  Collective when sharded."""
        if not self.sharded:
            found: dict[str, Tensor] = {k: v.detach() for k, v in self.policy.hf.state_dict().items()}
        else:
            gathered = self.accelerator.get_state_dict(self.model)
            found = {str(k).removeprefix("hf."): v for k, v in gathered.items()}
            if not self.accelerator.is_main_process:
                return found
        return {name: found[name] if name in found else found[self._alias[name]] for name in self.names}

    def published(self) -> dict[str, Tensor]:
        """``tensors`` under the names, and in the shapes, of the files in ``model.path``, on rank 0.

        Collective when sharded.
        """
        tensors = self.tensors()
        return causal_lm.published(self.policy.hf, tensors) if self.accelerator.is_main_process else tensors

    def probe(self, tokens_ST: np.ndarray) -> np.ndarray:
        """float32[S * (T - 1)]: log-prob of each token but the first of its sequence, under the weights now, at
        temperature 1.  Collective when sharded."""
        tokens = torch.from_numpy(tokens_ST.astype(np.int64))
        target = tokens[:, 1:].reshape(-1)
        inputs = {"tokens": tokens[:, :-1], "predictor": torch.arange(len(target)), "target": target}
        scored = self._whole(self.policy.logprobs, inputs | {"temperature": 1.0})
        result: np.ndarray = scored.float().cpu().numpy()
        return result

    def next_tokens(self, tokens_ST: Tensor, waiting_times_SV: Tensor) -> Tensor:
        """int64[S]: a token to follow each sequence, at temperature 1.  Collective when sharded.

        Args:
            tokens_ST: int64, the sequences so far.
            waiting_times_SV: exponential numbers for each token of the vocabulary.
        """
        last = torch.arange(1, len(tokens_ST) + 1) * tokens_ST.shape[1] - 1
        inputs = {"tokens": tokens_ST, "predictor": last, "waiting_times": waiting_times_SV}
        return self._whole(self.policy.sampled, inputs).cpu()

    def _whole(self, method: Callable[..., Tensor], inputs: dict[str, Any]) -> Tensor:
        """The policy's answer without gradient."""
        with torch.no_grad():
            # Sharded parameters are whole only inside the wrapper's forward; elsewhere leave autocast out.
            score = self.model if self.sharded else method
            answer: Tensor = score(**send_to_device(inputs, self.accelerator.device))
        return answer

    def same_everywhere(self, values: Sequence[float]) -> list[float]:
        """Rank 0's numbers, on every rank."""
        if self.accelerator.num_processes == 1:
            return list(values)
        return self._sum(np.array(values if self.accelerator.is_main_process else [0.0] * len(values))).tolist()  # type: ignore[no-any-return]

    def least(self, value: float) -> float:
        """The smallest of all ranks' numbers."""
        return min(self._gather(value))

    def _concatenated(self, own: Tensor) -> Tensor:
        """Every rank's one-dimensional tensor, one behind the other."""
        if self.accelerator.num_processes == 1:
            return own
        sizes = [int(size) for size in self._gather(own.numel())]
        padded = torch.zeros(max([1, *sizes]), dtype=own.dtype, device=own.device)
        padded[: own.numel()] = own
        gathered = self.accelerator.gather(padded).reshape(len(sizes), -1)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    def _sum(self, values: np.ndarray) -> np.ndarray:
        if self.accelerator.num_processes == 1:
            return values
        tensor = send_to_device(torch.from_numpy(values.astype(np.float64)), self.accelerator.device)
        total: np.ndarray = self.accelerator.reduce(tensor, reduction="sum").cpu().numpy()
        return total

    def _gather(self, value: float) -> list[float]:
        if self.accelerator.num_processes == 1:
            return [value]
        tensor = send_to_device(torch.tensor([float(value)], dtype=torch.float64), self.accelerator.device)
        return [float(v) for v in self.accelerator.gather(tensor).tolist()]


def _split(trees: Sequence[CreditedTree], parts: int, order: np.random.Generator) -> list[list[CreditedTree]]:
    if parts == 1:
        return [list(trees)]
    shuffled = [trees[i] for i in order.permutation(len(trees))]
    return [shuffled[i::parts] for i in range(parts)]


def _by_tree(values: np.ndarray, trees: Sequence[CreditedTree]) -> list[np.ndarray]:
    """Numbers by turn of the part -> one array a tree."""
    return np.split(values, np.cumsum([len(tree.tree) for tree in trees])[:-1]) if trees else []


def _frozen_copy(policy: Policy, accelerator: Accelerator) -> Policy:
    """The policy as it was loaded from ``model.path``, whole on every rank."""
    frozen = copy.deepcopy(policy).requires_grad_(False).eval()
    placed: Policy = frozen.to(accelerator.device)
    return placed


def _aliases(hf: Any) -> dict[str, str]:
    """Name of a tied tensor -> the first name it has."""
    first: dict[int, str] = {}
    alias: dict[str, str] = {}
    for name, tensor in hf.state_dict().items():
        key = tensor.data_ptr()
        if key in first:
            alias[name] = first[key]
        else:
            first[key] = name
    return alias
