"""Where the roles of a run listen: a file in the run's folder, written by those that listen and read by the others.

A role binds its sockets itself and notes the addresses that it got.  Those of an earlier life of the run stay in a file
beside it: a role tries its former port first, since actors that were joined by hand know no other one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from atpo_async.core.errors import SetupError
from atpo_async.run import locks

ENDPOINTS, FORMER_ENDPOINTS = "endpoints.json", "endpoints.former.json"
SHARDS = "endpoints.shards.json"


@dataclass(frozen=True, slots=True)
class ShardEndpoints:
    """Where one shard of the buffer listens, or did in an earlier life of the run."""

    front: str
    """For the buffer's front."""
    turns: str
    """For actors."""


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the roles of a run listen: ``tcp://host:port``, empty where not known (an actor that joined by address)."""

    actors: str = ""
    """The buffer, for actors."""
    learner: str = ""
    """The buffer, for the learner."""
    weights: str = ""
    """The learner, for weights."""
    announce: str = ""
    """The learner, for announcements of versions."""
    follower: str = ""
    """The buffer, for followers of its journal."""


class EndpointsFile:
    """The file in one run's folder.

    Args:
        folder: the run's.
        write: writes a file as a whole or not at all.
    """

    def __init__(self, folder: Path, write: Callable[[Path, str], None]) -> None:
        self.path = folder / ENDPOINTS
        self._former = folder / FORMER_ENDPOINTS
        self._shards = folder / SHARDS
        self._lock = folder / "endpoints.lock"
        self._write = write

    @property
    def there(self) -> bool:
        """Whether any role has listened in this run, now or in an earlier life."""
        return self.path.exists() or self._former.exists()

    def now(self) -> Endpoints:
        """Where the roles listen now; empty where not recorded yet.  Raises SetupError if the file is damaged."""
        return _read(self.path) or Endpoints()

    def former(self) -> Endpoints:
        """Where the roles listened last, in this life of the run or in an earlier one."""
        return _over(_read(self._former) or Endpoints(), self.now())

    def replace(self, endpoints: Endpoints) -> None:
        """All of it anew."""
        self._write(self.path, _dump(endpoints))

    def note(self, **bound: str) -> None:
        """Record where a role listens now, by the names of ``Endpoints``; several roles may do so at a time."""
        with locks.alone(self._lock):
            self.replace(replace(self.now(), **bound))

    def shards(self) -> dict[int, ShardEndpoints]:
        """Where the shards of the buffer listen, or did last, by index.  Raises SetupError if the file is damaged.

        A shard that is not there any more is looked for here again, until it records where it is.
        """
        try:
            read = json.loads(self._shards.read_text(encoding="utf-8"))
            return {int(index): ShardEndpoints(**each) for index, each in read.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, AttributeError) as exc:
            raise SetupError(f"{self._shards} is damaged: {exc}; remove it and start the run again") from None

    def note_shard(self, index: int, endpoints: ShardEndpoints) -> None:
        """Record where a shard of the buffer listens now; several may do so at a time."""
        with locks.alone(self._lock):
            found = {**self.shards(), index: endpoints}
            dumped = {str(index): asdict(each) for index, each in sorted(found.items())}
            self._write(self._shards, json.dumps(dumped, indent=2) + "\n")

    def forget(self) -> None:
        """Begin a new life of the run: no role listens, and readers wait until a role has recorded its endpoint."""
        with locks.alone(self._lock):
            former = self.former()
            if former != Endpoints():
                self._write(self._former, _dump(former))
            self.path.unlink(missing_ok=True)


def _over(old: Endpoints, new: Endpoints) -> Endpoints:
    return replace(old, **{name: text for name, text in asdict(new).items() if text})


def _read(file: Path) -> Endpoints | None:
    try:
        return Endpoints(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as exc:
        raise SetupError(f"{file} is damaged: {exc}; start the run again with `atpo train`") from None


def _dump(endpoints: Endpoints) -> str:
    # Left out where nothing follows, so that an earlier program reads the file.
    found = {name: text for name, text in asdict(endpoints).items() if text or name != "follower"}
    return json.dumps(found, indent=2) + "\n"
