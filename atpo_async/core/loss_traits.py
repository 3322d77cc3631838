"""What a surrogate or a correction declares about itself, so that rules check a property and not a name.

A function declares its traits with ``@declares(SurrogateTraits(...))``; one that declares nothing has the defaults.
The configuration's rules read the built-in ones' traits; a user's own module is imported by the learner only, which
checks what it declares when it loads it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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
    """Decorator: note ``traits`` of a surrogate or a correction."""

    def mark(function: F) -> F:
        function.traits = traits  # type: ignore[attr-defined]
        return function

    return mark


def declared(function: Callable[..., Any], default: Traits) -> Traits:
    """The traits that a function (options bound or not) declares; ``default`` if it declares none of that type."""
    bare = function.func if isinstance(function, functools.partial) else function
    traits = getattr(bare, "traits", None)
    return traits if isinstance(traits, type(default)) else default
