"""Stopping a run: the signals that ask for it, and how long the supervisor waits for a role that saves its work.

A learner that is asked to end finishes its step where that cannot be given up, and saves a checkpoint; of a large model
that takes minutes.  Its phase is then ``waits.SAVING``, and it is killed only if it makes no progress in it.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

from atpo_async.status.hangs import ObservedRole, WorkMeter
from atpo_async.status.waits import DISK, SAVING, TORCH
from atpo_async.status.wording import duration

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Each of them asks a command to stop, and the second time to end everything at once."""


def again(signum: int) -> str:
    """The words for asking a second time, after ``signum``."""
    return "Ctrl-C again" if signum == signal.SIGINT else f"a second {signal.Signals(signum).name}"


def stopping_line(signum: int) -> str:
    """The line that a command prints when ``signum`` has asked it to stop."""
    asked = "" if signum == signal.SIGINT else f", as {signal.Signals(signum).name} asks"
    return f"stopping{asked}; {again(signum)} ends everything at once"


SAY_S = 2.0
"""Saving that lasts for longer is reported, and again whenever it has lasted twice as long."""

WINDOW_S = 1.0
"""Over which computing and writing are measured."""


@dataclass(slots=True)
class _Memory:
    began: float
    moved_at: float
    done: object
    work: WorkMeter
    told_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Look:
    """What to report about roles that were asked to end, and which of them the supervisor still waits for."""

    waited_for: tuple[str, ...]
    """Roles that save, and make progress in it."""
    lines: tuple[str, ...]
    """For the user."""


@dataclass(slots=True)
class Watch:
    """Judges roles that were asked to end, look after look: which of them still save.

    Args:
        hang_s: the supervisor stops waiting for a role that neither computes nor writes for so long while it saves.
        again: what the user does to end everything at once: ``Ctrl-C again``, ``a second SIGTERM``.
    """

    hang_s: float
    again: str = "Ctrl-C again"
    _roles: dict[str, _Memory] = field(default_factory=dict)

    def look(self, observed_roles: Sequence[ObservedRole], now: float) -> Look:
        """``now``: seconds, monotonic."""
        waited_for: list[str] = []
        lines: list[str] = []
        for observed in observed_roles:
            if not any(status.phase == SAVING for status in observed.statuses):
                continue
            memory = self._remember(observed, now)
            lasts_s, still_s = now - memory.began, now - memory.moved_at
            if still_s > self.hang_s:
                lines.append(
                    f"{observed.role} has stood still for {duration(still_s)} while it saved ({_what(observed)}) and "
                    "is ended; what no checkpoint holds is trained on again"
                )
                continue
            waited_for.append(observed.role)
            if lasts_s >= max(SAY_S, 2 * memory.told_s):
                memory.told_s = lasts_s
                lines.append(
                    f"waiting for {observed.role} to save what was trained: {_what(observed)}, {duration(lasts_s)} so "
                    f"far; {self.again} ends everything at once and loses what no checkpoint holds"
                )
        return Look(tuple(waited_for), tuple(lines))

    def _remember(self, observed: ObservedRole, now: float) -> _Memory:
        done = [(status.progress, status.phase) for status in observed.statuses]
        memory = self._roles.get(observed.role)
        if memory is None:
            memory = self._roles[observed.role] = _Memory(now, now, done, WorkMeter(WINDOW_S))
        if memory.work.is_busy(observed, now) or done != memory.done:
            memory.done, memory.moved_at = done, now
        return memory


def _what(observed: ObservedRole) -> str:
    """What the role is doing, by its longest wait for the disk, or else for torch."""
    waits = [wait for status in observed.statuses for wait in status.waits if wait.on in (DISK, TORCH)]
    waits.sort(key=lambda wait: (not wait.what.startswith("space"), wait.on != DISK, -wait.since_s))
    return waits[0].what if waits else "its last words"
