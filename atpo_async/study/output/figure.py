"""The figure of a study as a PNG, and what its page shares: panels, colours, marks, the points of each curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atpo_async.report import charts
from atpo_async.report.charts import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, TEAL
from atpo_async.study.cells import AT_TOKENS, FINAL, WINDOW
from atpo_async.study.grid.corrections import CORRECTIONS
from atpo_async.study.output.tables import has
from atpo_async.study.plan import combinations
from atpo_async.study.results.summary import At, Spread, Summary, mean_curve, place

KL_FLOOR = 1e-5
"""Nats; less is drawn there: what an engine's rounding makes of the same weights."""

COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, TEAL, GREY, "#b8860b", "#c2418f", "#5b7083", "#7a9e2c", "#8c5a3c")
MARKERS = ("s", "o", "D", "X", "^", "v", "P", "<", ">", "h")
"""Matplotlib's names; colour is not to be the only sign.  Their numbers differ, so that no pair comes again soon."""

_OF_CORRECTIONS = dict(zip(CORRECTIONS, (3, 1, 0, 2, 5, 4, 6, 7, 8, 9, 10, 11), strict=False))
"""Correction -> number of its colour, the same in every study."""

MOST_CURVES = 40
"""Small figures of learning curves; more are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """The groups that are one line of a figure: all values of the axes but that of the rows."""

    at: At
    name: str
    color: str
    marker: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One figure against the axis of the rows."""

    key: str
    title: str
    label: str
    logarithmic: bool = False
    y_range: tuple[float, float] | None = None


PANELS: tuple[Panel, ...] = (
    Panel(
        key=FINAL,
        title="Success at the end",
        label=f"sampled success, last {WINDOW} steps",
        y_range=(0.0, 1.0),
    ),
    Panel(
        key=AT_TOKENS,
        title="Success at equal tokens",
        label=f"sampled success, {WINDOW} steps",
        y_range=(0.0, 1.0),
    ),
    Panel(key="greedy", title="Greedy success", label="held-out tasks", y_range=(0.0, 1.0)),
    Panel(key="ess_turn", title="Effective sample size", label="ESS/N of the exact turn ratios", y_range=(0.0, 1.0)),
    Panel(
        key="kl_k3",
        title="Distance to the data",
        label=f"KL(μ‖prox), k3, nats a token; less than {KL_FLOOR:g} drawn there",
        logarithmic=True,
    ),
)


def panels(summary: Summary) -> list[Panel]:
    """Those of a study: against numbers ESS and KL too, else success alone; at equal tokens where it is by those."""
    against_numbers = summary.x_axis is not None
    keys = {FINAL, "ess_turn", "kl_k3"} if against_numbers else {FINAL, "greedy"}
    if summary.by_tokens:
        keys = (keys | {AT_TOKENS}) - {"ess_turn", "kl_k3"}
    return [panel for panel in PANELS if panel.key in keys and has(summary, panel.key)]


def all_series(summary: Summary) -> list[Series]:
    """In the grid's order."""
    found = []
    for i, at in enumerate(combinations(summary.others)):
        number = i
        if [name for name, _ in at] == ["correction"]:
            number = _OF_CORRECTIONS.get(at[0][1], i)
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        found.append(Series(at=at, name=place(at) or "success", color=color, marker=marker))
    return found


def curves(
    summary: Summary, row: str, series: Series
) -> tuple[list[list[tuple[float, float]]], list[tuple[float, float]]]:
    """Learning curves of a group: each seed's, and their mean.

    Against tokens, each curve is drawn at its own tokens, in thousands, and the mean at those of a grid of twenty.
    """
    results = [r for r in summary.joined(row, series.at).done if r.curve]
    if not summary.by_tokens:
        seeds = [[(float(step), value) for step, value in r.curve] for r in results]
        return seeds, mean_curve(seeds)
    counted = [r for r in results if r.tokens]
    seeds = [[(tokens / 1000, value) for tokens, (_, value) in zip(r.tokens, r.curve, strict=True)] for r in counted]
    if not seeds:
        return [], []
    ends = (max(points[0][0] for points in seeds), min(points[-1][0] for points in seeds))
    if ends[0] >= ends[1]:
        return seeds, []
    places = [ends[0] + (ends[1] - ends[0]) * i / 20 for i in range(21)]
    return seeds, mean_curve([[(x, _between(points, x)) for x in places] for points in seeds])


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """The value of a curve at a place within it."""
    after = next((i for i, (at, _) in enumerate(points) if at >= x), len(points) - 1)
    if after == 0 or points[after][0] == points[after - 1][0]:
        return points[after][1]
    (x0, y0), (x1, y1) = points[after - 1], points[after]
    return y0 + (y1 - y0) * min(1.0, (x - x0) / (x1 - x0))


def along(summary: Summary, key: str, series: Series) -> list[tuple[str, Spread]]:
    """(value of the rows' axis, figure) of one line."""
    found = ((row, summary.joined(row, series.at).spread(key)) for row in summary.rows.values)
    return [(row, spread) for row, spread in found if spread is not None]


