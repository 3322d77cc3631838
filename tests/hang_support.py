"""Scripted roles that keep a snapshot as real ones do, and snapshots made up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from atpo_async.config import build
from atpo_async.ops.specs import RoleSpec
from atpo_async.run import processes
from atpo_async.run.endpoints import Endpoints
from atpo_async.run.host import host_id
from atpo_async.run.rundir import RunDir
from atpo_async.status import snapshot
from atpo_async.status.hangs import ObservedRole
from atpo_async.status.snapshot import StatusSnapshot, Wait

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 60.0
"""For one wait; far beyond what it takes."""

FRAME = """
import asyncio, os, sys, threading, time
from pathlib import Path
from atpo_async.ops import role
from atpo_async.status import waits

WHO = {role!r}
FLAG = Path(sys.argv[1]) / f"{{WHO}}.flag"

def first_time():
    # Only the first attempt goes wrong.
    if FLAG.exists():
        return False
    FLAG.touch()
    return True

async def main(context):
    print("ready", flush=True)
{body}

role.run(WHO.partition("-")[0], main, [sys.argv[1], "--name", WHO])
"""

SERVES = """
    waits.phase("serving")
    await context.stopping.wait()
"""
WAITS_FOR_THE_BUFFER = """
    waits.phase("working")
    with waits.waiting(WHO, "a batch", on="buffer"):
        await context.stopping.wait()
"""
BLOCKS_ITS_LOOP = """
    waits.phase("working")
    await asyncio.sleep(0)
    if first_time():
        time.sleep(1000)
    print("second attempt", flush=True)
    await context.stopping.wait()
"""


def make_run(folder: Path, **sections: Any) -> RunDir:
    """A run whose deadlines are short."""
    links = {"deadline_s": 1.0, "give_up_s": 1000.0, **sections.pop("links", {})}
    rundir = RunDir.create(build({"run": {"dir": str(folder), "name": "r"}, "links": links, **sections}))
    rundir.write_endpoints(Endpoints("tcp://127.0.0.1:1", "tcp://127.0.0.1:2", "tcp://127.0.0.1:3", ""))
    return rundir


def argv_of(rundir: RunDir, role: str, body: str) -> tuple[str, ...]:
    """The command of a role whose main runs ``body``."""
    code = FRAME.format(role=role, body=textwrap.indent(textwrap.dedent(body).strip("\n"), "    "))
    return (sys.executable, "-c", code, str(rundir.path))


def spec_of(rundir: RunDir, role: str, body: str, **more: bool) -> RoleSpec:
    return RoleSpec(name=role, argv=argv_of(rundir, role, body), env={"PYTHONPATH": str(ROOT)}, **more)


@contextlib.contextmanager
def started(rundir: RunDir, role: str, body: str) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], str]]]:
    """A role by hand: its process, and what it has said so far.  Ended afterwards, whatever it is in."""
    output = rundir.path / f"{role}.output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            argv_of(rundir, role, body),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        )
    try:
        yield process, output.read_text
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait()


def until(condition: Callable[[], object], story: Callable[[], str] = str) -> None:
    """Wait for what another process brings about; a deadline, not a duration."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain:\n{story()}"
        time.sleep(0.02)


async def until_async(condition: Callable[[], object], story: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain:\n{story()}"
        await asyncio.sleep(0.02)


def status_of(rundir: RunDir, role: str) -> StatusSnapshot | None:
    return snapshot.read(rundir.path / snapshot.FOLDER)[0].get(role)


def status(role: str = "learner", **changes: Any) -> StatusSnapshot:
    """One of a role that works well, but for ``changes``."""
    fields: dict[str, Any] = {
        "role": role,
        "mark": f"r/{role}/0",
        "pid": os.getpid(),
        "started": processes.started(os.getpid()) or 0,
        "host": host_id(),
        "hostname": "here",
        "at": time.time(),
        "monotonic_s": time.monotonic(),
        "sequence": 1,
        "phase": "working",
        "phase_s": 100.0,
        "starting": False,
        "still_s": 0.0,
        "loop_age_s": 0.1,
    }
    return StatusSnapshot(**(fields | changes))


def wait(what: str, on: str, since_s: float = 1.0, **more: Any) -> Wait:
    return Wait(who="somebody", what=what, on=on, since_s=since_s, **more)


def observed(
    role: str = "learner", *, processor_s: float = 0.0, stopped: tuple[int, ...] = (), **changes: Any
) -> ObservedRole:
    """A role with one snapshot; ``sequence`` has to rise for it to be a living one."""
    return ObservedRole(role=role, statuses=(status(role, **changes),), processor_s=processor_s, stopped=stopped)
