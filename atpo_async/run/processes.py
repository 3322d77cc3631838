"""Processes of a role on this machine: which belong to it, what they use, and how all of them are ended.

A role's engine has processes of its own; they outlive their parent, and a launcher puts its ranks into other sessions.
So three signs tell that a process belongs to a role: the session that the supervisor made for it, descent, and a mark
in the environment that every descendant inherits.  Off Linux only the process group is known.

psutil says what a process uses and is.  Our own reading of ``/proc`` is left for what psutil has not: the session, and
the start in clock ticks since boot.  Status files and locks of runs hold those ticks, which no change of the wall clock
moves; psutil's ``create_time`` is made from them with the time of boot, which moves with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import psutil

T = TypeVar("T")

ROLE_MARK = "ATPO_ROLE_MARK"
"""Environment variable that says which attempt of which role of which run a process belongs to."""

_TRACKER = "multiprocessing.resource_tracker"
"""In the command line of the process that unlinks semaphores and shared memory once those it serves have gone."""


def die_with_parent(signum: int = signal.SIGTERM, parent_pid: int | None = None) -> bool:
    """Have the kernel send ``signum`` to this process when its parent ends.  True if the tie holds (Linux only).

    Given ``parent_pid``, ends this process at once when that is no longer its parent: it died before the tie was made.
    May be called between fork and exec.  The kernel counts the parent *thread* that forked as the parent, so that
    thread must live as long as the parent.
    """
    if _prctl is None or _prctl(_PR_SET_PDEATHSIG, int(signum), 0, 0, 0) != 0:
        return False
    # After the call, not before it: a parent that dies in between would otherwise go unnoticed.
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(1)
    return True


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9; of a number without a name, the number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _load_prctl() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    try:
        function: Callable[..., int] = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None
    return function


_PR_SET_PDEATHSIG = 1
_prctl = _load_prctl()  # at import: between fork and exec nothing may be loaded


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
    return [process for pid in psutil.pids() if (process := _read(pid)) is not None]


def _read(pid: int) -> Process | None:
    """One that runs, from ``/proc/PID/stat`` (proc(5))."""
    try:
        # The name may hold spaces and brackets: fields are counted from the last bracket.
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    if len(fields) < 20 or fields[0] in (b"Z", b"X"):
        return None
    return Process(pid, parent=int(fields[1]), session=int(fields[3]), started=int(fields[19]))


def _each(pids: Iterable[int], ask: Callable[[psutil.Process], T]) -> Iterator[tuple[int, T]]:
    """What each process says of itself; nothing of one that has gone or that this user may not look at."""
    for pid in pids:
        with contextlib.suppress(psutil.Error, OSError):
            yield pid, ask(psutil.Process(pid))


def started(pid: int) -> int | None:
    """When a process started, clock ticks since boot; None where none runs under that id (off Linux: 0 if one does)."""
    if sys.platform.startswith("linux"):
        found = _read(pid)
        return None if found is None else found.started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0


def stopped(pids: Iterable[int]) -> list[int]:
    """Those that a signal has stopped (SIGSTOP, SIGTSTP); not those that a debugger holds."""
    return [pid for pid, status in _each(pids, psutil.Process.status) if status == psutil.STATUS_STOPPED]


def processor_s(pids: Iterable[int]) -> float:
    """Processor seconds that these processes have used together; those that have gone count nothing."""
    return sum((used.user + used.system for _, used in _each(pids, psutil.Process.cpu_times)), 0.0)


def moved_mb(pids: Iterable[int]) -> float:
    """Megabytes that these processes have read and written together so far, files mapped into memory included."""
    counted = _each(pids, psutil.Process.io_counters)
    return sum(io.read_chars + io.write_chars + io.read_bytes for _, io in counted) / 1e6


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


def marked(*marks: str) -> list[Process]:
    """Processes of this user that carry one of ``marks`` in their environment."""
    running = {process.pid: process for process in processes()}
    environments = _each(running, psutil.Process.environ)
    return [running[pid] for pid, found in environments if found.get(ROLE_MARK) in marks]


def environment(pid: int) -> dict[str, str]:
    """What a process was started with; empty where it has gone or is another user's."""
    return next((found for _, found in _each([pid], psutil.Process.environ)), {})


def owner(pid: int) -> str:
    """The user a process runs as: the name, the number where it has none here."""
    return next((name for _, name in _each([pid], psutil.Process.username)), "unknown")


def is_ours(pid: int) -> bool:
    """Whether we may send signals to a process; true of one that has gone."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return False
    except ProcessLookupError:
        pass
    return True


def kill_all(leader: int, mark: str, *, timeout_s: float = 2.0) -> int:
    """SIGKILL everything that belongs to a role, by id, until nothing of it is left.  Returns how many were met.

    Blocks for at most about ``timeout_s``.  Safe when the leader has gone already.  multiprocessing's resource trackers
    end by themselves after the others, having removed what those left in shared memory; they are killed last.
    """
    return kill_roles({leader: mark}, timeout_s=timeout_s)


def kill_roles(marks: Mapping[int, str], *, timeout_s: float = 2.0) -> int:
    """``kill_all`` for several roles (leader -> mark) at once: ``timeout_s`` is for all of them together."""
    if not marks:
        return 0
    if not sys.platform.startswith("linux"):
        for leader in marks:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(leader, signal.SIGKILL)
        return 0
    met: set[int] = set()
    began = time.monotonic()
    while True:
        running = processes()
        belonging = [p for leader in marks for p in members(leader, running)] + marked(*marks.values())
        left = {p.pid: p for p in belonging if p.pid != os.getpid()}
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
    return any(_TRACKER in " ".join(words) for _, words in _each([pid], psutil.Process.cmdline))


def memory_mb(pids: Iterable[int]) -> float:
    """Sum over processes of their memory in MiB: PSS (pages shared between processes counted once in all) where it can
    be read, else RSS.  Processes that have gone count nothing."""
    return sum(nbytes for _, nbytes in _each(pids, _memory_bytes)) / 2**20


def _memory_bytes(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.AccessDenied, AttributeError):  # another user's; or no PSS on this system
        return int(process.memory_full_info().pss)
    return int(process.memory_info().rss)
