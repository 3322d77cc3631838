"""The launcher ``processes``: each role is a process of this machine, in a session of its own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import sys
from collections.abc import Sequence

from atpo_async.core.errors import SetupError
from atpo_async.ops.launchers.base import RoleUsage, StartOrder
from atpo_async.run import processes


class LocalRole:
    """A role's first process."""

    def __init__(self, process: asyncio.subprocess.Process, mark: str) -> None:
        self._process = process
        self.pid = process.pid
        self.mark = mark

    async def wait(self) -> int:
        return await self._process.wait()

    def ask_to_end(self, pids: Sequence[int]) -> None:
        # The role alone is asked: it ends its engine itself, or `ProcessLauncher.kill` does.  A program in between that
        # is asked (accelerate) gives its ranks 30 s and no more to save.
        for pid in pids or (self.pid,):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGTERM)


class ProcessLauncher:
    """Starts, observes and ends processes of this machine.  ``run.processes`` decides which belong to a role."""

    async def start(self, order: StartOrder) -> LocalRole:
        tie = functools.partial(processes.die_with_parent, parent_pid=os.getpid())
        with order.log.open("xb") as output:
            try:
                process = await asyncio.create_subprocess_exec(
                    *order.argv,
                    env=order.env,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=asyncio.subprocess.STDOUT,
                    start_new_session=True,
                    # A program in between that is not ours (accelerate) must end with us as well.
                    preexec_fn=tie if sys.platform.startswith("linux") else None,
                )
            except OSError as exc:
                raise SetupError(f"{order.role} cannot be started: {order.argv[0]}: {exc.strerror}") from exc
        return LocalRole(process, order.mark)

    async def kill(self, handles: Sequence[LocalRole]) -> None:
        # Together: one after the other, many roles that do not end would keep the user waiting.
        await asyncio.to_thread(processes.kill_roles, {handle.pid: handle.mark for handle in handles})

    def usage(self, handles: Sequence[LocalRole]) -> list[RoleUsage | None]:
        running = processes.processes()
        found: list[RoleUsage | None] = []
        for handle in handles:
            family = [p.pid for p in processes.members(handle.pid, running)]
            found.append(
                RoleUsage(
                    processor_s=processes.processor_s(family),
                    moved_mb=processes.moved_mb(family),
                    stopped=tuple(processes.stopped([handle.pid])),
                )
            )
        return found

    def memory_mb(self, handles: Sequence[LocalRole]) -> list[float | None]:
        running = processes.processes()
        return [
            processes.memory_mb(p.pid for p in processes.members(handle.pid, running)) or None for handle in handles
        ]
