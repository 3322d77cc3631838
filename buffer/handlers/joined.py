"""Handles messages of learners that joined by address: hellos, numbers of versions, and the files that they pass on.

The disk is waited for in a thread; while it refuses, the learner is answered so, keeps what it has, and tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np

from atpo_async.config import Config
from atpo_async.core.errors import BadMessage, SetupError
from atpo_async.links.frames import worth_a_line
from atpo_async.links.server import PeerInfo
from atpo_async.models.identity import identity_of
from atpo_async.run.metrics import eval_lines
from atpo_async.run.replica import elsewhere, names
from atpo_async.run.rundir import JOINED, RunDir
from atpo_async.wire import joined as j
from atpo_async.wire import messages as m
from buffer.handlers.changes import Changes
from buffer.uplink.lines import LineFiles
from buffer.uplink.versions import VersionCount
from buffer.uplink.wholes import WholeFiles

log = logging.getLogger("atpo.buffer")

MAX_RANK = 65535
ALIVE_BEATS = 3
"""A learner that was silent for so many heartbeats is taken for dead."""
LINES_BYTES_S, LINES_BURST_BYTES = 2 << 20, 32 << 20
"""A rank may add so many bytes of lines a second, for long and at once: a hundred times what ours write."""

T = TypeVar("T")


class JoinedContext(Protocol):
    """What a buffer, or the front of one with shards, has for this."""

    @property
    def config(self) -> Config: ...

    @property
    def changes(self) -> Changes: ...

    @property
    def clock(self) -> Callable[[], float]: ...

    @property
    def saved_step(self) -> int:
        """Batches below are in a checkpoint of the learner, as it reported."""

    def check_run(self, message: Any) -> None:
        """Raises BadMessage for a message of another run."""


@dataclass(slots=True, kw_only=True)
class _Rank:
    """What is known of one rank of the joined learner."""

    lines: LineFiles
    wholes: WholeFiles
    life: str = ""
    """The process whose files are taken; empty before the first hello to this buffer."""
    peer: str = ""
    host: str = ""
    gone: bool = False
    """It has ended in good order."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One part of a file at a time, in order."""
    allowance: float = LINES_BURST_BYTES
    """Bytes of lines that may come at once."""
    counted_at: float = 0.0


