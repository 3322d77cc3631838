"""The buffer's sockets and loops.  Handlers are thin: ``BufferState`` decides, this waits, commits and answers.

Who waits for whom: an actor's request for leases waits for admission (unblocked by the learner taking a batch or
publishing); the learner's request for a batch waits for ready trees (unblocked by actors closing trees); its query for
an evaluation waits for the evaluation's last tree.  All of them answer within a bounded time, with what is missing.

Everything is decided in memory at once, and every acknowledgement and answer leaves after the commit that holds it
(``Journal.settle``).  While the journal cannot be written nothing is acknowledged and no lease is granted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec
import numpy as np

from atpo_async.config import Config
from atpo_async.core.errors import BadMessage, SetupError, WaitTimeout
from atpo_async.core.tree import Turn
from atpo_async.links import ports
from atpo_async.links.addresses import port_of
from atpo_async.links.server import Server
from atpo_async.ops.role import RoleContext
from atpo_async.run.endpoints import Endpoints
from atpo_async.run.metrics import read_metrics
from atpo_async.run.rundir import RunDir
from atpo_async.status import waits
from atpo_async.status.facts import publish_facts
from atpo_async.wire.messages import (
    PROTOCOL,
    ActorHello,
    ActorReport,
    ActorToBuffer,
    Checkpointed,
    EvalQuery,
    EvalRequest,
    EvalResult,
    Exhausted,
    LearnerToBuffer,
    LeaseRequest,
    LeaseReturned,
    Leases,
    Message,
    NotYet,
    Refused,
    RunFinished,
    SampleRequest,
    Trained,
    TreeClosed,
    TreeOpened,
    VersionPublished,
    Welcome,
)
from atpo_async.wire.records import TurnRecords
from buffer.batches.served import Share
from buffer.handlers.pending_answers import PendingAnswer
from buffer.journal.journal import Journal
from buffer.journal.persistence import StatePersistence
from buffer.metrics_file import MetricsFile, may_be_called
from buffer.pool.checked import SamplerFault
from buffer.state import RETRY_S, BufferState
from buffer.trees.assembly import Frames
from buffer.trees.index import StoredTurns, places_of

log = logging.getLogger("atpo.buffer")

Found = TypeVar("Found")

LEASE_WAIT_S = 0.5
"""A request for leases waits this long for admission before it is answered with none."""
TICK_S = 0.5
"""How often leases are looked after."""
AWAY_S = 2.0
"""A look at the leases that is late by more was not merely busy."""
FAREWELL_S = 5.0
"""After the run's end: how long actors have to hear of it."""
SETTLE_S = 0.2
"""After the last answer: how long the sockets stay open, for acknowledgements and repeats."""
LEASES_SHARE = 0.5
"""Of links.max_message_bytes: what turns already committed may take of an answer with leases."""
SETTLE_WAIT_S = 5.0
"""An answer waits no longer for the disk; it then says that the disk is what is waited for."""
FIRST_GRANT = "time/first_grant"
"""Metric: when the first lease of all was given, of whichever kind."""
MOVE_CHUNKS = 8
"""Mostly dead chunks that are emptied at a time."""


