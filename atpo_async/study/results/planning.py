"""What a study will be able to tell apart, said before it runs.  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from atpo_async.study.cells import FINAL, CellResult
from atpo_async.study.grid.axes import Axis
from atpo_async.study.results.comparisons import num_comparisons
from atpo_async.study.results.statistics import ALPHA, MOST_SEEDS, POWER, detectable, deviation, seeds_for
from atpo_async.study.results.summary import MEASURED, At, Summary, place, task_of

ASSUMED = (0.02, 0.05, 0.1, 0.2)
"""Spreads that are reckoned with where none is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spreading:
    """The standard deviation of final success over seeds, and where it comes from."""

    value: float
    source: str


def spreading(
    results: Iterable[CellResult], given: float | None, *, axes: Sequence[Axis], by_tokens: bool = False
) -> Spreading | None:
    """As given; else pooled over groups of cells that have ended, those of a first stage among them; else None.

    Args:
        axes: of the grid: of several tasks the one whose runs differ most counts.
        by_tokens: whether success is compared at equal tokens.
    """
    if given is not None:
        return Spreading(value=given, source="--spread")
    every = list(results)
    last = [result for result in every if not result.cell.stage]
    seeds = sorted({result.cell.seed for result in last})
    summary = Summary.of(last, axes=axes, seeds=seeds, by_tokens=by_tokens)
    final = {result.cell: result.figures.get(summary.final) for result in summary.results}
    groups: dict[At, dict[object, list[float]]] = {}
    for result in every:
        value = result.figures.get(FINAL) if result.cell.stage else final.get(result.cell)
        if result.status == "done" and value is not None:
            of_task = groups.setdefault(task_of(axes, result.cell.at), {})
            of_task.setdefault((result.cell.stage, result.cell.at), []).append(value)
    found = {}
    for task, by_place in groups.items():
        several = [values for values in by_place.values() if len(values) > 1]
        if freedom := sum(len(values) - 1 for values in several):
            squares = sum(deviation(values) ** 2 * (len(values) - 1) for values in several)
            found[task] = (max((squares / freedom) ** 0.5, MEASURED), len(several))
    if not found:
        return None
    task = max(found, key=lambda each: found[each])
    value, count = found[task]
    where = f" on {place(task)}, which differ most" if len(found) > 1 else ""
    return Spreading(value=value, source=f"pooled over {count} groups of cells that have ended in this folder{where}")


def power_lines(axes: Sequence[Axis], seeds: int, spread: Spreading | None, *, wanted: float) -> list[str]:
    """What the study can tell apart, line by line.

    Args:
        wanted: the difference of success of which it is said how many seeds it takes.
    """
    count = num_comparisons(axes)
    if not count:
        return ["power: the grid compares nothing, for the values of its axes are different tasks, or one of each"]
    if seeds < 2:
        return [f"power: with one seed no difference can be told from chance; the grid has {count} comparisons"]
    alpha = ALPHA / count
    head = (
        f"power: {count} comparison{'s' if count > 1 else ''} of {seeds} seeds with {seeds}, two-sided, {ALPHA:.0%} "
        f"over all of them (Holm; {alpha:.2g} for the first), {POWER:.0%} power"
    )
    if spread is None:
        listed = ", ".join(
            f"{s:g} → {_shown(detectable(s, seeds, alpha=alpha))} (alone {_shown(detectable(s, seeds))})"
            for s in ASSUMED
        )
        return [
            head,
            "  the spread over seeds is not known here (--spread S states one; a first stage or the first seeds "
            "measure it): standard deviation → difference of success that is told apart (were it the only "
            f"comparison): {listed}",
        ]
    return [
        head,
        f"  with a standard deviation over seeds of {spread.value:.3g} ({spread.source}): a difference of success is "
        f"told apart from {_shown(detectable(spread.value, seeds, alpha=alpha))} on; were it the only comparison, "
        f"from {_shown(detectable(spread.value, seeds))} on",
        f"  a difference of {wanted:g} would take {_needed(wanted, spread.value, alpha)} seeds a group; were it the "
        f"only comparison, {_needed(wanted, spread.value, ALPHA)}",
    ]


def _shown(difference: float) -> str:
    return f"{difference:.2f}" if difference <= 1.0 else f"{difference:.2f}, more than there is"


def _needed(difference: float, spread: float, alpha: float) -> str:
    seeds = seeds_for(difference, spread, alpha=alpha)
    return f"more than {MOST_SEEDS}" if seeds is None else str(seeds)
