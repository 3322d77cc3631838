"""The protocols of surrogates and corrections: their arguments and their results.

Both are pure functions of a struct of tensors and of their section of the configuration; options that a run names
(``objective.surrogate_options``, ``correction.action_options``) come as keywords.  Both are called for passes without
tokens too, so that ranks stay in step: they return empty tensors then.

This module does not load torch: the configuration's rules read the traits of the built-in ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

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
