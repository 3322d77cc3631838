"""Off-policy correction: importance weights between mu (sampled) and prox (proximal).

Source: ALGORITHM, section 4.  d_t = prox_t - mu_t is the log-ratio of a token, S = sum of d_t over a unit (token, turn,
prefix: the path down to a turn and that turn, sequence), the exact weight is exp(lambda S), without gradient;
``correction.action`` decides how it is applied.  Tokens that do not count (stale turns) add nothing to S.

Numbers that are not finite: an infinite log-ratio counts as MAX_TOKEN_LOG_RATIO nats; NaN stays NaN, so that the loss
is NaN and the update is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from atpo_async.config import CorrectionConfig
from atpo_async.core.loss_traits import CorrectionTraits
from atpo_async.core.vocabulary import Level
from learner.loss.protocols import Correction, UnitRatios, UnitWeights
from learner.loss.tempering import effective_share, exact_share, largest_scale
from learner.loss.tokens import OffPolicyTokens
from learner.loss.units import num_units, prefix_sum, spread, unit_mean, unit_sum, units

MAX_TOKEN_LOG_RATIO = 1e3
"""Of a token, nats: keeps sums over units finite; beyond anything that two real policies differ by."""


@dataclass(frozen=True, slots=True)
class Tempering:
    """How the whole batch changes its weights."""

    scale: float = 1.0
    """Multiplies lambda."""
    measured: float | None = None
    """By the correction's own measure."""


@dataclass(frozen=True, slots=True)
class Temperings:
    """Of the batch's trees, and of the rows that are imitated beside them: old rows must not temper fresh turns."""

    trees: Tempering = Tempering()
    rows: Tempering = Tempering()

    @property
    def changes(self) -> bool:
        """Whether any weight is tempered."""
        return self.trees.scale < 1 or self.rows.scale < 1


@dataclass(frozen=True, slots=True)
class Weights:
    """Off-policy weights."""

    per_token: Tensor
    """Shape of the tokens; 0 where the unit is masked or the place holds none."""
    per_unit: Tensor
    """float[U] at the level in use."""
    changed: Tensor
    """bool[U]: bounded or masked."""


class OffPolicyCorrection:
    """``[correction]`` with its action loaded.

    Args:
        settings: level, exponent, bounds, gate.
        action: how the exact weights are bounded or masked.
        traits: of the action.
        measure: the action's own, its options bound; None: it measures nothing.
    """

    def __init__(
        self,
        settings: CorrectionConfig,
        action: Correction,
        traits: CorrectionTraits,
        measure: Callable[[Tensor, CorrectionConfig], float] | None = None,
    ) -> None:
        self.settings = settings
        self.traits = traits
        self._action = action
        self._measure = measure

    @property
    def corrects(self) -> bool:
        return self.traits.corrects

    @property
    def needs_batch(self) -> bool:
        """Whether the weights depend on the whole batch before its first step (``log_weights``, ``temper``)."""
        return self.corrects and (self.settings.exponent == "ess" or self._measure is not None)

    @property
    def guards_ess(self) -> bool:
        return self.corrects and self.settings.ess_floor > 0

    def weights(self, tokens: OffPolicyTokens, tempering: Tempering = Tempering()) -> Weights:
        """sg of exp(lambda S), bounded or masked by the action.

        Args:
            tokens: of one forward pass.
            tempering: from ``temper``, where it was computed over the whole batch.
        """
        unit = units(self.settings.level, tokens.turn, tokens.row)
        found = self._action(
            UnitRatios(
                log_weight=self._log_weight(tokens) * tempering.scale,
                unit=unit,
                advantage=tokens.advantage,
                measured=tempering.measured,
            ),
            self.settings,
        )
        count = num_units(unit)
        per_token, per_unit, changed = spread(found.weight, unit), found.weight, found.changed
        if found.exempt is not None:
            exempt = (unit >= 0) & found.exempt
            per_token = torch.where(exempt, torch.ones_like(per_token), per_token)
            every = _all(exempt, unit, count)
            per_unit, changed = per_unit.masked_fill(every, 1.0), changed & ~every
        if self.settings.gate is not None and self.corrects:
            drift = unit_mean(log_ratio_to_mu(tokens.numerator, tokens.mu), tokens.turn, num_units(tokens.turn))
            gated = spread(drift.abs() > self.settings.gate, tokens.turn)
            per_token = per_token.masked_fill(gated, 0.0)
            every = _all(gated, unit, count)
            per_unit, changed = per_unit.masked_fill(every, 0.0), changed | every
        return Weights(per_token, per_unit, changed)

    def log_weights(self, tokens: OffPolicyTokens, counted: Tensor) -> Tensor:
        """float64[U]: lambda S before tempering of each unit at the level in use; what ``temper`` takes, concatenated.

        NaN, which that leaves out, for units without a token counted here: to pick the others out of the tensor would
        be to wait until a GPU knows how many there are.

        Args:
            tokens: of one micro-batch.
            counted: bool, by token; false for a turn that another row has counted already.  A sequence always counts.
        """
        unit = units(self.settings.level, tokens.turn, tokens.row)
        log_weight = self._log_weight(tokens)
        here = present(self.settings.level, tokens.turn, unit, counted, log_weight.shape[0])
        return torch.where(here, log_weight.double(), torch.nan)

    def temper(self, log_weights: Tensor) -> Tempering:
        """The tempering that keeps a batch's effective sample size, and the action's own measure of the batch.

        ``exponent = ess``: the largest scale up to 1 with ESS(exp(scale S)) / N >= ``ess_target``.  Otherwise, for an
        action that measures nothing itself, the guard: the weights as applied, bounds included, keep ``ess_floor``, if
        any scale gives them that.

        Args:
            log_weights: float[U], ``log_weights`` of all micro-batches and ranks.  Infinite ones and NaN are left out.

        The guard uses ratios alone: it ignores ``gate``, and takes every A as negative, so that with an
        action that exempts good turns it may temper more than it must.
        """
        settings = self.settings
        logs = log_weights.detach().double().cpu()
        logs = logs[logs.isfinite()]
        if not self.corrects or not logs.numel():
            return Tempering()
        measured = None if self._measure is None else self._measure(logs, settings)
        scale = 1.0
        if settings.exponent == "ess":
            scale = largest_scale(lambda scale: exact_share(logs * scale), settings.ess_target)
        elif self._measure is None:
            scale = largest_scale(lambda scale: effective_share(self._applied(logs * scale)), settings.ess_floor)
        return Tempering(scale=scale, measured=measured)

    def _log_weight(self, tokens: OffPolicyTokens) -> Tensor:
        """float[U]: lambda S before tempering."""
        settings = self.settings
        total, length = unit_log_ratio(tokens, settings.level)
        if settings.exponent == "geometric":
            return total / length.clamp(min=1)
        return total * settings.exponent_value if settings.exponent == "fixed" else total

    def _applied(self, log_weights: Tensor) -> Tensor:
        """float64[U]: the weights of a whole batch's units, each taken for one token of a bad turn."""
        each = torch.arange(len(log_weights))
        bad = -torch.ones_like(log_weights)
        found: UnitWeights = self._action(UnitRatios(log_weight=log_weights, unit=each, advantage=bad), self.settings)
        return found.weight


