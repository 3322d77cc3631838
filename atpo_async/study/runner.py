"""Runs a study's cells: side by side, each an `atpo train` of its own, of which nothing is left when it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from atpo_async.config import Config
from atpo_async.core.errors import AtpoError, ConfigError, SetupError
from atpo_async.ops import stopping
from atpo_async.ops.exits import ERROR_PREFIX, EXIT_USER
from atpo_async.ops.orphans import end_orphans
from atpo_async.run import launch, processes, scratch
from atpo_async.run.files import last_lines, write_atomic
from atpo_async.run.metrics import MetricsTail, Record, read_metrics
from atpo_async.run.rundir import RunDir
from atpo_async.study.cells import Cell, CellResult, curve_of, figures_of, tokens_of, unfinished
from atpo_async.study.folder import StudyFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A cell to be run."""

    cell: Cell
    config: Config
    """Of the run: where the grid has lags, ``cell.lag`` steps longer than the study's."""
    folder: StudyFolder


EXIT_INTERRUPTED = 130
"""Of `atpo train`, when a signal stopped it."""

LOOK_S = 0.3
"""Between two reads of a cell's metrics."""
STOP_S = 10.0
"""For a cell's command to stop all its roles after it was asked to; then all its processes are killed."""
RELEASE_S = 20.0
"""For an interrupted cell's last processes to let go of its run folder, when the study starts again."""

OnStep = Callable[[int, float | None], None]
"""Called with the progress of a running cell: (steps done, last sampled success)."""


class CellRefused(SetupError):
    """A cell ended with what only the user can mend.

    Args:
        result: of the cell.
        log: of it.
    """

    def __init__(self, result: CellResult, log: Path) -> None:
        super().__init__(f"cell {result.cell.label}: {result.reason}  (log: {log})")
        self.result = result
        self.log = log


MOST_ALIKE = 3
"""Cells in a row that end with the same fault, which only the user can mend: it is that of all cells, and the study
ends.  One value of an axis that is at fault costs its own cells."""


class Runner(Protocol):
    """Runs one cell to its end; cancelled, it leaves nothing of it running.

    Raises CellRefused for what only the user can mend, SetupError for what ends every other cell alike.
    """

    def __call__(self, job: Job, on_step: OnStep) -> Awaitable[CellResult]: ...


@contextlib.asynccontextmanager
async def held(runner: Runner) -> AsyncIterator[Runner]:
    """The runner; where it is a context, entered and left: so processes that stay from cell to cell are ended."""
    if isinstance(runner, contextlib.AbstractAsyncContextManager):
        async with runner:
            yield runner
    else:
        yield runner


class Watcher(Protocol):
    """Shows what happens."""

    def began(self, cell: Cell, *, steps: int) -> None: ...

    def moved(self, cell: Cell, step: int, success: float | None) -> None: ...

    def ended(self, result: CellResult) -> None: ...


async def run_cells(
    jobs: Sequence[Job], *, runner: Runner, at_once: int, watcher: Watcher, keep: Callable[[CellResult], None]
) -> None:
    """Run cells, ``at_once`` side by side, in order.  Waits for: their ends.  Unblocked by: those, or a cancellation.

    Args:
        keep: called with each result as it comes, before anything is shown of it.

    Raises what a runner raises, but for a cell that only the user can mend: that is kept as failed, and SetupError
    raised where ``MOST_ALIKE`` in a row are; the other cells are stopped first.
    """
    waiting = list(reversed(jobs))
    refused: list[CellRefused] = []

    async def work() -> None:
        while waiting:
            job = waiting.pop()
            watcher.began(job.cell, steps=job.config.run.steps)
            try:
                result = await runner(job, functools.partial(watcher.moved, job.cell))
            except CellRefused as exc:
                result = exc.result
                if refused and _fault(refused[-1]) != _fault(exc):
                    refused.clear()
                refused.append(exc)
            else:
                refused.clear()
            keep(result)
            watcher.ended(result)
            if len(refused) == MOST_ALIKE:
                raise _all_alike(refused)

    if not jobs:
        return
    workers = [asyncio.create_task(work(), name=f"cells {i}") for i in range(min(at_once, len(jobs)))]
    try:
        ended, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        for worker in ended:
            worker.result()
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


