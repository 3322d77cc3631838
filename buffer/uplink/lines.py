"""Lines that a joined learner adds to files of the run's folder: each is written exactly once, whatever ends when.

Other processes add lines to the same files.  So what is about to be written is noted on disk first: which lines, by
their digests, and how long the file was before.  After a crash, or a write that the disk has taken in part, the file
itself says which of them are there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from atpo_async.core.errors import BadMessage
from atpo_async.run.files import write_atomic
from atpo_async.run.metrics import parse_record
from atpo_async.run.replica import names
from atpo_async.wire.digests import digest_of


class Pending(msgspec.Struct, forbid_unknown_fields=True):
    """Lines that may be in the file, or not."""

    file: str
    before: int
    """Bytes that the file had when they were about to be written."""
    lines: list[tuple[int, str]]
    """(bytes in the replica's file, digest of what is written); no digest where a line is left out."""


class Progress(msgspec.Struct, forbid_unknown_fields=True):
    """How much of one replica has arrived."""

    replica: str = ""
    taken: dict[str, int] = {}
    """File -> bytes of the replica's file."""
    left_out: int = 0
    """Lines that were none."""
    pending: Pending | None = None


class LineFiles:
    """Adds the lines of one rank's replica to the run's files.  One thread at a time.

    Args:
        run: the run's folder.
        state: file that holds how much has arrived.
        rank: whose lines; each rank may write its own only.

    Raises:
        OSError: the state cannot be read.
    """

    def __init__(self, run: Path, state: Path, *, rank: int) -> None:
        self._run = run
        self._state = state
        self._rank = rank
        self._progress = _read(state)
        self._settle_pending()

    @property
    def replica(self) -> str:
        """Identity of the replica whose lines are taken; empty before the first."""
        return self._progress.replica

    @property
    def taken(self) -> dict[str, int]:
        return dict(self._progress.taken)

    def begin(self, replica: str, taken: dict[str, int]) -> None:
        """From now on take the lines of another replica, of which so much is not to be written.  Raises OSError."""
        self._save(Progress(replica=replica, taken=taken))

    def add(self, file: str, offset: int, data: bytes, *, left_out: int = 0) -> int:
        """Add lines that begin at ``offset`` of the replica's file, ``left_out`` bytes of which follow that are never
        passed on.  Returns how much of that has arrived now.

        Raises:
            BadMessage: a file in which this rank writes no lines, or bytes that do not end with a line.
            OSError: the file system refuses; what it has taken is not written again.
        """
        if not names.may_add_lines(file, self._rank):
            raise BadMessage(f"rank {self._rank} of the learner adds no lines to {file!r:.80}")
        if data and not data.endswith(b"\n"):
            raise BadMessage(f"{len(data)} bytes for {file} do not end with a line")
        taken = self._progress.taken.get(file, 0)
        if offset != taken:
            return taken
        path = self._run / file
        lines = [line + b"\n" for line in data.split(b"\n")[:-1]]
        wanted = [line if self._is_wanted(file, line) else b"" for line in lines]
        noted = [(len(line), digest_of(kept) if kept else "") for line, kept in zip(lines, wanted, strict=True)]
        noted += [(left_out, "")] if left_out else []
        before = path.stat().st_size if path.exists() else 0
        self._save(msgspec.structs.replace(self._progress, pending=Pending(file, before, noted)))
        try:
            _append(path, b"".join(wanted))
        except OSError:
            self._settle_pending()
            raise
        self._arrived(file, noted)
        return self._progress.taken[file]

    def _is_wanted(self, file: str, line: bytes) -> bool:
        """Whether a line is one of the file's, and this rank's own."""
        if len(line) > names.MAX_LINE_BYTES:
            return False
        if file == "metrics.jsonl":
            record = parse_record(line)
            return record is not None and record.source == "learner"
        try:
            said: Any = json.loads(line)
        except (ValueError, RecursionError):
            return False
        return isinstance(said, dict) and (file != "lineage.jsonl" or said.get("rank") == self._rank)

    def _settle_pending(self) -> None:
        """Count those of the pending lines that are in the file.  Raises OSError."""
        pending = self._progress.pending
        if pending is None:
            return
        there = _there(self._run / pending.file, pending)
        self._arrived(pending.file, pending.lines[:there])

    def _arrived(self, file: str, lines: Iterable[tuple[int, str]]) -> None:
        # Only in memory: the next lines write it, and until then the file itself says it after a crash.
        taken, left_out = self._progress.taken.get(file, 0), self._progress.left_out
        for nbytes, digest in lines:
            taken, left_out = taken + nbytes, left_out + (not digest)
        progress = msgspec.structs.replace(
            self._progress, taken={**self._progress.taken, file: taken}, left_out=left_out, pending=None
        )
        self._progress = progress

    def _save(self, progress: Progress) -> None:
        self._state.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._state, msgspec.json.encode(progress))
        self._progress = progress


def _there(path: Path, pending: Pending) -> int:
    """How many of the pending lines, from the first on, are in the file or are left out."""
    wanted = [digest for _, digest in pending.lines]
    found = 0
    with (path if path.exists() else Path(os.devnull)).open("rb") as file:
        file.seek(pending.before)
        for line in file:
            while found < len(wanted) and not wanted[found]:
                found += 1
            if found == len(wanted):
                break
            # The last one may lack its end alone: the next write adds that.
            if digest_of(line if line.endswith(b"\n") else line + b"\n") == wanted[found]:
                found += 1
    while found < len(wanted) and not wanted[found]:
        found += 1
    return found


def _append(path: Path, data: bytes) -> None:
    """Add whole lines in one write where the file system takes it so, on disk when this returns.  Raises OSError."""
    if not data:
        return
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(fd).st_size
        # Another writer died in mid-line, or the disk took a part of one: end it, or the next line is lost with it.
        rest = b"\n" + data if size and os.pread(fd, 1, size - 1) != b"\n" else data
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _read(state: Path) -> Progress:
    try:
        return msgspec.json.decode(state.read_bytes(), type=Progress)
    except FileNotFoundError:
        return Progress()
    except msgspec.MsgspecError:
        # Written whole or not at all: what a disk has damaged.  A learner that joins then begins a new replica.
        return Progress()
