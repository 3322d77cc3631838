"""The run's count of versions, given out to a joined learner: no number twice, and the same answer to a question asked
twice."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from atpo_async.run.files import write_atomic
from atpo_async.run.rundir import RunDir

log = logging.getLogger("atpo.buffer")


class _Given(msgspec.Struct, forbid_unknown_fields=True):
    life: str
    number: int
    version: int


class VersionCount:
    """Counts in the run's folder, where a learner with that folder goes on.  One thread at a time.

    Args:
        rundir: the run.
        file: holds the number that was given last, and to which question.
    """

    def __init__(self, rundir: RunDir, file: Path) -> None:
        self._rundir = rundir
        self._file = file

    def take(self, life: str, number: int) -> int:
        """The next version number; on disk before it is returned.

        Args:
            life: which process of the learner asks.
            number: of its question.

        Raises:
            OSError: the file system refuses.
            SetupError: the count is damaged.
        """
        given = self._read()
        if given is not None:
            # A crash came between the two files: that number may have been given.
            self._rundir.skip_versions(given.version)
            if (given.life, given.number) == (life, number):
                return given.version
        version = self._rundir.following_version()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._file, msgspec.json.encode(_Given(life, number, version)))
        self._rundir.skip_versions(version)
        return version

    def raise_above(self, version: int) -> tuple[int, int]:
        """Give none up to ``version`` any more.  Returns the next one, and by how many the count was raised."""
        raised = self._rundir.skip_versions(version)
        return self._rundir.following_version(), raised

    def _read(self) -> _Given | None:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=_Given)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as exc:
            log.warning("%s is damaged (%s): the count itself is in %s", self._file, exc, self._rundir.path / "version")
            return None
