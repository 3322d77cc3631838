"""Runs a study's cells in worker processes that stay: each runs one cell after another, all of a cell in one process.

A worker is `python -m inprocess`; it is handed a cell's configuration as a line of JSON and reports its steps and its
end in the same way.  One that crashes costs its cell, which says why; the next cell gets a new one.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from atpo_async.run import launch
from atpo_async.run.files import last_lines, write_atomic
from atpo_async.study.cells import CellResult
from atpo_async.study.runner import CellRefused, Job, OnStep, clear_run, read_result
from atpo_async.study.workers.worker import Worker, WorkerLost


def worker_command() -> Sequence[str]:
    return launch.command("inprocess")


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
            failed = self._failed(job, str(ended["failed"]), began)
            if ended.get("user"):
                raise CellRefused(failed, job.folder.log(job.cell))
            return failed
        return await asyncio.to_thread(read_result, job, self.clock() - began, in_process=True)

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
        return CellResult(cell=job.cell, status="failed", reason=reason, figures={"seconds": seconds}, in_process=True)

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
