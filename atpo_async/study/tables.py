"""The tables of a study: CSV of every cell, a matrix of lag by correction, means beside it.  Pure."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from atpo_async.study.cells import COLUMNS, FINAL, Column
from atpo_async.study.summary import Group, Summary


def to_csv(summary: Summary) -> str:
    """One line a cell, those too that failed or have not ended; a figure that is not known is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["lag", "correction", "seed", "status", "reason", *(column.key for column in COLUMNS)])
    for (lag, correction), group in summary.groups.items():
        known = {result.cell.seed: result for result in group.results}
        for seed in summary.seeds:
            result = known.get(seed)
            if result is None:
                writer.writerow([lag, correction, seed, "missing", "", *("" for _ in COLUMNS)])
                continue
            figures = [f"{result.figures[c.key]:.6g}" if c.key in result.figures else "" for c in COLUMNS]
            writer.writerow([lag, correction, seed, result.status, result.reason, *figures])
    return out.getvalue()


def matrix(summary: Summary, key: str) -> list[list[str]]:
    """Head and rows: a row a lag, a column a correction, mean (lowest–highest) over seeds."""
    rows = [["lag", *summary.corrections]]
    for lag in summary.lags:
        rows.append([str(lag), *(level(summary[lag, name], key) for name in summary.corrections)])
    return rows


def level(group: Group, key: str, digits: int = 2) -> str:
    """A group's entry in a table: the spread, and what failed or was not run."""
    spread = group.spread(key)
    notes = group.shortfalls()
    if spread is None:
        return ", ".join(notes) or "–"
    return spread.text(digits) + (f", {', '.join(notes)}" if notes else "")


BESIDE: tuple[Column, ...] = tuple(c for c in COLUMNS if c.key not in (FINAL, "greedy", "skipped_updates", "lag_max"))


def details(summary: Summary) -> list[list[str]]:
    """Head and rows: a row a group, means over seeds."""
    rows = [["lag", "correction", *(column.heading for column in BESIDE)]]
    for (lag, name), group in summary.groups.items():
        rows.append([str(lag), name, *(_figure(group, column) for column in BESIDE)])
    return rows


def _figure(group: Group, column: Column) -> str:
    done = [r for r in group.results if r.status == "done"]
    if not done:
        return "failed" if group.failed else "–"
    if column.key == "steps_to_goal":  # each seed's: a mean over those that got there would flatter
        return ", ".join(f"{r.figures[column.key]:.0f}" if column.key in r.figures else "never" for r in done)
    spread = group.spread(column.key)
    return "–" if spread is None else _number(spread.mean, column.digits)


def _number(value: float, digits: int) -> str:
    least = 10.0**-digits
    return f"{value:.0e}" if 0 < abs(value) < least / 2 else f"{value:.{digits}f}"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def num_seeds(summary: Summary) -> str:
    return "one seed" if len(summary.seeds) == 1 else f"{len(summary.seeds)} seeds"


def has(summary: Summary, key: str) -> bool:
    return any(group.values(key) for group in summary.groups.values())