def _fault(refused: CellRefused) -> str:
    """What is wrong, without what names the cell."""
    return refused.result.reason.replace(refused.result.cell.name, "")


def _all_alike(refused: Sequence[CellRefused]) -> SetupError:
    last = refused[-1]
    return SetupError(
        f"{len(refused)} cells in a row ended alike, the last of them cell {last.result.cell.label}: "
        f"{last.result.reason}  (log: {last.log}); mend that, and add --retry-failed"
    )


async def until_interrupted(work: Awaitable[None], *, hurry: asyncio.Event, say: Callable[[str], None]) -> bool:
    """Run ``work`` under this process's signals; whether it came to its end.

    The first SIGINT, SIGTERM or SIGHUP cancels it and waits until it has stopped; the second one sets ``hurry``.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    interrupted = False

    def interrupt(signum: int) -> None:
        nonlocal interrupted
        if interrupted:
            hurry.set()
            return
        interrupted = True
        say(stopping.stopping_line(signum))
        task.cancel()

    for signum in stopping.STOP_SIGNALS:
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(signum, interrupt, signum)
    try:
        await task
    except asyncio.CancelledError:
        if not interrupted:
            raise  # our caller is cancelled, not our work
        return False
    finally:
        for signum in stopping.STOP_SIGNALS:
            with contextlib.suppress(NotImplementedError):
                loop.remove_signal_handler(signum)
    return True


def train_command(job: Job) -> list[str]:
    return [*launch.command("atpo_async", "train", str(job.folder.config(job.cell)))]


@dataclass(kw_only=True)
class TrainProcess:
    """A ``Runner``: each cell is an `atpo train` in a session of its own.

    Args:
        hurry: set when cells are to be killed instead of stopping gracefully.
        command: what to start for a job.
        stop_s: for it to end after it was asked to.
    """

    hurry: asyncio.Event = field(default_factory=asyncio.Event)
    command: Callable[[Job], Sequence[str]] = train_command
    stop_s: float = STOP_S
    clock: Callable[[], float] = time.monotonic

    async def __call__(self, job: Job, on_step: OnStep) -> CellResult:
        await clear_run(job.folder.run(job.cell))
        write_atomic(job.folder.config(job.cell), json.dumps(job.config.model_dump(mode="json"), indent=1) + "\n")
        mark = f"study/{os.getpid()}/{job.cell.name}/{os.urandom(4).hex()}"
        began = self.clock()
        with job.folder.log(job.cell).open("wb") as output:
            process = await _spawn(self.command(job), mark=mark, output=output)
        try:
            await self._watch(process, job, on_step)
        finally:
            # Cancelled again, it still stops what it has started: the shield keeps that going to its end.
            await asyncio.shield(asyncio.ensure_future(self._end(process, mark, job)))
        seconds = self.clock() - began
        if process.returncode:
            is_users = process.returncode == EXIT_USER
            failed = CellResult(
                cell=job.cell,
                status="failed",
                reason=_error_line(job) if is_users else _why(process.returncode, job),
                figures={"seconds": round(seconds, 1)},
                in_process=False,
            )
            if is_users:
                raise CellRefused(failed, job.folder.log(job.cell))
            return failed
        return await asyncio.to_thread(read_result, job, seconds, in_process=False)

    async def _watch(self, process: asyncio.subprocess.Process, job: Job, on_step: OnStep) -> None:
        """Pass the run's steps on.  Waits for: the process.  Unblocked by: its end."""
        tail = MetricsTail(job.folder.run(job.cell) / "metrics.jsonl")
        ended = asyncio.ensure_future(process.wait())
        step, success = 0, None
        try:
            while not ended.done():
                await asyncio.wait({ended}, timeout=LOOK_S)
                for record in tail.new():
                    step = max(step, record.step) if record.source == "learner" else step
                    success = record.metrics.get("train/success", success)
                on_step(step, success)
        finally:
            ended.cancel()

    async def _end(self, process: asyncio.subprocess.Process, mark: str, job: Job) -> None:
        """Leave nothing of a cell running.  Waits for: its command's own stop.  Unblocked by: ``stop_s``, ``hurry``."""

        def kill() -> None:
            # The roles' own marks too: a command that was killed no longer ties them to its session by descent.
            processes.kill_roles({process.pid: mark} | _roles(job.folder.run(job.cell)))

        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            ended = asyncio.ensure_future(process.wait())
            hurry = asyncio.ensure_future(self.hurry.wait())
            await asyncio.wait({ended, hurry}, timeout=self.stop_s, return_when=asyncio.FIRST_COMPLETED)
            hurry.cancel()
            if not ended.done():
                await asyncio.to_thread(kill)
            await ended
        await asyncio.to_thread(kill)
        await asyncio.to_thread(_clear_shared_memory, job.folder.run(job.cell))


