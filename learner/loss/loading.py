"""Loads the surrogate and the correction that a run trains with, and checks what they return.

A built-in one and a user's own (``package.module:name``) come in the same way.  What a user's own returns is checked
for shapes and types; its first numbers also for being finite, so that a faulty formula is not taken for a model that
has diverged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from atpo_async.config import Config, CorrectionConfig, ObjectiveConfig
from atpo_async.config.doors import CORRECTION, SURROGATE
from atpo_async.config.loss_rules import check_bias, check_correction
from atpo_async.core.errors import ConfigError
from atpo_async.core.loss_traits import CorrectionTraits, SurrogateTraits, declared
from atpo_async.core.texts import of_type
from learner.loss.correction import OffPolicyCorrection
from learner.loss.protocols import Correction, Surrogate, SurrogateTerms, SurrogateTokens, UnitRatios, UnitWeights
from learner.loss.returned import Returned


def load_surrogate(settings: ObjectiveConfig) -> CheckedSurrogate:
    """``objective.surrogate``, its options bound.

    Raises:
        ConfigError, SetupError: there is none of that name, it cannot be imported, or not be called like one.
    """
    function: Surrogate = SURROGATE.load(settings.surrogate, settings.surrogate_options)
    return CheckedSurrogate(settings.surrogate, function)


def load_correction(config: Config) -> OffPolicyCorrection:
    """``[correction]`` with its action, whose options are bound.

    Raises:
        ConfigError, SetupError: there is none of that name, it cannot be imported, not be called like one, or declares
            what contradicts the settings.
    """
    settings = config.correction
    function: Correction = CORRECTION.load(settings.action, settings.action_options)
    traits = declared(function, CorrectionTraits())
    try:
        check_correction(settings, traits)
        check_bias(config, traits)
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc
    return correction_of(settings, function)


def correction_of(settings: CorrectionConfig, function: Correction) -> OffPolicyCorrection:
    """The correction whose action ``function`` is, whatever its settings contradict."""
    traits = declared(function, CorrectionTraits())
    measure = None
    if traits.measure is not None:
        measure = _CheckedMeasure(settings.action, functools.partial(traits.measure, **settings.action_options))
    return OffPolicyCorrection(settings, _CheckedCorrection(settings.action, function), traits, measure)


class CheckedSurrogate:
    """A surrogate whose results are checked.  Raises ConfigError where they break the protocol."""

    def __init__(self, name: str, function: Surrogate) -> None:
        self._returned, self._function, self._proven = Returned(SURROGATE, name), function, False
        self.metrics = tuple(sorted(declared(function, SurrogateTraits()).metrics))
        """Names of its metrics."""

    def __call__(self, tokens: SurrogateTokens, settings: ObjectiveConfig, /) -> SurrogateTerms:
        """The terms of one forward pass."""
        returned, shape = self._returned, tokens.logp.shape
        terms = returned.checked(SurrogateTerms, lambda: self._function(tokens, settings))
        returned.check_number("loss", terms.loss, shape)
        if terms.clipped is not None:
            returned.check_truth("clipped", terms.clipped, shape)
        returned.check_metrics(terms.metrics, self.metrics, "SurrogateTraits", shape)
        if tokens.logp.requires_grad and not terms.loss.requires_grad:
            raise returned.fault("returned a loss without a gradient: compute it from tokens.logp or tokens.log_ratio")
        if not self._proven and tokens.logp.numel() and bool(tokens.log_ratio.isfinite().all()):
            inputs = {
                "logp": tokens.logp,
                "log_ratio": tokens.log_ratio,
                "mu": tokens.mu,
                "advantage": tokens.advantage,
            }
            returned.check_finite("loss", terms.loss, inputs)
            self._proven = True
        return terms


class _CheckedCorrection:
    """A correction whose results are checked.  Raises ConfigError where they break the protocol."""

    def __init__(self, name: str, function: Correction) -> None:
        self._returned, self._function, self._proven = Returned(CORRECTION, name), function, False

    def __call__(self, ratios: UnitRatios, settings: CorrectionConfig, /) -> UnitWeights:
        returned, shape = self._returned, ratios.log_weight.shape
        found = returned.checked(UnitWeights, lambda: self._function(ratios, settings))
        returned.check_number("weight", found.weight, shape)
        returned.check_truth("changed", found.changed, shape)
        if found.exempt is not None:
            returned.check_truth("exempt", found.exempt, ratios.unit.shape)
        if found.weight.requires_grad:
            raise returned.fault("returned weights with a gradient: detach them")
        if not self._proven and ratios.log_weight.numel():
            returned.check_finite("weight", found.weight, {"log_weight": ratios.log_weight})
            lowest = float(found.weight.nan_to_num().min())
            if lowest < 0:
                raise returned.fault(f"returned a weight of {lowest:g}: an importance weight is 0 or more")
            self._proven = True
        return found


class _CheckedMeasure:
    """A correction's measure of a whole batch.  Raises ConfigError where it is not a number."""

    def __init__(self, name: str, function: Callable[[Tensor, CorrectionConfig], float]) -> None:
        self._returned, self._function = Returned(CORRECTION, name), function

    def __call__(self, log_weights: Tensor, settings: CorrectionConfig) -> float:
        found = self._returned.checked(object, lambda: self._function(log_weights, settings))
        if isinstance(found, bool) or not isinstance(found, int | float) or found != found:
            raise self._returned.fault(f"its measure returned {of_type(found)} {found!r:.40}: it must return a number")
        return float(found)