class JoinedHandler:
    """Answers a learner that has no run folder.

    Args:
        context: the buffer's.
        rundir: the run; None: no learner can join by address.
        peers: the clients of the learner's socket, by name.
        identity: of the weights in a model folder.
    """

    def __init__(
        self,
        context: JoinedContext,
        *,
        rundir: RunDir | None,
        peers: Callable[[], Mapping[str, PeerInfo]],
        identity: Callable[[str], str] = identity_of,
    ) -> None:
        self._context = context
        self._rundir = rundir
        self._peers = peers
        self._identity = identity
        self._ranks: dict[int, _Rank] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="joined")
        self._refusals = 0
        self._versions: VersionCount | None = None
        if rundir is not None:
            self._versions = VersionCount(rundir, rundir.path / JOINED / "version.json")

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    @property
    def still_passing_on(self) -> set[str]:
        """Ranks that live and have not said that they have passed everything on."""
        return {
            names.role_of(k) for k, rank in self._ranks.items() if rank.life and not rank.gone and self._lives(rank)
        }

    async def handle(self, peer: str, message: j.JoinedToBuffer) -> m.Message:
        """The answer to one message.

        Raises:
            BadMessage: the message is refused.
        """
        if self._rundir is None:
            raise BadMessage("this buffer has no run folder: a learner cannot join it by address")
        try:
            if isinstance(message, j.LearnerHello):
                return await self._hello(peer, message, self._rundir)
            self._context.check_run(message)
            if isinstance(message, j.VersionWanted):
                return await self._version(message)
            return await self._file(message)
        except OSError as exc:
            self._refusals += 1
            why = f"the run's folder {self._rundir.path} cannot be written: {exc.strerror or exc}"
            if worth_a_line(self._refusals):
                log.warning("%s; what the learner passes on waits (%d times by now)", why, self._refusals)
            return m.NotYet(waiting_for=why)
        except SetupError as exc:
            raise BadMessage(str(exc)) from exc

    async def note_checkpoint(self, message: m.Checkpointed) -> None:
        """Note in the run's folder where a checkpoint is that is not there; where the disk refuses, the next is."""
        found = elsewhere.Elsewhere(step=message.step, where=message.where)
        if (rundir := self._rundir) is not None:
            with contextlib.suppress(OSError):
                await self._in_thread(lambda: elsewhere.note(rundir.path, found))

    # --- who may join ------------------------------------------------------------------------------------------

    async def _hello(self, peer: str, hello: j.LearnerHello, rundir: RunDir) -> m.Message:
        if hello.protocol != m.PROTOCOL:
            raise BadMessage(f"protocol {hello.protocol}, this buffer speaks {m.PROTOCOL}: install the same version")
        if hello.run and hello.run != rundir.run_id:
            raise BadMessage(f"run {hello.run!r} is not the one here, {rundir.run_id!r}")
        if not hello.life or hello.rank > MAX_RANK:
            raise BadMessage(f"a learner of rank {hello.rank} and life {hello.life!r:.80} cannot join")
        if not hello.joins:
            return await self._in_thread(lambda: self._described(rundir))
        if hello.rank not in self._ranks:
            opened = await self._in_thread(lambda: self._opened(rundir, hello.rank))
            self._ranks.setdefault(hello.rank, opened)
        rank = self._ranks[hello.rank]
        async with rank.lock:
            # A replica is locked by its learner: one with the same replica follows another that has ended.
            follows = bool(hello.replica) and hello.replica == rank.lines.replica
            if hello.life != rank.life and not follows and (other := self._other(hello.rank, rank)):
                return m.NotYet(waiting_for=other)
            welcome = await self._in_thread(lambda: self._welcome(rank, hello, rundir))
            if hello.life != rank.life:
                again = ", again" if follows else ", in a new replica of this run's folder"
                log.info("%s joins by address from %s%s", names.role_of(hello.rank), hello.host or "?", again)
            rank.life, rank.peer, rank.host, rank.gone = hello.life, peer, hello.host, False
            return welcome

    def _opened(self, rundir: RunDir, number: int) -> _Rank:
        folder = rundir.path / JOINED
        return _Rank(
            lines=LineFiles(rundir.path, folder / f"rank-{number}.json", rank=number),
            wholes=WholeFiles(rundir.path, folder / f"rank-{number}", rank=number),
        )

    def _other(self, number: int, rank: _Rank) -> str:
        """Which learner is at work as this rank; empty where none is."""
        if rank.life and not rank.gone and self._lives(rank):
            return f"{names.role_of(number)} on {rank.host or '?'} is at work in this run; end that one first"
        if not rank.life and number == 0:
            limit_s = ALIVE_BEATS * self._context.config.links.heartbeat_s
            for name, info in self._peers().items():
                if name.rpartition("/")[2] == names.role_of(0) and info.silent_s < limit_s:
                    return f"a learner ({name}) is at work in this run; end that one first"
        return ""

    def _lives(self, rank: _Rank) -> bool:
        info = self._peers().get(rank.peer)
        return info is not None and info.silent_s < ALIVE_BEATS * self._context.config.links.heartbeat_s

    def _welcome(self, rank: _Rank, hello: j.LearnerHello, rundir: RunDir) -> j.LearnerWelcome:
        """In the thread."""
        found = self._described(rundir)
        if not rank.lines.replica or hello.replica != rank.lines.replica:
            # Named after the process that makes it.  Its metrics begin with the evaluations, which are here already.
            rank.lines.begin(hello.life, {"metrics.jsonl": len(found.evaluations)})
        return msgspec.structs.replace(found, replica=rank.lines.replica, taken=rank.lines.taken)

    def _described(self, rundir: RunDir) -> j.LearnerWelcome:
        """The run, for any learner; in the thread."""
        saved = elsewhere.elsewhere(rundir.path)
        return j.LearnerWelcome(
            run=rundir.run_id,
            replica="",
            settings=_array((rundir.path / "config.json").read_bytes()),
            facts=_array((rundir.path / "run.json").read_bytes()),
            taken={},
            evaluations=_array(eval_lines(rundir.metrics_path)),
            saved_step=self._context.saved_step,
            saved_where="" if saved is None else saved.where,
            policy=self._identity(rundir.config.model.path),
        )

    # --- what it asks and writes -------------------------------------------------------------------------------

    async def _version(self, wanted: j.VersionWanted) -> m.Message:
        rank, versions = self._ranks.get(0), self._versions
        if rank is None or versions is None or not rank.life:
            return j.HelloWanted()
        self._check_life(rank, wanted.life)
        async with rank.lock:
            following, raised = await self._in_thread(lambda: versions.raise_above(wanted.above))
            if wanted.take:
                following = await self._in_thread(lambda: versions.take(wanted.life, wanted.number))
        return j.VersionGiven(version=following, raised=raised)

    async def _file(self, message: j.LinesWritten | j.FilePart | j.FolderWritten | j.LearnerGone) -> m.Message:
        rank = self._ranks.get(message.rank)
        if rank is None or not rank.life:
            return j.HelloWanted()
        self._check_life(rank, message.life)
        async with rank.lock:
            match message:
                case j.LinesWritten():
                    await self._allowed(rank, len(message.data))
                    data = message.data.tobytes()
                    taken = await self._in_thread(
                        lambda: rank.lines.add(message.file, message.offset, data, left_out=message.left_out)
                    )
                    return j.FileTaken(file=message.file, offset=taken)
                case j.FilePart():
                    data = message.data.tobytes()
                    file, at, total, digest = message.file, message.offset, message.total, message.digest
                    there = await self._in_thread(lambda: rank.wholes.add(file, at, data, total=total, digest=digest))
                    return j.FileTaken(file=message.file, offset=there)
                case j.FolderWritten():
                    await self._in_thread(lambda: rank.wholes.finish(message.folder, message.files))
                    return j.FileTaken(file=message.folder, offset=0)
                case j.LearnerGone():
                    rank.gone = True
                    self._context.changes.notify()
                    return j.FileTaken(file="", offset=0)

    def _check_life(self, rank: _Rank, life: str) -> None:
        if life != rank.life:
            raise BadMessage(f"another learner, on {rank.host or '?'}, has taken this one's place in the run")

    async def _allowed(self, rank: _Rank, nbytes: int) -> None:
        """Waits for: so many bytes to be allowed.  Unblocked by: the clock."""
        now = self._context.clock()
        rank.allowance = min(LINES_BURST_BYTES, rank.allowance + LINES_BYTES_S * (now - rank.counted_at)) - nbytes
        rank.counted_at = now
        if rank.allowance < 0:
            await asyncio.sleep(-rank.allowance / LINES_BYTES_S)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Waits for: the disk.  What is written for a peer that has gone is finished all the same."""
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, work))


def _array(data: bytes) -> np.ndarray[Any, Any]:
    return np.frombuffer(data, dtype=np.uint8)
