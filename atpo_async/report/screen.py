"""A console on which something is redrawn in place while lines scroll by above it; off a terminal the lines alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Self

from rich.console import Console


class Redrawn(Protocol):
    """What rich redraws: a ``Live`` or a ``Progress``."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


class Screen:
    """Use as a context: ``redrawn`` is on the terminal in the meantime.

    Args:
        redrawn: None off a terminal.
        clock: seconds.
    """

    def __init__(self, console: Console, redrawn: Redrawn | None, *, clock: Callable[[], float]) -> None:
        self._console = console
        self._redrawn = redrawn
        self._clock = clock
        self._began = clock()

    def __enter__(self) -> Self:
        if self._redrawn is not None:
            self._redrawn.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._redrawn is not None:
            self._redrawn.stop()

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._began

    def say(self, line: str) -> None:
        """Print a line as it is, however long."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