def write_figure(summary: Summary, path: Path) -> list[Path]:
    """The figure as a PNG.  Returns its path, or nothing where there is nothing to draw."""
    shown = panels(summary)
    if not shown:
        return []
    from matplotlib.figure import Figure

    rows = summary.rows.values[:MOST_CURVES]
    columns = min(len(rows), 6)
    lines = math.ceil(len(rows) / columns)
    top_height = 4.0 if summary.x_axis is not None else max(2.6, 0.9 + 0.28 * len(summary.rows.values))
    figure = Figure(figsize=(12.6, top_height + 2.4 * lines), dpi=120, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(top_height, 2.4 * lines), squeeze=False)[:, 0]
    series = all_series(summary)
    for axes, panel in zip(top.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        if summary.x_axis is not None:
            _lines(axes, summary, panel, series)
        else:
            _dots(axes, summary, panel, series)
    if len(series) > 1:
        figure.legend(
            *top.axes[0].get_legend_handles_labels(),
            loc="outside upper center",
            ncols=min(len(series), 6),
            frameon=False,
        )
    _small_curves(bottom, summary, rows, series, shape=(lines, columns))
    aside = path.with_name(f".{path.stem}.writing.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(aside, metadata={"Software": None})
    aside.replace(path)
    return [path]


def _lines(axes: Any, summary: Summary, panel: Panel, series: Sequence[Series]) -> None:
    """A figure against numbers: means as lines, their intervals as bands."""
    for each in series:
        points = along(summary, panel.key, each)
        floor = KL_FLOOR if panel.logarithmic else -math.inf
        places = [float(row) for row, _ in points]
        mean, low, high = (
            [max(floor, getattr(spread, field)) for _, spread in points] for field in ("mean", "low", "high")
        )
        axes.fill_between(places, low, high, color=each.color, alpha=0.13, linewidth=0)
        axes.plot(places, mean, color=each.color, marker=each.marker, markersize=6, linewidth=1.8, label=each.name)
    if panel.logarithmic:
        axes.set_yscale("log")
    elif panel.y_range is not None:
        axes.set_ylim(panel.y_range[0] - 0.02, panel.y_range[1] + 0.02)
    numbers = summary.rows.numbers or []
    if spaced(numbers):
        least = min(abs(n) for n in numbers if n)
        axes.set_xscale("symlog", base=2, linthresh=least)
        axes.set_xlim(-0.3 * least if min(numbers) == 0 else 0.9 * least, 1.2 * max(numbers))
    axes.set(title=panel.title, xlabel=axis_label(summary), ylabel=panel.label)
    axes.set_xticks(numbers, labels=list(summary.rows.values))
    axes.minorticks_off()
    _plain(axes)


def _dots(axes: Any, summary: Summary, panel: Panel, series: Sequence[Series]) -> None:
    """A figure by name: a row for each, its mean as a mark, its interval as a line."""
    names = list(summary.rows.values)
    for i, each in enumerate(series):
        shift = (i - (len(series) - 1) / 2) * 0.7 / max(1, len(series))
        points = along(summary, panel.key, each)
        ys = [names.index(row) + shift for row, _ in points]
        xs = [spread.mean for _, spread in points]
        ends = [[s.mean - s.low for _, s in points], [s.high - s.mean for _, s in points]]
        style = {"color": each.color, "marker": each.marker, "markersize": 5, "linestyle": "none", "label": each.name}
        axes.errorbar(xs, ys, xerr=ends, elinewidth=1.6, **style)
    axes.set_yticks(range(len(names)), labels=names)
    axes.invert_yaxis()
    if (shown := dot_range(summary, panel)) is not None:
        edge = 0.02 * (shown[1] - shown[0])
        axes.set_xlim(shown[0] - edge, shown[1] + edge)
    axes.set(title=panel.title, xlabel=panel.label)
    _plain(axes)


def dot_range(summary: Summary, panel: Panel) -> tuple[float, float] | None:
    """The ends of the axis of a figure by name: its range from the tenth below the least interval on, so that what is
    close to its upper end is told apart; None where the figure has no range."""
    if panel.y_range is None:
        return None
    lows = [spread.low for each in all_series(summary) for _, spread in along(summary, panel.key, each)]
    low, high = panel.y_range
    least = math.floor(min(lows, default=low) * 10 + 1e-9) / 10
    return min(max(low, least), high - 0.1), high


def _small_curves(
    figure: Any, summary: Summary, rows: Sequence[str], series: Sequence[Series], *, shape: tuple[int, int]
) -> None:
    grid = figure.subplots(*shape, sharex=not summary.by_tokens, sharey=True, squeeze=False)
    places = [axes for line in grid for axes in line]
    for axes, row in zip(places, rows, strict=False):
        for each in series:
            seeds, mean = curves(summary, row, each)
            for points in seeds:
                axes.plot(*zip(*points, strict=True), color=each.color, alpha=0.22, linewidth=0.8)
            if mean:
                axes.plot(*zip(*mean, strict=True), color=each.color, linewidth=1.8)
        axes.set(title=row_title(summary, row), xlabel=curve_label(summary), ylim=(-0.02, 1.02))
        axes.xaxis.get_major_locator().set_params(integer=not summary.by_tokens)
        axes.tick_params(labelbottom=True)
        _plain(axes)
    for axes in places[len(rows) :]:
        axes.set_visible(False)
    for line in grid:
        line[0].set_ylabel("sampled success")


def spaced(numbers: Sequence[float]) -> bool:
    """Whether numbers lie so far apart that a figure shows their logarithms, 0 beside them."""
    above = sorted(n for n in numbers if n > 0)
    return len(above) > 2 and above[-1] / above[0] >= 8 and min(numbers) >= 0


def axis_label(summary: Summary) -> str:
    """Of the axis of the rows."""
    return "lag, learner versions" if summary.rows.name == "lag" else summary.rows.name


def curve_label(summary: Summary) -> str:
    """Of the axis along which learning curves run."""
    return "tokens generated, thousands" if summary.by_tokens else "step"


def row_title(summary: Summary, row: str) -> str:
    """Of a small figure."""
    return place(((summary.rows.name, row),))


def _plain(axes: Any) -> None:
    axes.grid(color=charts.GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
