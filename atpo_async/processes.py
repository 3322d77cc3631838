"""Processes of a role on this machine: who belongs to it, how much memory it takes, ending all of it.

A role's engine has processes of its own; they outlive their parent, and a launcher puts its ranks into other sessions.
So what belongs to a role is told by three signs: the session that the supervisor made for it, descent, and a mark in
the environment that every descendant inherits.  Off Linux only the process group is known.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROLE_MARK = "ATPO_ROLE_MARK"
"""Environment variable that says which attempt of which role of which run a process belongs to."""

_PROC = Path("/proc")

_TRACKER = b"multiprocessing.resource_tracker"
"""In the command line of the process that unlinks semaphores and shared memory once those it serves have gone."""


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    parent: int
    session: int
    started: int
    """Clock ticks since boot: tells a process from a later one with the same pid."""


def processes() -> list[Process]:
    """All that run (zombies do not); empty off Linux."""
    if not sys.platform.startswith("linux"):
        return []
    found = []
    for entry in os.scandir(_PROC):
        if entry.name.isdecimal() and (process := _read(int(entry.name))) is not None:
            found.append(process)
    return found


def _read(pid: int) -> Process | None:
    try:
        # The name may hold spaces and brackets: fields are counted from the last bracket.
        fields = (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    if len(fields) < 20 or fields[0] in (b"Z", b"X"):
        return None
    return Process(pid, parent=int(fields[1]), session=int(fields[3]), started=int(fields[19]))


def members(leader: int, running: Iterable[Process]) -> list[Process]:
    """Processes in the session of ``leader`` and their descendants, the leader included.  Pure."""
    running = list(running)
    children: dict[int, list[Process]] = {}
    for process in running:
        children.setdefault(process.parent, []).append(process)
    found: dict[int, Process] = {}
    todo = [p for p in running if p.session == leader or p.pid == leader]
    while todo:
        process = todo.pop()
        if process.pid not in found:
            found[process.pid] = process
            todo += children.get(process.pid, [])
    return list(found.values())


def marked(mark: str) -> list[Process]:
    """Processes of this user that carry ``mark`` in their environment."""
    sign = f"{ROLE_MARK}={mark}".encode()
    found = []
    for process in processes():
        try:
            environment = (_PROC / str(process.pid) / "environ").read_bytes()
        except OSError:
            continue
        if sign in environment.split(b"\0"):
            found.append(process)
    return found


def kill_all(leader: int, mark: str, *, timeout_s: float = 2.0) -> int:
    """SIGKILL everything that belongs to a role, by id, until nothing of it is left.  Returns how many were met.

    Blocks for at most about ``timeout_s``.  Safe when the leader has gone already.  multiprocessing's resource trackers
    end by themselves after the others, having removed what those left in shared memory; they are killed last.
    """
    if not sys.platform.startswith("linux"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)
        return 0
    met: set[int] = set()
    began = time.monotonic()
    while True:
        left = {p.pid: p for p in [*members(leader, processes()), *marked(mark)] if p.pid != os.getpid()}
        waited_s = time.monotonic() - began
        if not left or waited_s > timeout_s:
            return len(met)
        for process in left.values():
            met.add(process.pid)
            if waited_s < timeout_s / 2 and _is_tracker(process.pid):
                continue
            again = _read(process.pid)
            if again is not None and again.started == process.started:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.01)


def _is_tracker(pid: int) -> bool:
    try:
        return _TRACKER in (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False


def memory_mb(pids: Iterable[int]) -> float:
    """Sum over processes of their memory in MiB: PSS (pages shared between processes counted once in all) where it can
    be read, else RSS.  Processes that have gone count nothing."""
    return sum(_pss_kb(pid) for pid in pids) / 1024


def _pss_kb(pid: int) -> float:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return float(line.split()[1])
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int((_PROC / str(pid) / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1024
    return 0.0
