"""``atpo status RUN``: who waits for whom, since when; one screen, from the snapshots that the roles keep."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from atpo_async.core.errors import SetupError
from atpo_async.models.policy import steps_trained
from atpo_async.run import processes
from atpo_async.run.host import host_id
from atpo_async.run.rundir import RunDir
from atpo_async.status import snapshot
from atpo_async.status.chains import Stuck, explain, joined_by_address, waits_of
from atpo_async.status.hangs import SILENT_S, WORK_S, stopped_words, stuck_now
from atpo_async.status.snapshot import StatusSnapshot
from atpo_async.status.wording import duration, flat

if TYPE_CHECKING:
    from rich.console import Console

OTHER_MACHINE_S = 30.0
"""Clocks of two machines may differ by so much; a snapshot from another machine that is older is called stale."""
JOINED = "joined by address"
SHOWN_WAITS = 3
"""Of each role."""
UNSAID = frozenset({"kind", "name", "endpoint", "waits"})
"""Of what a link says: its title has the first, the roles' waits the last."""


@dataclass(frozen=True, kw_only=True)
class RoleView:
    """One role, as far as it can be seen from here."""

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
    """A run, as far as it can be seen from here."""

    rundir: RunDir
    supervisor: int | None
    """Process id of what holds the run; None if nothing does, as far as can be told."""
    supervisor_stopped: bool
    """Whether a signal has stopped it: its roles go on, and nobody looks after them."""
    steps: int
    """Of the last checkpoint."""
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
        """Who waits for whom, to the end."""
        alive = {name: view.status for name, view in self.roles.items() if view.alive}
        stuck = {n: v.stuck for n, v in self.roles.items() if v.stuck is not None and v.alive}
        said = explain(alive, stuck, known=self._known, circle_s=WORK_S)
        if self.supervisor is not None and self.supervisor_stopped:
            said.append(f"supervisor {stopped_words([self.supervisor])}")
        return said

    @property
    def joined(self) -> dict[str, float]:
        """Actors that joined by address, without a status file here: name -> seconds since the buffer heard of them."""
        return joined_by_address(view.status for view in self.roles.values() if view.alive)

    @property
    def _known(self) -> dict[str, str]:
        """What is known of roles that others may wait for, and that do not run here."""
        again = ", and the supervisor is to start it again" if self.supervisor is not None else ""
        gone = {
            name: f"has {view.state}{again}" for name, view in self.roles.items() if view.state in ("ended", "gone")
        }
        return gone | {name: f"{JOINED} (heard {duration(silent_s)} ago)" for name, silent_s in self.joined.items()}


def look(path: Path | str) -> RunView:
    """Raises SetupError for a folder that is no run, ConfigError for a damaged one."""
    try:
        rundir = RunDir.open(path)
    except SetupError as exc:
        known = _runs_near(Path(path))
        raise SetupError(f"{exc}; {known}") from None
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
    """As the way of a turn goes, actors by number."""
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
        # Another machine's clock says nothing about a few seconds.
        stuck = stuck_now(status, stopped=stopped, silent_s=0.0 if alive is None else age_s)
    return RoleView(status=status, state=state, age_s=age_s, stuck=stuck)


def _holder(lock: Path) -> int | None:
    """The process that holds the run's lock, found without touching the lock: to try it could refuse a starting run."""
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


def _runs_near(path: Path) -> str:
    """The way out for a path that is no run."""
    for folder in (path, path.parent, Path("runs")):
        found = sorted(p.parent for p in folder.glob("*/run.json") if not p.parent.is_symlink())[:5]
        if found:
            return f"runs are {', '.join(map(str, found))}"
    return "name the folder of a run: runs/<run.name>"


def as_json(view: RunView) -> str:
    """For programs: what the screen says and all the snapshots."""
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
        "joined": {name: {"silent_s": silent_s} for name, silent_s in view.joined.items()},
        "damaged": view.damaged,
    }
    return json.dumps(found, indent=2, default=str)


