"""How long cells take, from those that have ended, and with it the time that a study still needs.  Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from atpo_async.study.cells import Cell, CellResult
from atpo_async.study.grid.names import FILES
from atpo_async.study.results.statistics import mean

KNOWN_SHARE = 0.25
"""Of a cell's steps after which its own pace says how long it takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A cell under way."""

    cell: Cell
    steps: int
    step: int
    for_s: float


class Pace:
    """Takes in cells that have ended, and says how long one like them takes."""

    def __init__(self, ended: Iterable[tuple[Cell, int, float]] = ()) -> None:
        self._each: list[tuple[Cell, float]] = []
        for cell, steps, seconds in ended:
            self.note(cell, steps=steps, seconds=seconds)

    @classmethod
    def of(cls, results: Mapping[Cell, CellResult], steps: Mapping[Cell, int]) -> Pace:
        """From the results of cells, which say how long they took; those that failed may have ended early."""
        return cls(
            (cell, steps[cell], result.figures["seconds"])
            for cell, result in results.items()
            if result.status == "done" and "seconds" in result.figures and cell in steps
        )

    def note(self, cell: Cell, *, steps: int, seconds: float) -> None:
        """A cell has ended."""
        self._each.append((cell, seconds / max(1, steps)))

    def expected_s(self, cell: Cell, *, steps: int) -> float | None:
        """Seconds by those that are most like it: first of its files (task, recipe), then of all other values."""
        if not self._each:
            return None
        alike = [(_likeness(cell, other), each) for other, each in self._each]
        best = max(likeness for likeness, _ in alike)
        return steps * mean([each for likeness, each in alike if likeness == best])

    def left_s(self, running: Sequence[Running], waiting: Iterable[tuple[Cell, int]], *, lanes: int) -> float | None:
        """Seconds until all have ended, each lane taking the next cell once it is free.  None while nothing is known.

        Args:
            running: at most ``lanes``.
            waiting: (cell, steps), in the order in which they begin.
        """
        known = Pace()
        known._each = list(self._each)
        for each in running:
            if each.step >= each.steps * KNOWN_SHARE:
                known.note(each.cell, steps=each.step, seconds=each.for_s)
        if not known._each:
            return None
        ends = []
        for each in running:
            if each.step >= each.steps * KNOWN_SHARE:
                ends.append(each.for_s * (each.steps - each.step) / each.step)
            else:
                ends.append(max(0.0, (known.expected_s(each.cell, steps=each.steps) or 0.0) - each.for_s))
        ends += [0.0] * max(0, lanes - len(ends))
        heapq.heapify(ends)
        for cell, steps in waiting:
            heapq.heapreplace(ends, ends[0] + (known.expected_s(cell, steps=steps) or 0.0))
        return max(ends)


def _likeness(cell: Cell, other: Cell) -> tuple[int, int]:
    ours = set(cell.at)
    same = [axis for axis, value in other.at if (axis, value) in ours]
    return sum(axis in FILES for axis in same), len(same)
