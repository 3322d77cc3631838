"""The buffer's side of its followers: who follows, what each gets next, and how far behind each is.

A follower says where it stands (``FollowHello``) and asks for one part after another.  Where its next commit is kept it
gets commits; otherwise a copy of the journal, without the chunks that it has, and then the commits since.  Nothing here
holds the journal up: reading happens in a thread of its own, and what followers lack is bounded in memory.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from atpo_async.core.errors import BadMessage
from atpo_async.status import waits
from atpo_async.wire.followers import messages as f
from atpo_async.wire.messages import PROTOCOL, Refused
from buffer.following.copying import COPY_S, Has, JournalCopy
from buffer.following.small_files import SmallFiles
from buffer.journal.changes import cut
from buffer.journal.commits import Commits, Lag
from buffer.journal.journal import Journal

log = logging.getLogger("atpo.buffer.followers")

_Part = tuple[bytes, bool, f.PartKind]
"""Bytes, whether something ends with them, and what they are of."""
PART_BYTES = 4 << 20
MOST_FOLLOWERS = 8
SPARE_BYTES = 1 << 20
"""Above ``links.max_message_bytes``: a chunk's records beside a large one, and their checksum."""
GONE_S = 2.0
"""A follower asks once a second at least."""
CATCH_UP_S = 5.0
"""At the end: how long followers have to take the last commits."""


@dataclass(kw_only=True)
class Follower:
    """One follower."""

    name: str
    durable: int
    """Commits of the present stream that it has on disk."""
    sent: int
    """Commits that were sent."""
    next_part: int = 0
    parts: Iterator[_Part] | None = None
    """The rest of what is under way: a copy, or a group of commits."""
    copy: JournalCopy | None = None
    copied_since: float = 0.0
    files: dict[str, bytes] = field(default_factory=dict)
    trouble: str = ""
    heard_at: float = 0.0
    durable_bytes: int = 0
    """Of all commits up to ``durable``."""

    told: bool = False
    """It knows that the run is over."""


