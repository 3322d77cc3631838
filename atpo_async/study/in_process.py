"""Runs a study's cells in worker processes that stay: each runs one cell after another, all of a cell in one process.

A worker is `python -m inprocess`; it is handed a cell's configuration as a line of JSON and reports its steps and its
end in the same way.  One that crashes costs its cell, which says why; the next cell gets a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from atpo_async.core.errors import SetupError
from atpo_async.run import launch, processes
from atpo_async.run.files import last_lines, write_atomic
from atpo_async.study.cells import CellResult
from atpo_async.study.runner import Job, OnStep, clear_run, read_result

END_S = 5.0
"""For a worker to end after its input was closed; then it is killed."""

MOST_LINE_BYTES = 1 << 20
"""Of what a worker reports at once."""


def worker_command() -> Sequence[str]:
    return launch.command("inprocess")


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


@dataclass(kw_only=True)
class InProcess:
    """A ``Runner`` of workers that stay; use it as a context, at whose end none of them is left.

    Args:
        command: what starts a worker.
    """

    command: Callable[[], Sequence[str]] = worker_command
    clock: Callable[[], float] = time.monotonic
    _idle: list[Worker] = field(default_factory=list, init=False)
    _all: set[Worker] = field(default_factory=set, init=False)

    async def __aenter__(self) -> InProcess:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.gather(*(worker.close(at_once=worker not in self._idle) for worker in self._all))
        self._all.clear()
        self._idle.clear()

    async def __call__(self, job: Job, on_step: OnStep) -> CellResult:
        await clear_run(job.folder.run(job.cell))
        config = job.config.model_dump(mode="json")
        write_atomic(job.folder.config(job.cell), json.dumps(config, indent=1) + "\n")
        write_atomic(job.folder.log(job.cell), "")
        began = self.clock()
        worker = await self._worker()
        try:
            await worker.tell({"config": config, "log": str(job.folder.log(job.cell).resolve())})
            ended = await self._watch(worker, on_step)
        except WorkerLost as exc:
            await self._give_up(worker)
            return self._failed(job, f"{exc}{_last_line(job)}", began)
        except BaseException:
            # The cell is given up, and with it the worker that is in the middle of it.
            await asyncio.shield(asyncio.ensure_future(self._give_up(worker)))
            raise
        self._idle.append(worker)
        if "failed" in ended:
            if ended.get("user"):
                raise SetupError(f"cell {job.cell.label}: {ended['failed']}  (log: {job.folder.log(job.cell)})")
            return self._failed(job, str(ended["failed"]), began)
        return await asyncio.to_thread(read_result, job, self.clock() - began)

    async def _watch(self, worker: Worker, on_step: OnStep) -> dict[str, Any]:
        """The last line about a cell.  Waits for: the worker.  Raises WorkerLost."""
        while True:
            fact = await worker.heard()
            if "ended" in fact or "failed" in fact:
                return fact
            if isinstance(step := fact.get("step"), int):
                success = fact.get("success")
                on_step(step, float(success) if isinstance(success, (int, float)) else None)

    def _failed(self, job: Job, reason: str, began: float) -> CellResult:
        seconds = round(self.clock() - began, 1)
        return CellResult(cell=job.cell, status="failed", reason=reason, figures={"seconds": seconds})

    async def _worker(self) -> Worker:
        if self._idle:
            return self._idle.pop()
        worker = await Worker.start(self.command())
        self._all.add(worker)
        return worker

    async def _give_up(self, worker: Worker) -> None:
        self._all.discard(worker)
        await worker.close(at_once=True)


def _last_line(job: Job) -> str:
    """The end of what a worker has logged about a cell, for the reason that it failed."""
    lines = [line.strip() for line in last_lines(job.folder.log(job.cell), 20) if line.strip()]
    return f"; the last line of its log: {lines[-1]}" if lines else ""
