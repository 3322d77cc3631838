"""Which roles wait for a place on the cluster: what is said of each, once, and the status that shows it.  Pure, but for
the files it is given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from atpo_async.status.snapshot import StatusSnapshot, Wait, file_stem
from atpo_async.status.waits import CLUSTER

SAY_S = 3.0
"""A role that waits for less is not worth a line."""


@dataclass(slots=True, kw_only=True)
class _Waiting:
    since: float
    need: str
    mark: str
    told: bool = False
    sequence: int = 0


@dataclass(kw_only=True)
class Waiting:
    """The roles that have no place yet.

    Args:
        say: one line to the user.
        blank: a status of the supervisor's process at this moment, whose role and waits are filled in.
    """

    say: Callable[[str], None]
    blank: Callable[[], StatusSnapshot]
    _roles: dict[str, _Waiting] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)
    """Roles that were said to wait, and not yet to have their place."""

    def begin(self, role: str, *, need: str, mark: str, now: float) -> None:
        self._roles[role] = _Waiting(since=now, need=need, mark=mark)

    def look(self, now: float) -> dict[str, StatusSnapshot]:
        """Role -> its status, of all that wait; tells the user of those that have waited for ``SAY_S``, once each."""
        found = {}
        for role, waiting in self._roles.items():
            if role not in self._told and now - waiting.since >= SAY_S:
                self._told.add(role)
                self.say(
                    f"{role} waits for a place on the cluster ({waiting.need}); the others go on, and it starts when a "
                    "node has that free"
                )
            waiting.sequence += 1
            found[role] = self._status(role, waiting, now)
        return found

    def _status(self, role: str, waiting: _Waiting, now: float) -> StatusSnapshot:
        wait_s = now - waiting.since
        place = Wait(who=role, what=f"a place ({waiting.need})", on=CLUSTER, since_s=wait_s)
        return msgspec.structs.replace(
            self.blank(),
            role=role,
            mark=waiting.mark,
            sequence=waiting.sequence,
            phase="pending: it has no place on the cluster",
            phase_s=wait_s,
            # The others wait on for a learner that has no place yet.
            starting=role == "learner",
            waits=(place,),
        )

    def end(self, role: str, *, placed_on: str = "") -> None:
        """A role has its place, or waits for none any more."""
        self._roles.pop(role, None)
        if placed_on and role in self._told:
            self._told.discard(role)
            self.say(f"{role} has its place, on node {placed_on}")

    @property
    def roles(self) -> list[str]:
        return list(self._roles)


def write(folder: Path, status: StatusSnapshot) -> None:
    """As the role itself would.  The disk may be full: the next one is written in a second."""
    with contextlib.suppress(OSError):
        folder.mkdir(exist_ok=True)
        file = folder / f"{file_stem(status.role)}.json"
        aside = file.with_name(f".{file.name}.waiting")
        aside.write_bytes(msgspec.json.encode(status))
        aside.replace(file)


def unwrite(folder: Path, role: str) -> None:
    """It waits no more: what ``write`` wrote would look as if it did."""
    with contextlib.suppress(OSError):
        (folder / f"{file_stem(role)}.json").unlink(missing_ok=True)
