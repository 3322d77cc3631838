"""The journal: turns, trees, leases, cursor, priorities, uses and versions on disk, committed in groups.

Durability: commit before acknowledging.  The event loop only hands over; a thread writes and syncs.  Everything handed
over before a commit begins is in it, completely or not at all.  Answers and acknowledgements that follow from it are
sent after ``settle``: no acknowledged turn is lost, and no answer depends on a lost one.  While the disk refuses (full,
an error), nothing settles; the same group is tried again until it is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import lmdb

from atpo_async.status import waits
from buffer.journal.chunks import ChunkLog, Group
from buffer.journal.commits import Commits
from buffer.journal.marks import MARK, STREAMS, read_mark, read_streams
from buffer.journal.tables import JournalBroken, Recovered, Tables
from buffer.trees.index import Place, Rows, TurnEntry

log = logging.getLogger("atpo.buffer.journal")

GROUP_MESSAGES = 512
"""A commit that has so many messages waits for no further ones."""
RETRY_S = 0.5
RETRY_MAX_S = 5.0
REPEAT_S = 30.0
"""How often a failure that lasts is logged."""


class Journal:
    """One run's journal.  Use as an async context; one that is never entered lets its folder go when it is closed, or
    collected as garbage.

    Args:
        folder: made if it is not there.
        run: id of the run that it belongs to; empty for none in particular.
        max_bytes: of records that the owner will hold; the map is made for several times that.
        sync: whether a commit waits until the disk has it.  Without, it survives ``kill -9`` but no power cut.
        gather_s: how long a commit waits for more to come, from the first thing on that it will hold.
        collect: called on the loop right before a commit: hands over (``put``) what has changed.
        leased: whether an earlier buffer of this run may have granted leases; an empty file is damage then.
        followed: keep the newest commits for followers, and count them.
        follower_wait: what is committed settles only once ``reached`` has it; for a journal that is followed.

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
        followed: bool = False,
        follower_wait: bool = False,
    ) -> None:
        self.folder = folder
        self._run = run
        self._followed = followed
        self._follower_wait = follower_wait
        self._unmirrored: deque[tuple[int, int, float]] = deque()
        """(ticket, number of the commit, when it was made) of commits that no follower has yet."""
        self.mirrored = 0
        """Commits that a follower has."""
        self.committed: Commits | None = None
        """Kept for followers, once the journal is recovered."""
        self.collect = collect
        self.gather_s = gather_s
        self._tables = Tables(folder, max_bytes=max_bytes, sync=sync, leased=leased)
        self._tables.keeps_changes = followed
        self._log = ChunkLog()
        self._writes: dict[bytes, bytes | None] = {}
        self._messages = 0
        self._first_at = 0.0
        """When the first of them came."""
        self._commit_s: deque[float] = deque(maxlen=4096)
        self.commits = 0
        self.failing: str | None = None
        """Why nothing is committed at the moment; None if something is."""
        self.broken: asyncio.Future[None] | None = None
        self._asked = asyncio.Event()
        self._wanted = 0
        self._settling: dict[int, asyncio.Future[None]] = {}
        """Ticket -> the future that waits for its commit, in order."""
        self._full = asyncio.Event()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="journal-read")
        self._committing: asyncio.Task[None] | None = None

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
            self.wait_no_more()
            if self.broken is not None and not self.broken.done():
                with contextlib.suppress(TimeoutError):
                    await self.settle(timeout_s=timeout_s)
            self._committing.cancel()
            await asyncio.gather(self._committing, return_exceptions=True)
            self._committing = None
            await asyncio.get_running_loop().run_in_executor(self._writer, lambda: None)
        self._writer.shutdown(wait=True)
        self._reader.shutdown(wait=True)
        self._tables.close()

    # --- handing over ------------------------------------------------------------------------------------------

    def add(self, record: bytes) -> Place:
        """Add a record.  Its entry has to follow (``note``) before the loop turns to anything else."""
        if not self._messages:
            self._first_at = time.monotonic()
        self._messages += 1
        return self._log.add(record)

    def note(self, entry: TurnEntry) -> None:
        """The entry of a record just added."""
        self._log.note(entry)
        if self._messages >= GROUP_MESSAGES:
            self._full.set()

    def put(self, key: bytes, value: bytes | None) -> None:
        """Store ``value`` under ``key``; None removes it."""
        self._writes[key] = value

    def release(self, rows: Rows, *, gone: bool = False) -> None:
        """These records are needed no more; their chunk goes with the last of them.

        Args:
            rows: ROW[R].
            gone: whether their trees are gone too, by which a recovery skips them.  Otherwise their rows are cut out.
        """
        self._log.release(rows, gone=gone)

    async def settle(self, *, timeout_s: float | None = None, at_once: bool = False) -> None:
        """Returns once all that was handed over, or can be collected, before this call is committed.

        Waits for: the disk.  Unblocked by: the commit.

        Args:
            timeout_s: None for no end.
            at_once: the commit does not wait for further messages; for a caller that has nothing else to do.

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
                # While the disk refuses, many callers time out.
                del self._settling[ticket]

    # --- reading -----------------------------------------------------------------------------------------------

    def read(self, place: Place) -> bytes:
        """One record, in the caller's thread."""
        uncommitted = self._log.find(place)
        return self._tables.read(place) if uncommitted is None else uncommitted

    async def load(self, places: Sequence[Place]) -> list[bytes]:
        """Records, read in a thread: the disk may have to be waited for."""
        if not places:
            return []
        # Begun here: a commit after this cannot take away what it sees.
        fetch = self._tables.reader([self._log.find(place) or place for place in places])
        return await asyncio.get_running_loop().run_in_executor(self._reader, fetch)

    def recover(self) -> Recovered:
        """Everything that is committed.  Called before anything is handed over.

        Raises:
            SetupError: another program's journal, or a damaged one.
        """
        recovered, last, missing = self._tables.recover(self._run)
        self._writes |= missing
        earlier = read_mark(recovered.state)
        if self._followed:
            self.committed = Commits(earlier, read_streams(recovered.state), clock=time.monotonic)
            self._writes[STREAMS] = self.committed.streams
        elif earlier is not None:
            # Commits that are not counted follow: no copy of before may take itself for one of this journal.
            self._writes |= {MARK: None, STREAMS: None}
        self._log.restore(recovered.rows, last=max(last, 0 if earlier is None else earlier.last_chunk))
        return recovered

    def wait_no_more(self) -> None:
        """From here on what is on this disk is settled: nothing is acknowledged any more."""
        self._follower_wait = False

    @property
    def unmirrored_s(self) -> float:
        """For how long acknowledgements have waited for a follower; 0 where none does."""
        return time.monotonic() - self._unmirrored[0][2] if self._unmirrored else 0.0

    @property
    def held_up(self) -> str | None:
        """Why what was handed over does not settle: the disk, or that no follower has it; None while neither is so."""
        if self.failing is None and self._unmirrored:
            return "no follower has its last commits (buffer.follower_wait)"
        return self.failing

    def why_no_commit(self, limit_s: float) -> str:
        """Why the first commit has not settled within ``limit_s``, and the way out."""
        what = f"the first commit to the journal in {self.folder} took over {limit_s:g} s (links.give_up_s): "
        if self.failing is None and self._unmirrored:
            return what + (
                "no follower has it (buffer.follower_wait): start `atpo follower` first, or set "
                "--buffer.follower_wait false"
            )
        return what + "its disk is too slow or stands still; name another with --buffer.journal_dir"

    @property
    def tables(self) -> Tables:
        """For copies of them."""
        return self._tables

    def reached(self, number: int) -> None:
        """A follower has the first ``number`` commits on disk."""
        self.mirrored = max(self.mirrored, number)
        while self._unmirrored and self._unmirrored[0][1] <= self.mirrored:
            self._resolve(self._unmirrored.popleft()[0])

    # --- moving the last records out of sparse chunks-----------------------------------------------------------

    def sparse_chunks(self, limit: int) -> list[int]:
        """Up to ``limit`` chunks to empty, oldest first; none while few bytes are unneeded."""
        return self._log.sparse(limit)

    async def rows_in(self, chunks: Iterable[int]) -> Rows:
        """ROW[R]: entries of all records ever put into these chunks, including those not needed any more."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, self._tables.rows_reader(chunks))

    # --- committing --------------------------------------------------------------------------------------------

    def _seal(self) -> Group:
        writes, self._writes = self._writes, {}
        self._messages = 0
        self._full.clear()
        group = self._log.seal(writes)
        if group and self.committed is not None:
            writes[MARK] = self.committed.next_mark(self._log.last_chunk)
        return group

    async def _commit_when_asked(self) -> None:
        """Waits for: a call of ``settle``.  Ended by: close()."""
        try:
            await self._commit_forever(asyncio.get_running_loop())
        # Whatever the error was, nothing would ever settle again: this process has to exit and another to take over.
        except Exception as exc:
            log.exception("a commit failed")
            self._break(f"the journal in {self.folder} failed: {type(exc).__name__}: {exc}")

    async def _commit_forever(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            await self._asked.wait()
            self._asked.clear()
            # Messages that came while the last commit was written do not wait again.
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
            self._log.committed()
            if self._follower_wait and self.committed is not None and self.mirrored < self.committed.number:
                self._wait_for_follower(upto, self.committed.number)
            else:
                self._resolve(upto)

    def _wait_for_follower(self, upto: int, number: int) -> None:
        since = time.monotonic()
        if self._unmirrored and self._unmirrored[-1][1] == number:
            # Nothing was committed since: there may be no follower for hours, and reports that come all the time.
            since = self._unmirrored.pop()[2]
        self._unmirrored.append((upto, number, since))

    def _resolve(self, upto: int) -> None:
        """What was handed over before the ticket ``upto`` is settled."""
        # One after another and at once: at full load every further round of the loop handles a burst of messages.
        for ticket, done in self._settling.items():
            if ticket > upto:
                break
            if not done.done():
                done.set_result(None)

    async def _write(self, loop: asyncio.AbstractEventLoop, group: Group) -> bool:
        """Write a group, again until the disk takes it.  False if that cannot succeed in this process."""
        pause_s, began, logged = RETRY_S, loop.time(), -REPEAT_S
        while True:
            try:
                changes = await loop.run_in_executor(self._writer, self._tables.commit, group)
                self.commits += 1
                if self.committed is not None:
                    self.committed.append(changes)
            except (lmdb.Error, OSError) as exc:
                if isinstance(exc, lmdb.PanicError | lmdb.CorruptedError | lmdb.InvalidError):
                    self._break(f"the journal in {self.folder} can take nothing more: {exc}")
                    return False
                self.failing = str(exc)
                now = loop.time()
                if now - logged >= REPEAT_S:
                    logged = now
                    log.error(
                        "the journal in %s cannot be written (%s): nothing is acknowledged until it can; for %.0f s "
                        "now, tried again every few seconds; free space on that disk",
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

    def gauges(self) -> dict[str, float]:
        """Metrics since the last call: bytes on disk, and how long commits took."""
        taken = list(self._commit_s)
        self._commit_s.clear()
        found = {"buffer/journal_bytes": float(self._log.chunk_bytes)}
        if taken:
            found |= {"buffer/commit_s/mean": sum(taken) / len(taken), "buffer/commit_s/max": max(taken)}
        return found

    def status(self) -> dict[str, Any]:
        """Sizes, and what waits for a commit, for the buffer's status."""
        return {
            "bytes": self._log.nbytes,
            "chunk_bytes": self._log.chunk_bytes,
            "chunks": len(self._log),
            "commits": self.commits,
            "uncommitted_records": self._log.num_uncommitted,
            "waiting": len(self._settling),
            "failing": self.failing,
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the records that are needed."""
        return self._log.nbytes
