"""The status of one role at one moment, as its file ``runs/<name>/status/<role>.json`` holds it, and reading the files.

``status.reporter`` writes them; the supervisor, ``status.hangs`` and ``atpo status`` read them.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import msgspec

from atpo_async.run import processes
from atpo_async.run.host import host_id

FOLDER = "status"
"""In a run's folder."""

STANDS_STILL_S = 4.0
"""A loop that has not ticked for so long is held up: its stack is in the snapshot."""

ENDING, ENDED = "ending", "ended"
"""Phases: the role's work is done or given up; and the phase of its last snapshot, unless it was killed."""


class Wait(msgspec.Struct, frozen=True, kw_only=True):
    """Waits of one kind."""

    who: str
    """The one that has waited longest."""
    what: str
    on: str
    since_s: float
    limit_s: float | None = None
    count: int = 1
    detail: str = ""
    """The progress of what it waits for, or what holds that up; empty where that is not known."""


class StatusSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """One role at one moment."""

    role: str
    mark: str
    """Which attempt of the role it is (``processes.ROLE_MARK``); empty where it was started by hand."""
    pid: int
    started: int
    """Of the process, clock ticks since boot: tells it from a later one with this pid."""
    host: str
    """Machine and boot (``run.host.host_id``)."""
    hostname: str
    at: float
    """Unix seconds: for another machine."""
    monotonic_s: float
    """``time.monotonic()``, the same for every process of this boot: for this machine."""
    sequence: int
    """Rises with every snapshot of a process."""
    phase: str
    phase_s: float
    starting: bool
    still_s: float
    """Since anything in ``progress`` or the phase last changed."""
    loop_age_s: float | None
    """Since the event loop last ticked; None before it runs."""
    waits: tuple[Wait, ...] = ()
    progress: dict[str, int] = {}
    links: dict[str, dict[str, Any]] = {}
    """Link -> what ``link_status()`` says, as of the loop's last tick."""
    facts: dict[str, dict[str, Any]] = {}
    """Facts that parts of the role publish (``status.facts``), as of the loop's last tick."""
    stack: tuple[str, ...] = ()
    """Of the loop's thread, outermost call first, where the loop stands still."""

    @property
    def held_up(self) -> bool:
        return self.loop_age_s is not None and self.loop_age_s > STANDS_STILL_S


def file_stem(role: str) -> str:
    """The name of a role's status file, without its ending, for any name that a user may give the role."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", role) or "_"


def read(folder: Path) -> tuple[dict[str, StatusSnapshot], dict[str, str]]:
    """(role -> snapshot, file name -> what is wrong with it) of all files in a status folder; neither need exist."""
    statuses: dict[str, StatusSnapshot] = {}
    damaged: dict[str, str] = {}
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        if file.name.startswith("."):
            continue
        try:
            status = msgspec.json.decode(file.read_bytes(), type=StatusSnapshot)
        except FileNotFoundError:
            continue
        except OSError as exc:
            damaged[file.name] = exc.strerror or str(exc)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            damaged[file.name] = str(exc)
        else:
            statuses[status.role] = status
    return statuses, damaged


def is_alive(status: StatusSnapshot) -> bool | None:
    """Whether the process that made it runs; None where it ran on another machine, or before this boot."""
    if status.host != host_id():
        return None
    started = processes.started(status.pid)
    return started is not None and (started == status.started or status.started == 0)


def age_s(status: StatusSnapshot, *, now: float, wall: float) -> float:
    """Seconds since it was made.

    ``now``, ``wall``: ``time.monotonic()`` and ``time.time()``; the wall clock may be set, so that it counts for
    other machines only.
    """
    return max(0.0, now - status.monotonic_s if status.host == host_id() else wall - status.at)


def as_of_now(status: StatusSnapshot, age_s: float) -> StatusSnapshot:
    """A snapshot ``age_s`` seconds old, its durations extended to now: a role that is frozen writes no newer one."""
    return msgspec.structs.replace(
        status,
        phase_s=status.phase_s + age_s,
        loop_age_s=None if status.loop_age_s is None else status.loop_age_s + age_s,
        waits=tuple(msgspec.structs.replace(wait, since_s=wait.since_s + age_s) for wait in status.waits),
    )


def forget_the_dead(folder: Path) -> None:
    """Remove the status files of processes of this machine that have ended."""
    for role, status in read(folder)[0].items():
        if is_alive(status) is False:
            with contextlib.suppress(OSError):
                (folder / f"{file_stem(role)}.json").unlink(missing_ok=True)
