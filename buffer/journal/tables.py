"""The journal's three tables in LMDB: opened by one process at a time, read, and changed a group at a time.

``chunks``: number -> records, one after another, and their checksum.  ``rows``: the same number -> the entries of those
records (``trees.index.ROW``), so that a recovery reads numbers and no payload.  ``state``: key -> one of
``journal.entries``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import struct
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmdb
import numpy as np

from atpo_async.core.errors import AtpoError, SetupError
from atpo_async.run import locks, processes
from buffer.journal import check, earlier
from buffer.journal.changes import CHUNKS, ROWS, STATE, Change
from buffer.journal.chunks import Group
from buffer.trees.index import ROW, Place, Rows

if TYPE_CHECKING:
    from filelock import BaseFileLock

log = logging.getLogger("atpo.buffer.journal")

FORMAT = 3
"""Raised where an earlier program could not read what this one writes: it then refuses the journal by this number."""
MAP_FACTOR = 16
MAP_LEAST_BYTES = 16 << 30
"""Address space of the map, not bytes on disk: the free pages between records have to fit too."""
_U64 = struct.Struct(">Q")
_META, _OWNER = b"meta", b"run"
LEAST_FREE_BYTES = 4 << 20
MAX_READERS = 8192


class JournalBroken(AtpoError):
    """LMDB accepts no further commit in this process; another process recovers what was committed."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """What an earlier process had committed and not removed."""

    rows: Rows
    """ROW[R], by tree, then by turn."""
    state: Mapping[bytes, bytes]


class Tables:
    """The tables in one folder, locked for this process until ``close``, or until this object is garbage-collected.

    Args:
        folder: made if it is not there.
        max_bytes: of records that the owner will hold; the map is made for several times that.
        sync: whether a commit waits until the disk has it.
        leased: whether an earlier buffer of this run may have granted leases; an empty file is damage then.

    Raises:
        SetupError: the folder cannot be used, or holds something else.
    """

    def __init__(self, folder: Path, *, max_bytes: int, sync: bool, leased: Callable[[], bool]) -> None:
        self.folder = folder
        self.keeps_changes = False
        """Whether ``commit`` returns what it has changed, for followers; that takes memory."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
            lock = _lock(folder)
        except OSError as exc:
            raise SetupError(
                f"the journal's folder {folder} cannot be used: {exc.strerror or exc}; set buffer.journal_dir to a "
                "folder that this user can write"
            ) from exc
        with contextlib.ExitStack() as held:
            held.callback(lock.release)
            self._env = held.enter_context(self._mapped(free=free, max_bytes=max_bytes, sync=sync, leased=leased))
            # An owner that forgets to close must not lock the folder against the next one in this process.
            self.close = weakref.finalize(self, held.pop_all().close)
        self.close.atexit = False  # the end of a process lets go by itself

    def _mapped(self, *, free: int, max_bytes: int, sync: bool, leased: Callable[[], bool]) -> lmdb.Environment:
        """The tables, opened, after all that they reach was read.  Raises SetupError."""
        folder = self.folder
        data = folder / check.DATA
        there = data.exists()
        if there and not data.stat().st_size:
            if leased():
                raise SetupError(
                    f"the journal in {folder} is damaged: {data.name} is empty, and leases were given before; "
                    f"{check.KEEP}"
                )
            # Left by an earlier program that was killed while it made the journal, or by a disk that was full then.
            log.warning("the journal in %s is empty and nothing was ever leased: it is made anew", folder)
            data.unlink()
            there = False
        if free < LEAST_FREE_BYTES and not there:
            # LMDB maps its files: where the disk cannot hold their first pages the process would die without a message.
            raise SetupError(
                f"the disk of {folder} has {free} bytes left, the journal needs {LEAST_FREE_BYTES} to begin with; make "
                "space there, or set buffer.journal_dir to another disk"
            )
        if there:
            check.check(folder)
        try:
            if not there:
                check.create(folder)
            with contextlib.ExitStack() as held:
                env = held.enter_context(
                    lmdb.open(
                        str(folder),
                        map_size=max(MAP_FACTOR * max_bytes, MAP_LEAST_BYTES),
                        max_dbs=4,
                        sync=sync,
                        metasync=sync,
                        # The payload is read at random; what the kernel would read ahead is not needed.
                        readahead=False,
                        meminit=False,
                        # For every load that may wait at a time: more than there may be peers.
                        max_readers=MAX_READERS,
                    )
                )
                self._chunks = env.open_db(check.CHUNKS.encode())
                self._rows = env.open_db(b"rows")
                self._state = env.open_db(b"state")
                self.tables = (self._chunks, self._rows, self._state)
                held.pop_all()
                return env
        except (OSError, lmdb.Error) as exc:
            raise SetupError(f"the journal in {folder} cannot be opened: {exc}; {check.KEEP}") from exc

    @property
    def env(self) -> lmdb.Environment:
        """For transactions of a copy of these tables; the tables themselves are ``tables``, by number."""
        return self._env

    # --- reading -----------------------------------------------------------------------------------------------

    def read(self, place: Place) -> bytes:
        """One record."""
        with self._env.begin(db=self._chunks, buffers=True) as txn:
            return bytes(_cut(txn.get(_U64.pack(place.chunk)), place))

    def reader(self, places: Sequence[Place | bytes]) -> Callable[[], list[bytes]]:
        """A function that reads these places, in any thread: it sees the state of now, whatever is committed meanwhile.
        It has to be called.

        Args:
            places: a record instead of a place is returned as it is.
        """
        txn = self._env.begin(buffers=True)

        def fetch() -> list[bytes]:
            seen: dict[int, Any] = {}
            found: list[bytes] = []
            try:
                for each in places:
                    if isinstance(each, bytes):
                        found.append(each)
                        continue
                    if each.chunk not in seen:
                        seen[each.chunk] = txn.get(_U64.pack(each.chunk), db=self._chunks)
                    found.append(bytes(_cut(seen[each.chunk], each)))
            finally:
                seen.clear()
                txn.abort()
            return found

        return fetch

    def rows_reader(self, chunks: Iterable[int]) -> Callable[[], Rows]:
        """As ``reader``, for the entries of all records ever put into these chunks, needed or not."""
        keys = [_U64.pack(chunk) for chunk in chunks]
        txn = self._env.begin()

        def fetch() -> Rows:
            try:
                return np.frombuffer(b"".join(txn.get(key, b"", db=self._rows) for key in keys), dtype=ROW)
            finally:
                txn.abort()

        return fetch

    def recover(self, run: str) -> tuple[Recovered, int, dict[bytes, bytes]]:
        """All that is committed.

        Args:
            run: id of the run that it has to belong to; empty for any.

        Returns:
            The contents, the number of the newest chunk, and the keys and values to write so that the tables name their
            run.

        Raises:
            SetupError: another program's journal, another run's, or a damaged one.
        """
        try:
            self._upgrade(run)
            with self._env.begin() as txn:
                state = {bytes(key): bytes(value) for key, value in txn.cursor(db=self._state)}
                rows = b"".join(value for _, value in txn.cursor(db=self._rows))
                chunks: set[int] = set()
                with txn.cursor(db=self._chunks) as cursor:
                    last = _U64.unpack(cursor.key())[0] if cursor.last() else 0
                    for key in cursor.iternext(keys=True, values=False) if cursor.first() else ():
                        chunks.add(_U64.unpack(key)[0])
        except (lmdb.Error, struct.error, ValueError) as exc:
            raise SetupError(f"the journal in {self.folder} cannot be read ({exc}); {check.KEEP}") from exc
        known = state.pop(_META, None)
        if known is not None and known != str(FORMAT).encode():
            raise SetupError(
                f"the journal in {self.folder} has format {known.decode(errors='replace')}, this program reads "
                f"{FORMAT}: finish the run with the program that began it"
            )
        owner = state.pop(_OWNER, b"").decode(errors="replace")
        if run and owner not in ("", run):
            raise SetupError(
                f"the journal in {self.folder} belongs to run {owner!r}, this is run {run!r}; put each run's "
                "journal back into its own folder"
            )
        missing_keys = {_OWNER: run.encode()} if run and not owner else {}
        if known is None:
            missing_keys[_META] = str(FORMAT).encode()
        if len(rows) % ROW.itemsize:
            raise SetupError(f"the journal in {self.folder} is damaged: its rows end amid one; {check.KEEP}")
        found = np.frombuffer(rows, dtype=ROW)
        missing = set(np.unique(found["chunk"]).tolist()) - chunks
        if missing:
            raise SetupError(f"the journal in {self.folder} is damaged: chunk {min(missing)} is missing; {check.KEEP}")
        return Recovered(found[np.lexsort((found["turn_id"], found["tree"]))], state), last, missing_keys

    def _upgrade(self, run: str) -> None:
        """Brings an earlier program's journal to this program's format, its rows too, all at once or not at all.

        Raises:
            SetupError: the disk does not take it.
        """
        with self._env.begin(db=self._state) as txn:
            known, owner = txn.get(_META), txn.get(_OWNER, b"")
        if known not in earlier.FORMATS or (run and owner not in (b"", run.encode())):
            return
        try:
            with self._env.begin(write=True) as txn:
                keys = txn.cursor(db=self._rows).iternext(values=False) if known == earlier.ROWS else ()
                for key in [bytes(key) for key in keys]:
                    txn.put(key, earlier.upgraded(txn.get(key, b"", db=self._rows)), db=self._rows)
                txn.put(_META, str(FORMAT).encode(), db=self._state)
        except lmdb.Error as exc:
            raise SetupError(
                f"the journal in {self.folder}, of an earlier program, cannot be rewritten: {exc}; nothing of it is "
                "changed: make space on its disk"
            ) from exc
        log.info("the journal in %s is of an earlier program: it is in format %d now", self.folder, FORMAT)

    # --- writing -----------------------------------------------------------------------------------------------

    def commit(self, group: Group) -> list[Change]:
        """Commit all of the group, or nothing.  Returns what was put and deleted, in order, if ``keeps_changes``."""
        made = []
        with self._env.begin(write=True) as txn:
            for change, is_new in self._changes(txn, group):
                self.make(txn, change, append=is_new)
                if self.keeps_changes:
                    made.append(change)
        return made

    def _changes(self, txn: lmdb.Transaction, group: Group) -> Iterator[tuple[Change, bool]]:
        """What a group changes, with True for entries that come last in their table; each is made before the next one
        is asked for."""
        # Entries added and removed between two commits are left out: LMDB counts their pages but may never write them.
        passed = {chunk.number for chunk in group.chunks} & set(group.freed)
        for chunk in group.chunks:
            if chunk.number not in passed:
                key = _U64.pack(chunk.number)
                yield Change(CHUNKS, key, check.with_sum(chunk.records)), True
                yield Change(ROWS, key, b"".join(chunk.rows)), True
        for number in group.freed:
            if number not in passed:
                yield Change(CHUNKS, _U64.pack(number), None), False
                yield Change(ROWS, _U64.pack(number), None), False
        for number, offsets in group.cut_out.items():
            key = _U64.pack(number)
            rows = txn.get(key, db=self._rows)
            if rows is not None:
                found = np.frombuffer(rows, dtype=ROW)
                yield Change(ROWS, key, found[~np.isin(found["offset"], list(offsets))].tobytes()), False
        for name, value in group.writes.items():
            yield Change(STATE, name, value), False

    def make(self, txn: lmdb.Transaction, change: Change, *, append: bool = False) -> None:
        """Make one change.  Raises lmdb.Error.

        Args:
            append: its key comes after all others of its table.
        """
        table, key, value = change
        if value is None:
            txn.delete(key, db=self.tables[table])
        else:
            txn.put(key, value, db=self.tables[table], append=append)


def _lock(folder: Path) -> BaseFileLock:
    """Holds the folder for this process.  Raises SetupError naming the one that has it."""
    owner = folder / "owner"
    lock = locks.take(owner, f"{os.getpid()} {socket.gethostname()}\n")
    if lock is None:
        found = _named(locks.words_in(owner))
        raise SetupError(f"the journal in {folder} is in use by another buffer{found}; stop that one first")
    return lock


def _named(owner: str) -> str:
    """The process that holds a journal, from the text that it left there."""
    pid, _, host = owner.strip().partition(" ")
    if not pid.isdecimal():
        return ""
    if host != socket.gethostname():
        return f" (process {pid} on {host})"
    if processes.stopped([int(pid)]):
        return f" (process {pid}, which a signal has stopped: kill -CONT {pid} lets it go on, kill -9 {pid} ends it)"
    return f" (process {pid})"


def _cut(value: Any, place: Place) -> memoryview:
    if value is None:
        raise JournalBroken(f"chunk {place.chunk} is not in the journal: a record of it was still needed")
    return memoryview(value)[place.offset : place.offset + place.nbytes]
