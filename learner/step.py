"""One batch: trees -> rows -> log-probs -> loss -> optimizer steps.  Synchronous; the same on every rank.

The loss is a mean over the global batch, whatever part of it a rank or a micro-batch holds.  With ``minibatches`` > 1
each optimizer step's loss is the mean over its own leaves, and the proximal policy is the weights before the first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor

from atpo_async.config import Config
from atpo_async.errors import SetupError
from atpo_async.messages import Batch
from atpo_async.tree import lag_versions
from learner import correction, guards
from learner.model import Policy, is_sharded, is_tied, learning_rate, make_optimizer
from learner.objective import atpo_loss
from learner.packing import (
    CreditedTree,
    MicroBatch,
    Normaliser,
    Staleness,
    idle_micro_batch,
    leaf_rows,
    micro_batches,
    priority,
)


class Abandoned(Exception):
    """The batch was given up between two forward passes because the role is stopping; no weight has changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one batch did."""

    metrics: dict[str, float]
    """Global, the same on every rank."""
    priorities: dict[str, float]
    """Of this rank's trees."""
    fault: str | None
    """Why an update of this batch was skipped."""


@dataclass(slots=True)
class _Totals:
    """What is added up over the optimizer steps of a batch."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    lr: float = 0.0
    fault: str | None = None
    padded_tokens: int = 0


@dataclass(slots=True, kw_only=True)
class _Pass:
    """A micro-batch on its device."""

    inputs: dict[str, Any]
    mu: Tensor
    advantage: Tensor
    weight: Tensor
    turn: Tensor
    row: Tensor
    counted: Tensor
    same_version: Tensor
    prox: Tensor | None = None


class Trainer:
    """The policy, its optimizer, and how a batch changes them.

    Raises SetupError if Accelerate unties the policy's output head from its embeddings.
    """

    def __init__(self, config: Config, *, accelerator: Accelerator, policy: Policy) -> None:
        self.config = config
        self.accelerator = accelerator
        self.policy = policy
        self.updates = 0
        """Optimizer steps taken."""
        self.skips = guards.SkipCount()
        self.names = tuple(policy.hf.state_dict())
        """Every tensor an engine needs, aliases of tied ones too."""
        self._alias = _aliases(policy.hf)
        self.sharded = is_sharded(accelerator)
        optimizer = make_optimizer(policy, config.learner, sharded=self.sharded)
        tied = is_tied(policy)
        self.model, self.optimizer = accelerator.prepare(policy, optimizer)
        if tied and not is_tied(policy):
            # A head of its own would be no parameter of the optimizer, and its gradient would never be zeroed.
            raise SetupError(
                f"accelerate untied the output head from the embeddings (learner.accelerate_config = "
                f"{config.learner.accelerate_config!r}): set fsdp_cpu_ram_efficient_loading to false there"
            )

    @property
    def total_updates(self) -> int:
        return self.config.run.steps * self.config.learner.minibatches

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
        trees = [CreditedTree.of(tree, settings.credit) for tree in batch.trees]
        order = np.random.default_rng((settings.run.seed, batch.step, self.accelerator.process_index))
        shares = _split(trees, settings.learner.minibatches, order)
        planned = [self._plan(share, batch, version) for share in shares]
        if len(planned) > 1:
            with torch.no_grad():
                for passes in planned:
                    for item in passes:
                        item.prox = self.model(**item.inputs).detach()
        totals = _Totals()
        diagnostics = torch.zeros(len(correction.SUMS), dtype=torch.float64, device=self.accelerator.device)
        for passes in planned:
            if passes:
                diagnostics += self._update(passes, totals, should_stop if totals.losses == [] else lambda: False)
        return StepReport(
            metrics=self._metrics(trees, version, totals, diagnostics),
            priorities={
                tree.tree.tree_id: priority(tree.advantages, max_share=settings.buffer.priority_max_share)
                for tree in trees
            },
            fault=totals.fault,
        )

    def _plan(self, trees: Sequence[CreditedTree], batch: Batch, version: int) -> list[_Pass]:
        """This rank's forward passes for one optimizer step: as many as every other rank, none if nobody has rows."""
        settings = self.config
        normaliser = Normaliser(num_leaves=batch.num_leaves, num_action_tokens=batch.num_action_tokens)
        if settings.learner.minibatches > 1:
            own = [sum(t.num_leaves for t in trees), sum(t.num_action_tokens for t in trees)]
            leaves, tokens = (int(v) for v in self._sum(np.array(own, dtype=np.float64)))
            normaliser = Normaliser(num_leaves=leaves, num_action_tokens=tokens)
        rows = leaf_rows(
            trees,
            version=version,
            max_lag=settings.staleness.max_lag,
            aggregation=settings.objective.aggregation,
            normaliser=normaliser,
        )
        packed = micro_batches(rows, max_tokens=settings.learner.micro_batch_tokens, version=version)
        count = int(max(self._gather(len(packed))))
        packed += [idle_micro_batch() for _ in range(count - len(packed))]
        return [self._on_device(item) for item in packed]

    def _on_device(self, batch: MicroBatch) -> _Pass:
        dtype = next(self.policy.parameters()).dtype
        dtype = dtype if dtype == torch.float64 else torch.float32

        def number(values: Any) -> Tensor:
            return torch.from_numpy(values).to(dtype)

        inputs: dict[str, Any] = {
            "tokens": torch.from_numpy(batch.tokens),
            "predictor": torch.from_numpy(batch.predictor),
            "target": torch.from_numpy(batch.target),
        }
        if batch.position_ids is not None:
            inputs["position_ids"] = torch.from_numpy(batch.position_ids)
        if batch.attention_mask is not None:
            inputs["attention_mask"] = torch.from_numpy(batch.attention_mask)
        rest: dict[str, Any] = {
            "mu": number(batch.mu),
            "advantage": number(batch.advantage),
            "weight": number(batch.weight),
            "turn": torch.from_numpy(batch.turn),
            "row": torch.from_numpy(batch.row),
            "counted": torch.from_numpy(batch.counted),
            "same_version": torch.from_numpy(batch.same_version),
        }
        device = self.accelerator.device
        return _Pass(inputs=send_to_device(inputs, device), **send_to_device(rest, device))

    def _update(self, passes: list[_Pass], totals: _Totals, should_stop: Callable[[], bool]) -> Tensor:
        """One optimizer step, or none if it would be a bad one.  Returns the diagnostics' sums of this rank."""
        accelerator, settings = self.accelerator, self.config
        self.optimizer.zero_grad()
        diagnostics = torch.zeros(len(correction.SUMS), dtype=torch.float64, device=accelerator.device)
        loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        for i, item in enumerate(passes):
            if accelerator.num_processes == 1 and should_stop():
                self.optimizer.zero_grad()
                raise Abandoned
            # Only the last backward pass of the step exchanges gradients: ranks then agree on their number.
            last = i + 1 == len(passes)
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                logp = self.model(**item.inputs)
                prox = logp.detach() if item.prox is None else item.prox
                weights = correction.importance_weights(prox, item.mu, item.turn, item.row, settings.correction)
                result = atpo_loss(
                    logp, prox, item.advantage, item.turn, item.row, item.weight, weights.per_token, settings.objective
                )
                # Data parallelism averages gradients over ranks; the loss is a sum over them.
                accelerator.backward(result.loss * accelerator.num_processes)
            loss_sum += result.loss.detach().double()
            if item.turn.numel():
                diagnostics += correction.sums(
                    prox=prox,
                    mu=item.mu,
                    advantage=item.advantage,
                    turn=item.turn,
                    row=item.row,
                    counted=item.counted,
                    same_version=item.same_version,
                    clipped=result.clipped,
                    weights=weights,
                    settings=settings.correction,
                )
            totals.padded_tokens += item.inputs["tokens"].numel()
        norm = accelerator.clip_grad_norm_(self.model.parameters(), settings.learner.max_grad_norm)
        loss = float(accelerator.reduce(loss_sum, reduction="sum"))
        grad_norm = float(norm) if norm is not None else float("nan")
        totals.losses.append(loss)
        totals.grad_norms.append(grad_norm)
        self._apply(guards.fault(loss=loss, grad_norm=grad_norm), totals)
        return diagnostics

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
        else:
            totals.fault = fault
            if self.accelerator.scaler is not None:
                # The scaler leaves the weights alone on a non-finite gradient, and must see it to lower its scale.
                self.optimizer.step()
        self.skips = self.skips.after(fault)
        self.optimizer.zero_grad()

    def _metrics(
        self, trees: Sequence[CreditedTree], version: int, totals: _Totals, diagnostics: Tensor
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
        out["tokens/forward"] = float(self._sum(np.array([totals.padded_tokens], dtype=np.float64))[0])
        out["train/updates"] = self.updates
        out["guard/skipped_updates"] = self.skips.total
        if totals.losses:
            out["train/loss"] = float(np.mean(totals.losses))
            out["grad_norm"] = float(np.mean(totals.grad_norms))
            out["lr"] = totals.lr
        return out

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

    def probe(self, token_ids: np.ndarray) -> np.ndarray:
        """float32[L - 1]: log-prob of each token given those before it, under the weights now, at temperature 1."""
        tokens = torch.from_numpy(token_ids.astype(np.int64))
        inputs = send_to_device(
            {"tokens": tokens[None, :-1], "predictor": torch.arange(len(tokens) - 1), "target": tokens[1:]},
            self.accelerator.device,
        )
        with torch.no_grad():
            # Sharded parameters are whole only inside the wrapper's forward; elsewhere leave autocast out.
            score = self.model if self.sharded else self.policy.logprobs
            result: np.ndarray = score(**inputs, temperature=1.0).float().cpu().numpy()
        return result

    def same_everywhere(self, values: Sequence[float]) -> list[float]:
        """Rank 0's numbers, on every rank."""
        if self.accelerator.num_processes == 1:
            return list(values)
        return self._sum(np.array(values if self.accelerator.is_main_process else [0.0] * len(values))).tolist()  # type: ignore[no-any-return]

    def least(self, value: float) -> float:
        """The smallest of all ranks' numbers."""
        return min(self._gather(value))

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
