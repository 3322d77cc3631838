"""The results of a study by group: spreads over seeds, and when one group is told apart from another.  Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from atpo_async.study.cells import FINAL, CellResult, mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """One figure over the seeds of a group."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def range(self) -> float:
        return self.high - self.low

    def text(self, digits: int = 2) -> str:
        """``0.95 (0.93–0.97)``; of one seed ``0.95``."""
        mean, low, high = (f"{value:.{digits}f}" for value in (self.mean, self.low, self.high))
        return mean if self.count == 1 else f"{mean} ({low}–{high})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The cells of one lag and correction, over seeds."""

    lag: int
    correction: str
    planned: int
    results: tuple[CellResult, ...]

    @property
    def failed(self) -> list[CellResult]:
        return [r for r in self.results if r.status == "failed"]

    @property
    def num_missing(self) -> int:
        return self.planned - len(self.results)

    @property
    def is_whole(self) -> bool:
        """Every cell planned has ended, and well."""
        return not self.failed and not self.num_missing

    def shortfalls(self) -> list[str]:
        """What is not in the figures: cells that failed or were not run."""
        found = []
        if self.failed:
            found.append(f"{len(self.failed)} of {self.planned} failed")
        if self.num_missing:
            found.append(f"{self.num_missing} of {self.planned} not run")
        return found

    def values(self, key: str) -> list[float]:
        return [r.figures[key] for r in self.results if r.status == "done" and key in r.figures]

    def spread(self, key: str) -> Spread | None:
        """None where no cell has the figure."""
        values = self.values(key)
        if not values:
            return None
        return Spread(mean=mean(values), low=min(values), high=max(values), count=len(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The grid's results by group."""

    lags: tuple[int, ...]
    corrections: tuple[str, ...]
    seeds: tuple[int, ...]
    groups: Mapping[tuple[int, str], Group]

    @classmethod
    def of(
        cls, results: Iterable[CellResult], *, lags: Sequence[int], corrections: Sequence[str], seeds: Sequence[int]
    ) -> Summary:
        """``results`` outside the grid are left aside; cells without one are missing."""
        by_group: dict[tuple[int, str], list[CellResult]] = {}
        for result in sorted(results, key=lambda r: r.cell):
            if result.cell.seed in seeds:
                by_group.setdefault((result.cell.lag, result.cell.correction), []).append(result)
        groups = {
            (lag, name): Group(
                lag=lag, correction=name, planned=len(seeds), results=tuple(by_group.get((lag, name), ()))
            )
            for lag in lags
            for name in corrections
        }
        return cls(lags=tuple(lags), corrections=tuple(corrections), seeds=tuple(seeds), groups=groups)

    def __getitem__(self, key: tuple[int, str]) -> Group:
        return self.groups[key]

    @property
    def results(self) -> list[CellResult]:
        return [result for group in self.groups.values() for result in group.results]

    @property
    def num_missing(self) -> int:
        return sum(group.num_missing for group in self.groups.values())


# --- differences --------------------------------------------------------------------------------------------------

RESOLUTION = 0.05
"""Least difference in success that is stated: a hundred held-out tasks, or three steps' trees, tell no less apart."""

NUM_ERRORS = 3.0
"""Standard errors of a difference, pooled over all groups, that it must exceed: a grid holds many comparisons."""

Sign = Literal["above", "below", "same"]
"""Of one group against another."""


@dataclass(frozen=True, slots=True)
class Yardstick:
    """When one group is told apart from another.

    All of: their ranges over seeds do not meet; the means differ by more than either range, by more than
    ``NUM_ERRORS`` standard errors with the variance over seeds pooled over the whole grid, and by more than
    ``RESOLUTION``.
    """

    variance: float
    """Within groups, pooled; 0 where no group has two seeds (then nothing is compared)."""

    @classmethod
    def of(cls, summary: Summary, key: str = FINAL) -> Yardstick:
        squares, freedom = 0.0, 0
        for group in summary.groups.values():
            values = group.values(key)
            if len(values) > 1:
                middle = mean(values)
                squares += math.fsum((value - middle) ** 2 for value in values)
                freedom += len(values) - 1
        return cls(squares / freedom if freedom else 0.0)

    def least(self, a: Spread, b: Spread) -> float:
        """The difference of means that has to be exceeded."""
        error = math.sqrt(self.variance * (1 / a.count + 1 / b.count))
        return max(a.range, b.range, NUM_ERRORS * error, RESOLUTION)

    def sign(self, a: Spread, b: Spread) -> Sign:
        """Of ``a`` against ``b``."""
        apart = a.low > b.high or a.high < b.low
        if not apart or abs(a.mean - b.mean) <= self.least(a, b):
            return "same"
        return "above" if a.mean > b.mean else "below"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two groups by one figure.  ``sign`` is None where they cannot be compared; ``why_not`` then says why."""

    first: Group
    second: Group
    sign: Sign | None
    why_not: str = ""


def compare(first: Group, second: Group, yardstick: Yardstick, key: str = FINAL) -> Comparison:
    for group in (first, second):
        if not group.is_whole:
            return Comparison(first=first, second=second, sign=None, why_not="cells are missing")
        if len(group.values(key)) < group.planned:
            return Comparison(first=first, second=second, sign=None, why_not="figures are missing")
    if first.planned < 2:
        return Comparison(first=first, second=second, sign=None, why_not="one seed")
    a, b = first.spread(key), second.spread(key)
    assert a is not None
    assert b is not None
    return Comparison(first=first, second=second, sign=yardstick.sign(a, b))
