"""The panels and learning curves of a study's page as SVG; colours of text and lines are the page's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from atpo_async.report import charts
from atpo_async.study.figure import COLORS, KL_FLOOR, MARKERS, Panel, against_lag, curves
from atpo_async.study.summary import Spread, Summary

LEFT, RIGHT, TOP, BOTTOM = 64, 14, 14, 44


class _Plot:
    """Maps data to pixels and draws axes; colours of text and lines are the page's."""

    def __init__(
        self,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        *,
        logarithmic: bool = False,
        size: tuple[int, int] = (420, 280),
    ) -> None:
        self._x, self._log = x_range, logarithmic
        self.wide, self.tall = size
        self._y = (math.log10(y_range[0]), math.log10(y_range[1])) if logarithmic else y_range

    def x(self, value: float) -> float:
        low, high = self._x
        return LEFT + (value - low) / ((high - low) or 1.0) * (self.wide - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self._y
        value = math.log10(max(value, KL_FLOOR)) if self._log else value
        share = (min(max(value, low), high) - low) / ((high - low) or 1.0)
        return self.tall - BOTTOM - share * (self.tall - TOP - BOTTOM)

    def axes(self, x_ticks: Sequence[float], x_label: str, y_label: str) -> str:
        if self._log:
            y_ticks = [10.0**k for k in range(math.ceil(self._y[0]), math.floor(self._y[1]) + 1)]
        else:
            y_ticks = charts.ticks(*self._y, count=5)
        parts = []
        for tick in y_ticks:
            y = self.y(tick)
            name = charts.number(tick)
            if self._log:
                power = round(math.log10(tick))
                name = f"{'≤' if tick <= KL_FLOOR else ''}" + (f"1e{power}" if power < -3 else f"{tick:g}")
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{self.wide - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{name}</text>'
            )
        bottom = self.tall - BOTTOM
        for tick in x_ticks:
            x = self.x(tick)
            parts.append(
                f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
                f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{charts.number(tick)}</text>'
            )
        middle = (TOP + bottom) / 2
        parts.append(
            f'<line class="axis" x1="{LEFT}" x2="{self.wide - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
            f'<text x="{(LEFT + self.wide - RIGHT) / 2}" y="{self.tall - 8}" text-anchor="middle">'
            f"{escape(x_label)}</text>"
            f'<text x="11" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 11 {middle:.1f})">'
            f"{escape(y_label)}</text>"
        )
        return "".join(parts)

    def line(
        self, points: Sequence[tuple[float, float]], color: str, *, width: float = 2.0, opacity: float = 1.0
    ) -> str:
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        return (
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width:g}" '
            f'stroke-opacity="{opacity:g}" stroke-linejoin="round"/>'
        )

    def band(self, points: Sequence[tuple[float, Spread]], color: str) -> str:
        edge = [(x, s.high) for x, s in points] + [(x, s.low) for x, s in reversed(points)]
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in edge)
        return f'<polygon points="{path}" fill="{color}" fill-opacity="0.16"/>'

    def svg(self, content: str) -> str:
        return _svg(self.wide, self.tall, content)


def draw_panel(summary: Summary, panel: Panel) -> str:
    series = {name: against_lag(summary, panel.key, name) for name in summary.corrections}
    values = [value for points in series.values() for _, s in points for value in (s.low, s.high)]
    if not values:
        return _nothing()
    y_range = panel.y_range or (0.0, max(values) * 1.05 or 1.0)
    if panel.logarithmic:
        top = max(10 * KL_FLOOR, *values)
        y_range = (KL_FLOOR, 10.0 ** math.ceil(math.log10(top)))
    lags = [float(lag) for lag in summary.lags]
    plot = _Plot(
        (lags[0], lags[-1]) if len(lags) > 1 else (lags[0] - 1, lags[0] + 1), y_range, logarithmic=panel.logarithmic
    )
    parts = [plot.axes(lags, "lag, learner versions", panel.label)]
    parts += [plot.band(points, COLORS[name]) for name, points in series.items()]
    for name, points in series.items():
        parts.append(plot.line([(lag, s.mean) for lag, s in points], COLORS[name]))
        for lag, spread in points:
            told = escape(f"{name}, lag {lag}: {spread.text(3)}")
            parts.append(f"<g>{mark(plot.x(lag), plot.y(spread.mean), name)}<title>{told}</title></g>")
    return plot.svg("".join(parts))


def draw_curves(summary: Summary, lag: int) -> str:
    drawn = {name: curves(summary, lag, name) for name in summary.corrections}
    steps = [step for seeds, _ in drawn.values() for points in seeds for step, _ in points]
    if not steps:
        return _nothing()
    plot = _Plot((min(steps), max(steps)), (0.0, 1.0), size=(320, 230))
    parts = [plot.axes(charts.ticks(min(steps), max(steps), count=4, whole=True), "step", "sampled success")]
    for name, (seeds, mean) in drawn.items():
        parts += [plot.line(points, COLORS[name], width=1.0, opacity=0.3) for points in seeds]
        parts.append(plot.line(mean, COLORS[name], width=2.4))
    return plot.svg("".join(parts))


def _nothing() -> str:
    return _svg(320, 80, '<text x="160" y="40" text-anchor="middle">nothing recorded</text>')


def _svg(wide: int, tall: int, content: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {tall}" font-family="{charts.FONT}" '
        f'font-size="12" role="img">{content}</svg>'
    )


_SHAPES: dict[str, Callable[[float, float], str]] = {
    "o": lambda x, y: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.2"',
    "s": lambda x, y: f'<rect x="{x - 3.8:.1f}" y="{y - 3.8:.1f}" width="7.6" height="7.6"',
    "D": lambda x, y: _polygon(x, y, (0, -5.4), (5.4, 0), (0, 5.4), (-5.4, 0)),
    "X": lambda x, y: _polygon(
        x, y, (0, -1.8), (2.6, -4.6), (4.6, -2.6), (1.8, 0), (4.6, 2.6), (2.6, 4.6), (0, 1.8), (-2.6, 4.6), (-4.6, 2.6),
        (-1.8, 0), (-4.6, -2.6), (-2.6, -4.6),
    ),
    "^": lambda x, y: _polygon(x, y, (0, -5), (4.8, 4), (-4.8, 4)),
    "v": lambda x, y: _polygon(x, y, (0, 5), (4.8, -4), (-4.8, -4)),
    "<": lambda x, y: _polygon(x, y, (-5, 0), (4, -4.8), (4, 4.8)),
    ">": lambda x, y: _polygon(x, y, (5, 0), (-4, -4.8), (-4, 4.8)),
    "P": lambda x, y: _polygon(
        x, y, (-1.6, -5), (1.6, -5), (1.6, -1.6), (5, -1.6), (5, 1.6), (1.6, 1.6), (1.6, 5), (-1.6, 5), (-1.6, 1.6),
        (-5, 1.6), (-5, -1.6), (-1.6, -1.6),
    ),
    "h": lambda x, y: _polygon(x, y, (0, -5), (4.4, -2.5), (4.4, 2.5), (0, 5), (-4.4, 2.5), (-4.4, -2.5)),
}  # fmt: skip


def _polygon(x: float, y: float, *corners: tuple[float, float]) -> str:
    return f'<polygon points="{" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)}"'


def mark(x: float, y: float, name: str) -> str:
    return f'{_SHAPES[MARKERS[name]](x, y)} fill="{COLORS[name]}" class="mark"/>'
