"""The state of a run as seen from outside its processes: each role's state, and who waits for whom."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from atpo_async.models.policy import steps_trained
from atpo_async.run import processes
from atpo_async.run.rundir import RunDir
from atpo_async.status import snapshot
from atpo_async.status.chains import Stuck, explain, joined_by_address
from atpo_async.status.fleet import ActorRow, rows_of
from atpo_async.status.hangs import SILENT_S, WORK_S, stopped_words, stuck_now
from atpo_async.status.run_folders import run_at
from atpo_async.status.snapshot import StatusSnapshot
from atpo_async.status.wording import duration

OTHER_MACHINE_S = 30.0
"""Allowance for the clocks of two machines; a snapshot from another machine that is older counts as stale."""
JOINED = "joined by address"


@dataclass(frozen=True, kw_only=True)
class RoleView:
    """The state of one role."""

    status: StatusSnapshot
    state: str
    """runs, stopped, silent, ended, gone, or stale (another machine's, which has not written for long)."""
    age_s: float
    stuck: Stuck | None

    @property
    def alive(self) -> bool:
        return self.state in ("runs", "stopped", "silent")


@dataclass(frozen=True, kw_only=True)
class RunView:
    """The state of a run."""

    rundir: RunDir
    supervisor: int | None
    """Process id of the supervisor that holds the run's lock; None if none is found."""
    supervisor_stopped: bool
    """Whether a signal has stopped it: its roles go on unsupervised."""
    steps: int
    """Step of the last checkpoint."""
    roles: dict[str, RoleView]
    damaged: dict[str, str]

    @property
    def running(self) -> bool:
        return self.supervisor is not None or bool(self.running_roles)

    @property
    def running_roles(self) -> list[str]:
        return [name for name, view in self.roles.items() if view.alive]

    @property
    def sentences(self) -> list[str]:
        """Who waits for whom, each chain followed to its end."""
        alive = {name: view.status for name, view in self.roles.items() if view.alive}
        stuck = {n: v.stuck for n, v in self.roles.items() if v.stuck is not None and v.alive}
        said = explain(alive, stuck, known=self._known, circle_s=WORK_S)
        if self.supervisor is not None and self.supervisor_stopped:
            said.append(f"supervisor {stopped_words([self.supervisor])}")
        return said

    @property
    def joined(self) -> dict[str, float]:
        """Actors that joined by address, without a status file here: name -> seconds since they last sent anything."""
        return joined_by_address(view.status for view in self.roles.values() if view.alive)

    @property
    def fleet(self) -> list[ActorRow]:
        """The actors as the buffer sees them."""
        return rows_of(view.status for view in self.roles.values() if view.alive)

    @property
    def _known(self) -> dict[str, str]:
        """Words for roles that others may wait for and that do not run here."""
        again = ", and the supervisor is to start it again" if self.supervisor is not None else ""
        gone = {
            name: f"has {view.state}{again}" for name, view in self.roles.items() if view.state in ("ended", "gone")
        }
        return gone | {name: f"{JOINED} (heard {duration(silent_s)} ago)" for name, silent_s in self.joined.items()}


def look(path: Path | str) -> RunView:
    """Raises SetupError for a folder that is no run, ConfigError for a damaged one."""
    rundir = run_at(path)
    statuses, damaged = snapshot.read(rundir.path / snapshot.FOLDER)
    now, wall = time.monotonic(), time.time()
    roles = {name: _view(statuses[name], now=now, wall=wall) for name in sorted(statuses, key=_order)}
    supervisor = _holder(rundir.path / "lock")
    return RunView(
        rundir=rundir,
        supervisor=supervisor,
        supervisor_stopped=supervisor is not None and bool(processes.stopped([supervisor])),
        steps=steps_trained(rundir),
        roles=roles,
        damaged=damaged,
    )


def _order(role: str) -> tuple[int, str]:
    """Sort key: buffer, learner, then actors by number."""
    first = [i for i, name in enumerate(("buffer", "learner", "actor")) if role.startswith(name)]
    stem, _, number = role.rpartition("-")
    return (first[0] if first else len("bla"), f"{stem}-{int(number):06d}" if number.isdecimal() else role)


def _view(status: StatusSnapshot, *, now: float, wall: float) -> RoleView:
    age_s = snapshot.age_s(status, now=now, wall=wall)
    alive = snapshot.is_alive(status)
    stopped = bool(alive and processes.stopped([status.pid]))
    if status.phase == snapshot.ENDED:
        state = "ended"
    elif alive is None:
        state = "runs" if age_s < OTHER_MACHINE_S else "stale"
    elif not alive:
        state = "gone"
    elif stopped:
        state = "stopped"
    else:
        state = "silent" if age_s > SILENT_S else "runs"
    stuck = None
    if state in ("runs", "stopped", "silent"):
        # The clock of another machine may be off by a few seconds.
        stuck = stuck_now(status, stopped=stopped, silent_s=0.0 if alive is None else age_s)
    if alive and state in ("stopped", "silent"):
        status = snapshot.as_of_now(status, age_s)
    return RoleView(status=status, state=state, age_s=age_s, stuck=stuck)


def _holder(lock: Path) -> int | None:
    """The process that holds the run's lock, found without taking the lock, which could make a starting run fail."""
    try:
        file = lock.stat()
        pid = int(lock.read_text(encoding="ascii").strip() or 0)
    except (OSError, ValueError):
        return None
    try:
        held = [line.split() for line in Path("/proc/locks").read_text(encoding="ascii").splitlines()]
    except OSError:
        return pid if pid and processes.started(pid) is not None else None
    # N: FLOCK ADVISORY WRITE pid device:inode …; the device is not compared, as layered file systems name another one.
    # The process has no number here where it runs in another container.
    by_inode = [words[4] for words in held if words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(file.st_ino)]
    return pid if {str(pid), "0", "-1"} & set(by_inode) else None


def as_json(view: RunView) -> str:
    """The screen's content and all snapshots as JSON, for programs."""
    found: dict[str, Any] = {
        "run": str(view.rundir.path),
        "run_id": view.rundir.run_id,
        "running": view.running,
        "supervisor": view.supervisor,
        "supervisor_state": None if view.supervisor is None else "stopped" if view.supervisor_stopped else "runs",
        "steps": {"checkpoint": view.steps, "of": view.rundir.config.run.steps},
        "waits": view.sentences,
        "roles": {
            name: {
                "state": role.state,
                "age_s": role.age_s,
                "stuck": None if role.stuck is None else role.stuck.why,
                **msgspec.to_builtins(role.status),
            }
            for name, role in view.roles.items()
        },
        "actors": {row.name: dataclasses.asdict(row) for row in view.fleet},
        "joined": {name: {"silent_s": silent_s} for name, silent_s in view.joined.items()},
        "damaged": view.damaged,
    }
    return json.dumps(found, indent=2, default=str)