def show(view: RunView, console: Console) -> None:
    """One screen."""
    from rich.table import Table
    from rich.text import Text

    console.print(Text(_headline(view)))
    if view.roles:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("role", "state", "process", "at", "loop ran", "waits for"):
            table.add_column(name, no_wrap=name != "waits for", overflow="fold")
        for name, role in view.roles.items():
            status = role.status
            loop = "–" if status.loop_age_s is None or not role.alive else f"{duration(status.loop_age_s)} ago"
            where = f"{status.pid}" if status.host == host_id() else f"{status.pid} on {status.hostname}"
            # The id of a process that has gone may be another's by now.
            where = "–" if role.state in ("ended", "gone") else where
            state = role.state if role.alive else f"{role.state}, last seen {duration(role.age_s)} ago"
            at = f"{status.phase} for {duration(status.phase_s)}" if role.alive else "–"
            colour = "red" if role.stuck is not None or role.state == "gone" else "green" if role.alive else "dim"
            # As text: what others call themselves is no markup.
            cells = (Text(word) for word in (where, at, loop, _waits(role)))
            table.add_row(Text(name), Text(state, style=colour), *cells)
        for name, silent_s in view.joined.items():
            state = f"heard {duration(silent_s)} ago"
            table.add_row(Text(name), Text(state, style="green"), "–", JOINED, "–", "known only where it runs")
        console.print(table)
        links = [
            f"  {name}: {flat(_worth_saying(facts))}"
            for role in view.roles.values()
            if role.alive
            for name, facts in role.status.links.items()
        ]
        for line in ["links:", *links] if links else []:
            console.print(Text(line))
        for role in view.roles.values():
            for name, facts in role.status.facts.items() if role.alive else ():
                whose = role.status.role if role.status.role.startswith(name) else f"{role.status.role}, {name}"
                console.print(Text(f"{whose}: {flat(facts)}"))
    for file, fault in view.damaged.items():
        console.print(Text(f"{snapshot.FOLDER}/{file} is damaged and says nothing: {fault}"))
    for sentence in view.sentences:
        console.print(Text(f"→ {sentence}"))
    for role in view.roles.values():
        if role.alive and role.status.stack:
            console.print(Text(f"{role.status.role} stands still in:"))
            for line in role.status.stack[-5:]:
                console.print(Text(f"    {line}"))


def _headline(view: RunView) -> str:
    run = f"run {view.rundir.path} ({view.rundir.run_id})"
    if view.supervisor is not None and view.supervisor_stopped:
        goes_on = "its roles go on, and nobody starts them again" if view.running_roles else "no role runs"
        return f"{run}: its supervisor, process {view.supervisor}, {stopped_words([view.supervisor])}; {goes_on}"
    if view.supervisor is not None:
        return f"{run}: running, looked after by process {view.supervisor}"
    if view.running_roles:
        return f"{run}: roles run, and nobody looks after them: {', '.join(view.running_roles)}"
    steps = view.rundir.config.run.steps
    if view.steps >= steps:
        done = f"its {steps} steps are done"
    else:
        done = f"its last checkpoint is of step {view.steps} of {steps}" if view.steps else "it has no checkpoint"
    if not view.roles:
        return f"{run}: not running; none of its roles was ever started; {done}"
    newest = min(role.age_s for role in view.roles.values())
    gone = [name for name, role in view.roles.items() if role.state == "gone"]
    lost = f"; killed or crashed: {', '.join(gone)} (logs: {view.rundir.path / 'logs'})" if gone else ""
    return f"{run}: not running; the last sign of a role is {duration(newest)} old; {done}{lost}"


def _worth_saying(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of a link: without what is empty."""
    kept = {name: value for name, value in facts.items() if name not in UNSAID and value not in ("", None, [], {})}
    return {
        name: [_worth_saying(part) if isinstance(part, Mapping) else part for part in value]
        if isinstance(value, list)
        else value
        for name, value in kept.items()
    }


def _waits(role: RoleView) -> str:
    if not role.alive:
        return "–"
    if role.stuck is not None:
        return role.stuck.why
    shown = [
        f"{wait.what} from {wait.on} {duration(wait.since_s)}{f' (x{wait.count})' if wait.count > 1 else ''}"
        for wait in waits_of(role.status)
    ]
    more = f"; and {len(shown) - SHOWN_WAITS} more" if len(shown) > SHOWN_WAITS else ""
    return "; ".join(shown[:SHOWN_WAITS]) + more or "nobody"
