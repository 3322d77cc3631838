"""The protocols of surrogates, corrections, loss terms and token weights: their arguments and their results.

All are pure functions of structs of tensors and of their section of the configuration; options that a run names
(``objective.surrogate_options``, ``correction.action_options``, ``objective.term_options``) come as keywords.  All are
called for passes without tokens too, so that ranks stay in step: they return empty tensors then.

This module does not load torch: the configuration's rules read the traits of the built-in ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from atpo_async.config import CorrectionConfig, ObjectiveConfig

MAX_LOG_RATIO = 10.0
"""Of a surrogate's ratio: keeps exp() finite; far outside any clip range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SurrogateTokens:
    """The action tokens that a surrogate is computed from.  All of one shape; places that do not count hold zeros."""

    logp: Tensor
    """float: log-probs under the weights being trained; with the gradient."""
    log_ratio: Tensor
    """float: log s_t, policy over prox at ``objective.ratio_level``, at most MAX_LOG_RATIO; with the gradient of
    ``logp``."""
    prox: Tensor
    """float: log-probs under the proximal policy."""
    mu: Tensor
    """float: log-probs under the behaviour policy."""
    advantage: Tensor
    """float: of the token's turn."""
    turn: Tensor
    """int64: turn occurrence, -1 where nothing counts (``learner.loss.units`` sums over them)."""
    row: Tensor
    """int64: row of the forward pass."""

    def at_ceiling(self) -> Tensor:
        """bool: the log-ratio was cut at MAX_LOG_RATIO, so that no gradient flows through it."""
        return self.log_ratio.detach() >= MAX_LOG_RATIO


@dataclass(frozen=True, slots=True, kw_only=True)
class SurrogateTerms:
    """What a surrogate returns: a term of the loss for each token."""

    loss: Tensor
    """float, shape of the tokens: loss_t, with the gradient.  The objective weighs and adds them up."""
    clipped: Tensor | None = None
    """bool, shape of the tokens: a clip or a mask binds here, so no gradient flows.  None: nowhere."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """float, shape of the tokens: numbers whose mean over the batch's tokens is logged as ``surrogate/NAME``; the names
    are those that the surrogate declares (``SurrogateTraits.metrics``)."""


class Surrogate(Protocol):
    """``objective.surrogate``: a term of the loss for each action token."""

    def __call__(self, tokens: SurrogateTokens, settings: ObjectiveConfig, /) -> SurrogateTerms:
        """The terms of one forward pass."""


MAX_LOG_WEIGHT = 30.0
"""Of an importance weight: keeps exp() and its square finite in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitRatios:
    """Log-ratios of the proximal to the behaviour policy by unit of ``correction.level``: U units, M tokens."""

    log_weight: Tensor
    """float[U]: lambda S of each unit; the exact importance weight is its exponential.  An infinite one is huge, and
    one that is not a number stays so."""
    unit: Tensor
    """int64, shape of the tokens: the unit of each, -1 where none counts."""
    advantage: Tensor
    """float, shape of the tokens."""
    measured: float | None = None
    """What ``CorrectionTraits.measure`` found of the whole batch, over all ranks.  None: it measures nothing, or the
    batch had no finite log-weight."""

    def weight(self) -> Tensor:
        """float[U]: the exact importance weights, finite wherever ``log_weight`` is a number."""
        return self.log_weight.clamp(max=MAX_LOG_WEIGHT).exp()


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitWeights:
    """What a correction returns: the weight of each unit's loss."""

    weight: Tensor
    """float[U], without gradient; 0 takes the unit out of the loss."""
    changed: Tensor
    """bool[U]: the weight is not the exact one: bounded or masked (logged as ``is/truncated_share``)."""
    exempt: Tensor | None = None
    """bool, shape of the tokens: tokens whose weight is 1, whatever their unit's.  None: none."""


