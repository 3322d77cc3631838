"""The loss of one forward pass: log-probs of the policies, the correction's weights, the objective, diagnostics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from atpo_async.config import Config
from atpo_async.status import waits
from learner.imitation.loss import ImitatedLoss, clip_cov
from learner.loss import diagnostics
from learner.loss.correction import OffPolicyCorrection, Tempering, Temperings, Weights, interpolated_prox
from learner.loss.loading import CheckedSurrogate, load_correction, load_surrogate
from learner.loss.objective import Loss, PassTerm, atpo_loss
from learner.loss.parts import sums as part_sums
from learner.loss.parts.loading import ObjectiveParts
from learner.loss.protocols import MinP
from learner.loss.tokens import ActionTokens
from learner.policy import precision
from learner.training.passes import Pass
from learner.training.reductions import Reductions
from learner.training.whole_batch.measuring import Measuring, arguments, named_lines


@dataclass(frozen=True, slots=True, kw_only=True)
class PassResult:
    """The results of one pass."""

    loss: Loss
    log_weights: Tensor
    """float64[U]: of its units, for the batch's tempering."""
    sums: Tensor | None
    """float64[``PassLoss.num_sums``]: diagnostics, to be added over passes and ranks; None without tokens."""
    row_sums: Tensor | None = None
    """float64[``len(imitation.loss.SUMS)``], in place of ``sums``: of a pass over rows that are imitated."""


