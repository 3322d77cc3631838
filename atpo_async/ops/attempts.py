"""One attempt of a role: its files, how and why it ended; and when a role that crashed is started again or given up."""

from __future__ import annotations

import collections
import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atpo_async.config import SupervisorConfig
from atpo_async.core.texts import middle_cut
from atpo_async.ops.exits import DOING, ERROR_PREFIX, EXIT_CRASH, EXIT_DONE, EXIT_USER
from atpo_async.run.files import last_lines
from atpo_async.run.processes import signal_name

LOG_LINES = 20
"""Lines of a crashed role's log in the error."""

REASON_CHARACTERS = 2000
"""Of the reason for which a role ended; its log has the rest."""


@dataclass(kw_only=True)
class Attempt:
    """One attempt of a role, under way or just ended."""

    role: str
    handle: Any
    """The launcher's handle of it."""
    mark: str
    log: Path
    error_file: Path
    hung: str = ""
    """Why the supervisor ended it, where it did."""

    def ending(self, code: int) -> Ending:
        """How it ended, once its first process has, with ``code`` (-n: killed by signal n)."""
        if self.hung:
            return Ending(code=code, reason=middle_cut(self.hung, REASON_CHARACTERS))
        # What the role has written comes first: a program in between (accelerate) changes the exit code.
        told = self._told() if code != EXIT_DONE else None
        ending = told or self._untold(code)
        return Ending(code=ending.code, reason=middle_cut(ending.reason, REASON_CHARACTERS))

    def _told(self) -> Ending | None:
        """The ending that the role has written into its error file."""
        try:
            said = json.loads(self.error_file.read_text(encoding="utf-8"))
            return Ending(code=int(said["code"]), reason=str(said["error"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _untold(self, code: int) -> Ending:
        doing = self._was_doing()
        if code < 0:
            return Ending(code=code, reason=f"killed by {signal_name(-code)}{doing}")
        if doing and not self.error_file.exists():
            # The process ended in the middle of its environment's code, so that its exit code means nothing.
            return Ending(code=EXIT_CRASH, reason=f"it ended without an error message, as by os._exit(){doing}")
        if code == EXIT_DONE:
            return Ending(code=code)
        lines = last_lines(self.log, LOG_LINES)
        said_last = next((line for line in reversed(lines) if line.startswith(ERROR_PREFIX)), None)
        if said_last is not None:
            return Ending(code=code, reason=said_last.removeprefix(ERROR_PREFIX))
        if code == EXIT_USER and lines:
            return Ending(code=code, reason=lines[-1])
        return Ending(code=code, reason=f"exit code {code}")

    def _was_doing(self) -> str:
        """The calls of its environments that were under way, for the end of a sentence; empty where there were none."""
        found = []
        # One file an environment; the first has no number.
        first = self.error_file.with_suffix(DOING)
        for file in (first, *sorted(first.parent.glob(f"{first.stem}.[0-9]*{DOING}"))):
            with contextlib.suppress(OSError, ValueError):
                found.append(file.read_text(encoding="utf-8").strip())
        said = ", and ".join(filter(None, found))
        return f"; its environment was at {said}" if said else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How an attempt ended."""

    code: int
    """As in ``exits``; -n where signal n killed it."""
    reason: str = ""
    """In a line; empty where its work was done."""
    lost: bool = False
    """Its machine is gone: no crash of the role."""


class Crashes:
    """The crashes of one role within ``supervisor.restart_window_s``.

    Args:
        settings: how many are too many, and the back-off.
    """

    def __init__(self, settings: SupervisorConfig) -> None:
        self._settings = settings
        self._times: collections.deque[float] = collections.deque()

    def add(self, now: float) -> None:
        """Count a crash at ``now`` (seconds, monotonic)."""
        self._times.append(now)
        while self._times and now - self._times[0] > self._settings.restart_window_s:
            self._times.popleft()

    @property
    def too_many(self) -> bool:
        return len(self._times) > self._settings.max_restarts

    @property
    def pause_s(self) -> float:
        """Before the next attempt."""
        return backoff_s(len(self._times), self._settings)

    def given_up(self, attempt: Attempt, reason: str) -> str:
        """The message of a run that ends because of these crashes, with the last lines of the log."""
        lines = "\n".join(f"  | {line}" for line in last_lines(attempt.log, LOG_LINES)) or "  | (its log is empty)"
        return (
            f"{attempt.role} crashed {len(self._times)} times within {self._settings.restart_window_s:g} s "
            f"(supervisor.max_restarts = {self._settings.max_restarts}): {reason}\n"
            f"last lines of {attempt.log}:\n{lines}"
        )


def backoff_s(crashes: int, settings: SupervisorConfig) -> float:
    """Seconds before the restart after the ``crashes``-th crash (from 1) of the window: doubling, with a limit."""
    return min(settings.backoff_s * 2.0 ** (crashes - 1), settings.max_backoff_s)