class Followers:
    """The followers of one journal.

    Args:
        journal: recovered, and followed.
        run: run id.
        max_bytes: ``buffer.max_bytes``.
        message_bytes: ``links.max_message_bytes``.
        files: of the run's folder.
        finished: whether the run is over.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        run: str,
        max_bytes: int,
        message_bytes: int,
        files: SmallFiles,
        finished: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert journal.committed is not None
        self._journal = journal
        self._commits: Commits = journal.committed
        self._commits.on_commit = self._on_commit
        self._run = run
        self._max_bytes = max_bytes
        self._value_bytes = message_bytes + SPARE_BYTES
        self._part_bytes = min(PART_BYTES, message_bytes // 2)
        self._files = files
        self._finished = finished
        self._clock = clock
        self._followers: dict[str, Follower] = {}
        self._committed = asyncio.Event()
        self._progressed = asyncio.Event()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="followers")
        self.copies = 0
        """Copies of the journal that were begun."""

    @property
    def followers(self) -> tuple[Follower, ...]:
        return tuple(self._followers.values())

    def close(self) -> None:
        """Send nothing further."""
        for follower in self._followers.values():
            self._drop(follower)
        self._followers.clear()
        self._reader.shutdown(wait=True)

    def _drop(self, follower: Follower) -> None:
        """Let go of what is under way, where it may be read just now."""
        copy, follower.copy, follower.parts = follower.copy, None, None
        if copy is not None:
            self._reader.submit(copy.close)

    def _break_off(self, follower: Follower, copy: JournalCopy) -> None:
        """A copy has been under way for ``COPY_S``: let it go.  Its follower is asked to begin again."""
        if follower.copy is copy:
            log.info("the copy for %s was not complete after %g s and is broken off", follower.name, COPY_S)
            self._drop(follower)
            if self._followers.get(follower.name) is follower:
                del self._followers[follower.name]

    async def catch_up(self, *, timeout_s: float = CATCH_UP_S) -> None:
        """Waits for: every follower to have all commits on disk, and to know where the run is over.  Given up after
        ``timeout_s``."""
        deadline = self._clock() + timeout_s
        self._on_commit()  # those that wait for a commit learn of the end
        while late := [each for each in self._followers.values() if not self._has_all(each)]:
            left = min(deadline, max(each.heard_at for each in late) + GONE_S) - self._clock()
            if left <= 0:
                log.warning("ends before these followers have all: %s", ", ".join(each.name for each in late))
                return
            self._progressed.clear()
            try:
                async with asyncio.timeout(left):
                    await self._progressed.wait()
            except TimeoutError:
                continue

    def _has_all(self, follower: Follower) -> bool:
        return follower.durable == self._commits.number and (follower.told or not self._finished())

    def _on_commit(self) -> None:
        committed, self._committed = self._committed, asyncio.Event()
        committed.set()

    # --- messages ----------------------------------------------------------------------------------------------

    async def handle(self, peer: str, message: Any) -> f.Following | f.JournalPart | Refused:
        """A follower's request and its answer.

        Raises:
            BadMessage: it belongs to another run, or is none that a follower sends.
        """
        if isinstance(message, f.FollowHello):
            return await self._hello(peer, message)
        if message.run != self._run:
            raise BadMessage(f"FollowRequest belongs to run {message.run!r}, this buffer to {self._run!r}")
        follower = self._followers.get(peer)
        if follower is None or message.part != follower.next_part:
            return Refused(reason="say hello first: this buffer expects another part")
        follower.next_part += 1
        follower.heard_at, follower.trouble = self._clock(), message.trouble
        self._note_durable(follower, min(message.durable, follower.sent))
        waits.progress("parts for followers")
        return await self._part(follower, message)

    async def _hello(self, peer: str, hello: f.FollowHello) -> f.Following | Refused:
        if hello.protocol != PROTOCOL:
            return Refused(reason=f"the follower speaks protocol {hello.protocol}, this buffer {PROTOCOL}")
        if hello.run not in ("", self._run):
            return Refused(
                reason=f"its folder holds the journal of run {hello.run!r}, this buffer's is that of {self._run!r}: "
                "give the follower another --dir"
            )
        has = Has(hello.chunks)
        standing = self._commits.standing(hello.stream, hello.position) if hello.stream else "behind"
        if standing in ("ahead", "unknown"):
            return Refused(reason=_not_followed(standing, hello))
        if peer not in self._followers and len(self._followers) >= MOST_FOLLOWERS and not self._forget_one():
            return Refused(reason=f"{MOST_FOLLOWERS} followers are there, which is as many as a buffer takes")
        # The mark of this process is in the journal with its first commit; before it there is nothing to copy.
        while not self._commits.number:
            await self._committed.wait()
        follower = await self._begin(peer, hello, has)
        if (before := self._followers.pop(peer, None)) is not None:
            self._drop(before)
        self._followers[peer] = follower
        if follower.copy is not None:
            # Also where it asks for nothing any more: what a copy reads takes space in the journal until it is closed.
            asyncio.get_running_loop().call_later(COPY_S, self._break_off, follower, follower.copy)
        return f.Following(
            run=self._run,
            stream=self._commits.stream,
            position=follower.sent if follower.copy is None else self._copied(follower),
            copy=follower.copy is not None,
            max_bytes=self._max_bytes,
            value_bytes=self._value_bytes,
        )

    async def _begin(self, peer: str, hello: f.FollowHello, has: Has) -> Follower:
        """A follower with what it gets first."""
        position = self._commits.position_of(hello.stream, hello.position)
        now = self._clock()
        if hello.complete and position is not None and self._commits.holds(position):
            follower = Follower(name=peer, durable=0, sent=position, heard_at=now)
            log.info("%s follows from commit %d on", peer, position)
            self._note_durable(follower, position)
            return follower
        self.copies += 1
        copy = await self._in_thread(lambda: JournalCopy(self._journal.tables, has))
        follower = Follower(name=peer, durable=0, sent=0, heard_at=now, copy=copy, copied_since=now)
        follower.parts = self._copy_parts(copy)
        log.info("%s gets a copy of the journal, of commit %d", peer, self._copied(follower))
        return follower

    def _copied(self, follower: Follower) -> int:
        """The commit that the copy under way is of."""
        mark = None if follower.copy is None else follower.copy.mark()
        if mark is None or mark.stream != self._commits.stream:
            raise BadMessage("the journal has no mark of this process")
        return mark.number

    def _copy_parts(self, copy: JournalCopy) -> Iterator[_Part]:
        for data, _ in cut(copy.chunks(), self._part_bytes):
            yield data, False, "chunks"
        for data, ends in cut(copy.rest(), self._part_bytes):
            yield data, ends, "rest"

    async def _part(self, follower: Follower, request: f.FollowRequest) -> f.JournalPart:
        """The next part of what is under way, or of the commits since.  Waits for: a commit, ``wait_s`` at most."""
        if follower.copy is not None and self._clock() - follower.copied_since > COPY_S:
            self._drop(follower)
            return self._answer(follower, request, "again")
        parts = follower.parts
        if parts is None:
            if not self._commits.holds(follower.sent):
                return self._answer(follower, request, "again")
            if follower.sent == self._commits.number and not self._finished():
                await self._next_commit(request.wait_s)
            pieces, upto = self._commits.after(follower.sent)
            if not pieces:
                return self._answer(follower, request, "nothing")
            follower.sent = upto
            parts = follower.parts = ((data, ends, "commits") for data, ends in cut(pieces, self._part_bytes))
        assert parts is not None
        copy = follower.copy
        data, ends, kind = await self._in_thread(functools.partial(_next, parts))
        if follower.copy is not copy:  # broken off meanwhile
            return self._answer(follower, request, "again")
        if ends and follower.copy is not None:
            follower.sent = self._copied(follower)
        answer = self._answer(follower, request, kind, data, ends)
        if ends:
            self._drop(follower)
        return answer

    def _answer(
        self, follower: Follower, request: f.FollowRequest, kind: f.PartKind, data: bytes = b"", ends: bool = False
    ) -> f.JournalPart:
        # Read after the commit: a version that the journal speaks of is below the one in the file.
        files = self._files.changed(follower.files)
        follower.files |= {file.name: file.data.tobytes() for file in files}
        over = self._finished() and follower.durable == self._commits.number and kind == "nothing"
        if over:
            follower.told = True
            self._progressed.set()
        return f.JournalPart(
            part=request.part,
            kind=kind,
            data=np.frombuffer(data, np.uint8),
            ends=ends,
            position=follower.sent,
            behind=min(self._commits.number - follower.sent, 2**31 - 1),
            files=tuple(files),
            finished=over,
        )

    async def _next_commit(self, wait_s: float) -> None:
        committed = self._committed
        try:
            async with asyncio.timeout(wait_s):
                await committed.wait()
        except TimeoutError:
            return

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._reader, work)

    def _note_durable(self, follower: Follower, durable: int) -> None:
        if durable <= follower.durable:
            return
        follower.durable, follower.durable_bytes = durable, self._commits.bytes_up_to(durable)
        self._journal.reached(durable)
        self._progressed.set()

    def _forget_one(self) -> bool:
        """Forget the follower that was silent longest, if it is gone."""
        silent = min(self._followers.values(), key=lambda each: each.heard_at)
        if self._clock() - silent.heard_at < COPY_S:
            return False
        self._drop(silent)
        del self._followers[silent.name]
        return True

    # --- how far behind ----------------------------------------------------------------------------------------

    def lag(self, follower: Follower) -> Lag:
        """How far behind one is."""
        since = self._commits.since(follower.durable)
        return Lag(
            self._commits.number - follower.durable,
            self._commits.bytes_up_to(self._commits.number) - follower.durable_bytes,
            0.0 if since is None else self._clock() - since,
        )

    def gauges(self) -> dict[str, float]:
        """Metrics: of the follower that is least behind."""
        least = min((self.lag(each) for each in self._followers.values()), default=None)
        found = {"buffer/followers": float(len(self._followers)), "buffer/follower_copies": float(self.copies)}
        if least is not None:
            found |= {
                "buffer/follower_lag_commits": float(least.commits),
                "buffer/follower_lag_bytes": float(least.nbytes),
                "buffer/follower_lag_s": least.seconds,
            }
        return found

    def facts(self) -> dict[str, str]:
        """For the buffer's status: a sentence for each follower."""
        now = self._clock()
        found = {}
        for name, each in self._followers.items():
            lag = self.lag(each)
            at = "gets a copy of the journal" if each.copy is not None else f"{lag.commits} commits behind"
            silent = now - each.heard_at
            found[name] = (
                f"{at} ({lag.nbytes} bytes, {lag.seconds:.1f} s), heard {silent:.0f} s ago"
                f"{f'; it cannot write: {each.trouble}' if each.trouble else ''}"
            )
        return found or {"followers": "none has joined"}


def _next(parts: Iterator[_Part]) -> _Part:
    return next(parts)


def _not_followed(standing: str, hello: f.FollowHello) -> str:
    """Why a copy cannot go on with this journal, and the way out."""
    if standing == "ahead":
        return (
            f"its copy has commit {hello.position} of stream {hello.stream}, which this buffer's journal has not: the "
            "buffer's disk has lost commits that were acknowledged.  Promote the copy (atpo follower --promote), or "
            "go on without those turns: give the follower an empty --dir"
        )
    return (
        f"its copy is of stream {hello.stream}, which this buffer's journal does not know: it is of another journal, "
        "or the run went on without a follower for a while.  Give the follower an empty --dir"
    )
