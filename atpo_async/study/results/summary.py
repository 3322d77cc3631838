"""The results of a study by group: the cells that differ in their seeds only, and their figures.  Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from atpo_async.study.cells import AT_TOKENS, FINAL, SHARES, SUCCESS, TO_GOAL, WINDOW, CellResult, smooth
from atpo_async.study.grid.axes import Axis
from atpo_async.study.grid.names import label
from atpo_async.study.plan import combinations
from atpo_async.study.results.statistics import Interval, interval, mean

At = tuple[tuple[str, str], ...]
"""(axis, value), in the axes' order: what the cells of a group have in common."""


def place(at: At) -> str:
    """In words, for a legend or a sentence."""
    return ", ".join(label(*pair) for pair in at)


MEASURED = 0.01
"""Least standard deviation of success over seeds: of a hundred held-out tasks, or three steps' trees, one more or less
solved is that much.  Groups that vary less by chance are taken to vary so much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """One figure over the seeds of a group."""

    mean: float
    low: float
    """Of the interval of the mean; the mean itself where one seed has none."""
    high: float
    values: tuple[float, ...]

    @property
    def count(self) -> int:
        return len(self.values)

    def text(self, digits: int = 2) -> str:
        """``0.95 [0.93, 0.97]``; of one seed ``0.95``."""
        mean, low, high = (number(value, digits) for value in (self.mean, self.low, self.high))
        return mean if self.count == 1 else f"{mean} [{low}, {high}]"


def number(value: float, digits: int) -> str:
    """Rounded; a small one that is not 0 keeps its magnitude, a large whole one has its thousands marked."""
    least = 10.0**-digits
    return f"{value:.0e}" if 0 < abs(value) < least / 2 else f"{value:,.{digits}f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The cells that differ in their seeds only."""

    at: At
    planned: int
    results: tuple[CellResult, ...]

    def value(self, axis: str) -> str:
        return dict(self.at)[axis]

    @property
    def done(self) -> list[CellResult]:
        return [r for r in self.results if r.status == "done"]

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
        return [r.figures[key] for r in self.done if key in r.figures]

    def spread(self, key: str) -> Spread | None:
        """None where no cell has the figure."""
        return spread_of(self.values(key), share=key in SHARES, least_deviation=MEASURED if key in SUCCESS else 0.0)


