"""Watches the roles of a run, by their status files and their launcher's reports, and ends a role that hangs."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from atpo_async.core.texts import of_error
from atpo_async.ops.attempts import Attempt
from atpo_async.ops.launchers.base import Launcher
from atpo_async.run import processes
from atpo_async.status import snapshot
from atpo_async.status.hangs import ObservedRole, Verdict, Watch
from atpo_async.status.reporter import EVERY_S
from atpo_async.status.snapshot import StatusSnapshot
from atpo_async.status.wording import status_lines

T = TypeVar("T")


@dataclass
class RoleWatch:
    """The roles that run, as observed from outside their processes.

    Args:
        folder: of the run's status files.
        launcher: that started them.
        attempts: role -> its attempt that runs; changes as roles end and start.
        say: one line to the user.
    """

    folder: Path
    launcher: Launcher[Any]
    attempts: Mapping[str, Attempt]
    say: Callable[[str], None]
    _trouble: str = ""
    """The launcher's error that was last reported; empty where it had none."""

    def observe(self) -> tuple[list[ObservedRole], list[StatusSnapshot]]:
        """The roles; and the status of others that take part in the run (actors that joined by hand).  Reads files."""
        statuses, _ = snapshot.read(self.folder)
        attempts = list(self.attempts.values())
        found = []
        for attempt, usage in zip(attempts, self._told(attempts, self.launcher.usage), strict=True):
            # Of several ranks one may have ended before the others.
            own = tuple(s for s in statuses.values() if s.mark == attempt.mark and s.phase != snapshot.ENDED)
            here = {s.pid for s in own if snapshot.is_alive(s)}
            found.append(
                ObservedRole(
                    role=attempt.role,
                    statuses=own,
                    stopped=tuple(sorted({*processes.stopped(here), *(usage.stopped if usage is not None else ())})),
                    usage_known=usage is not None,
                    processor_s=usage.processor_s if usage is not None else 0.0,
                    moved_mb=usage.moved_mb if usage is not None else 0.0,
                )
            )
        seen = {status.role for role in found for status in role.statuses}
        return found, [s for s in statuses.values() if s.role not in seen and snapshot.is_alive(s) is not False]

    def _told(
        self, attempts: Sequence[Attempt], ask: Callable[[Sequence[Any]], Sequence[T | None]]
    ) -> Sequence[T | None]:
        """The launcher's report of each; None where it has none."""
        try:
            return ask([attempt.handle for attempt in attempts])
        # The run must not end because its processes cannot be seen.
        except Exception as exc:
            if not self._trouble:
                self._trouble = of_error(exc)
                self.say(f"the launcher cannot tell what the roles' processes do: {self._trouble}")
            return [None] * len(attempts)

    def working_pids(self) -> dict[str, list[int]]:
        """Role -> its ranks, for roles whose first process only starts them (accelerate)."""
        found: dict[str, list[int]] = {}
        statuses, _ = snapshot.read(self.folder)
        for attempt in list(self.attempts.values()):
            pids = [s.pid for s in statuses.values() if s.mark == attempt.mark and snapshot.is_alive(s) is not False]
            if pids and attempt.handle.pid not in pids:
                found[attempt.role] = pids
        return found

    def memory(self) -> dict[str, float]:
        """``memory/<role>_mb`` of each role, summed over its processes."""
        attempts = list(self.attempts.values())
        sizes = self._told(attempts, self.launcher.memory_mb)
        return {
            f"memory/{attempt.role}_mb": round(size, 1)
            for attempt, size in zip(attempts, sizes, strict=True)
            if size is not None
        }

    def status_lines(self) -> list[str]:
        """The status of every role, in lines."""
        statuses, damaged = snapshot.read(self.folder)
        lines = [line for name in sorted(statuses) for line in status_lines(statuses[name])]
        return lines + [f"{name}: {fault}" for name, fault in damaged.items()]


class HangWatch:
    """Reports which role waits for which when that takes long, and ends a role that hangs.

    Args:
        roles: that are looked at.
        deadline_s: of ``links``: when a wait is reported.
        hang_s: when a role is ended.
        restarts: role that has ended -> seconds until it is started again.
        end: ends a role that hangs, which its supervisor then starts again.
        say: one line to the user.
    """

    def __init__(
        self,
        roles: RoleWatch,
        *,
        deadline_s: float,
        hang_s: float,
        restarts: Callable[[], Mapping[str, float]],
        end: Callable[[Verdict], Awaitable[None]],
        say: Callable[[str], None],
    ) -> None:
        self._roles = roles
        self._every_s = min(EVERY_S, deadline_s / 4, hang_s / 4)
        self._watch = Watch(deadline_s=deadline_s, hang_s=hang_s, every_s=self._every_s)
        self._restarts = restarts
        self._end = end
        self._say = say
        self._failed = False

    async def run(self) -> None:
        """Waits for: nothing but the clock.  Ended by: being cancelled."""
        while True:
            await asyncio.sleep(self._every_s)
            for verdict in await self._look():
                if verdict.ends is None:
                    self._say(verdict.line)
                else:
                    await self._end(verdict)

    async def _look(self) -> list[Verdict]:
        try:
            observed, others = await asyncio.to_thread(self._roles.observe)
            return self._watch.look(observed, time.monotonic(), others=others, restarts=self._restarts())
        # The run must not end because of a fault in what watches it.
        except Exception as exc:
            if not self._failed:
                self._say(f"hangs cannot be looked for: {type(exc).__name__}: {exc}")
            self._failed = True
            return []


def write_hang_report(attempt: Attempt, verdict: Verdict, status: Sequence[str]) -> Path:
    """Beside the log of an attempt that hangs: why it is ended, and the status of every role."""
    report = attempt.log.with_suffix(".stuck.txt")
    with contextlib.suppress(OSError):
        report.write_text("\n".join([verdict.line, *status]) + "\n", encoding="utf-8")
    return report
