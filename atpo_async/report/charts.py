"""Small charts as SVG text: lines with bands and points, a heat map, shares as bars.  Pure: numbers in, text out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

FONT = "ui-sans-serif, system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"
INK, SOFT, GRID = "#1f2933", "#66727f", "#e4e8ec"
BLUE, ORANGE, GREEN, PURPLE, RED, TEAL, GREY = (
    "#2563eb",
    "#ea8a1a",
    "#1a9a5b",
    "#7c4dcc",
    "#d64545",
    "#0f9aa8",
    "#9aa5b1",
)
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, RED, TEAL, GREY)

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One series.  ``points`` are in ascending x."""

    name: str
    points: Sequence[Point]
    color: str
    width: float = 2.0
    opacity: float = 1.0
    dots: bool = False
    """Drawn as dots with thin lines between them: few, exact values."""
    dashed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """A vertical line with words."""

    x: float
    text: str
    color: str = GREEN


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """Size and ranges; a range that is None follows the data."""

    x_label: str
    y_label: str
    width: int = 680
    height: int = 270
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    percent: bool = False
    markers: Sequence[Marker] = field(default_factory=tuple)
    guides: Sequence[float] = field(default_factory=tuple)
    """Dotted horizontal lines, each labelled with its value."""


LEFT, RIGHT, TOP, BOTTOM = 56, 16, 34, 42


def line_chart(lines: Sequence[Line], axes: Axes) -> str:
    """An SVG element; one with a note where there is nothing to draw."""
    drawn = [line for line in lines if line.points]
    if not drawn:
        return nothing(axes)
    xs = [x for line in drawn for x, _ in line.points] + [marker.x for marker in axes.markers]
    ys = [y for line in drawn for _, y in line.points]
    frame = _Frame(axes, axes.x_range or _span(xs), axes.y_range or _span(ys, from_zero=True))
    parts = [frame.grid()]
    for guide in axes.guides:
        parts.append(
            f'<line x1="{LEFT}" x2="{axes.width - RIGHT}" y1="{frame.y(guide):.1f}" y2="{frame.y(guide):.1f}" '
            f'stroke="{SOFT}" stroke-dasharray="1 4"/>'
            + text(axes.width - RIGHT, frame.y(guide) - 4, frame.y_words(guide), anchor="end", size=10)
        )
    for marker in axes.markers:
        x = frame.x(marker.x)
        anchor, shift = ("end", -5) if x > axes.width * 0.6 else ("start", 5)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{axes.height - BOTTOM}" stroke="{marker.color}" '
            f'stroke-dasharray="4 3"/>'
            + text(x + shift, axes.height - BOTTOM - 8, marker.text, color=marker.color, anchor=anchor)
        )
    for line in drawn:
        parts.append(_line(line, frame))
    parts.append(legend([(line.name, line.color, line.opacity) for line in drawn if line.name], axes.width))
    return svg(axes.width, axes.height, "".join(parts))


def heat_map(cells: Mapping[tuple[int, int], float], axes: Axes, *, columns: Sequence[float], rows: int) -> str:
    """Shares by (column, row); ``columns`` are the x values, rows count up from 0."""
    if not cells or not columns:
        return nothing(axes)
    step = (columns[-1] - columns[0]) / max(1, len(columns) - 1) or 1.0
    frame = _Frame(axes, (columns[0] - step / 2, columns[-1] + step / 2), (-0.5, rows - 0.5), whole_y=True)
    wide = max(1.0, (axes.width - LEFT - RIGHT) / len(columns))
    tall = (axes.height - TOP - BOTTOM) / rows
    parts = []
    for (column, row), share in sorted(cells.items()):
        if share > 0:
            x, y = frame.x(columns[column]) - wide / 2, frame.y(row) - tall / 2
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide + 0.4:.1f}" height="{tall:.1f}" fill="{BLUE}" '
                f'fill-opacity="{0.08 + 0.92 * min(1.0, share):.2f}"><title>step {columns[column]:g}: {share:.0%} of '
                f"turns at lag {row}</title></rect>"
            )
    key = "".join(
        f'<rect x="{axes.width - 226 + 22 * i}" y="10" width="22" height="10" fill="{BLUE}" '
        f'fill-opacity="{0.08 + 0.92 * i / 4:.2f}"/>'
        for i in range(5)
    )
    key += text(axes.width - 232, 19, "0 %", anchor="end") + text(axes.width - 110, 19, "100 % of a step")
    return svg(axes.width, axes.height, frame.grid() + "".join(parts) + key)


def bars(rows: Sequence[tuple[str, Sequence[tuple[str, float, str]]]], *, width: int = 680) -> str:
    """Stacked horizontal bars: (label, [(name, share, colour)]), shares of 1."""
    left, tall, gap = 96, 26, 16
    height = len(rows) * (tall + gap) + 44
    names: dict[str, str] = {}
    parts = []
    for index, (label, shares) in enumerate(rows):
        y = 40 + index * (tall + gap)
        parts.append(text(left - 10, y + 17, label, anchor="end", color=INK))
        x = float(left)
        for name, share, color in shares:
            names.setdefault(name, color)
            wide = max(0.0, share) * (width - left - RIGHT)
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{tall}" fill="{color}">'
                f"<title>{escape(name)}: {share:.1%}</title></rect>"
            )
            if wide > 40:
                parts.append(text(x + wide / 2, y + 17, f"{share:.0%}", anchor="middle", color="#ffffff", size=12))
            x += wide
    parts.append(legend([(name, color, 1.0) for name, color in names.items()], width))
    return svg(width, height, "".join(parts))


