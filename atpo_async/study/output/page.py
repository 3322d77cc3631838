"""The page of a study: one HTML file that opens without a network, readable in light and in dark."""

from __future__ import annotations

from atpo_async.report.figures import Figure
from atpo_async.report.pages import render
from atpo_async.study.cells import AT_TOKENS, COLUMNS, FINAL, WINDOW
from atpo_async.study.grid.corrections import CORRECTIONS
from atpo_async.study.output.figure import MOST_CURVES, all_series, panels, row_title
from atpo_async.study.output.origin import Origin
from atpo_async.study.output.plots import draw_curves, draw_panel, mark
from atpo_async.study.output.tables import Rows, details, goals, has, matrices
from atpo_async.study.results.conclusions import method, num_seeds, sentences
from atpo_async.study.results.summary import Summary

HEADINGS: dict[str, str] = {
    FINAL: f"Sampled success at the end, mean of the last {WINDOW} steps of which every cell knows it",
    AT_TOKENS: "Sampled success at equal tokens",
    "greedy": "Greedy success on held-out tasks, after the last step",
}
"""Figures that have a table of their own -> its heading."""


def page(summary: Summary, origin: Origin) -> str:
    """The whole document; it fetches nothing and is readable in light and in dark."""
    series = all_series(summary)
    return render(
        "study.html.j2",
        title=origin.title,
        kind=origin.name,
        num_runs=len(summary.groups) * len(summary.seeds),
        grid=" × ".join(f"{len(axis.values)} of {axis.name}" for axis in summary.axes),
        seeds=num_seeds(summary),
        sentences=sentences(summary),
        series=[
            {"name": _named(each.name), "color": each.color, "mark": mark(17, 7, each)}
            for each in (series if len(series) > 1 else [])
        ],
        panels=[Figure(draw_panel(summary, panel), panel.title) for panel in panels(summary)],
        curves=[
            Figure(draw_curves(summary, row), f"{row_title(summary, row)}.")
            for row in summary.rows.values[:MOST_CURVES]
        ],
        tables=_tables(summary, origin),
        rule=method(summary),
        settings=[*origin.settings, ("made with", f"{origin.made}; {origin.machine}")],
        command=origin.command,
        meanings=[(column.heading, column.meaning) for column in COLUMNS if has(summary, column.key)],
    )


def _named(name: str) -> str:
    """With the phrase of a correction, whose name is short."""
    return f"{name}: {CORRECTIONS[name].phrase}" if name in CORRECTIONS else name


def figure_tables(summary: Summary) -> list[tuple[str, Rows]]:
    """(heading, table) of the figures of success; several where the grid has more than two axes."""
    found = []
    for key, heading in HEADINGS.items():
        if has(summary, key) and (key != AT_TOKENS or summary.by_tokens):
            for place, rows in matrices(summary, key):
                found.append((f"{heading}: {place}" if place else heading, rows))
    return found


def _tables(summary: Summary, origin: Origin) -> list[tuple[str, Rows]]:
    """Heading and rows, the head first; no rows where there are none."""
    failed = [[r.cell.label, r.reason] for r in summary.results if r.status == "failed"]
    return [
        *figure_tables(summary),
        ("What it took to reach 0.9", goals(summary)),
        ("Beside it, means over seeds", details(summary)),
        ("What was chosen in the first stage", origin.choices),
        ("Failed cells", [["cell", "why"], *failed] if failed else []),
    ]
