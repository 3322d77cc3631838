"""The page of a study: one HTML file that opens without a network, readable in light and in dark."""

from __future__ import annotations

from atpo_async.report.figures import Figure
from atpo_async.report.pages import render
from atpo_async.study.cells import COLUMNS, FINAL, WINDOW
from atpo_async.study.conclusions import PHRASES, sentences
from atpo_async.study.figure import COLORS, PANELS
from atpo_async.study.folder import KIND
from atpo_async.study.origin import Origin
from atpo_async.study.plots import draw_curves, draw_panel, mark
from atpo_async.study.summary import NUM_ERRORS, RESOLUTION, Summary
from atpo_async.study.tables import details, has, matrix, num_seeds

RULE = (
    "A difference is stated only where both groups are whole, their ranges over seeds do not meet, and the means "
    f"differ by more than either range, by more than {NUM_ERRORS:g} standard errors (variance over seeds pooled over "
    f"the grid) and by more than {RESOLUTION:g}."
)


def page(summary: Summary, origin: Origin) -> str:
    """The whole document; it fetches nothing and is readable in light and in dark."""
    return render(
        "study.html.j2",
        title="Staleness",
        kind=KIND,
        num_runs=len(summary.groups) * len(summary.seeds),
        num_lags=len(summary.lags),
        seeds=num_seeds(summary),
        sentences=sentences(summary),
        corrections=[
            {"name": name, "phrase": PHRASES[name], "color": COLORS[name], "mark": mark(17, 7, name)}
            for name in summary.corrections
        ],
        panels=[Figure(draw_panel(summary, panel), panel.title) for panel in PANELS],
        curves=[Figure(draw_curves(summary, lag), f"Lag {lag}.") for lag in summary.lags],
        tables=_tables(summary),
        rule=RULE,
        settings=[*origin.settings, ("made with", f"{origin.made}; {origin.machine}")],
        command=origin.command,
        meanings=[(column.heading, column.meaning) for column in COLUMNS],
    )


def _tables(summary: Summary) -> list[tuple[str, list[list[str]]]]:
    """Heading and rows, the head first; no rows where there are none."""
    failed = [[r.cell.label, r.reason] for r in summary.results if r.status == "failed"]
    return [
        (f"Sampled success at the end, mean of the last {WINDOW} steps", matrix(summary, FINAL)),
        ("Greedy success on held-out tasks", matrix(summary, "greedy") if has(summary, "greedy") else []),
        ("Beside it, means over seeds", details(summary)),
        ("Failed cells", [["cell", "why"], *failed] if failed else []),
    ]
