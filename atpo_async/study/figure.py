"""The figure of a study as a PNG, and what its page shares: panels, colours, marks, the points of each curve."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from atpo_async.report import charts
from atpo_async.report.charts import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, TEAL
from atpo_async.study.cells import FINAL, WINDOW
from atpo_async.study.plan import CORRECTIONS
from atpo_async.study.summary import Spread, Summary
from atpo_async.study.tables import has

KL_FLOOR = 1e-5
"""Nats; less is drawn there: what an engine's rounding makes of the same weights."""

COLORS: dict[str, str] = dict(
    zip(CORRECTIONS, (RED, ORANGE, BLUE, GREEN, TEAL, PURPLE, GREY, "#b8860b", "#c2418f", "#5b7083"), strict=True)
)
MARKERS: dict[str, str] = dict(zip(CORRECTIONS, ("X", "o", "s", "D", "^", "v", "P", "<", ">", "h"), strict=True))
"""Matplotlib's names; colour is not to be the only sign."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One figure against lag."""

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
    Panel(key="ess_turn", title="Effective sample size", label="ESS/N of the exact turn ratios", y_range=(0.0, 1.0)),
    Panel(key="kl_k3", title="Distance to the data", label="KL(μ‖prox), k3, nats a token", logarithmic=True),
)


def curves(summary: Summary, lag: int, name: str) -> tuple[list[list[tuple[float, float]]], list[tuple[float, float]]]:
    """Learning curves of a group: each seed's, and their mean at the steps that all have."""
    seeds = [
        [(float(step), value) for step, value in r.curve] for r in summary[lag, name].results if r.status == "done"
    ]
    if not seeds:
        return [], []
    tables = [dict(points) for points in seeds]
    common = sorted(set(tables[0]).intersection(*tables[1:]))
    return seeds, [(step, math.fsum(table[step] for table in tables) / len(tables)) for step in common]


def against_lag(summary: Summary, key: str, name: str) -> list[tuple[int, Spread]]:
    found = ((lag, summary[lag, name].spread(key)) for lag in summary.lags)
    return [(lag, spread) for lag, spread in found if spread is not None]


def write_figure(summary: Summary, path: Path) -> list[Path]:
    """The figure as a PNG.  Returns its path, or nothing where there is nothing to draw."""
    if not has(summary, FINAL):
        return []
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 7.2), dpi=130, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.25, 1.0), squeeze=False)[:, 0]
    for axes, panel in zip(top.subplots(1, len(PANELS), squeeze=False)[0], PANELS, strict=True):
        for name in summary.corrections:
            points = against_lag(summary, panel.key, name)
            floor = KL_FLOOR if panel.logarithmic else -math.inf
            lags = [lag for lag, _ in points]
            mean, low, high = (
                [max(floor, getattr(spread, field)) for _, spread in points] for field in ("mean", "low", "high")
            )
            axes.fill_between(lags, low, high, color=COLORS[name], alpha=0.16, linewidth=0)
            axes.plot(lags, mean, color=COLORS[name], marker=MARKERS[name], markersize=6, linewidth=1.8, label=name)
        if panel.logarithmic:
            axes.set_yscale("log")
        elif panel.y_range is not None:
            axes.set_ylim(panel.y_range[0] - 0.02, panel.y_range[1] + 0.02)
        axes.set(title=panel.title, xlabel="lag, learner versions", ylabel=panel.label, xticks=list(summary.lags))
        _plain(axes)
    figure.legend(
        *top.axes[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(summary.corrections),
        frameon=False,
    )
    rows = bottom.subplots(1, len(summary.lags), sharey=True, squeeze=False)[0]
    for axes, lag in zip(rows, summary.lags, strict=True):
        for name in summary.corrections:
            seeds, mean = curves(summary, lag, name)
            for each in seeds:
                axes.plot(*zip(*each, strict=True), color=COLORS[name], alpha=0.25, linewidth=0.8)
            if mean:
                axes.plot(*zip(*mean, strict=True), color=COLORS[name], linewidth=1.8)
        axes.set(title=f"lag {lag}", xlabel="step", ylim=(-0.02, 1.02))
        axes.xaxis.get_major_locator().set_params(integer=True)
        _plain(axes)
    rows[0].set_ylabel("sampled success")
    aside = path.with_name(f".{path.stem}.writing.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(aside, metadata={"Software": None})
    aside.replace(path)
    return [path]


def _plain(axes: object) -> None:
    axes.grid(color=charts.GRID)  # type: ignore[attr-defined]
    axes.set_axisbelow(True)  # type: ignore[attr-defined]
    axes.spines[["top", "right"]].set_visible(False)  # type: ignore[attr-defined]
