"""Reports on an environment's calls: lines for the user and the log, and a file that names the call in progress."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from pathlib import Path

from atpo_async.core.texts import of_error
from atpo_async.ops import notices

log = logging.getLogger("atpo.actor.environment")

MAKE = "make"
"""Name of the call that makes the environment: it may load for long, and holds up no other call."""


class Reporting:
    """Reports on one environment.

    Args:
        name: ``environment.name``.
        doing: a file that names the call in progress, for the supervisor if the process dies.
    """

    def __init__(self, name: str, doing: Path | None) -> None:
        self._name = name
        self._file = os.open(doing, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600) if doing is not None else -1
        self._writing = threading.Lock()
        self._held_up_reported = False
        self.failed_closes = 0

    def begins(self, what: str) -> None:
        """A call begins, or with an empty text none is under way.  In the environment's thread, which may go on after
        ``close``."""
        with self._writing, contextlib.suppress(OSError):
            if self._file >= 0:
                os.pwrite(self._file, what.encode()[:255].ljust(256), 0)

    def held_up(self, what: str, took_s: float) -> None:
        """In the environment's thread.  Reports the first call that blocks on the user's terminal, others in the log:
        no limit is exceeded, so that nothing else would show why the run is slow."""
        said = (
            f"environment {self._name!r}: {what} held up its event loop for {took_s:.1f} s, and the environment's "
            "other calls with it; use await asyncio.to_thread(...) for what blocks"
        )
        if what == MAKE or self._held_up_reported:
            log.warning("%s", said)
            return
        self._held_up_reported = True
        notices.post(said, f"{self._name} held up")

    def failed_close(self, what: str, error: Exception) -> None:
        """The first one is reported on the user's terminal; of many others not all are logged."""
        self.failed_closes += 1
        said = f"environment {self._name!r}: {what} failed, the branch counts all the same"
        if self.failed_closes == 1:
            notices.post(f"{said} (environment/closes_failed): {of_error(error)}", f"{self._name} close")
        elif self.failed_closes & (self.failed_closes - 1) == 0:
            log.warning("%s (%d so far): %s", said, self.failed_closes, of_error(error))

    def failed_snapshot(self, what: str, error: Exception, *, count: int, given_up: bool) -> None:
        """The first one is reported on the user's terminal, and that no more are made; of many others not all are
        logged."""
        said = f"environment {self._name!r}: {what} failed, the branches there are replayed"
        if given_up:
            said += "; as many failed in a row, no more are made"
        if count == 1 or given_up:
            key = f"{self._name} snapshots {'given up' if given_up else 'failed'}"
            notices.post(f"{said} (environment/snapshots_failed): {of_error(error)}", key)
        elif count & (count - 1) == 0:
            log.warning("%s (%d so far): %s", said, count, of_error(error))

    def close(self) -> None:
        with self._writing:
            if self._file >= 0:
                os.ftruncate(self._file, 0)
                os.close(self._file)
                self._file = -1
