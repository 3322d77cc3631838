"""What a part of the loss declares about itself, so that rules check a property and not a name.

A function declares its traits with ``@declares(SurrogateTraits(...))``; one that declares nothing has the defaults.
The configuration's rules read the built-in ones' traits; a user's own module is imported by the learner only, which
checks what it declares when it loads it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
Traits = TypeVar("Traits")


@dataclass(frozen=True, slots=True, kw_only=True)
class SurrogateTraits:
    """Of ``objective.surrogate``."""

    reads: tuple[str, ...] = ()
    """Fields of ``[objective]`` that decide something in it.  ``ratio_level``: it reads the ratio of policy to prox."""
    metrics: tuple[str, ...] = ()
    """Names of its metrics, the same for every pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectionTraits:
    """Of ``correction.action``."""

    reads: tuple[str, ...] = ()
    """Fields of ``[correction]`` that decide something in it, besides those of every correction."""
    corrects: bool = True
    """Its weights are not all 1."""
    levels: tuple[str, ...] = ()
    """Values of ``correction.level`` that it is for.  Empty: all."""
    masks_outside: bool = False
    """Weights outside [floor, cap] are 0, so that 1 must lie inside."""
    measure: Callable[..., float] | None = None
    """``measure(log_weights, settings, **options)``: a number that the whole batch decides, from the finite lambda S
    (float64[N]) of all its units over all micro-batches and ranks.  It comes with each pass as ``UnitRatios.measured``,
    and takes the place of the guard of the effective sample size."""
    measured_as: str = "is/measured"
    """Metric under which that number is logged."""


def declares(traits: object) -> Callable[[F], F]:
    """Decorator: note ``traits`` of a surrogate, a correction, a loss term or a token weight."""

    def mark(function: F) -> F:
        function.traits = traits  # type: ignore[attr-defined]
        return function

    return mark


def declared(function: Callable[..., Any], default: Traits) -> Traits:
    """The traits that a function (options bound or not) declares; ``default`` if it declares none of that type."""
    bare = function.func if isinstance(function, functools.partial) else function
    traits = getattr(bare, "traits", None)
    return traits if isinstance(traits, type(default)) else default


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a loss term or a token weight reads of each token besides its log-probs; all else is not computed."""

    entropy: bool = False
    """Of the policy at the batch's start: ``tokens.start.entropy``."""
    own_entropy: bool = False
    """Of the weights being trained, with its gradient: ``tokens.entropy``.  For a term only."""
    min_p: float | None = None
    """Of the policy at the batch's start: ``tokens.start.min_p``, for this share of the largest probability."""
    own_min_p: float | None = None
    """Of the weights being trained, without gradient: ``tokens.min_p``.  For a term only."""
    reference: bool = False
    """Log-probs under the policy of ``model.path``: ``tokens.start.reference``."""
    random: bool = False
    """A number in [0, 1) for each token, a function of the run's seed, the step, the tree, the turn and the token:
    ``tokens.start.random``."""

    @property
    def at_start(self) -> bool:
        """Whether the batch's start has to be measured before its first optimizer step."""
        return self.entropy or self.min_p is not None or self.reference


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTraits:
    """Of a loss term or a token weight, after the options that it is called with."""

    needs: Needs | Callable[..., Needs] = Needs()
    """A function of the options (``needs(**options)``) where these decide it."""
    measure: Callable[..., Any] | None = None
    """``measure(tokens, batch, now, settings, **options) -> Measured``: what the whole batch decides, before
    its first optimizer step (``learner.loss.protocols.Measure``)."""
    check: Callable[..., None] | None = None
    """``check(settings, **options)`` raises ValueError for options that are out of range or contradict ``[objective]``;
    called with the first and with the last values of options that are schedules."""

    def needs_of(self, options: Mapping[str, Any]) -> Needs:
        return self.needs if isinstance(self.needs, Needs) else self.needs(**options)


@dataclass(frozen=True, slots=True, kw_only=True)
class TermTraits(PartTraits):
    """Of an entry of ``objective.terms``."""

    metrics: tuple[str, ...] = ()
    """Names of its metrics, the same for every pass."""
    corrected: bool = True
    """The off-policy weight multiplies it, as it does the surrogate and the KL to the reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWeightTraits(PartTraits):
    """Of an entry of ``objective.token_weights``."""