class BufferService:
    """One buffer, serving.  Use as an async context; ``serve`` runs until the run is over or ``stopping`` is set.

    Args:
        config: the run's.
        run: run id.
        endpoints: where to bind: ``actors`` and ``learner``; port 0 takes a free one.  ``weights`` and ``announce`` are
            passed on to actors when the learner published before this buffer was restarted.
        former: where they were bound before; tried first where the port is 0.
        rundir: for the journal and the actors' metrics; None writes no metrics.
        stopping: set to end early.
        journal: folder of the journal; in the run's folder, or where ``buffer.journal_dir`` says, if None.  Without a
            run's folder one that goes with this object.
        clock: seconds, monotonic.

    Raises:
        SetupError: the journal cannot be used.
    """

    def __init__(
        self,
        config: Config,
        *,
        run: str,
        endpoints: Endpoints,
        rundir: RunDir | None,
        stopping: asyncio.Event,
        former: Endpoints | None = None,
        journal: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._run = run
        self._rundir = rundir
        self._stopping = stopping
        self._clock = clock
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        buffer = config.buffer
        if journal is None and rundir is not None:
            journal = rundir.journal
        if journal is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="atpo-journal-")
            journal = Path(self._scratch.name)
        self.journal = Journal(
            journal, run=run, max_bytes=buffer.max_bytes, sync=buffer.journal_sync, gather_s=buffer.commit_ms / 1000,
            leased=lambda: rundir is None or was_leased(rundir),
        )  # fmt: skip
        recovered = self.journal.recover()
        self.state = BufferState(
            config, run=run, rng=np.random.default_rng(config.run.seed), now=clock(), store=self.journal
        )
        persistence = StatePersistence(self.state)
        found = persistence.restore(recovered.rows, recovered.state, clock())
        if found:
            log.info("recovered from %s: %s", journal, ", ".join(f"{n} {what}" for what, n in found.items()))
        if self.state.weights_endpoint and endpoints.weights:
            # Where the learner is now; the run may have been started anew since it last said so.
            self.state.weights_endpoint, self.state.announce_endpoint = endpoints.weights, endpoints.announce
        self.state.rng = np.random.default_rng([config.run.seed, self.state.incarnation])
        self.journal.collect = lambda: persistence.collect(self.journal.put)
        self.state.gauges = self._gauges
        self._changed = asyncio.Event()
        self._metrics = MetricsFile(None if rundir is None else rundir.metrics_path)
        self._farewells: set[str] = set()
        self._owed_leases: dict[str, PendingAnswer[Leases]] = {}
        """Actor -> what was granted to it and is not committed yet."""
        self._owed_batch: PendingAnswer[int] | None = None
        """Number of the batch that was made last, until it is committed and after."""
        # For the buffer's status: why those who ask are put off.
        self._admission = waits.DeferredAnswers("requests for leases")
        self._trees = waits.DeferredAnswers("the request for a batch")
        self._evaluated = waits.DeferredAnswers("the question for an evaluation")
        self._links_bad = 0
        self._num_refused = 0
        self._leased = self.state.ledger.next_number > 1
        self._leased_training = self.state.ledger.tasks.next_task > 0
        self._endpoints = endpoints
        settings = config.links
        former = former or Endpoints()
        self.actors = Server(
            endpoints.actors,
            name="buffer",
            receives=ActorToBuffer,
            handler=self._from_actor,
            settings=settings,
            settled=self.journal.settle,
            with_frames=True,
            former_port=port_of(former.actors),
            setting="links.actors_port",
        )
        self.learner = Server(
            endpoints.learner,
            name="buffer",
            receives=LearnerToBuffer,
            handler=self._from_learner,
            settings=settings,
            settled=self.journal.settle,
            learners_only=True,
            former_port=port_of(former.learner),
            setting="links.learner_port",
        )

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            if self._scratch is not None:
                stack.callback(self._scratch.cleanup)
            await stack.enter_async_context(self.journal)
            # The number of this incarnation before anybody is told a name that has it.
            limit_s = self._config.links.give_up_s
            try:
                await self.journal.settle(timeout_s=limit_s)
            except TimeoutError:
                raise WaitTimeout(
                    f"the first commit to the journal in {self.journal.folder} took over {limit_s:g} s "
                    "(links.give_up_s): its disk is too slow or stands still; name another with --buffer.journal_dir"
                ) from None
            await stack.enter_async_context(self.actors)
            await stack.enter_async_context(self.learner)
            self._opened = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(self.actors.close(), self.learner.close())
        self._write_records()
        for peer in list(self._owed_leases):
            self._let_go(peer)
        if self._owed_batch is not None:
            self._owed_batch.drop()
        await self._opened.aclose()
        self._metrics.close()

    async def serve(self) -> None:
        """Waits for: the run's end.  Unblocked by: ``RunFinished``, once the actors know of it, or ``stopping``.

        Raises:
            JournalBroken: another process must take over.
        """
        assert self.journal.broken is not None
        async with asyncio.TaskGroup() as tasks:
            ticking = tasks.create_task(self._look_after_leases(), name="leases")
            stop = tasks.create_task(self._stopping.wait(), name="stopping")
            over = tasks.create_task(self._say_farewell(), name="farewell")
            moving = tasks.create_task(self._move_records(), name="move records")
            ends: set[asyncio.Future[Any]] = {stop, over, self.journal.broken}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in (ticking, stop, over, moving):
                task.cancel()
            if self.journal.broken.done():
                self.journal.broken.result()
        log.info("buffer ends: %s", "the run is over" if self.state.finished else "asked to stop")

    def _gauges(self) -> dict[str, float]:
        """What the parts around the state count, for the metrics of a batch."""
        actors, learner = self.actors.counters, self.learner.counters
        sent = {f"buffer/{name}": actors[name] + learner[name] for name in actors}
        return {**self.journal.gauges(), **sent, "buffer/refused_metrics": float(self._metrics.num_refused)}

    def facts(self) -> dict[str, object]:
        """For the buffer's status."""
        ledger = self.state.ledger
        return {
            "step": self.state.step,
            "version": self.state.version,
            "published": ledger.progress.published,
            "ready trees": len(self.state.pool),
            "leased trees": ledger.num_training,
            "actors alive": ledger.actors.num_alive(self._clock()),
            "journal failing": self.journal.failing or "no",
        }

    # --- loops -------------------------------------------------------------------------------------------------

    async def _look_after_leases(self) -> None:
        """Expire leases of the silent and the late.  Waits for: the clock."""
        looked = self._clock()
        while True:
            await asyncio.sleep(TICK_S)
            looked, away_s, now = self._clock(), self._clock() - looked - TICK_S, self._clock()
            if away_s > AWAY_S:
                # Stopped, or its machine slept: nobody could reach it, so nobody was late.
                log.warning("the buffer itself stood still for %.1f s; every lease gets that time again", away_s)
                self.state.ledger.excuse(away_s, now)
                await asyncio.sleep(TICK_S)
                now = self._clock()
            # The link's own heartbeats count: an actor that waits for its engine reports late but lives.
            for name, peer in self.actors.peers.items():
                self.state.ledger.actors.heard(name, now - peer.silent_s)
            # At the end somebody waits for actors to fall silent, which no message tells.
            if self.state.tick(now) or self.state.finished:
                self._notify()
            self._write_records()

    async def _move_records(self) -> None:
        """Empty chunks of which little is needed, so that they can go.  Waits for: the clock, then the disk."""
        while True:
            await asyncio.sleep(TICK_S)
            chunks = [] if self.journal.failing else self.journal.sparse_chunks(MOVE_CHUNKS)
            if not chunks:
                continue
            rows = self.state.trees.registry.live(await self.journal.rows_in(chunks))
            records = await self.journal.load(places_of(rows))
            moved = self.state.trees.registry.relocate(rows, records)
            await self.journal.settle()
            log.debug("moved %d records out of %d chunks", moved, len(chunks))

    async def _say_farewell(self) -> None:
        """Waits for: every actor alive to be told that the run is over.  Unblocked by: their next request for leases;
        given up after ``FAREWELL_S``."""
        await self._until(lambda: self.state.finished or None, timeout_s=None)
        await self._until(lambda: not self._untold() or None, timeout_s=FAREWELL_S)
        if untold := self._untold():
            log.warning("the run is over; not heard by %s", ", ".join(sorted(untold)))
        await asyncio.sleep(SETTLE_S)

    def _untold(self) -> set[str]:
        alive = {name for name, peer in self.actors.peers.items() if peer.silent_s < 2 * self._config.links.heartbeat_s}
        return alive - self._farewells

    async def _until(self, found: Callable[[], Found | None], *, timeout_s: float | None) -> Found | None:
        """``found()`` as soon as it is not None; None after ``timeout_s`` or once stopping.

        Waits for: a change that a message or a lapsed lease brings about.  Unblocked by: ``_notify``.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._stopping.is_set():
                    changed = self._changed
                    result = found()
                    if result is not None:
                        return result
                    await changed.wait()
        return None

    def _notify(self) -> None:
        """Whoever waits looks again."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    # --- actors ------------------------------------------------------------------------------------------------

    def _from_actor(self, peer: str, message: Any, frames: Frames) -> Awaitable[Message] | None:
        """One message from an actor: the reply to a request, None for a send, which never waits here.

        Raises:
            BadMessage: the message is refused.
        """
        if isinstance(message, ActorHello | LeaseRequest):
            return self._answer_actor(peer, message)
        now = self._clock()
        try:
            self._check_run(message)
            self.state.ledger.actors.heard(peer, now)
            self._take(peer, message, now, frames)
        except BadMessage as exc:
            self._note_refusal(peer, message, exc)
            raise
        return None

    async def _answer_actor(self, peer: str, message: ActorHello | LeaseRequest) -> Message:
        if isinstance(message, LeaseRequest):
            self._check_run(message)
            return await self._lease(peer, message)
        welcome = self._welcome(peer, message, self._clock())
        if isinstance(welcome, Welcome):
            await self.journal.settle()
        return welcome

    def _welcome(self, peer: str, hello: ActorHello, now: float) -> Welcome | Refused:
        if hello.protocol != PROTOCOL:
            return Refused(reason=f"actor {hello.actor} speaks protocol {hello.protocol}, this buffer {PROTOCOL}")
        if hello.run not in ("", self._run):
            return Refused(reason=f"actor {hello.actor} belongs to run {hello.run!r}, this buffer to {self._run!r}")
        if not may_be_called(peer):
            return Refused(reason=f"{peer!r} is another role's name; give this actor one of its own (--name)")
        mine = self._config.environment.name, self._config.search.max_leaves
        if (hello.environment, hello.search_leaves) != mine:
            return Refused(
                reason=f"actor {hello.actor} grows {hello.environment!r} trees of up to {hello.search_leaves} leaves, "
                f"this run {mine[0]!r} trees of {mine[1]}; start it with the run's configuration"
            )
        self._let_go(peer)
        self.state.hello(peer, now)
        self._notify()
        return Welcome(
            run=self._run,
            weights_endpoint=self.state.weights_endpoint,
            announce_endpoint=self.state.announce_endpoint,
        )

    async def _lease(self, peer: str, request: LeaseRequest) -> Leases:
        """Waits for: admission, then the commit.  Unblocked by: a batch taken, a version published, an evaluation, a
        lost lease; the disk.

        What is granted leaves after the commit that holds it and not before, however slow the disk is: a buffer
        started after a kill must know of it.  Until then it is owed, and nothing more is granted to this actor.
        """
        owed = self._owed_leases.get(peer)
        if owed is None:
            leases = await self._admitted(peer, request)
            owed = self._owed_leases.get(peer)  # to a request that came in the meantime
            if owed is not None:
                self.state.returned(peer, [lease.tree_id for lease in leases.leases])
            elif not leases.leases:
                if leases.finished:
                    self._farewells.add(peer)
                    self._notify()
                return leases
            else:
                leases = self._as_many_as_fit(peer, leases)
                owed = self._owed_leases[peer] = PendingAnswer(leases, self.journal.settle())
        asked = owed.ask()
        if not await owed.committed(SETTLE_WAIT_S) or not owed.is_latest(asked):
            why = self._disk_trouble()
            self._admission.goes_on(why, on=waits.DISK)
            return Leases(leases=(), closed_because=why, retry_after_s=RETRY_S, finished=False)
        self._let_go(peer)
        return await self._granted(peer, owed.answer)

    async def _admitted(self, peer: str, request: LeaseRequest) -> Leases:
        """What can be granted; none, with the reason, after ``LEASE_WAIT_S``."""

        def ask() -> Leases:
            if self.journal.failing is not None:
                return Leases(
                    leases=(), closed_because=self._disk_trouble(), retry_after_s=SETTLE_WAIT_S, finished=False
                )
            return self.state.lease(peer, request.count, self._clock(), engine_version=request.version)

        def some() -> Leases | None:
            leases = ask()
            return leases if leases.leases or leases.finished else None

        leases = await self._until(some, timeout_s=LEASE_WAIT_S) or ask()
        if leases.leases or leases.finished:
            self._admission.over()
        else:
            why = leases.closed_because or "all tasks of an evaluation are under way"
            self._admission.goes_on(f"another lease to become possible ({why})", on=self._admits())
        return leases

    async def _granted(self, peer: str, leases: Leases) -> Leases:
        """The answer with those leases that are still this actor's, and the turns that they have already."""
        there = tuple(lease for lease in leases.leases if self.state.has(peer, lease))
        if not self._leased:
            # Before the first of them is out: an empty journal is no new one from here on.
            self._leased = True
            self._metrics.write(self.state.step, self.state.version, {FIRST_GRANT: time.time()})
        if not self._leased_training and any(lease.kind == "train" for lease in there):
            self._leased_training = True
            self._metrics.write(self.state.step, self.state.version, {"time/first_lease": time.time()})
        return await self._with_turns(msgspec.structs.replace(leases, leases=there))

    def _let_go(self, peer: str) -> None:
        """What is owed to this actor has left, or is not its any more."""
        if (owed := self._owed_leases.pop(peer, None)) is not None:
            owed.drop()

    def _disk_trouble(self) -> str:
        return f"the buffer's journal cannot be written: {self.journal.failing or 'its disk is slow'}"

    def _admits(self) -> str:
        """Who can end it that no lease is granted: for the buffer's picture."""
        if self.journal.failing is not None:
            return waits.DISK
        evaluating = any(e.blocking and not e.done for e in self.state.ledger.evaluations)
        return "actors" if evaluating and self.state.ledger.progress.published is not None else "learner"

    def _as_many_as_fit(self, peer: str, leases: Leases) -> Leases:
        """Leases whose turns fit into one answer, one at least; the others go back, to be asked for again."""
        room, fitting = self._config.links.max_message_bytes * LEASES_SHARE, 0
        for lease in leases.leases:
            committed = lease.committed
            room -= int(committed.rows["nbytes"].sum()) if isinstance(committed, StoredTurns) else 0
            if room < 0 and fitting:
                break
            fitting += 1
        if fitting == len(leases.leases):
            return leases
        self.state.returned(peer, [lease.tree_id for lease in leases.leases[fitting:]])
        return msgspec.structs.replace(leases, leases=leases.leases[:fitting])

    async def _with_turns(self, leases: Leases) -> Leases:
        """The turns that are there already, read from the journal in one go: what it sees at once it sees whole."""
        stored = [each.committed.places if isinstance(each.committed, StoredTurns) else [] for each in leases.leases]
        records = iter(await self.journal.load([place for places in stored for place in places]))
        found = [
            msgspec.structs.replace(lease, committed=TurnRecords.raw(list(islice(records, len(places))), len(places)))
            for lease, places in zip(leases.leases, stored, strict=True)
        ]
        return msgspec.structs.replace(leases, leases=tuple(found))

    def _take(
        self,
        peer: str,
        message: TreeOpened | Turn | TreeClosed | LeaseReturned | ActorReport,
        now: float,
        frames: Frames,
    ) -> None:
        match message:
            case Turn() | TreeOpened() | TreeClosed():
                try:
                    came_to_an_end = self.state.take(message, now, frames)
                except BadMessage as exc:
                    self.state.refused(peer, message, str(exc))
                    raise
                waits.progress("messages")
                if came_to_an_end:
                    self._notify()
            case ActorReport():
                owed = self._owed_leases.get(peer)
                # Of these it cannot know yet.
                not_out = [] if owed is None else [lease.tree_id for lease in owed.answer.leases]
                if self.state.report(peer, [*message.tree_ids, *not_out], now):
                    self._notify()
                self._metrics.report(peer, self.state.step, message.version, message.metrics)
            case LeaseReturned():
                if self.state.returned(peer, message.tree_ids, message.reason):
                    self._notify()

    # --- the learner -------------------------------------------------------------------------------------------

    async def _from_learner(self, peer: str, message: Any) -> Message | None:
        """One message from a learner's rank."""
        try:
            self._check_run(message)
            return await self._for_learner(message)
        except SamplerFault as exc:
            log.error("batch refused: %s", exc)
            raise BadMessage(str(exc)) from exc
        except BadMessage as exc:
            self._note_refusal(peer, message, exc)
            raise

    async def _for_learner(self, message: Any) -> Message | None:
        match message:
            case SampleRequest():
                return await self._sample(message)
            case EvalQuery():
                return await self._eval_result(message)
            case Trained():
                self.state.trained(message)
            case Checkpointed():
                self.state.checkpointed(message)
            case VersionPublished():
                self.state.publish(message)
            case EvalRequest():
                self.state.evaluate(message)
            case RunFinished():
                self.state.finish()
        self._notify()
        return None

    async def _sample(self, request: SampleRequest) -> Message:
        """Waits for: enough fresh trees with signal.  Unblocked by: actors closing trees.  NotYet after ``wait_s``."""
        if not 0 <= request.rank < request.num_ranks:
            raise BadMessage(f"rank {request.rank} of {request.num_ranks} does not exist")

        def made() -> Share | Exhausted | None:
            self._count_bad_frames()
            before = self.state.next_batch
            share = self.state.draw(request, self._clock())
            if self.state.next_batch != before:
                self._notify()
            if share is None:
                ready = f"{len(self.state.pool)} of {request.num_trees} are ready"
                self._trees.goes_on(f"trees for batch {request.step} ({ready})", on="actors")
            return share

        share: Share | Exhausted | None = await self._until(made, timeout_s=request.wait_s)
        if share is None:
            return NotYet(
                waiting_for=self.state.waiting_for(request, self._clock()),
                progress=self.state.progress,
                checkpoint_wanted=self.state.checkpoint_wanted,
            )
        self._trees.over()
        waits.progress("batches")
        return await self._given(share)

    async def _given(self, share: Share | Exhausted) -> Message:
        """The answer, once it is committed: whoever serves after a kill must give every rank its share of the same."""
        number = -1 if isinstance(share, Exhausted) else share.head.batch_id
        owed = self._owed_batch
        if owed is None or owed.answer != number:
            if owed is not None:
                owed.drop()
            owed = self._owed_batch = PendingAnswer(number, self.journal.settle(at_once=True))
        records = [] if isinstance(share, Exhausted) else await self.journal.load(share.places)
        if not await owed.committed(SETTLE_WAIT_S):
            return NotYet(waiting_for=self._disk_trouble(), progress=self.state.progress)
        if isinstance(share, Exhausted):
            self._owed_batch = None  # said again it may rest on something newer
            return share
        return share.batch(records)

    async def _eval_result(self, query: EvalQuery) -> EvalResult:
        """Waits for: the evaluation's last tree.  Unblocked by: actors closing trees, lost leases being given up.

        Raises:
            BadMessage: no such evaluation, so that the learner asks for it again after this buffer was restarted.
        """
        evaluation = self.state.ledger.evaluations.find(query.step)
        if evaluation is None:
            raise BadMessage(f"no evaluation of step {query.step} is known here; the buffer may have restarted")

        def done() -> EvalResult | None:
            result = self.state.eval_result(query.step)
            if result.done:
                self._evaluated.over()
                return result
            so_far = f"the {result.num_tasks} tasks of an evaluation ({result.num_done} done)"
            self._evaluated.goes_on(so_far, on="actors")
            return None

        result: EvalResult | None = await self._until(done, timeout_s=query.wait_s)
        if result is None and self.state.ledger.progress.published is None:
            # The learner waits for what it asked for after its publication, which an earlier buffer heard of: without
            # this it would wait for trees, and the trees for a publication that comes after them.
            self.state.publish(
                VersionPublished(
                    run=self._run,
                    version=evaluation.version,
                    weights_endpoint=self._endpoints.weights,
                    announce_endpoint=self._endpoints.announce,
                )
            )
            self._notify()
        result = result or self.state.eval_result(query.step)
        if result.done:
            await self.journal.settle()
        return result

    # --- files -------------------------------------------------------------------------------------------------

    def _note_refusal(self, peer: str, message: Any, exc: BadMessage) -> None:
        self.state.count_bad_message()
        self._num_refused += 1
        # All of the first ones, then every thousandth: a broken peer must not fill the disk.
        if self._num_refused <= 50 or self._num_refused % 1000 == 0:
            log.warning("refused %s of %s (%d by now): %s", type(message).__name__, peer, self._num_refused, exc)

    def _check_run(self, message: Any) -> None:
        if message.run != self._run:
            raise BadMessage(f"{type(message).__name__} belongs to run {message.run!r}, this buffer to {self._run!r}")

    def _count_bad_frames(self) -> None:
        bad = self.actors.bad_messages + self.learner.bad_messages
        for _ in range(bad - self._links_bad):
            self.state.count_bad_message()
        self._links_bad = bad

    def _write_records(self) -> None:
        for step, version, metrics in self.state.drain_records():
            self._metrics.write(step, version, metrics)


