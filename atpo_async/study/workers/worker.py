"""A process that stays: it is told facts as lines of JSON, and reports facts in the same way."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atpo_async.run import processes

END_S = 5.0
"""For a worker to end after its input was closed; then it is killed."""

MOST_LINE_BYTES = 1 << 20
"""Of what a worker reports at once."""


class WorkerLost(Exception):
    """A worker ended in the middle of a cell."""


@dataclass(eq=False, slots=True)
class Worker:
    """One process, and what it is told and reports."""

    process: asyncio.subprocess.Process

    @classmethod
    async def start(cls, command: Sequence[str]) -> Worker:
        """Tied to this process's life: by the end of its input, and on Linux by the kernel."""
        tie = functools.partial(processes.die_with_parent, parent_pid=os.getpid())
        mark = f"study/{os.getpid()}/worker/{os.urandom(4).hex()}"
        process = await asyncio.create_subprocess_exec(
            *command,
            env={**os.environ, processes.ROLE_MARK: mark},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            limit=MOST_LINE_BYTES,
            preexec_fn=tie if sys.platform.startswith("linux") else None,
        )
        return cls(process)

    async def tell(self, fact: dict[str, Any]) -> None:
        """Raises WorkerLost."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(fact).encode() + b"\n")
            await self.process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            raise await self._lost() from None

    async def heard(self) -> dict[str, Any]:
        """The next line.  Waits for: the worker.  Raises WorkerLost where it ended, or reports what is no fact."""
        assert self.process.stdout is not None
        try:
            line = await self.process.stdout.readline()
            if not line:
                raise await self._lost()
            found = json.loads(line)
            if not isinstance(found, dict):
                raise ValueError(f"{found!r} is no object")
            return found
        except ValueError as exc:
            raise WorkerLost(f"its process reports what is not understood: {exc}") from None

    async def _lost(self) -> WorkerLost:
        code = await self.process.wait()
        if code < 0:
            hint = ", out of memory?" if -code == signal.SIGKILL else ""
            return WorkerLost(f"its process was killed by {processes.signal_name(-code)}{hint}")
        return WorkerLost(f"its process ended with code {code}")

    async def close(self, *, at_once: bool) -> None:
        """Leave nothing of it.  Waits for: its end.  Unblocked by: ``END_S``."""
        if self.process.returncode is None:
            if at_once:
                self._kill()
            elif self.process.stdin is not None:
                self.process.stdin.close()
            try:
                await asyncio.wait_for(self.process.wait(), END_S)
            except TimeoutError:
                self._kill()
                await self.process.wait()
        # What an environment has started in its session.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
