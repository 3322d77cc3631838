"""Loads the loss terms and token weights that a run names, and checks what they return.

A built-in one and a user's own come in the same way, as surrogates do.  An option that is a schedule comes as the
number that it is for the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from atpo_async.config import Config, ObjectiveConfig
from atpo_async.config.doors import TERM, TOKEN_WEIGHT
from atpo_async.config.loss_rules import check_part, label_of, part_options, united
from atpo_async.core.doors import Door
from atpo_async.core.errors import ConfigError
from atpo_async.core.loss_traits import Needs, PartTraits, TermTraits, TokenWeightTraits, declared
from atpo_async.core.schedule import Schedule, coefficient
from atpo_async.core.texts import of_type
from learner.loss.protocols import BatchStatistics, Measured, Now, StartTokens, TermLoss, TermTokens
from learner.loss.returned import Returned

Traits = TypeVar("Traits", bound=PartTraits)


@dataclass(kw_only=True)
class Part(Generic[Traits]):
    """A loss term or a token weight with its options; what it returns is checked.

    Raises ConfigError where a result breaks the protocol.
    """

    door: Door[Any]
    name: str
    function: Callable[..., Any]
    traits: Traits
    options: Mapping[str, Any]
    """As configured: schedules among them."""
    settings: ObjectiveConfig
    _proven: bool = False

    @property
    def label(self) -> str:
        """In names of metrics and in checkpoints."""
        return label_of(self.name)

    @property
    def needs(self) -> Needs:
        return self.traits.needs_of(self.options_at(0))

    def options_at(self, step: int) -> dict[str, Any]:
        """Each schedule as its value for the batch ``step``."""
        return {
            name: coefficient(value, step) if isinstance(value, Schedule) else value
            for name, value in self.options.items()
        }

    def measure(self, tokens: StartTokens, batch: BatchStatistics, now: Now) -> Measured:
        """What the whole batch decides for it; nothing where it declares no measure."""
        measure, returned = self.traits.measure, Returned(self.door, self.name)
        if measure is None:
            return Measured()
        options = self.options_at(now.step)
        found = returned.checked(Measured, lambda: measure(tokens, batch, now, self.settings, **options))
        for kind, numbers in (("values", found.values), ("state", found.state or {})):
            for name, value in numbers.items():
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise returned.fault(
                        f"its measure returned for {kind}[{name!r}] {of_type(value)}: it must be a number"
                    )
        return found

    def _to_prove(self, logp: Tensor) -> bool:
        """Whether numbers are looked at too: a GPU is waited for then.  Of a built-in one, in its first pass alone."""
        if not logp.numel() or (self._proven and self.name in self.door.names()):
            return False
        self._proven = True
        return True


class TermPart(Part[TermTraits]):
    """An entry of ``objective.terms``."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(sorted(self.traits.metrics))

    def __call__(self, tokens: TermTokens) -> TermLoss:
        """Its loss in one forward pass."""
        returned, shape = Returned(self.door, self.name), tokens.logp.shape
        options = self.options_at(tokens.now.step)
        found = returned.checked(TermLoss, lambda: self.function(tokens, self.settings, **options))
        returned.check_number("loss", found.loss, shape)
        if found.replaces is not None:
            returned.check_truth("replaces", found.replaces, shape)
        returned.check_metrics(found.metrics, self.metrics, "TermTraits", shape)
        if tokens.logp.requires_grad and not found.loss.requires_grad:
            raise returned.fault(
                "returned a loss without a gradient: compute it from tokens.logp, tokens.log_ratio or tokens.entropy"
            )
        if self._to_prove(tokens.logp):
            given = _given(tokens.start, logp=tokens.logp, log_ratio=tokens.log_ratio)
            returned.check_finite("loss", found.loss, given)
        return found


class WeightPart(Part[TokenWeightTraits]):
    """An entry of ``objective.token_weights``."""

    def __call__(self, tokens: StartTokens, now: Now) -> Tensor:
        """Its multiplier for each token of one forward pass."""
        returned = Returned(self.door, self.name)
        options = self.options_at(now.step)
        found = returned.checked(Tensor, lambda: self.function(tokens, now, self.settings, **options))
        returned.check_number("its weight", found, tokens.logp.shape)
        if found.requires_grad:
            raise returned.fault("returned weights with a gradient: detach them")
        if self._to_prove(tokens.logp):
            returned.check_finite("its weight", found, _given(tokens))
            if bool((found < 0).any()):
                raise returned.fault(f"returned a weight of {float(found.min()):g}: a token weight is 0 or more")
        return found


def _given(tokens: StartTokens, **others: Tensor) -> dict[str, Tensor]:
    """What a part's numbers are computed from: they must be finite where these are."""
    found = {**others, "prox": tokens.logp, "mu": tokens.mu, "advantage": tokens.advantage}
    if tokens.entropy is not None:
        found["entropy"] = tokens.entropy
    if tokens.reference is not None:
        found["reference"] = tokens.reference
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveParts:
    """The terms and token weights of a run, in the order in which it names them."""

    terms: tuple[TermPart, ...] = ()
    weights: tuple[WeightPart, ...] = ()

    @property
    def all(self) -> tuple[TermPart | WeightPart, ...]:
        return (*self.terms, *self.weights)

    @property
    def needs(self) -> Needs:
        """Of all of them together."""
        return united({f"{part.door.field}, {part.name}": part.needs for part in self.all})

    @property
    def measures_first(self) -> bool:
        """Whether the batch's start has to be measured before its first optimizer step."""
        return self.needs.at_start or any(part.traits.measure is not None for part in self.all)


def load_parts(config: Config) -> ObjectiveParts:
    """``objective.terms`` and ``objective.token_weights`` with their options.

    Raises:
        ConfigError, SetupError: there is none of that name, it cannot be imported, or not be called like one; its
            options, or what it needs, contradict other settings.
    """
    settings = config.objective
    terms = [TermPart(**_loaded(config, TERM, name, TermTraits())) for name in settings.terms]
    weights = [
        WeightPart(**_loaded(config, TOKEN_WEIGHT, name, TokenWeightTraits())) for name in settings.token_weights
    ]
    parts = ObjectiveParts(terms=tuple(terms), weights=tuple(weights))
    try:
        _ = parts.needs
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc
    return parts


def _loaded(config: Config, door: Door[Any], name: str, default: Traits) -> dict[str, Any]:
    options = part_options(config.objective, door, name)
    function = door.offered(
        name, {key: value.at(0) if isinstance(value, Schedule) else value for key, value in options.items()}
    )
    traits = declared(function, default)
    try:
        check_part(config, door, name, traits)
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc
    return {
        "door": door, "name": name, "function": function, "traits": traits, "options": options,
        "settings": config.objective,
    }  # fmt: skip
