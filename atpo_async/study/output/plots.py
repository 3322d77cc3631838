"""The panels and learning curves of a study's page as SVG; colours of text and lines are the page's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from atpo_async.report import charts
from atpo_async.study.output.figure import (
    KL_FLOOR,
    Panel,
    Series,
    all_series,
    along,
    axis_label,
    curve_label,
    curves,
    dot_range,
    row_title,
    spaced,
)
from atpo_async.study.results.summary import Spread, Summary

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

    def axes(self, x_ticks: Mapping[float, str], x_label: str, y_label: str) -> str:
        """``x_ticks``: place -> what stands there."""
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
        for tick, name in x_ticks.items():
            x = self.x(tick)
            parts.append(
                f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
                f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{escape(name)}</text>'
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
    """A figure: lines against numbers, or a row for each name."""
    return _lines(summary, panel) if summary.x_axis is not None else _dots(summary, panel)


def _lines(summary: Summary, panel: Panel) -> str:
    drawn = [(each, along(summary, panel.key, each)) for each in all_series(summary)]
    values = [value for _, points in drawn for _, s in points for value in (s.low, s.high)]
    if not values:
        return _nothing()
    y_range = panel.y_range or (0.0, max(values) * 1.05 or 1.0)
    if panel.logarithmic:
        top = max(10 * KL_FLOOR, *values)
        y_range = (KL_FLOOR, 10.0 ** math.ceil(math.log10(top)))
    numbers = summary.rows.numbers or []
    at = _places(numbers)
    plot = _Plot((min(at.values()), max(at.values())), y_range, logarithmic=panel.logarithmic)
    ticks = {at[number]: row for number, row in zip(numbers, summary.rows.values, strict=True)}
    parts = [plot.axes(ticks, axis_label(summary), panel.label)]
    placed = [(each, [(at[float(row)], row, s) for row, s in points]) for each, points in drawn]
    parts += [plot.band([(x, s) for x, _, s in points], each.color) for each, points in placed]
    for each, points in placed:
        parts.append(plot.line([(x, s.mean) for x, _, s in points], each.color))
        for x, row, spread in points:
            told = escape(f"{each.name}, {row_title(summary, row)}: {spread.text(3)}")
            parts.append(f"<g>{mark(plot.x(x), plot.y(spread.mean), each)}<title>{told}</title></g>")
    return plot.svg("".join(parts))


def _places(numbers: Sequence[float]) -> dict[float, float]:
    """Number -> place along the axis: by doublings where numbers lie far apart, 0 one doubling below the least."""
    if not spaced(numbers):
        return {number: number for number in numbers}
    least = min(number for number in numbers if number > 0)
    return {number: math.log2(number / least) + 1 if number > 0 else 0.0 for number in numbers}


def _dots(summary: Summary, panel: Panel) -> str:
    """A row for each name: the mean as a mark, its interval as a line."""
    series = all_series(summary)
    names = summary.rows.values
    wide, step = 420, 20 if len(series) < 3 else 9 * len(series)
    left = 24 + max(6.6 * max(len(name) for name in names), 30.0)
    bottom = TOP + step * len(names)
    low, high = dot_range(summary, panel) or (0.0, 1.0)

    def x_of(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * (wide - left - RIGHT)

    parts = []
    for tick in charts.ticks(low, high, count=5):
        x = x_of(tick)
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>'
            f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{charts.number(tick)}</text>'
        )
    parts.append(
        f'<text x="{(left + wide) / 2:.1f}" y="{bottom + 36}" text-anchor="middle">{escape(panel.label)}</text>'
    )
    for i, name in enumerate(names):
        parts.append(
            f'<text x="{left - 8:.1f}" y="{TOP + step * (i + 0.5) + 4:.1f}" text-anchor="end">{escape(name)}</text>'
        )
    for number, each in enumerate(series):
        shift = (number - (len(series) - 1) / 2) * 0.7 / max(1, len(series))
        for row, spread in along(summary, panel.key, each):
            y = TOP + step * (names.index(row) + 0.5 + shift)
            told = escape(f"{each.name}, {row}: {spread.text(3)}")
            parts.append(
                f'<line x1="{x_of(spread.low):.1f}" x2="{x_of(spread.high):.1f}" y1="{y:.1f}" y2="{y:.1f}" '
                f'stroke="{each.color}" stroke-width="2"/>'
                f"<g>{mark(x_of(spread.mean), y, each)}<title>{told}</title></g>"
            )
    return _svg(wide, round(bottom + BOTTOM), "".join(parts))


def draw_curves(summary: Summary, row: str) -> str:
    """The learning curves of one value of the rows' axis."""
    drawn = [(each, *curves(summary, row, each)) for each in all_series(summary)]
    places = [x for _, seeds, _ in drawn for points in seeds for x, _ in points]
    if not places:
        return _nothing()
    plot = _Plot((min(places), max(places)), (0.0, 1.0), size=(320, 230))
    whole = not summary.by_tokens
    ticks = {x: charts.number(x) for x in charts.ticks(min(places), max(places), count=4, whole=whole)}
    parts = [plot.axes(ticks, curve_label(summary), "sampled success")]
    for each, seeds, mean in drawn:
        parts += [plot.line(points, each.color, width=1.0, opacity=0.3) for points in seeds]
        if mean:
            parts.append(plot.line(mean, each.color, width=2.4))
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


def mark(x: float, y: float, series: Series) -> str:
    """The mark of a line of a figure."""
    return f'{_SHAPES[series.marker](x, y)} fill="{series.color}" class="mark"/>'
