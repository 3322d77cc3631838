"""The replica of a run's folder on a machine that has no access to that folder: made or opened again, and locked.

    FOLDER/<run id>/checkpoints/      of all ranks on this machine
    FOLDER/<run id>/rank-0/           as a run's folder, with what this rank writes
      replica.json                    identity of the replica, and which folders were passed on

The buffer counts how much of a replica has arrived.  It knows one replica of each rank; what another one has not passed
on is out of date, and is removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from pathlib import Path

import msgspec

from atpo_async.config import Config
from atpo_async.core.errors import SetupError
from atpo_async.run import locks
from atpo_async.run.files import write_atomic
from atpo_async.run.replica import names
from atpo_async.run.replica.elsewhere import Elsewhere, note
from atpo_async.run.rundir import RunDir

REPLICA = "replica.json"


class Known(msgspec.Struct, frozen=True):
    """``replica.json``."""

    replica: str = ""
    folders: dict[str, str] = {}
    """Folder that was passed on -> what tells this state of it from another."""


class Replica:
    """One rank's replica, locked for as long as this process lives or until ``close``.

    Args:
        parent: folder of all replicas on this machine.
        run_id: of the run.
        rank: that works in it.

    Raises:
        SetupError: it cannot be made, or another process has it.
    """

    def __init__(self, parent: Path, *, run_id: str, rank: int) -> None:
        self.path = parent / run_id / f"rank-{rank}"
        self._rank = rank
        self._held = contextlib.ExitStack()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path.parent / "checkpoints").mkdir(exist_ok=True)
        except OSError as exc:
            raise SetupError(
                f"{self.path} cannot be made: {exc.strerror or exc}; name another folder by --dir"
            ) from exc
        self._held.enter_context(locks.held(self.path / "lock", in_use=self._in_use))

    def close(self) -> None:
        """Give the lock back."""
        self._held.close()

    def _in_use(self, holder: str) -> str:
        return (
            f"{self.path} is in use by process {holder}, a learner of rank {self._rank} of this run: end that one "
            "first, or name another folder by --dir"
        )

    @property
    def known(self) -> Known:
        """Its identity and what was passed on; an empty one where there is nothing, or it is damaged."""
        try:
            return msgspec.json.decode((self.path / REPLICA).read_bytes(), type=Known)
        except (OSError, msgspec.MsgspecError):
            return Known()

    def note_folder(self, folder: str, state: str) -> None:
        """Remember that this state of a folder was passed on."""
        known = self.known
        self._note(msgspec.structs.replace(known, folders={**known.folders, folder: state}))

    def lacks(self, taken: dict[str, int]) -> bool:
        """Whether a file is shorter than what has arrived of it: what was not on disk when the machine failed."""
        return any(self._size(file) < count for file, count in taken.items())

    def begin(self, identity: str, *, evaluations: bytes) -> None:
        """Become another replica: remove what a former one has, but its checkpoints; metrics begin with
        ``evaluations``.  Whenever this is broken off, the next start does it again.

        Raises SetupError where the disk refuses.
        """
        try:
            (self.path / REPLICA).unlink(missing_ok=True)
            for entry in self.path.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != "lock":
                    entry.unlink()
            (self.path / "metrics.jsonl").write_bytes(evaluations)
            self._note(Known(replica=identity))
        except OSError as exc:
            raise SetupError(f"{self.path} cannot be written: {exc.strerror or exc}; see --dir") from exc

    def describe(self, config: Config, facts: bytes, *, saved: Elsewhere) -> None:
        """Write what makes it readable as a run's folder, and which checkpoint the run counts on.

        Raises SetupError where the disk refuses.
        """
        try:
            note(self.path, saved)
            (self.path / "logs").mkdir(exist_ok=True)
            write_atomic(self.path / "config.json", json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
            write_atomic(self.path / "run.json", facts)
        except OSError as exc:
            raise SetupError(f"{self.path} cannot be written: {exc.strerror or exc}; see --dir") from exc

    def _size(self, file: str) -> int:
        path = self.path / file
        return path.stat().st_size if file in names.LINES and path.is_file() else 0

    def _note(self, known: Known) -> None:
        write_atomic(self.path / REPLICA, msgspec.json.encode(known))


def default_parent(environment: dict[str, str] | None = None) -> Path:
    """Where replicas lie if no folder is named: in the user's cache.  Raises SetupError where there is no home."""
    environment = dict(os.environ) if environment is None else environment
    if named := environment.get("XDG_CACHE_HOME"):
        return Path(named) / "atpo-async" / "joined"
    try:
        return Path.home() / ".cache" / "atpo-async" / "joined"
    except RuntimeError as exc:
        raise SetupError("this user has no home folder: name a folder for the learner's files by --dir") from exc


class ReplicaDir(RunDir):
    """A replica as a run's folder: the unchanged learner works in it.

    Args:
        replica: locked.
        run_id: of the run.
        config: of this learner.
        uplink: counts versions, and passes on what is written here.
    """

    def __init__(self, replica: Replica, *, run_id: str, config: Config, uplink: names.Passes) -> None:
        super().__init__(replica.path, run_id=run_id, config=config)
        self._uplink = uplink

    @property
    def checkpoints(self) -> Path:
        return self.path.parent / "checkpoints"

    @property
    def checkpoints_place(self) -> str:
        return f"{self.checkpoints} on {socket.gethostname()}"

    def next_version(self) -> int:
        return self._uplink.next_version()

    def skip_versions(self, upto: int) -> int:
        return self._uplink.skip_versions(upto)

    def pass_on(self) -> None:
        self._uplink.pass_on()