def nothing(axes: Axes) -> str:
    note = text(axes.width / 2, axes.height / 2, "nothing recorded", anchor="middle")
    return svg(axes.width, axes.height, note)


def svg(width: float, height: float, content: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" font-family="{FONT}" font-size="12" role="img">{content}</svg>'
    )


def text(
    x: float, y: float, words: str, *, color: str = SOFT, anchor: str = "start", size: float = 11.5, weight: str = ""
) -> str:
    bold = f' font-weight="{weight}"' if weight else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" text-anchor="{anchor}" font-size="{size:g}"{bold}>'
        f"{escape(words)}</text>"
    )


def legend(entries: Sequence[tuple[str, str, float]], width: int) -> str:
    """(name, colour, opacity) along the top."""
    parts = []
    x = float(LEFT)
    for name, color, opacity in entries:
        parts.append(
            f'<rect x="{x:.1f}" y="11" width="12" height="8" rx="2" fill="{color}" fill-opacity="{opacity:g}"/>'
            + text(x + 17, 19, name)
        )
        x += 17 + 6.4 * len(name) + 18
        if x > width - 60:
            break
    return "".join(parts)


class _Frame:
    """Maps data to pixels, and draws the grid."""

    def __init__(
        self, axes: Axes, x_range: tuple[float, float], y_range: tuple[float, float], *, whole_y: bool = False
    ) -> None:
        self.axes = axes
        self.x_range, self.y_range = x_range, y_range
        self.whole_y = whole_y

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / ((high - low) or 1.0) * (self.axes.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        bottom = self.axes.height - BOTTOM
        return bottom - (value - low) / ((high - low) or 1.0) * (bottom - TOP)

    def y_words(self, value: float) -> str:
        """A value of the y axis as the axis writes it."""
        return f"{value:.0%}" if self.axes.percent else number(value)

    def grid(self) -> str:
        axes = self.axes
        parts = []
        for tick in ticks(*self.y_range, count=5, whole=self.whole_y):
            y = self.y(tick)
            if not self.whole_y:
                parts.append(f'<line x1="{LEFT}" x2="{axes.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>')
            parts.append(text(LEFT - 8, y + 4, self.y_words(tick), anchor="end"))
        bottom = axes.height - BOTTOM
        for tick in ticks(*self.x_range, count=8):
            x = self.x(tick)
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}" stroke="{SOFT}"/>')
            parts.append(text(x, bottom + 17, number(tick), anchor="middle"))
        parts.append(f'<line x1="{LEFT}" x2="{axes.width - RIGHT}" y1="{bottom}" y2="{bottom}" stroke="{SOFT}"/>')
        parts.append(text((LEFT + axes.width - RIGHT) / 2, axes.height - 8, axes.x_label, anchor="middle"))
        middle = (TOP + bottom) / 2
        parts.append(
            f'<text x="14" y="{middle:.1f}" fill="{SOFT}" text-anchor="middle" font-size="11.5" '
            f'transform="rotate(-90 14 {middle:.1f})">{escape(axes.y_label)}</text>'
        )
        return "".join(parts)


def _line(line: Line, frame: _Frame) -> str:
    low, high = frame.y_range
    points = [(frame.x(x), frame.y(min(max(y, low), high))) for x, y in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    width = 1.0 if line.dots else line.width
    drawn = (
        f'<polyline points="{path}" fill="none" stroke="{line.color}" stroke-width="{width:g}" '
        f'stroke-opacity="{line.opacity:g}" stroke-linejoin="round"{dash}/>'
    )
    if line.dots or len(points) == 1:
        for (x, y), (at, value) in zip(points, line.points, strict=True):
            drawn += (
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{line.color}" stroke="#ffffff" stroke-width="1.5">'
                f"<title>{escape(line.name)} at {number(at)}: {value:.3g}</title></circle>"
            )
    return drawn


def _span(values: Sequence[float], *, from_zero: bool = False) -> tuple[float, float]:
    low, high = min(values), max(values)
    if from_zero and low > 0:
        low = 0.0
    if low == high:
        return (low - 0.5, high + 0.5) if not from_zero else (min(low, 0.0), high + (abs(high) or 1.0))
    return low, high + (0.05 * (high - low) if from_zero else 0.0)


def ticks(low: float, high: float, *, count: int, whole: bool = False) -> list[float]:
    """Round numbers within low..high, about ``count`` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, count)
    if not rough > 0:  # of numbers next to zero
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    found = []
    while (value := first * step) <= high + step * 1e-9:
        found.append(0.0 if abs(value) < step * 1e-9 else value)
        first += 1
    return found


def number(value: float) -> str:
    """Short: 0.25, 12, 1.5k, 3e-07."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    if abs(value) < 1e-3:
        return f"{value:.0e}"
    return f"{value:.4g}"
