"""Waits that have a name and a deadline."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from atpo_async.errors import WaitTimeout


class Deadlines(Protocol):
    """``links.deadline_s`` and ``links.give_up_s``, wherever they are kept."""

    @property
    def deadline_s(self) -> float: ...

    @property
    def give_up_s(self) -> float: ...


class Patience:
    """One wait: past ``deadline_s`` it is logged who waits for what and since when; past ``give_up_s`` without anything
    having moved it ends loudly.

    Args:
        who, what: for the log and the error.
        deadlines: seconds.
        clock: seconds, monotonic.
        log: where the warnings go.
    """

    def __init__(
        self, who: str, what: str, deadlines: Deadlines, clock: Callable[[], float], *, log: logging.Logger
    ) -> None:
        self._who = who
        self._what = what
        self._deadlines = deadlines
        self._clock = clock
        self._log = log
        self._began = self._warned = self._moved = clock()

    def again(self, reason: str) -> None:
        """Called at every fruitless turn.  Raises WaitTimeout once nothing has ``moved`` for ``give_up_s``."""
        now = self._clock()
        if now - self._moved > self._deadlines.give_up_s:
            raise WaitTimeout(
                f"{self._who} waited {now - self._moved:.0f} s for {self._what} (links.give_up_s): {reason}"
            )  # fmt: skip
        if now - self._warned > self._deadlines.deadline_s:
            self._warned = now
            self._log.warning("%s has waited %.0f s for %s: %s", self._who, now - self._began, self._what, reason)

    def moved(self) -> None:
        """Something came: it may take as long again.  The log goes on counting from the beginning."""
        self._moved = self._clock()
