"""Ends orphans: roles whose supervisor was killed and that did not end by themselves, because a signal had stopped them
(SIGSTOP) or because they hang.

They hold the journal and the ports, so that the same command could not go on.  A process is recognised by its
environment: it says which run, role and attempt it is (``processes.ROLE_MARK``) and which supervisor started it
(``exits.SUPERVISOR_PID``).  A role whose supervisor lives is never touched.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from atpo_async.core.errors import SetupError
from atpo_async.ops.exits import ERROR_FILE, SUPERVISOR_PID
from atpo_async.run import processes
from atpo_async.run.host import host_id
from atpo_async.run.rundir import RunDir
from atpo_async.status import snapshot, waits

LOOK_S = 0.1
"""Between two looks at processes that are about to end by themselves."""

EXTRA_S = 2.0
"""For a role's own thread, which looks once a second whether its supervisor lives."""

OTHER_HOST_S = 30.0
"""An older status file of another machine is out of date; clocks may differ by so much."""

RENEWED_S = 3.0
"""A role that runs renews its status file in this time, thrice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Marked:
    """A process of this machine whose environment says that it belongs to the run."""

    process: processes.Process
    mark: str
    supervisor: int | None
    """Process id of the supervisor that started it, where that one still runs."""
    folder: Path | None
    """The run's folder, as its supervisor named it."""

    @property
    def role(self) -> str:
        return self.mark.split("/")[1]


def marked_processes(run_id: str) -> list[Marked]:
    """All such processes that this user may look at, their descendants included; empty off Linux."""
    found = []
    for process in processes.processes():
        environment = processes.environment(process.pid)
        mark = environment.get(processes.ROLE_MARK, "")
        if process.pid == os.getpid() or mark.rpartition("/")[0].rpartition("/")[0] != run_id:
            continue
        file = environment.get(ERROR_FILE)
        found.append(
            Marked(
                process=process,
                mark=mark,
                supervisor=_living(environment.get(SUPERVISOR_PID, ""), process),
                folder=None if not file else Path(file).parent.parent,
            )
        )
    return found


def _living(pid: str, child: processes.Process) -> int | None:
    """The supervisor of ``child``, unless it has gone; a later process may have got its id."""
    if not pid.isdecimal():
        return None
    began = processes.started(int(pid))
    return int(pid) if began is not None and began <= child.started else None


def end_orphans(
    rundir: RunDir,
    *,
    say: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> list[str]:
    """End the roles of ``rundir`` that have lost their supervisor.  The caller holds the run's lock.

    A role that is ending by itself gets its time for that: ``supervisor.stop_grace_s``, or ``links.give_up_s`` while it
    saves what was trained.  A role that a signal has stopped is killed at once.

    Returns the roles that were ended.  Raises SetupError naming the process where one may not be ended from here: its
    supervisor lives, it is another user's, it runs on another machine, or it does not end.
    """
    _refuse_other_hosts(rundir, pause)
    found = marked_processes(rundir.run_id)
    _refuse_supervised(rundir, found)
    _refuse_other_users(rundir, found)
    orphans = [marked for marked in found if marked.supervisor is None]
    if not orphans:
        return []
    for role, pid, stopped in _by_role(orphans):
        how = "a signal had stopped it, it is ended now" if stopped else "it is given time to end, then it is ended"
        say(f"{role} of an earlier start of this run is still there without its supervisor (process {pid}): {how}")
    began = clock()
    while True:
        orphans = [marked for marked in marked_processes(rundir.run_id) if marked.supervisor is None]
        waited_s = clock() - began
        saving = _saving(rundir) if waited_s <= rundir.config.links.give_up_s + EXTRA_S else set()
        late = waited_s > rundir.config.supervisor.stop_grace_s + EXTRA_S
        doomed = {m.mark for m in orphans if (late and m.mark not in saving) or _is_stopped(m)}
        processes.kill_roles({m.process.session: m.mark for m in orphans if m.mark in doomed}, timeout_s=5.0)
        if {m.mark for m in orphans} <= doomed and (late or not orphans):
            break
        pause(LOOK_S)
    left = [marked for marked in marked_processes(rundir.run_id) if marked.supervisor is None]
    if left:
        raise SetupError(
            f"{left[0].role} of an earlier start of run {rundir.path} (process {left[0].process.pid}) does not end, "
            "not even by kill -9: the system waits for a disk or a device; start again when it has gone"
        )
    return sorted({marked.role for marked in found if marked.supervisor is None})


def _saving(rundir: RunDir) -> set[str]:
    """Marks of the roles whose status says that they are saving."""
    return {status.mark for status in _statuses(rundir).values() if status.phase == waits.SAVING}


def _is_stopped(marked: Marked) -> bool:
    return bool(processes.stopped([marked.process.pid]))


def _by_role(orphans: Iterable[Marked]) -> list[tuple[str, int, bool]]:
    """(role, its first process, whether any of it is stopped) of each."""
    by_mark: dict[str, list[Marked]] = {}
    for marked in orphans:
        by_mark.setdefault(marked.mark, []).append(marked)
    return [
        (
            alike[0].role,
            min(alike, key=lambda m: (m.process.started, m.process.pid)).process.pid,
            any(map(_is_stopped, alike)),
        )
        for alike in by_mark.values()
    ]


def _refuse_supervised(rundir: RunDir, found: Iterable[Marked]) -> None:
    """Refuse a run whose supervisor lives though we hold its lock: the lock file was removed.  A copy of the folder has
    the same run_id; its supervisor is another run's."""
    for marked in found:
        if marked.supervisor is not None and marked.folder == rundir.path:
            raise SetupError(
                f"run {rundir.path} is in use: its {marked.role} (process {marked.process.pid}) belongs to supervisor "
                f"process {marked.supervisor}; stop that one (kill {marked.supervisor}), or use another --run.name"
            )


def _refuse_other_users(rundir: RunDir, found: Iterable[Marked]) -> None:
    known = {marked.process.pid for marked in found}
    for status in _statuses(rundir).values():
        if status.pid not in known and snapshot.is_alive(status) and not processes.is_ours(status.pid):
            raise SetupError(
                f"{status.role} of run {rundir.path} runs as process {status.pid} of another user, "
                f"{processes.owner(status.pid)}: it has to be ended first (kill -9 {status.pid}, as that user or as "
                "root), or use another --run.name"
            )


def _refuse_other_hosts(rundir: RunDir, pause: Callable[[float], None]) -> None:
    """Refuse a run one of whose roles goes on renewing its status file from another machine."""
    here = host_id()

    def elsewhere() -> Mapping[str, snapshot.StatusSnapshot]:
        now, wall = time.monotonic(), time.time()
        return {
            name: status
            for name, status in _statuses(rundir).items()
            if status.host != here and snapshot.age_s(status, now=now, wall=wall) < OTHER_HOST_S
        }

    before = elsewhere()
    if not before:
        return
    pause(RENEWED_S)
    for name, status in elsewhere().items():
        if name in before and status.sequence != before[name].sequence:
            raise SetupError(
                f"{name} of run {rundir.path} runs on {status.hostname} (process {status.pid} there): stop the run "
                "there first, or use another --run.name"
            )


def _statuses(rundir: RunDir) -> dict[str, snapshot.StatusSnapshot]:
    """Role -> status, of roles that a supervisor has started and that have not ended."""
    statuses, _ = snapshot.read(rundir.path / snapshot.FOLDER)
    return {name: status for name, status in statuses.items() if status.mark and status.phase != snapshot.ENDED}
