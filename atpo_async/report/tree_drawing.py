"""A tree as SVG: the prompt on the left, one row for each leaf, coloured by value.  Pure: a sample in, text out."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from atpo_async.core.tree import ROOT
from atpo_async.report.charts import GREEN, INK, PURPLE, RED, SOFT, svg, text
from atpo_async.report.tree_samples import TreeSample, TreeTurn

BOX_WIDTH, BOX_HEIGHT = 196, 50
GAP_X, GAP_Y = 30, 10
MAX_ROWS = 16
"""Leaves drawn of one tree; the report says how many more there are."""


def draw_tree(sample: TreeSample) -> str:
    """An SVG element: the prompt on the left, one row for each leaf, coloured by value."""
    children: dict[int, list[TreeTurn]] = {ROOT: []}
    for turn in sample.turns:
        children.setdefault(turn.id, [])
        children[turn.parent].append(turn)
    rows: dict[int, float] = {}
    depth: dict[int, int] = {ROOT: 0}
    used = 0

    def place(node: int) -> float:
        nonlocal used
        below = children[node]
        for child in below:
            depth[child.id] = depth[node] + 1
        if not below:
            rows[node] = used
            used += 1
        else:
            places = [place(child.id) for child in below]
            rows[node] = (places[0] + places[-1]) / 2
        return rows[node]

    place(ROOT)
    values = [turn.value for turn in sample.turns if turn.value is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    hidden = max(0, used - MAX_ROWS)
    shown = {node for node, row in rows.items() if row <= MAX_ROWS - 1}
    width = (max(depth.values()) + 1) * (BOX_WIDTH + GAP_X) + 12
    height = min(used, MAX_ROWS) * (BOX_HEIGHT + GAP_Y) + (24 if hidden else 6)

    def corner(node: int) -> tuple[float, float]:
        return 6 + depth[node] * (BOX_WIDTH + GAP_X), 4 + rows[node] * (BOX_HEIGHT + GAP_Y)

    parts = []
    for turn in sample.turns:
        if turn.id in shown and turn.parent in shown:
            (x0, y0), (x1, y1) = corner(turn.parent), corner(turn.id)
            start, end, middle = x0 + BOX_WIDTH, x1, (x0 + BOX_WIDTH + x1) / 2
            y0, y1 = y0 + BOX_HEIGHT / 2, y1 + BOX_HEIGHT / 2
            stroke = f'stroke="{SOFT}" stroke-width="1.4"' + (' stroke-dasharray="4 3"' if turn.round else "")
            parts.append(
                f'<path d="M{start:.1f},{y0:.1f} C{middle:.1f},{y0:.1f} {middle:.1f},{y1:.1f} {end:.1f},{y1:.1f}" '
                f'fill="none" {stroke}/>'
            )
    if ROOT in shown:
        x, y = corner(ROOT)
        parts.append(_box(x, y, "#f3f5f7", "#b8c2cc", [_cut(line) for line in _wrap(sample.prompt)], sample.prompt))
    for turn in sample.turns:
        if turn.id in shown:
            x, y = corner(turn.id)
            parts.append(_turn(turn, x, y, low, high))
    if hidden:
        parts.append(text(8, height - 6, f"{hidden} more leaves are not drawn"))
    return svg(width, height, "".join(parts))


def _turn(turn: TreeTurn, x: float, y: float, low: float, high: float) -> str:
    share = 0.5 if turn.value is None or high == low else (turn.value - low) / (high - low)
    versions = "→".join(f"v{v}" for v in turn.versions)
    figures = f"H {turn.entropy:.2f}"
    if turn.value is not None:
        figures += f" · V {turn.value:+.2f}"
    if versions:
        figures += f" · {versions}"
    hint = (
        f"turn {turn.id}, round {turn.round}\nobservation: {turn.observation or '–'}\naction: {turn.action}\n{figures}"
    )
    box = _box(
        x,
        y,
        _color(share),
        "#8794a1" if turn.round == 0 else INK,
        [_cut(turn.action, 27 if turn.reward is None else 22), figures],
        hint,
    )
    # Entropy as a bar along the foot of the box: 2 nats fill it.
    bar = min(1.0, turn.entropy / 2.0) * (BOX_WIDTH - 12)
    box += f'<rect x="{x + 6:.1f}" y="{y + BOX_HEIGHT - 7:.1f}" width="{bar:.1f}" height="3" rx="1.5" fill="{PURPLE}"/>'
    if turn.reward is not None:
        color = GREEN if turn.reward > 0 else RED
        box += f'<circle cx="{x + BOX_WIDTH - 16:.1f}" cy="{y + 16:.1f}" r="11" fill="{color}"/>' + text(
            x + BOX_WIDTH - 16, y + 20, f"{turn.reward:g}", color="#ffffff", anchor="middle", weight="600"
        )
    return box


def _box(x: float, y: float, fill: str, stroke: str, lines: Sequence[str], hint: str) -> str:
    rows = "".join(
        text(x + 8, y + 18 + 16 * i, line, color=INK if i == 0 else SOFT, size=12 if i == 0 else 11)
        for i, line in enumerate(lines[:2])
    )
    return (
        f'<g><title>{escape(hint)}</title><rect x="{x:.1f}" y="{y:.1f}" width="{BOX_WIDTH}" '
        f'height="{BOX_HEIGHT}" rx="7" fill="{fill}" stroke="{stroke}"/>{rows}</g>'
    )


def _cut(words: str, length: int = 27) -> str:
    return words if len(words) <= length else words[: length - 1] + "…"


def _wrap(words: str, length: int = 27) -> list[str]:
    if len(words) <= length:
        return [words]
    at = words.rfind(" ", 0, length)
    at = at if at > 0 else length
    return [words[:at], words[at:].strip()]


def _color(share: float) -> str:
    """From a pale red by white to a pale green."""
    low, middle, high = (252, 222, 218), (255, 255, 255), (209, 240, 222)
    start, end, part = (low, middle, share * 2) if share < 0.5 else (middle, high, share * 2 - 1)
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(start, end, strict=True))
