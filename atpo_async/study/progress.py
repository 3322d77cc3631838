"""The display of a study in progress: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from atpo_async.report.progress import duration
from atpo_async.report.screen import Screen
from atpo_async.study.cells import Cell, CellResult
from atpo_async.study.pace import Pace, Running

PLAIN_EVERY_S = 20.0


@dataclass
class _Running:
    began: float
    steps: int
    step: int = 0
    success: float | None = None
    bar: TaskID | None = None


class StudyProgress(Screen):
    """A ``study.Watcher``.  Use as a context.

    Args:
        waiting: (cell, steps) of those that are to run, in their order.
        total: cells of the study; ``done`` of them ended before.
        later: of those, cells that run after these.
        at_once: cells side by side.
        pace: of cells that ended before.
    """

    def __init__(
        self,
        console: Console,
        *,
        waiting: Sequence[tuple[Cell, int]],
        total: int,
        done: int,
        at_once: int,
        later: Sequence[tuple[Cell, int]] = (),
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._done, self._at_once = total, done, at_once
        self._said_at = clock()
        self._running: dict[Cell, _Running] = {}
        self._waiting = dict(waiting)
        self._later = list(later)
        self._before = pace or Pace()
        self._pace = Pace()
        self._bars: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[note]}", style="dim"),
            )
            self._bars = Progress(*columns, console=console, transient=True)
            self._all = self._bars.add_task("[bold]cells", total=total, completed=done, note="")
        super().__init__(console, self._bars, clock=clock)

    def began(self, cell: Cell, *, steps: int) -> None:
        running = self._running[cell] = _Running(self._clock(), steps)
        self._waiting.pop(cell, None)
        if self._bars is not None:
            running.bar = self._bars.add_task(cell.label, total=steps, note="starting")

    def moved(self, cell: Cell, step: int, success: float | None) -> None:
        running = self._running[cell]
        running.step, running.success = step, success
        if self._bars is not None and running.bar is not None:
            note = "starting" if not step else "" if success is None else f"success {success:.2f}"
            self._bars.update(running.bar, completed=step, note=note)
            self._bars.update(self._all, completed=self._done, note=self._left())
        elif self._clock() - self._said_at >= PLAIN_EVERY_S:
            self._said_at = self._clock()
            self.say(self.line())

    def ended(self, result: CellResult) -> None:
        running = self._running.pop(result.cell)
        self._done += 1
        if result.status == "done":
            self._pace.note(result.cell, steps=running.steps, seconds=self._clock() - running.began)
        if self._bars is not None and running.bar is not None:
            self._bars.remove_task(running.bar)
            self._bars.update(self._all, completed=self._done, note=self._left())
        left = self._left()
        self.say(f"[{self._done}/{self._total}] {outcome(result)}{f'  {left}' if left else ''}")
        self._said_at = self._clock()

    def line(self) -> str:
        """The progress of each running cell and of the study."""
        parts = [f"{self._done}/{self._total} cells"]
        for cell, running in self._running.items():
            at = f"step {running.step}/{running.steps}" if running.step else "starting"
            success = "" if running.success is None else f", success {running.success:.2f}"
            parts.append(f"{cell.label}: {at}{success}")
        left = self._left()
        return "; ".join([*parts, left] if left else parts)

    def left_s(self) -> float | None:
        """Seconds to the end at the pace so far, of this start where it is known, else of those before; or None."""
        now = self._clock()
        running = [
            Running(cell=cell, steps=each.steps, step=each.step, for_s=now - each.began)
            for cell, each in self._running.items()
        ]
        waiting = [*self._waiting.items(), *self._later]
        found = self._pace.left_s(running, waiting, lanes=self._at_once)
        return found if found is not None else self._before.left_s(running, waiting, lanes=self._at_once)

    def _left(self) -> str:
        left = self.left_s()
        return "" if not left else f"about {duration(left)} left"


def outcome(result: CellResult) -> str:
    """One line."""
    seconds = result.figures.get("seconds")
    took = "" if seconds is None else f"  ({seconds:.0f} s)"
    if result.status == "failed":
        return f"{result.cell.label}: FAILED, {result.reason}{took}"
    shown = [f"{key} {result.figures[key]:.2f}" for key in ("sampled", "greedy") if key in result.figures]
    return f"{result.cell.label}: {', '.join(shown) or 'no figures'}{took}"