def spread_of(values: Sequence[float], *, share: bool = False, least_deviation: float = 0.0) -> Spread | None:
    """The mean with Student's interval; None of no values.

    Args:
        share: both ends are kept within 0 and 1.
        least_deviation: a smaller spread counts as this.
    """
    if not values:
        return None
    found = interval(values, least_deviation=least_deviation) or Interval(values[0], values[0], values[0])
    low, high = (min(max(end, 0.0), 1.0) for end in (found.low, found.high)) if share else (found.low, found.high)
    return Spread(mean=found.mean, low=low, high=high, values=tuple(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The grid's results by group."""

    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    groups: Mapping[At, Group]
    by_tokens: bool = False
    laid_down: int = 0
    """Comparisons of one figure that were laid down, where they are more than those of the axes: of a part of a study
    all of its grid's."""
    token_budgets: Mapping[At, float]
    """Of each task (the values of the axes that are not compared): action tokens that every cell of it sampled."""

    @classmethod
    def of(
        cls,
        results: Iterable[CellResult],
        *,
        axes: Sequence[Axis],
        seeds: Sequence[int],
        by_tokens: bool = False,
        laid_down: int = 0,
    ) -> Summary:
        """``results`` outside the grid are left aside; cells without one are missing."""
        grid = list(combinations(axes))
        inside = [r for r in results if r.cell.at in set(grid) and r.cell.seed in seeds and not r.cell.stage]
        budgets = _least(axes, inside, lambda r: r.tokens[-1] if r.tokens else None)
        last = _least(axes, inside, lambda r: r.curve[-1][0] if r.curve else None)
        by_group: dict[At, list[CellResult]] = {}
        for result in sorted(inside, key=lambda r: r.cell.seed):
            task = task_of(axes, result.cell.at)
            whole = _over_equal_steps(_at_equal_tokens(result, budgets.get(task)), last.get(task))
            by_group.setdefault(result.cell.at, []).append(whole)
        groups = {at: Group(at=at, planned=len(seeds), results=tuple(by_group.get(at, ()))) for at in grid}
        return cls(
            axes=tuple(axes), seeds=tuple(seeds), groups=groups, by_tokens=by_tokens, laid_down=laid_down,
            token_budgets=budgets,
        )  # fmt: skip

    def __getitem__(self, at: At) -> Group:
        return self.groups[at]

    @property
    def final(self) -> str:
        """The figure that the sentences are about."""
        return AT_TOKENS if self.by_tokens else FINAL

    @property
    def x_axis(self) -> Axis | None:
        """The first axis whose values are numbers, and differ; None where there is none."""
        return next((axis for axis in self.axes if axis.numbers is not None and len(axis.values) > 1), None)

    @property
    def rows(self) -> Axis:
        """The axis down the tables: that of the figures where there is one, else the first."""
        return self.x_axis or self.axes[0]

    @property
    def others(self) -> tuple[Axis, ...]:
        """All axes but ``rows``."""
        return tuple(axis for axis in self.axes if axis.name != self.rows.name)

    def at(self, **values: str) -> At:
        """Those values, in the axes' order; by the names of axes, ``__`` for a dot."""
        given = {name.replace("__", "."): value for name, value in values.items()}
        return tuple((axis.name, given[axis.name]) for axis in self.axes)

    def joined(self, row: str, rest: At) -> Group:
        """The group of a value of ``rows`` and values of the others."""
        found = dict(rest) | {self.rows.name: row}
        return self.groups[tuple((axis.name, found[axis.name]) for axis in self.axes)]

    @property
    def results(self) -> list[CellResult]:
        return [result for group in self.groups.values() for result in group.results]

    @property
    def num_planned(self) -> int:
        return sum(group.planned for group in self.groups.values())

    @property
    def num_missing(self) -> int:
        return sum(group.num_missing for group in self.groups.values())


def task_of(axes: Sequence[Axis], at: At) -> At:
    """The values of the axes that are not compared."""
    apart = {axis.name for axis in axes if not axis.is_compared}
    return tuple(pair for pair in at if pair[0] in apart)


def _least(
    axes: Sequence[Axis], results: Iterable[CellResult], of: Callable[[CellResult], float | None]
) -> dict[At, float]:
    """Of each task the smallest that its cells have."""
    found: dict[At, float] = {}
    for result in results:
        if result.status == "done" and (value := of(result)) is not None:
            task = task_of(axes, result.cell.at)
            found[task] = min(found.get(task, math.inf), value)
    return found


def _over_equal_steps(result: CellResult, last: float | None) -> CellResult:
    """The result with its levels of success up to ``last``, the last step of which every cell of the task knows it.

    The last batches of a run may be of trees that had come in before, the more of them the older they may be
    (``staleness.max_lag``): success is not known up to the same step of all.
    """
    if last is None or result.status != "done" or not result.curve:
        return result
    within = [point for point in result.curve if point[0] <= last]
    level = smooth(within)
    figures = dict(result.figures) | {"steps": float(result.curve[-1][0])}
    if level:
        figures |= {FINAL: level[-1][1], "area": mean([value for _, value in within])}
    return replace(result, figures=figures)


def _at_equal_tokens(result: CellResult, budget: float | None) -> CellResult:
    """The result with its level of success at the last step that was within the budget."""
    if budget is None or result.status != "done" or not result.tokens:
        return result
    within = [i for i, tokens in enumerate(result.tokens) if tokens <= budget]
    level = smooth(result.curve)
    if len(within) < WINDOW:
        return result
    return replace(result, figures=dict(result.figures) | {AT_TOKENS: level[len(within) - WINDOW][1]})


# --- what it took to reach the goal -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ToGoal:
    """Steps, tokens or seconds that a group's runs took to reach the goal; some may never have."""

    reached: int
    count: int
    limit: float
    """As far as every run of the task was watched that never reached the goal; infinite where all of the group did."""
    spread: Spread
    """Of the smaller one of what it took and ``limit``: where this is finite the restricted mean, which needs no guess
    about the runs that did not get there."""

    def text(self, digits: int = 0) -> str:
        mean = self.spread.text(digits)
        if self.reached == self.count:
            return mean
        if not self.reached:
            return f"never within {number(self.limit, digits)}"
        return f"{self.reached} of {self.count}; {mean} within {number(self.limit, digits)}"


def to_goal(summary: Summary, group: Group, key: str) -> ToGoal | None:
    """What it took a group to reach the goal, by ``key`` of ``TO_GOAL``; None where no cell says how long it ran."""
    extent = TO_GOAL[key]
    task = task_of(summary.axes, group.at)
    done = [r for r in group.done if extent in r.figures]
    if not done:
        return None
    in_vain = [
        r.figures[extent]
        for each in summary.groups.values()
        if task_of(summary.axes, each.at) == task
        for r in each.done
        if extent in r.figures and key not in r.figures
    ]
    limit = math.inf if all(key in r.figures for r in done) else min(in_vain)
    took = [min(r.figures.get(key, math.inf), limit) for r in done]
    reached = sum(r.figures.get(key, math.inf) <= limit for r in done)
    spread = spread_of(took)
    assert spread is not None
    spread = replace(spread, low=max(spread.low, 0.0), high=min(spread.high, limit))
    return ToGoal(reached=reached, count=len(done), limit=limit, spread=spread)


def mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean at the places that all curves have."""
    tables = [dict(points) for points in curves]
    if not tables:
        return []
    common = sorted(set(tables[0]).intersection(*tables[1:]))
    return [(x, mean([table[x] for table in tables])) for x in common]
