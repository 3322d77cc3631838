"""The tables of a study: CSV of every cell, matrices of one figure, what lies beside it, what was chosen.  Pure."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from atpo_async.study.cells import AT_TOKENS, COLUMNS, FINAL, TO_GOAL, Column
from atpo_async.study.grid.choosing import CRITERIA, Choice, Choosing
from atpo_async.study.plan import combinations
from atpo_async.study.results.summary import Group, Summary, number, place, to_goal

Rows = list[list[str]]
"""A table: the head first."""


def to_csv(summary: Summary, *, choosing: Choosing | None = None, chosen: Mapping[str, str] | None = None) -> str:
    """One line a cell, those too that failed or have not ended; a figure that is not known is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    fields = [choosing.field] if choosing is not None else []
    names = [axis.name for axis in summary.axes]
    writer.writerow([*names, *fields, "seed", "status", "reason", *(column.key for column in COLUMNS)])
    for at, group in summary.groups.items():
        known = {result.cell.seed: result for result in group.results}
        head = [value for _, value in at]
        if choosing is not None:
            head.append((chosen or {}).get(dict(at).get(choosing.by, ""), ""))
        for seed in summary.seeds:
            result = known.get(seed)
            if result is None:
                writer.writerow([*head, seed, "missing", "", *("" for _ in COLUMNS)])
                continue
            figures = [f"{result.figures[c.key]:.6g}" if c.key in result.figures else "" for c in COLUMNS]
            writer.writerow([*head, seed, result.status, result.reason, *figures])
    return out.getvalue()


def matrices(summary: Summary, key: str) -> list[tuple[str, Rows]]:
    """Tables of one figure: the mean and its interval, a row for each value of the first axis (of numbers, if there is
    one), a column for each of the second; one table for each combination of the others, with what it is for."""
    columns, *rest = summary.others or (None,)
    found = []
    for extra in combinations(rest):
        names = columns.values if columns is not None else ("",)
        head = [summary.rows.name, *(names if columns is not None else [heading(key)])]
        rows = [head]
        for row in summary.rows.values:
            places = [((columns.name, name), *extra) if columns is not None else extra for name in names]
            rows.append([row, *(level(summary.joined(row, place), key) for place in places)])
        found.append((place(extra), rows))
    return found


def heading(key: str) -> str:
    """Of a figure's column."""
    return next(column.heading for column in COLUMNS if column.key == key)


def level(group: Group, key: str, digits: int = 2) -> str:
    """A group's entry in a table: the mean and its interval, and what failed or was not run."""
    spread = group.spread(key)
    notes = group.shortfalls()
    if spread is None:
        return ", ".join(notes) or "–"
    return spread.text(digits) + (f", {', '.join(notes)}" if notes else "")


def goals(summary: Summary) -> Rows:
    """A row a group: how many runs reached the goal, and in how many steps, tokens and seconds."""
    keys = [key for key, extent in TO_GOAL.items() if has(summary, extent)]
    rows = [[*(axis.name for axis in summary.axes), *(heading(key) for key in keys)]]
    for at, group in summary.groups.items():
        found = [to_goal(summary, group, key) for key in keys]
        rows.append([*(value for _, value in at), *("–" if each is None else each.text() for each in found)])
    return rows if keys else []


_ELSEWHERE = frozenset({FINAL, "greedy", AT_TOKENS, "skipped_updates", "lag_max", "steps", *TO_GOAL})
BESIDE: tuple[Column, ...] = tuple(column for column in COLUMNS if column.key not in _ELSEWHERE)


def details(summary: Summary) -> Rows:
    """A row a group: means over seeds, with their intervals where they are success."""
    columns = [column for column in BESIDE if has(summary, column.key)]
    rows = [[*(axis.name for axis in summary.axes), *(column.heading for column in columns)]]
    for at, group in summary.groups.items():
        rows.append([*(value for _, value in at), *(_figure(group, column) for column in columns)])
    return rows


def _figure(group: Group, column: Column) -> str:
    if not group.done:
        return "failed" if group.failed else "–"
    spread = group.spread(column.key)
    if spread is None:
        return "–"
    if column.key == "collapsed":
        return f"{sum(spread.values):.0f} of {spread.count}"
    return spread.text() if column.key == "area" else number(spread.mean, column.digits)


def choice_table(choosing: Choosing, chosen: Mapping[str, Choice]) -> Rows:
    """A row for each value of the axis: the criterion's mean of each candidate, the chosen one marked."""
    of = choosing.by or "grid"
    rows = [[of, *(f"{choosing.field} {value}" for value in choosing.values), "chosen"]]
    for name, choice in chosen.items():
        entries = []
        for value in choosing.values:
            failed = choice.num_failed[value]
            entries.append(f"{choice.means[value]:.3f}" + (f", {failed} failed" if failed else ""))
        edge = f" (the {choice.edge} candidate)" if choice.edge else ""
        rows.append([name or "all", *entries, f"{choice.value}{edge}" if choice.settled else "none: all failed"])
    return rows


def choice_lines(choosing: Choosing, chosen: Mapping[str, Choice]) -> list[str]:
    """What was chosen, by what; and where the best may lie beyond the candidates."""
    at = [f"{name} {', '.join(values)}" for name, values in choosing.at.items()]
    seeds = "one seed that is" if choosing.seeds == 1 else f"{choosing.seeds} seeds that are"
    lines = [
        f"{choosing.field} was chosen {f'for each {choosing.by}' if choosing.by else 'for the whole grid'} by the mean "
        f"of {CRITERIA[choosing.criterion]} over {seeds} none of the results'"
        + (f", at {'; '.join(at)}" if at else "")
        + "; a failed cell counts as 0."
    ]
    for edge, side in (("lowest", "lower"), ("highest", "higher")):
        names = [choice.of or "the grid" for choice in chosen.values() if choice.edge == edge]
        if names:
            listed = ", ".join(names)
            lines.append(
                f"For {listed} the {edge} candidate was chosen; a {side} one was not tried, and may be better."
            )
    return lines


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def has(summary: Summary, key: str) -> bool:
    """Whether any cell has the figure."""
    return any(group.values(key) for group in summary.groups.values())
