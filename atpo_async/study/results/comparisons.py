"""When one group of cells is told apart from another: Welch's test, corrected for the number of comparisons.  Pure.

The comparisons of a figure are laid down by the grid, before anything has run: along each axis, with all other axes
equal, every value against the axis' reference.  An axis whose values are different tasks has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from atpo_async.study.grid.axes import Axis
from atpo_async.study.plan import combinations
from atpo_async.study.results.statistics import ALPHA, Difference, holm, welch
from atpo_async.study.results.summary import MEASURED, At, Group, Summary

SAME = 0.05
"""A difference of success within which two groups count as practically equal."""

Sign = Literal["above", "below", "open"]
"""Of a group against its reference; ``open``: not told apart, which says nothing about equality."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A group beside its reference, by one figure."""

    axis: str
    first: Group
    reference: Group
    sign: Sign | None
    """None where they cannot be compared; ``why_not`` then says why."""
    why_not: str = ""
    difference: Difference | None = None
    """The first one's mean minus the reference's."""
    p: float = 1.0
    """Corrected for the number of comparisons of the figure (Holm)."""
    simultaneous: tuple[float, float] = (0.0, 0.0)
    """Of the difference: intervals of all comparisons of the figure hold together at 95 % (Bonferroni)."""

    @property
    def value(self) -> str:
        """Of the axis."""
        return self.first.value(self.axis)

    @property
    def is_same_run(self) -> bool:
        """Seed by seed both were the same at every step: what differs between them had no effect."""
        groups = (self.first, self.reference)
        ones, others = ({r.cell.seed: (list(r.curve), list(r.tokens)) for r in group.done} for group in groups)
        return ones == others and any(tokens for _, tokens in ones.values())


def num_comparisons(axes: Sequence[Axis]) -> int:
    """Of one figure, in a whole grid."""
    groups = 1
    for axis in axes:
        groups *= len(axis.values)
    return sum(groups // len(axis.values) * (len(axis.values) - 1) for axis in axes if axis.is_compared)


def num_laid_down(axes: Sequence[Axis], whole: Sequence[Axis]) -> int:
    """Comparisons of one figure that a part of a study's results, ``axes``, counts among: all of the study's grid,
    ``whole``; where other references were chosen, of every value with every other, for any of them might have been."""
    groups = math.prod(len(axis.values) for axis in whole)
    found = 0
    for part, axis in zip(axes, whole, strict=True):
        if axis.is_compared:
            values, lines = len(axis.values), groups // len(axis.values)
            is_new = len(part.values) > 1 and part.against != axis.against
            found += lines * (values * (values - 1) // 2 if is_new else values - 1)
    return found


def num_corrected_for(summary: Summary) -> int:
    """Comparisons that the correction of one figure counts."""
    return max(num_comparisons(summary.axes), summary.laid_down)


def _pairs(axes: Sequence[Axis]) -> Iterator[tuple[str, At, At]]:
    """(axis, a value's place in the grid, its reference's)."""
    for axis in axes:
        if not axis.is_compared:
            continue
        for at in combinations(axes):
            if dict(at)[axis.name] != axis.against:
                yield axis.name, at, tuple((name, axis.against if name == axis.name else v) for name, v in at)


def compare_all(summary: Summary, key: str) -> list[Comparison]:
    """All comparisons of one figure, in the grid's order, with Holm's correction over them.

    The correction counts those that cannot be made (yet) as well: the number was laid down before.
    """
    found: list[tuple[str, Group, Group, Difference | None, str]] = []
    for axis, at, other in _pairs(summary.axes):
        first, reference = summary[at], summary[other]
        why_not = _why_not(first, reference, key)
        measured = None if why_not else welch(first.values(key), reference.values(key), least_deviation=MEASURED)
        found.append((axis, first, reference, measured, why_not))
    count = num_corrected_for(summary)
    corrected = holm([1.0 if measured is None else measured.p for *_, measured, _ in found], among=count)
    return [
        Comparison(
            axis=axis,
            first=first,
            reference=reference,
            why_not=why_not,
            difference=measured,
            p=p,
            sign=None if measured is None else _sign(measured, p),
            simultaneous=(0.0, 0.0) if measured is None else measured.within(1.0 - ALPHA / count),
        )
        for (axis, first, reference, measured, why_not), p in zip(found, corrected, strict=True)
    ]


def _sign(difference: Difference, p: float) -> Sign:
    if p >= ALPHA:
        return "open"
    return "above" if difference.value > 0 else "below"


def _why_not(first: Group, reference: Group, key: str) -> str:
    for group in (first, reference):
        if not group.is_whole:
            return "cells are missing"
        if len(group.values(key)) < group.planned:
            return "figures are missing"
    return "one seed" if first.planned < 2 else ""


def by_reference(comparisons: Sequence[Comparison]) -> Mapping[tuple[str, At], list[Comparison]]:
    """(axis, place of the reference) -> its comparisons, in the grid's order."""
    found: dict[tuple[str, At], list[Comparison]] = {}
    for each in comparisons:
        found.setdefault((each.axis, each.reference.at), []).append(each)
    return found
