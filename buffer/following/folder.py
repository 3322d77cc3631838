"""A follower's folder: the copy of a journal, changed one whole commit at a time, and the run's small files.

It is laid out as a run's folder (``journal/``, ``run.json``, ``config.json``, …); ``following.json`` makes it a
follower's.  Killed at any moment it holds the journal of some commit, or, before the first copy is complete, none.
"""

from __future__ import annotations

import json
import logging
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from atpo_async.core.errors import BadMessage, SetupError
from atpo_async.run.files import write_atomic
from atpo_async.run.rundir import FOLLOWING, PROMOTED
from atpo_async.wire.followers import messages as f
from buffer.following.copying import ranges_of
from buffer.following.small_files import MAX_FILE_BYTES, NAMES
from buffer.journal import check
from buffer.journal.changes import CHUNKS, ROWS, STATE, Change, Decoder
from buffer.journal.marks import MARK, Mark, read_mark
from buffer.journal.tables import MAP_FACTOR, MAP_LEAST_BYTES, Tables

log = logging.getLogger("atpo.follower")

JOURNAL = "journal"
NOTE_EVERY_S = 5.0
_U64 = struct.Struct(">Q")
_IGNORED = {"lost+found"}
"""Of a volume that is freshly formatted."""


def check_empty(folder: Path) -> None:
    """Raises SetupError where a follower cannot begin in a folder, or go on in it."""
    if (folder / PROMOTED).exists():
        raise SetupError(
            f"{folder} was a follower's and has been promoted: a run goes on in it; give the follower another --dir"
        )
    if (folder / FOLLOWING).is_file() or not folder.exists():
        return
    if not folder.is_dir():
        raise SetupError(f"--dir {folder} is no folder")
    there = sorted(entry.name for entry in folder.iterdir() if entry.name not in _IGNORED)
    if there:
        raise SetupError(
            f"--dir {folder} is not empty and no follower's: it has {', '.join(there[:3])}; name an empty folder"
        )