def _roles(run: Path) -> dict[int, str]:
    """Process -> mark of the roles of a run that still run."""
    with contextlib.suppress(AtpoError, OSError):
        sign = RunDir.open(run).run_id
        logs = [log.name.rsplit(".", 2) for log in (run / "logs").glob("*.*.log")]
        marks = [f"{sign}/{role}/{attempt}" for role, attempt, _ in logs]
        return {process.pid: mark for mark in marks for process in processes.marked(mark)}
    return {}


async def _spawn(argv: Sequence[str], *, mark: str, output: Any) -> asyncio.subprocess.Process:
    tie = functools.partial(processes.die_with_parent, parent_pid=os.getpid())
    return await asyncio.create_subprocess_exec(
        *argv,
        env={**os.environ, processes.ROLE_MARK: mark},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=output,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=tie if sys.platform.startswith("linux") else None,
    )


async def clear_run(run: Path) -> None:
    """Remove what an interrupted cell left.  Waits for: its last processes to let go of it.  Unblocked by: their end.

    Raises SetupError where they hold it past ``RELEASE_S``.
    """
    if not await asyncio.to_thread(run.exists):
        return
    deadline = time.monotonic() + RELEASE_S
    while True:
        try:
            rundir = RunDir.open(run)
            with rundir.locked():
                await asyncio.to_thread(end_orphans, rundir)
                break
        except ConfigError:
            break  # damaged, for instance by unknown fields: no process can hold it as a run
        except SetupError as exc:
            if not (run / "run.json").is_file():
                break
            if time.monotonic() > deadline:
                raise SetupError(f"an interrupted cell still runs: {exc}") from None
        await asyncio.sleep(0.2)
    await asyncio.to_thread(_clear_shared_memory, run)
    await asyncio.to_thread(shutil.rmtree, run)


def _clear_shared_memory(run: Path) -> None:
    """A learner that was killed leaves its weights there."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        scratch.clear(str(json.loads((run / "run.json").read_text(encoding="utf-8"))["run_id"]))


def read_result(job: Job, seconds: float, *, in_process: bool) -> CellResult:
    """Of a run that ended without an error: done if its metrics say so."""
    records: list[Record] = list(read_metrics(job.folder.run(job.cell) / "metrics.jsonl"))
    lag = job.cell.lag or 0
    steps = job.config.run.steps - lag
    reason = unfinished(records, steps=steps, lag=job.cell.lag, evaluates=job.config.eval.at_end)
    curve = curve_of(records, steps=steps)
    return CellResult(
        cell=job.cell,
        status="done" if reason is None else "failed",
        reason=reason or "",
        figures=figures_of(records, steps=steps, lag=lag) | {"seconds": round(seconds, 1)},
        curve=curve,
        tokens=tokens_of(records, curve),
        in_process=in_process,
    )


def _error_line(job: Job) -> str:
    """The last line of a cell's log that says what went wrong."""
    lines = [line.strip() for line in last_lines(job.folder.log(job.cell), 60) if line.strip()]
    found = next((line for line in reversed(lines) if line.startswith(ERROR_PREFIX)), None)
    return found.removeprefix(ERROR_PREFIX) if found else (lines[-1] if lines else "its log is empty")


def _why(code: int, job: Job) -> str:
    if code < 0:
        hint = ", out of memory?" if -code == signal.SIGKILL else ""
        return f"killed by {processes.signal_name(-code)}{hint}"
    if code == EXIT_INTERRUPTED:
        return "its command was stopped from outside"
    # Of the supervisor's message: which role, and why.
    return re.sub(r"^(\S+) crashed \d+ times within [^)]*\): ", r"\1: ", _error_line(job))