@dataclass(slots=True, kw_only=True)
class PassLoss:
    """How a pass's loss is computed; the surrogate and the correction are loaded when it is made, once.

    Raises:
        ConfigError, SetupError: the surrogate or the correction cannot be loaded.
    """

    config: Config
    model: Callable[..., Tensor]
    """The policy in the wrappers that ``accelerate`` put around it."""
    reference: Callable[..., Tensor] | None
    """The policy of ``model.path``, where the objective asks for its log-probs."""
    accelerator: Accelerator
    reductions: Reductions
    parts: ObjectiveParts = field(default_factory=ObjectiveParts)
    """The run's loss terms and token weights (``load_parts``)."""
    correction: OffPolicyCorrection = field(init=False)
    measuring: Measuring = field(init=False)
    _surrogate: CheckedSurrogate = field(init=False)
    row_parts: ObjectiveParts = field(init=False)
    """Of rows that are imitated."""
    _imitated: ImitatedLoss = field(init=False)

    def __post_init__(self) -> None:
        self.correction = load_correction(self.config)
        self._surrogate = load_surrogate(self.config.objective)
        self.measuring = Measuring(parts=self.parts, reductions=self.reductions, num_steps=self.config.run.steps)
        self.row_parts = clip_cov(self.config)
        self._imitated = ImitatedLoss(
            config=self.config,
            model=self.model,
            correction=self.correction,
            surrogate=self._surrogate,
            prox=self._prox,
            measuring=Measuring(parts=self.row_parts, reductions=self.reductions, num_steps=self.config.run.steps),
        )

    @property
    def num_sums(self) -> int:
        return len(diagnostics.SUMS) + len(self._surrogate.metrics) + 2 * len(part_sums.names(self.parts))

    def __call__(self, item: Pass, tempering: Temperings) -> PassResult:
        """Forward; the result's loss carries the gradient."""
        if item.imitated:
            own_loss, log_weights, row_sums = self._imitated(item, tempering.rows)
            return PassResult(loss=own_loss, log_weights=log_weights, sums=None, row_sums=row_sums)
        settings = self.config
        # Before the policy's own pass: with adapters it is the same model, and nothing may come between a pass and its
        # backward pass.
        reference = self._reference_logprobs(item)
        logp, entropy, min_p = self._scored(item)
        own = logp.detach()
        prox = self._prox(item, own)
        tokens = item.against_mu(own if settings.correction.numerator == "policy" else prox)
        weights = self.correction.weights(tokens, tempering.trees)
        loss = atpo_loss(
            ActionTokens(
                logp=logp, prox=prox, mu=item.mu, advantage=item.advantage, turn=item.turn, row=item.row,
                weight=item.weight, correction=weights.per_token, reference=reference,
                entropy=entropy, multiplier=self.measuring.multiplier(item), min_p=min_p,
            ),
            settings.objective,
            self._surrogate,
            step=self.measuring.step,
            further=self._terms(item),
        )  # fmt: skip
        return PassResult(
            loss=loss,
            log_weights=self.correction.log_weights(tokens, item.counted),
            sums=self._sums(item, own, prox, weights, loss) if item.turn.numel() else None,
        )

    def _sums(self, item: Pass, policy: Tensor, prox: Tensor, weights: Weights, loss: Loss) -> Tensor:
        found = diagnostics.sums(
            diagnostics.Weighed(
                tokens=item.against_mu(prox),
                policy=policy,
                counted=item.counted,
                lag=item.lag,
                clipped=loss.clipped,
                weights=weights,
                level=self.config.correction.level,
            )
        )
        once = item.counted & (item.turn >= 0)
        own = [torch.where(once, loss.metrics[name], 0.0).double().sum() for name in self._surrogate.metrics]
        of_parts = part_sums.sums(self.parts, once, terms=loss.term_metrics, multipliers=item.multipliers)
        return torch.cat([found, *([torch.stack(own)] if own else []), of_parts])

    def summary(self, total: Sequence[float]) -> dict[str, float]:
        """Metrics from the sums of all passes and ranks."""
        first = len(diagnostics.SUMS) + len(self._surrogate.metrics)
        own = total[len(diagnostics.SUMS) : first]
        out = diagnostics.summary(total[: len(diagnostics.SUMS)], corrects=self.correction.corrects)
        tokens = total[diagnostics.SUMS.index("clip/n")]
        if tokens:
            out |= {f"surrogate/{name}": sum_ / tokens for name, sum_ in zip(self._surrogate.metrics, own, strict=True)}
        return out | part_sums.summary(self.parts, total[first:])

    # --- measurements of the whole batch

    def begin(self, step: int) -> None:
        """The learner's batch ``step`` begins; nothing is known of it yet."""
        self.measuring.begin(step)
        self._imitated.measuring.begin(step)

    def measure(self, passes: Sequence[Pass]) -> None:
        """Measure for terms and token weights what the batch's trees decide, and what its imitated rows do."""
        self.measuring.measure([item for item in passes if not item.imitated])
        self._imitated.measuring.measure([item for item in passes if item.imitated])

    def measure_start(self, passes: Sequence[Pass]) -> None:
        """Proximal log-probs of passes, and what terms and token weights need besides, in a forward pass of their own
        without a gradient."""
        for item in passes:
            needs = self.row_parts.needs if item.imitated else self.parts.needs
            with torch.no_grad():
                item.prox, item.start = named_lines(
                    item.spread(self.model(**item.inputs, **arguments(needs))).detach(), needs
                )
            waits.progress("micro-batches")

    def measure_reference(self, passes: Sequence[Pass]) -> None:
        """Log-probs of passes under the reference, which they keep."""
        for item in passes:
            self._reference_logprobs(item)
            waits.progress("micro-batches")

    def temper_by_prox(self, passes: Sequence[Pass]) -> Temperings:
        """The tempering of a batch, from the proximal log-probs that its passes have measured."""
        found: dict[bool, list[Tensor]] = {False: [], True: []}
        for item in passes:
            found[item.imitated].append(self.correction.log_weights(item.against_mu(_known(item)), item.counted))
        return self.temper(found[False], found[True])

    def temper(self, log_weights: Sequence[Tensor], row_log_weights: Sequence[Tensor]) -> Temperings:
        """The tempering of a batch, from the ratios of all ranks, those of rows that are imitated apart."""
        rows = self._tempering(row_log_weights) if self.config.imitation.rows else Tempering()
        return Temperings(trees=self._tempering(log_weights), rows=rows)

    def _tempering(self, log_weights: Sequence[Tensor]) -> Tempering:
        none = torch.zeros(0, dtype=torch.float64, device=self.accelerator.device)
        return self.correction.temper(self.reductions.concatenated(torch.cat([none, *log_weights])))

    # --- further numbers and terms

    def _scored(self, item: Pass) -> tuple[Tensor, Tensor | None, MinP | None]:
        """Log-probs of a pass; entropies and min-p numbers where they are needed."""
        needs = self.parts.needs
        with_entropy = bool(self.config.objective.entropy_coef) or needs.own_entropy  # the former at any step
        more: dict[str, Any] = {"with_entropy": True} if with_entropy else {}
        if needs.own_min_p is not None:
            more["min_p"] = needs.own_min_p
        scored = item.spread(self.model(**item.inputs, **more))
        if not more:
            return scored, None, None
        min_p = None if needs.own_min_p is None else MinP(log_mass=scored[-2].detach(), top_logp=scored[-1].detach())
        return scored[0], scored[1] if with_entropy else None, min_p

    def _terms(self, item: Pass) -> list[PassTerm]:
        """Of a pass whose proximal log-probs are known."""
        measuring = self.measuring
        return [
            PassTerm(
                label=term.label,
                corrected=term.traits.corrected,
                compute=term,
                start=measuring.start_of(item, term),
                now=measuring.now(term),
            )
            for term in self.parts.terms
        ]

    # --- log-probs of the other policies

    def _prox(self, item: Pass, own: Tensor) -> Tensor:
        """Proximal log-probs of a pass, given its log-probs under the weights now."""
        if self.config.correction.prox == "interpolate":
            item.prox = interpolated_prox(own, item.mu, item.lag)
            return item.prox
        if item.prox is None:
            item.prox = own
        return item.prox

    def _reference_logprobs(self, item: Pass) -> Tensor | None:
        """Under the weights of ``model.path``; they never change, so once a batch is enough."""
        if self.reference is None:
            return None
        if item.reference is None:
            # In the precision of the policy's own pass: their difference is to be the weights' alone.
            with torch.no_grad(), precision.as_the_policy(self.accelerator):
                inputs: dict[str, Any] = item.inputs
                item.reference = item.spread(self.reference(**inputs)).to(item.mu)
        return item.reference


def _known(item: Pass) -> Tensor:
    assert item.prox is not None
    return item.prox
