"""Roles that are still starting, by their status files: for the screen, and for those that wait for them.

An engine may take minutes to load.  A role that waits for it meanwhile goes on waiting, whatever ``links.give_up_s``
says; a role that stands still while it loads is ended by the supervisor (``supervisor.hang_s``).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from atpo_async.core.texts import shortened
from atpo_async.status import snapshot
from atpo_async.status.chains import BUFFER, joined_by_address
from atpo_async.status.snapshot import StatusSnapshot
from atpo_async.status.waits import OWN_PARTS
from atpo_async.status.wording import duration

SEEN_S = 30.0  # an older status file is out of date
MOST_DETAIL = 120  # characters in a line
SAID_FROM_S = 5.0  # a role that has been at a stage for less is not worth a line


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleStart:
    """A role that is still starting."""

    role: str
    stage: str
    """Continues the sentence "actor-0 is …"."""
    for_s: float
    """Seconds in this stage."""
    loads: bool
    """It works, rather than waits for another role."""
    detail: str = ""
    """The progress of what it waits for, as the buffer last reported it to the role."""


def starts(statuses: Iterable[StatusSnapshot], *, now: float, wall: float) -> list[RoleStart]:
    """The roles that run and are still starting.

    Args:
        now, wall: ``time.monotonic()`` and ``time.time()``.
    """
    found = []
    for status in statuses:
        age_s = snapshot.age_s(status, now=now, wall=wall)
        if not status.starting or age_s > SEEN_S or snapshot.is_alive(status) is False:
            continue
        loads = status.loop_age_s is None or status.held_up or any(wait.on in OWN_PARTS for wait in status.waits)
        detail = "" if loads else _how_far(status)
        for_s = status.phase_s + age_s
        found.append(RoleStart(role=status.role, stage=status.phase, for_s=for_s, loads=loads, detail=detail))
    return found


def _how_far(status: StatusSnapshot) -> str:
    """The counts that the buffer last reported to the longest wait for it."""
    said = next((wait.detail for wait in status.waits if wait.on == BUFFER and wait.detail), "")
    return shortened(said.partition("; ")[0], MOST_DETAIL)


def line(found: Sequence[RoleStart], *, from_s: float = SAID_FROM_S) -> str:
    """``actor-0: loading its engine (20 s); learner: waiting for its first batch (trees: 3 of 8 ready; 41 s)``.

    Empty if no role has been starting for long.  One that says what it is at while it loads (after a colon) takes long.
    """
    long = [start for start in found if start.for_s >= from_s or ": " in start.stage]
    long = sorted(long, key=lambda start: not start.loads)
    return "; ".join(f"{start.role}: {start.stage} ({_how_long(start)})" for start in long)


def _how_long(start: RoleStart) -> str:
    took = duration(start.for_s)
    return f"{start.detail}; {took}" if start.detail else took


def _asks_for_nothing(statuses: Mapping[str, StatusSnapshot]) -> str | None:
    """An actor that joined by address and has asked for nothing yet: it loads its engine."""
    joined = joined_by_address(statuses.values())
    for facts in statuses[BUFFER].links.values() if BUFFER in statuses else ():
        peers = facts.get("peers")
        for peer in peers if isinstance(peers, Sequence) else ():
            name = str(peer.get("peer")) if isinstance(peer, Mapping) else ""
            if isinstance(peer, Mapping) and peer.get("handled") == 0 and joined.get(name, SEEN_S) < SEEN_S:
                return f"{name} has joined and asked for nothing yet"
    return None


class Loads:
    """Whether another role of the run is loading; for ``waits.extend_while``.

    Args:
        folder: of the run's status files.
        own: name of this role.
        supervised: roles that a supervisor starts, and starts again; one that does not run is about to.
    """

    def __init__(self, folder: Path, own: str, supervised: Sequence[str] = ()) -> None:
        self._folder = folder
        self._own = own
        self._supervised = [role for role in supervised if role != own]

    def __call__(self) -> str | None:
        """What a loading role is at; None if none is loading.  Reads files."""
        statuses, _ = snapshot.read(self._folder)
        others = {name: status for name, status in statuses.items() if name != self._own}
        for start in starts(others.values(), now=time.monotonic(), wall=time.time()):
            if start.loads:
                return f"{start.role} is {start.stage} for {duration(start.for_s)}"
        for role in self._supervised:
            status = statuses.get(role)
            if status is None or (status.phase != snapshot.ENDED and snapshot.is_alive(status) is False):
                return f"{role} is being started"
        return _asks_for_nothing(statuses)