class FollowerFolder:
    """A follower's folder, locked until ``close``.  All its methods run in one thread.

    Args:
        path: made if it is not there.
        sync: whether a commit waits until the disk has it.

    Raises:
        SetupError: it cannot be used, holds something else, or another follower has it.
    """

    def __init__(self, path: Path, *, sync: bool) -> None:
        check_empty(path)
        self.path = path
        self.note: dict[str, Any] = _read_note(path)
        # Before anything else is in it: whenever this is broken off, the folder is a follower's.
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not (path / FOLLOWING).exists():
                write_atomic(path / FOLLOWING, json.dumps(self.note))
        except OSError as exc:
            raise SetupError(f"--dir {path} cannot be used: {exc.strerror or exc}") from exc
        most = int(self.note.get("max_bytes") or 1)
        self._tables = Tables(path / JOURNAL, max_bytes=most, sync=sync, leased=lambda: False)
        self._map_bytes = max(MAP_FACTOR * most, MAP_LEAST_BYTES)
        self._decoder = Decoder(1 << 20)
        self._txn: lmdb.Transaction | None = None
        self._seen: dict[int, set[bytes]] = {}
        self._stream = ""
        self._noted_at = 0.0

    def close(self) -> None:
        """Break off what is under way, and let the folder go."""
        self.abort()
        self._tables.close()

    @property
    def run(self) -> str:
        return str(self.note.get("run", ""))

    @property
    def mark(self) -> Mark | None:
        """How far the copy is; None before the first one is complete.  Raises SetupError where it is damaged."""
        with self._tables.env.begin(db=self._tables.tables[STATE]) as txn:
            data = txn.get(MARK)
        return None if data is None else read_mark({MARK: data})

    def hello(self, protocol: int) -> f.FollowHello:
        """Where this copy stands."""
        mark = self.mark
        with self._tables.env.begin(db=self._tables.tables[CHUNKS]) as txn:
            numbers = np.array([_U64.unpack(key)[0] for key in txn.cursor().iternext(values=False)], np.uint64)
        return f.FollowHello(
            protocol=protocol,
            run=self.run,
            # Chunks that came before a first copy was complete are of this stream.
            stream=mark.stream if mark is not None else str(self.note.get("stream", "")),
            position=0 if mark is None else mark.number,
            complete=mark is not None,
            chunks=ranges_of(numbers),
        )

    def begin(self, following: f.Following, join: str) -> None:
        """Take up what the buffer sends from here on.  Raises SetupError for another run."""
        if self.run not in ("", following.run):
            raise SetupError(f"{self.path} follows run {self.run!r}, the buffer at {join} is of {following.run!r}")
        self.abort()
        self._decoder = Decoder(following.value_bytes)
        self._stream = following.stream
        size = max(MAP_FACTOR * following.max_bytes, MAP_LEAST_BYTES)
        if size > self._map_bytes:
            self._tables.env.set_mapsize(size)
            self._map_bytes = size
        new = {"run": following.run, "join": join, "max_bytes": following.max_bytes, "stream": following.stream}
        self.heard(new, at_once=new.items() - self.note.items() != set())

    def heard(self, more: dict[str, Any] | None = None, *, at_once: bool = False) -> None:
        """The buffer was heard of now; noted every few seconds.  Raises OSError where the disk is full."""
        self.note |= {**(more or {}), "heard": round(time.time(), 3)}
        if at_once or time.monotonic() - self._noted_at > NOTE_EVERY_S:
            write_atomic(self.path / FOLLOWING, json.dumps(self.note))
            self._noted_at = time.monotonic()

    def take(self, part: f.JournalPart) -> None:
        """One part of a copy, or of commits.

        Raises:
            BadMessage: it is none of a journal, or does not fit what is here.
            lmdb.Error, OSError: the disk does not take it.  Nothing of a commit that did not end is here then.
        """
        try:
            self._write_files(part.files)
            if part.kind in ("nothing", "again"):
                return
            changes = self._decoder.feed(part.data.tobytes())
            if part.kind == "chunks":
                self._take_chunks(changes)
            else:
                self._take_changes(changes, part)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Break off a commit that has not ended."""
        txn, self._txn = self._txn, None
        self._seen = {}
        if txn is not None:
            txn.abort()

    def _take_chunks(self, changes: Iterator[Change]) -> None:
        """Records come first, and the entries that name them last: until then nothing refers to them."""
        with self._tables.env.begin(write=True) as txn:
            for change in changes:
                if change.table != CHUNKS or change.value is None:
                    raise BadMessage("a copy's records hold another change")
                self._make(txn, change)

    def _take_changes(self, changes: Iterator[Change], part: f.JournalPart) -> None:
        if self._txn is None:
            self._txn = self._tables.env.begin(write=True)
            self._seen = {ROWS: set(), STATE: set()}
        for change in changes:
            if part.kind == "rest":
                if change.table == CHUNKS or change.value is None:
                    raise BadMessage("the end of a copy holds records")
                self._seen[change.table].add(change.key)
            self._make(self._txn, change)
        if not part.ends:
            return
        if self._decoder.pending_bytes:
            raise BadMessage(f"a commit ends amid a change, {self._decoder.pending_bytes} bytes of which came")
        if part.kind == "rest":
            self._remove_others(self._txn)
        self._check_mark(self._txn, part.position)
        txn, self._txn, self._seen = self._txn, None, {}
        txn.commit()

    def _make(self, txn: lmdb.Transaction, change: Change) -> None:
        if change.table == CHUNKS and change.value is not None and (fault := check.fault_of(change.value)):
            raise BadMessage(f"chunk {change.key.hex()} is damaged: {fault}")
        self._tables.make(txn, change)

    def _remove_others(self, txn: lmdb.Transaction) -> None:
        """What the copy does not name, as it was removed since.  Raises BadMessage where it names chunks not here."""
        for table, keys in ((ROWS, self._seen[ROWS]), (STATE, self._seen[STATE]), (CHUNKS, self._seen[ROWS])):
            db = self._tables.tables[table]
            there = [bytes(key) for key in txn.cursor(db=db).iternext(values=False)]
            for key in there:
                if key not in keys:
                    txn.delete(key, db=db)
            if table == CHUNKS and (missing := keys - set(there)):
                raise BadMessage(f"a copy lacks {len(missing)} of its chunks, {min(missing).hex()} among them")

    def _check_mark(self, txn: lmdb.Transaction, position: int) -> None:
        data = txn.get(MARK, db=self._tables.tables[STATE])
        try:
            mark = None if data is None else read_mark({MARK: bytes(data)})
        except SetupError as exc:
            raise BadMessage(str(exc)) from None
        if mark is None or (mark.stream, mark.number) != (self._stream, position):
            raise BadMessage(f"what ends here is said to be commit {position} of {self._stream}, its mark is {mark}")

    def _write_files(self, files: tuple[f.SmallFile, ...]) -> None:
        for file in files:
            if file.name not in NAMES or len(file.data) > MAX_FILE_BYTES:
                raise BadMessage(f"{file.name!r} of {len(file.data)} bytes is none of a run's small files")
            write_atomic(self.path / file.name, file.data.tobytes())


def _read_note(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / FOLLOWING).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as exc:
        raise SetupError(f"{folder / FOLLOWING} is damaged: {exc}; give the follower an empty --dir") from None
    return found if isinstance(found, dict) else {}


def read_note(folder: Path) -> dict[str, Any]:
    """``following.json``.  Raises SetupError where the folder is no follower's."""
    if not (folder / FOLLOWING).is_file():
        raise SetupError(f"{folder} is no follower's folder: it has no {FOLLOWING}")
    return _read_note(folder)