def unit_log_ratio(tokens: OffPolicyTokens, level: Level) -> tuple[Tensor, Tensor]:
    """float[U], float[U]: S of each unit, and its number of tokens."""
    unit = units(level, tokens.turn, tokens.row)
    count = num_units(unit)
    difference = log_ratio_to_mu(tokens.numerator, tokens.mu)
    total, length = unit_sum(difference, unit, count), unit_sum(torch.ones_like(difference), unit, count)
    if level == "prefix":
        return prefix_sum(total, tokens.turn, tokens.row), prefix_sum(length, tokens.turn, tokens.row)
    return total, length


def log_ratio_to_mu(numerator: Tensor, mu: Tensor) -> Tensor:
    """d_t, without gradient and finite wherever it is a number."""
    return (numerator - mu).detach().clamp(-MAX_TOKEN_LOG_RATIO, MAX_TOKEN_LOG_RATIO)


def _all(where: Tensor, unit: Tensor, count: int) -> Tensor:
    """bool[count]: units whose every token is in ``where``."""
    return unit_mean(where.double(), unit, count) == 1


def interpolated_prox(logp_theta: Tensor, mu: Tensor, lag: Tensor) -> Tensor:
    """Proximal log-probs without a pass of their own: log-linear between mu and the policy by version.

    Of the lag + 1 versions that lie between the one that sampled a token and the one that this step makes, the
    proximal policy is the last but one: prox = mu + lag / (lag + 1) (theta - mu).  At lag 0 it is mu.

    Args:
        logp_theta: log-probs of the policy being trained; its gradient is not used.
        mu: log-probs of the behaviour policy.
        lag: int64, versions; negative ones count as 0.
    """
    behind = lag.clamp(min=0).to(mu.dtype)
    return mu + behind / (behind + 1) * (logp_theta.detach() - mu)


def present(level: Level, turn: Tensor, unit: Tensor, counted: Tensor, count: int) -> Tensor:
    """bool[U]: units with at least one token counted here; a sequence is counted wherever it has one that counts."""
    here = turn >= 0
    if level != "sequence":
        here = here & counted
    return unit_sum(here.double(), unit, count) > 0
