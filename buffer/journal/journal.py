"""What the buffer keeps: turns, trees, leases, cursor, priorities, uses, versions, in LMDB, committed in groups.

Three tables.  ``chunks``: number -> records, one after another; a chunk holds what one group of messages brought, up to
``CHUNK_BYTES``.  ``rows``: the same number -> the entries of those records (``buffer.index.ROW``), so that a recovery
reads numbers and no payload.  ``state``: key -> whatever the owner keeps beside (``buffer.journal.entries``).

The event loop only hands over; a thread writes and syncs.  All that was handed over before a commit begins is in it,
whole or not at all: the answers and acknowledgements that follow from it leave after ``settle``, so nothing anybody was
told is lost, and nobody was told of what is.  While the disk refuses (full, an error), nothing settles; the same group
is tried again until it is taken.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import logging
import os
import shutil
import socket
import struct
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import lmdb
import numpy as np

from atpo_async.core.errors import AtpoError, SetupError
from atpo_async.run import locks, processes
from atpo_async.status import waits
from buffer.journal import check
from buffer.trees.index import ROW, Place, Rows, TurnEntry, pack_entry

if TYPE_CHECKING:
    from filelock import BaseFileLock

log = logging.getLogger("atpo.buffer.journal")

FORMAT = 1
CHUNK_BYTES = 1 << 18
"""A chunk is closed once it has as many; it is freed as a whole, so a large one would be kept long by a few trees."""
MAP_FACTOR = 16
MAP_LEAST_BYTES = 16 << 30
"""Address space of the map, not bytes on disk: room for the free pages between records."""
GROUP_MESSAGES = 512
"""A commit waits no longer for more messages than these."""
RETRY_S = 0.5
RETRY_MAX_S = 5.0
REPEAT_S = 30.0
"""How often a failure that lasts is logged."""
SPARE_BYTES = 64 << 20
"""Dead bytes in living chunks that are not worth moving the others for."""

_U64 = struct.Struct(">Q")
_META, _OWNER = b"meta", b"run"
LEAST_FREE_BYTES = 4 << 20
MAX_READERS = 8192


class JournalBroken(AtpoError):
    """LMDB will take nothing more in this process; another one recovers what was committed."""


@dataclass(slots=True)
class _Chunk:
    """Records not committed yet, or being committed."""

    number: int
    records: list[bytes] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    rows: list[bytes] = field(default_factory=list)
    nbytes: int = 0


@dataclass(slots=True)
class _Live:
    """A chunk on disk: how much of it is still needed."""

    records: int
    nbytes: int
    size: int


@dataclass(frozen=True, slots=True)
class _Group:
    """One commit."""

    chunks: Sequence[_Chunk]
    freed: Sequence[int]
    cut_out: Mapping[int, set[int]]
    """Chunk -> offsets of the rows to be taken out."""
    writes: Mapping[bytes, bytes | None]

    def __bool__(self) -> bool:
        return bool(self.chunks or self.freed or self.cut_out or self.writes)


@dataclass(frozen=True, slots=True)
class Recovered:
    """What an earlier process had committed and not let go."""

    rows: Rows
    """ROW[R], by tree, then by turn."""
    state: Mapping[bytes, bytes]


class Journal:
    """One run's journal.  Use as an async context; one that is never entered lets its folder go when it is closed, or
    collected as garbage.

    Args:
        folder: made if it is not there.
        run: id of the run that it belongs to; empty for none in particular.
        max_bytes: of records the owner means to keep; the map is made for several times that.
        sync: whether a commit waits until the disk has it.  Without, it survives ``kill -9`` but no power cut.
        gather_s: how long a commit waits for more to come, from the first thing on that it will hold.
        collect: called on the loop right before a commit: hands over (``put``) what has changed.
        leased: whether anything of this run may have left an earlier buffer; a file without a byte is damage then.

    Raises:
        SetupError: the folder cannot be used, or holds something else.
    """

    def __init__(
        self,
        folder: Path,
        *,
        run: str = "",
        max_bytes: int,
        sync: bool = True,
        gather_s: float = 0.002,
        collect: Callable[[], None] = lambda: None,
        leased: Callable[[], bool] = lambda: True,
    ) -> None:
        self.folder = folder
        self._run = run
        self.collect = collect
        self.gather_s = gather_s
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
            # Whoever forgets to close must not keep the folder from the next one in this process.
            self._let_go = weakref.finalize(self, held.pop_all().close)
        self._let_go.atexit = False  # the end of a process lets go by itself
        self._open = _Chunk(1)
        self._closed: list[_Chunk] = []
        self._in_flight: list[_Chunk] = []
        self._uncommitted: dict[int, _Chunk] = {1: self._open}
        self._writes: dict[bytes, bytes | None] = {}
        self._freed: list[int] = []
        self._cut_out: dict[int, set[int]] = {}
        self._live: dict[int, _Live] = {}
        self._messages = 0
        self._first_at = 0.0
        """When the first of them came."""
        self._commit_s: deque[float] = deque(maxlen=4096)
        self.nbytes = 0
        """Bytes of the records that are needed."""
        self.chunk_bytes = 0
        """Bytes of the chunks that hold them, what is dead in them too."""
        self.commits = 0
        self.failing: str | None = None
        """Why nothing is committed at the moment; None if something is."""
        self.broken: asyncio.Future[None] | None = None
        self._asked = asyncio.Event()
        self._wanted = 0
        self._settling: dict[int, asyncio.Future[None]] = {}
        """Ticket -> who waits for its commit, in order."""
        self._full = asyncio.Event()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="journal-read")
        self._committing: asyncio.Task[None] | None = None

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
            # LMDB maps its files: where the disk cannot hold their first pages the process would die without a word.
            raise SetupError(
                f"the disk of {folder} has {free} bytes left, the journal needs {LEAST_FREE_BYTES} to begin with; make "
                "room there, or set buffer.journal_dir to another disk"
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
                        # Of every load that waits for its turn; as many as there may be peers, and more.
                        max_readers=MAX_READERS,
                    )
                )
                self._chunks = env.open_db(check.CHUNKS.encode())
                self._rows = env.open_db(b"rows")
                self._state = env.open_db(b"state")
                held.pop_all()
                return env
        except (OSError, lmdb.Error) as exc:
            raise SetupError(f"the journal in {folder} cannot be opened: {exc}; {check.KEEP}") from exc

    async def __aenter__(self) -> Self:
        self.broken = asyncio.get_running_loop().create_future()
        self._committing = asyncio.create_task(self._commit_when_asked(), name="journal commits")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self, *, timeout_s: float = 5.0) -> None:
        """Commit what is left, if the disk takes it in time, and close.  Of one never entered, only close."""
        if self._committing is not None:
            if self.broken is not None and not self.broken.done():
                with contextlib.suppress(TimeoutError):
                    await self.settle(timeout_s=timeout_s)
            self._committing.cancel()
            await asyncio.gather(self._committing, return_exceptions=True)
            self._committing = None
            await asyncio.get_running_loop().run_in_executor(self._writer, lambda: None)
        self._writer.shutdown(wait=True)
        self._reader.shutdown(wait=True)
        self._let_go()

    # --- handing over ------------------------------------------------------------------------------------------

    def add(self, record: bytes) -> Place:
        """Keep a record.  Its entry has to follow (``note``) before the loop turns to anything else."""
        chunk = self._open
        place = Place(chunk.number, chunk.nbytes, len(record))
        chunk.records.append(record)
        chunk.offsets.append(chunk.nbytes)
        chunk.nbytes += len(record)
        self.nbytes += len(record)
        if not self._messages:
            self._first_at = time.monotonic()
        self._messages += 1
        return place

    def note(self, entry: TurnEntry) -> None:
        """The entry of a record just added."""
        chunk = self._open
        chunk.rows.append(pack_entry(entry))
        if chunk.nbytes >= CHUNK_BYTES:
            self._close_chunk()
        if self._messages >= GROUP_MESSAGES:
            self._full.set()

    def _close_chunk(self) -> None:
        chunk = self._open
        if chunk.records:
            self._closed.append(chunk)
            self._live[chunk.number] = _Live(len(chunk.records), chunk.nbytes, chunk.nbytes)
            self.chunk_bytes += chunk.nbytes
            self._open = _Chunk(chunk.number + 1)
            self._uncommitted[self._open.number] = self._open

    def put(self, key: bytes, value: bytes | None) -> None:
        """Keep ``value`` under ``key``; None removes it."""
        self._writes[key] = value

    def release(self, rows: Rows, *, gone: bool = False) -> None:
        """These records are needed no more; their chunk goes with the last of them.

        Args:
            rows: ROW[R].
            gone: whether their trees are: a recovery tells by that.  Otherwise their rows are cut out.
        """
        if not len(rows):
            return
        if not gone:
            for chunk, offset in zip(rows["chunk"].tolist(), rows["offset"].tolist(), strict=True):
                self._cut_out.setdefault(chunk, set()).add(offset)
        chunks, at, counts = np.unique(rows["chunk"], return_inverse=True, return_counts=True)
        sizes = np.bincount(at, weights=rows["nbytes"].astype(np.float64))
        for chunk, count, nbytes in zip(chunks.tolist(), counts.tolist(), sizes.tolist(), strict=True):
            if chunk == self._open.number:
                self._close_chunk()
            live = self._live[chunk]
            live.records -= count
            live.nbytes -= int(nbytes)
            self.nbytes -= int(nbytes)
            if live.records <= 0:
                del self._live[chunk]
                self.chunk_bytes -= live.size
                self._freed.append(chunk)

    async def settle(self, *, timeout_s: float | None = None, at_once: bool = False) -> None:
        """Returns once all that was handed over, or can be collected, before this call is committed.

        Waits for: the disk.  Unblocked by: the commit.

        Args:
            timeout_s: None for no end.
            at_once: the commit does not wait for more to come; for somebody who has nothing else to do.

        Raises:
            TimeoutError: not within ``timeout_s``.
        """
        self._wanted += 1
        ticket = self._wanted
        if at_once:
            self._full.set()
        self._asked.set()
        with waits.waiting("the buffer", "a commit", on=waits.DISK, limit_s=timeout_s):
            done = self._settling[ticket] = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(timeout_s):
                    await done
            finally:
                # While the disk refuses, many come and give up.
                del self._settling[ticket]

    # --- reading -----------------------------------------------------------------------------------------------

    def read(self, place: Place) -> bytes:
        """One record, in the caller's thread."""
        chunk = self._uncommitted.get(place.chunk)
        if chunk is not None:
            return chunk.records[bisect.bisect_left(chunk.offsets, place.offset)]
        with self._env.begin(db=self._chunks, buffers=True) as txn:
            return bytes(_cut(txn.get(_U64.pack(place.chunk)), place))

    async def load(self, places: Sequence[Place]) -> list[bytes]:
        """Records, read in a thread: the disk may have to be waited for."""
        if not places:
            return []
        found: list[bytes | None] = []
        pending = self._uncommitted
        for place in places:
            chunk = pending.get(place.chunk)
            found.append(None if chunk is None else chunk.records[bisect.bisect_left(chunk.offsets, place.offset)])
        # Begun here: a commit after this cannot take away what it sees.
        txn = self._env.begin(buffers=True)

        def fetch() -> list[bytes]:
            seen: dict[int, Any] = {}
            out: list[bytes] = []
            try:
                for place, there in zip(places, found, strict=True):
                    if there is None:
                        if place.chunk not in seen:
                            seen[place.chunk] = txn.get(_U64.pack(place.chunk), db=self._chunks)
                        there = bytes(_cut(seen[place.chunk], place))
                    out.append(there)
            finally:
                seen.clear()
                txn.abort()
            return out

        return await asyncio.get_running_loop().run_in_executor(self._reader, fetch)

    def recover(self) -> Recovered:
        """All that is committed.  Before anything is handed over.

        Raises:
            SetupError: another program's journal, or a damaged one.
        """
        try:
            with self._env.begin() as txn:
                state = {bytes(key): bytes(value) for key, value in txn.cursor(db=self._state)}
                rows = b"".join(value for _, value in txn.cursor(db=self._rows))
                sizes: dict[int, int] = {}
                with txn.cursor(db=self._chunks) as cursor:
                    last = _U64.unpack(cursor.key())[0] if cursor.last() else 0
                    for key in cursor.iternext(keys=True, values=False) if cursor.first() else ():
                        sizes[_U64.unpack(key)[0]] = 0
        except (lmdb.Error, struct.error, ValueError) as exc:
            raise SetupError(f"the journal in {self.folder} cannot be read ({exc}); {check.KEEP}") from exc
        known = state.pop(_META, None)
        if known is not None and known != str(FORMAT).encode():
            raise SetupError(
                f"the journal in {self.folder} has format {known.decode(errors='replace')}, this program reads "
                f"{FORMAT}: finish the run with the program that began it"
            )
        owner = state.pop(_OWNER, b"").decode(errors="replace")
        if self._run and owner not in ("", self._run):
            raise SetupError(
                f"the journal in {self.folder} belongs to run {owner!r}, this is run {self._run!r}; put each run's "
                "journal back into its own folder"
            )
        if self._run and not owner:
            self.put(_OWNER, self._run.encode())
        if known is None:
            self.put(_META, str(FORMAT).encode())
        if len(rows) % ROW.itemsize:
            raise SetupError(f"the journal in {self.folder} is damaged: its rows end amid one; {check.KEEP}")
        found = np.frombuffer(rows, dtype=ROW)
        missing = set(np.unique(found["chunk"]).tolist()) - sizes.keys()
        if missing:
            raise SetupError(f"the journal in {self.folder} is damaged: chunk {min(missing)} is missing; {check.KEEP}")
        for chunk, size in zip(found["chunk"].tolist(), found["nbytes"].tolist(), strict=True):
            sizes[chunk] += size
        counts = np.unique(found["chunk"], return_counts=True)
        for chunk, count in zip(counts[0].tolist(), counts[1].tolist(), strict=True):
            self._live[chunk] = _Live(count, sizes[chunk], sizes[chunk])
        self.nbytes = self.chunk_bytes = sum(sizes.values())
        self._open = _Chunk(last + 1)
        self._uncommitted = {self._open.number: self._open}
        return Recovered(found[np.lexsort((found["turn_id"], found["tree"]))], state)

    # --- moving what is left of mostly dead chunks --------------------------------------------------------------

    def sparse_chunks(self, limit: int) -> list[int]:
        """Up to ``limit`` chunks to empty, oldest first; none while little is dead."""
        if self.chunk_bytes - self.nbytes < max(SPARE_BYTES, self.nbytes):
            return []
        sparse = (c for c, live in self._live.items() if 2 * live.nbytes < live.size and c not in self._uncommitted)
        return sorted(sparse)[:limit]

    async def rows_in(self, chunks: Iterable[int]) -> Rows:
        """ROW[R]: entries of all records ever put into these chunks, the dead ones too."""
        keys = [_U64.pack(chunk) for chunk in chunks]
        txn = self._env.begin()

        def fetch() -> bytes:
            try:
                return b"".join(txn.get(key, b"", db=self._rows) for key in keys)
            finally:
                txn.abort()

        return np.frombuffer(await asyncio.get_running_loop().run_in_executor(self._reader, fetch), dtype=ROW)

    # --- committing --------------------------------------------------------------------------------------------

    def _seal(self) -> _Group:
        self._close_chunk()
        group = _Group(self._closed, self._freed, self._cut_out, self._writes)
        self._in_flight = self._closed
        self._closed, self._freed, self._cut_out, self._writes = [], [], {}, {}
        self._messages = 0
        self._full.clear()
        return group

    async def _commit_when_asked(self) -> None:
        """Waits for: somebody who wants something settled.  Ended by: close()."""
        try:
            await self._commit_forever(asyncio.get_running_loop())
        # Whatever it was, nothing would ever settle again: the process has to end and another to take over.
        except Exception as exc:
            log.exception("a commit failed")
            self._break(f"the journal in {self.folder} failed: {type(exc).__name__}: {exc}")

    async def _commit_forever(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            await self._asked.wait()
            self._asked.clear()
            # What came while the last commit was written has waited long enough.
            gather_s = self.gather_s - (time.monotonic() - self._first_at if self._messages else 0.0)
            if gather_s > 0 and not self._full.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(gather_s):
                        await self._full.wait()
            upto = self._wanted
            self.collect()
            group, began = self._seal(), loop.time()
            if group and not await self._write(loop, group):
                return
            if group:
                self._commit_s.append(loop.time() - began)
            for chunk in self._in_flight:
                self._uncommitted.pop(chunk.number, None)
            self._in_flight = []
            # One after another and at once: at full load every further round of the loop handles a burst of messages.
            for ticket, done in self._settling.items():
                if ticket > upto:
                    break
                if not done.done():
                    done.set_result(None)

    async def _write(self, loop: asyncio.AbstractEventLoop, group: _Group) -> bool:
        """Until the disk takes it.  False if it never will in this process."""
        pause_s, began, told = RETRY_S, loop.time(), -REPEAT_S
        while True:
            try:
                await loop.run_in_executor(self._writer, self._commit, group)
            except (lmdb.Error, OSError) as exc:
                if isinstance(exc, lmdb.PanicError | lmdb.CorruptedError | lmdb.InvalidError):
                    self._break(f"the journal in {self.folder} can take nothing more: {exc}")
                    return False
                self.failing = str(exc)
                now = loop.time()
                if now - told >= REPEAT_S:
                    told = now
                    log.error(
                        "the journal in %s cannot be written (%s): nothing is acknowledged until it can; for %.0f s "
                        "now, tried again every few seconds; make room on that disk",
                        self.folder, exc, now - began,
                    )  # fmt: skip
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, RETRY_MAX_S)
                continue
            if self.failing is not None:
                self.failing = None
                log.warning("the journal in %s is written again after %.1f s", self.folder, loop.time() - began)
            return True

    def _break(self, why: str) -> None:
        self.failing = why
        log.error("%s", why)
        if self.broken is not None and not self.broken.done():
            self.broken.set_exception(JournalBroken(why))

    def _commit(self, group: _Group) -> None:
        """In the writer's thread: all of the group, or nothing."""
        # What came and went between two commits is left out: LMDB would count its pages and might never write them.
        passed = {chunk.number for chunk in group.chunks} & set(group.freed)
        with self._env.begin(write=True) as txn:
            for chunk in group.chunks:
                if chunk.number in passed:
                    continue
                key = _U64.pack(chunk.number)
                txn.put(key, check.with_sum(chunk.records), db=self._chunks, append=True)
                txn.put(key, b"".join(chunk.rows), db=self._rows, append=True)
            for number in group.freed:
                if number in passed:
                    continue
                key = _U64.pack(number)
                txn.delete(key, db=self._chunks)
                txn.delete(key, db=self._rows)
            for number, offsets in group.cut_out.items():
                key = _U64.pack(number)
                rows = txn.get(key, db=self._rows)
                if rows is not None:
                    found = np.frombuffer(rows, dtype=ROW)
                    txn.put(key, found[~np.isin(found["offset"], list(offsets))].tobytes(), db=self._rows)
            for name, value in group.writes.items():
                if value is None:
                    txn.delete(name, db=self._state)
                else:
                    txn.put(name, value, db=self._state)
        self.commits += 1

    def gauges(self) -> dict[str, float]:
        """Metrics since the last call: bytes on disk, and how long commits took."""
        taken = list(self._commit_s)
        self._commit_s.clear()
        found = {"buffer/journal_bytes": float(self.chunk_bytes)}
        if taken:
            found |= {"buffer/commit_s/mean": sum(taken) / len(taken), "buffer/commit_s/max": max(taken)}
        return found

    @property
    def picture(self) -> dict[str, Any]:
        """For the status: what is there, what waits."""
        return {
            "bytes": self.nbytes,
            "chunk_bytes": self.chunk_bytes,
            "chunks": len(self._live),
            "commits": self.commits,
            "uncommitted_records": sum(len(chunk.records) for chunk in self._uncommitted.values()),
            "waiting": len(self._settling),
            "failing": self.failing,
        }


def _lock(folder: Path) -> BaseFileLock:
    """Holds the folder for this process.  Raises SetupError naming the one that has it."""
    owner = folder / "owner"
    lock = locks.take(owner, f"{os.getpid()} {socket.gethostname()}\n")
    if lock is None:
        found = _named(locks.words_in(owner))
        raise SetupError(f"the journal in {folder} is in use by another buffer{found}; stop that one first")
    return lock


def _named(owner: str) -> str:
    """The process that holds a journal, of the words that it left there."""
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