def was_leased(rundir: RunDir) -> bool:
    """Whether a buffer of this run ever gave a lease, by what the run's metrics say."""
    signs = {FIRST_GRANT, "time/first_lease", "eval/failed"}
    return rundir.is_trained or (
        rundir.metrics_path.exists()
        and any(not signs.isdisjoint(record.metrics) for record in read_metrics(rundir.metrics_path))
    )


async def serve(ctx: RoleContext) -> None:
    """The buffer's role: bind, say where, serve until the end.

    Raises:
        SetupError: the port is taken, or there is no run folder.
    """
    if ctx.rundir is None:
        raise SetupError("the buffer needs the run's folder; start it through `atpo train` or on a run folder")
    listening, links = ctx.rundir.listening, ctx.config.links
    now = listening.now()
    asked = replace(now, actors=ports.to_bind(links, "actors"), learner=ports.to_bind(links, "learner"))
    service = BufferService(
        ctx.config,
        run=ctx.run_id,
        endpoints=asked,
        rundir=ctx.rundir,
        stopping=ctx.stopping,
        former=listening.former(),
    )
    if not now.weights:
        # Where the journal has it the learner was in an earlier life of the run; it says itself where it is now.
        service.state.weights_endpoint = service.state.announce_endpoint = ""
    async with service:
        bound = replace(asked, actors=service.actors.endpoint, learner=service.learner.endpoint)
        listening.note(actors=bound.actors, learner=bound.learner)
        ctx.log.info("buffer of run %s: actors at %s, learner at %s", ctx.run_id, bound.actors, bound.learner)
        publish_facts("buffer", service.facts)
        waits.phase("serving")
        await service.serve()
