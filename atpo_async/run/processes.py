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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROLE_MARK = "ATPO_ROLE_MARK"
"""Environment variable that says which attempt of which role of which run a process belongs to."""

_PROC = Path("/proc")

_TRACKER = b"multiprocessing.resource_tracker"
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
    found = []
    for pid in pids:
        with contextlib.suppress(OSError, IndexError):
            if (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()[0] == b"T":
                found.append(pid)
    return found


def processor_s(pids: Iterable[int]) -> float:
    """Processor seconds that these processes have used together; those that have gone count nothing."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / (os.sysconf("SC_CLK_TCK") if ticks else 100)


def moved_mb(pids: Iterable[int]) -> float:
    """Megabytes that these processes have read and written together so far, files mapped into memory included."""
    count = 0
    for pid in pids:
        with contextlib.suppress(OSError, IndexError, ValueError):
            said = (_PROC / str(pid) / "io").read_text().splitlines()
            counted = {name: int(value) for name, _, value in (line.partition(":") for line in said)}
            count += sum(counted.get(name, 0) for name in ("rchar", "wchar", "read_bytes"))
    return count / 1e6


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
    signs = {f"{ROLE_MARK}={mark}".encode() for mark in marks}
    found = []
    for process in processes():
        try:
            environment = (_PROC / str(process.pid) / "environ").read_bytes()
        except OSError:
            continue
        if not signs.isdisjoint(environment.split(b"\0")):
            found.append(process)
    return found


def environment(pid: int) -> dict[str, str]:
    """What a process was started with; empty where it has gone or is another user's."""
    try:
        text = (_PROC / str(pid) / "environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return {name: value for name, equals, value in (word.partition("=") for word in text.split("\0")) if equals}


def owner(pid: int) -> str:
    """The user a process runs as: the name, the number where it has none here."""
    try:
        uid = (_PROC / str(pid)).stat().st_uid
    except OSError:
        return "unknown"
    try:
        import pwd

        return pwd.getpwuid(uid).pw_name
    except (ImportError, KeyError):
        return str(uid)


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