class Correction(Protocol):
    """``correction.action``: how the importance weights of stale data are applied."""

    def __call__(self, ratios: UnitRatios, settings: CorrectionConfig, /) -> UnitWeights:
        """The weights of one forward pass; and of the whole batch, where the guard of the effective sample size tries
        exponents: each unit is then one token with a negative advantage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MinP:
    """Of the vocabulary's tokens whose probability is at least a share of the largest one (``Needs.min_p``)."""

    log_mass: Tensor
    """float: the log of their mass, 0 or less, in the distribution that each action token is of."""
    top_logp: Tensor
    """float: the largest log-prob there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartTokens:
    """Action tokens at the batch's start: what is fixed before its first optimizer step.  All of one shape, without
    gradient; what a part does not need (``Needs``) is None."""

    logp: Tensor
    """float: log-probs under the proximal policy."""
    mu: Tensor
    """float: log-probs under the behaviour policy."""
    advantage: Tensor
    """float: of the token's turn."""
    turn: Tensor
    """int64: turn occurrence, -1 where nothing counts."""
    row: Tensor
    """int64: row of the forward pass."""
    entropy: Tensor | None = None
    """float: over the whole vocabulary, nats."""
    min_p: MinP | None = None
    reference: Tensor | None = None
    """float: log-probs under the policy of ``model.path``."""
    random: Tensor | None = None
    """float in [0, 1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Now:
    """The batch under way, and what is known of it as a whole."""

    step: int
    """The learner's batch, from 0."""
    num_steps: int
    """``run.steps``."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """``Measured.values`` of this part for this batch; empty for a part that measures nothing."""
    state: Mapping[str, float] = field(default_factory=dict)
    """``Measured.state`` of this part as the batch before left it; empty for the first batch of a run."""


class BatchStatistics(Protocol):
    """Numbers over the action tokens of the whole batch: of all ranks and micro-batches, a shared turn's once.

    Each is exact, and does not depend on how ranks, micro-batches, mini-batches and rows cut the batch.  Every rank
    must call the same methods in the same order.  ``where``, bool by token, leaves the others out; NaN is left out
    always.
    """

    def count(self, where: Tensor) -> int:
        """How many tokens are in ``where``."""

    def sum(self, values: Tensor, where: Tensor | None = None) -> float:
        """0 of none."""

    def mean(self, values: Tensor, where: Tensor | None = None) -> float:
        """NaN of none."""

    def std(self, values: Tensor, where: Tensor | None = None, *, sample: bool = False) -> float:
        """The population's, or with ``sample`` that of a sample; NaN of none (of fewer than two)."""

    def quantile(self, values: Tensor, share: float, where: Tensor | None = None) -> float:
        """Linear between neighbours; NaN of none."""

    def smallest(self, values: Tensor, number: int, where: Tensor | None = None) -> float:
        """The ``number``-th smallest: that many tokens are not above it, and more where several tie there.  -inf where
        ``number`` is 0 or there is no token; the largest of all where there are fewer."""

    def largest(self, values: Tensor, number: int, where: Tensor | None = None) -> float:
        """The ``number``-th largest; inf where ``number`` is 0 or there is no token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a part's ``measure`` returns."""

    values: Mapping[str, float] = field(default_factory=dict)
    """They come with each pass as ``now.measured``, and are logged as ``PART/NAME`` where they are finite."""
    state: Mapping[str, float] | None = None
    """What the next batch's ``now.state`` holds: finite numbers, kept in checkpoints.  None: as it was."""


class Measure(Protocol):
    """What the whole batch decides for a loss term or a token weight, before its first optimizer step."""

    def __call__(
        self, tokens: StartTokens, batch: BatchStatistics, now: Now, settings: ObjectiveConfig, /, **options: Any
    ) -> Measured:
        """Called on every rank, with the tokens that this one has, each turn's once; there may be none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TermTokens(SurrogateTokens):
    """What a loss term is computed from: what a surrogate is, and what the term needs besides."""

    start: StartTokens
    now: Now
    entropy: Tensor | None = None
    """float: of the weights being trained, nats; with the gradient (``Needs.own_entropy``)."""
    min_p: MinP | None = None
    """Of the weights being trained, without gradient (``Needs.own_min_p``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TermLoss:
    """What a loss term returns, for each token."""

    loss: Tensor
    """float, shape of the tokens, with the gradient.  The objective weighs it as it does the surrogate's
    (``TermTraits.corrected``: with or without the off-policy weight) and adds it."""
    replaces: Tensor | None = None
    """bool, shape of the tokens: the surrogate's own loss is left out there.  None: nowhere."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """float, shape of the tokens: numbers whose mean over the batch's tokens is logged as ``TERM/NAME``; NaN at tokens
    that such a mean leaves out.  The names are those that the term declares (``TermTraits.metrics``)."""


class Term(Protocol):
    """An entry of ``objective.terms``: a loss for each token besides the surrogate's."""

    def __call__(self, tokens: TermTokens, settings: ObjectiveConfig, /) -> TermLoss:
        """The term in one forward pass."""


class TokenWeight(Protocol):
    """An entry of ``objective.token_weights``: a multiplier of the surrogate's loss for each token."""

    def __call__(self, tokens: StartTokens, now: Now, settings: ObjectiveConfig, /) -> Tensor:
        """float, shape of the tokens, 0 or more, without gradient."""
