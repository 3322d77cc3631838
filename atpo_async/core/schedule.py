"""Numbers as functions of a count: the learning rate of optimizer steps, other coefficients of learner batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

T = TypeVar("T")


def learning_rate(
    update: int,
    *,
    peak: float,
    warmup: int,
    total: int,
    schedule: Literal["constant", "linear", "cosine"],
) -> float:
    """Rate of the ``update``-th optimizer step, from 0: a function of the count alone, so a resume needs no more."""
    if update < warmup:
        return peak * (update + 1) / warmup
    done = min(1.0, (update - warmup) / max(1, total - warmup))
    if schedule == "linear":
        return peak * (1.0 - done)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * done))
    return peak


Kind = Literal["constant", "linear", "cosine-up", "cosine-down"]
KINDS: tuple[str, ...] = get_args(Kind)
FIELDS = ("kind", "start", "end", "steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A coefficient that moves from ``start`` to ``end`` over the learner's first ``steps`` batches, and stays there.

    ``linear``: in equal steps.  ``cosine-up`` and ``cosine-down``: along half a cosine, slowly at both ends; of the
    former the end is the higher, of the latter the lower (SPEAR, arXiv 2509.22601: gamma = (1 - cos(pi t / T)) / 2).
    ``constant``: ``start`` throughout.

    Raises:
        ValueError: the kind is unknown, a number is not finite, or kind, start and end contradict one another.
    """

    kind: Kind
    start: float
    end: float
    steps: int
    """1 or more."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind = {self.kind!r} is unknown; known: {', '.join(KINDS)}")
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise ValueError(f"start = {self.start} and end = {self.end} must be finite")
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps} must be 1 or more: batches until end is reached")
        if self.kind == "constant" and self.start != self.end:
            raise ValueError(f"kind = 'constant' stays at start = {self.start}: leave end = {self.end} out, or linear")
        up = self.kind == "cosine-up"
        if self.kind.startswith("cosine") and (self.end < self.start if up else self.end > self.start):
            other = "cosine-down" if up else "cosine-up"
            raise ValueError(
                f"kind = {self.kind!r} with start = {self.start} and end = {self.end} goes the other way: use {other}, "
                "or exchange the two"
            )

    def __bool__(self) -> bool:
        """Whether it is anything but 0 at some step, as a number is."""
        return bool(self.start or self.end)

    def at(self, step: int) -> float:
        """Its value for the batch ``step``, from 0."""
        done = min(1.0, max(0, step) / self.steps)
        if self.kind != "linear":
            done = 0.5 * (1.0 - math.cos(math.pi * done)) if self.kind != "constant" else 0.0
        return self.end if done == 1.0 else self.start + (self.end - self.start) * done

    def as_table(self) -> dict[str, Any]:
        """As a configuration file holds it."""
        return {name: getattr(self, name) for name in FIELDS}

    def __str__(self) -> str:
        return f'{{kind = "{self.kind}", start = {self.start!r}, end = {self.end!r}, steps = {self.steps}}}'


def coefficient(value: float | Schedule, step: int) -> float:
    """The value of a coefficient, a number or a schedule, for the learner's batch ``step``, from 0.

    A function of the count alone: a resumed run goes on along the same curve.
    """
    return value.at(step) if isinstance(value, Schedule) else value


def at_first(value: T | Schedule) -> T | float:
    """The value of an option for the first batch, where it is a schedule; any other as it is."""
    return value.at(0) if isinstance(value, Schedule) else value


def lowest(value: float | Schedule) -> float:
    """The lowest value that a coefficient ever has."""
    return min(value.start, value.end) if isinstance(value, Schedule) else value


def highest(value: float | Schedule) -> float:
    """The highest value that a coefficient ever has."""
    return max(value.start, value.end) if isinstance(value, Schedule) else value


def schedule_of(table: Mapping[str, Any]) -> Schedule:
    """A schedule from its table in a configuration.

    Raises:
        ValueError: a key is unknown or missing, or a value is of another type or contradicts the others.
    """
    unknown = [key for key in table if key not in FIELDS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no part of a schedule; known: {', '.join(FIELDS)}")
    found = dict(table)
    if found.get("kind") == "constant":
        found.setdefault("end", found.get("start"))
        found.setdefault("steps", 1)
    missing = [key for key in FIELDS if key not in found]
    if missing:
        raise ValueError(f"a schedule lacks {missing[0]!r}: it is {{ kind, start, end, steps }}")
    for key in ("start", "end", "steps"):
        kind = int if key == "steps" else (int, float)
        if isinstance(found[key], bool) or not isinstance(found[key], kind):
            raise ValueError(f"{key} = {found[key]!r} must be a {'whole number' if key == 'steps' else 'number'}")
    return Schedule(kind=found["kind"], start=float(found["start"]), end=float(found["end"]), steps=int(found["steps"]))
