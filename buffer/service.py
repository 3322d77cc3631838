"""The buffer's process: its journal, its two sockets and its loops.  ``BufferState`` decides, ``handlers`` answer.

Who waits for whom: an actor's request for leases waits for admission (unblocked by the learner taking a batch or
publishing); the learner's request for a batch waits for ready trees (unblocked by actors closing trees); its query for
an evaluation waits for the evaluation's last tree.  All of them answer within a bounded time, with what is missing.

Everything is decided in memory at once, and every acknowledgement and answer is sent after the commit that holds it
(``Journal.settle``).  While the journal cannot be written nothing is acknowledged and no lease is granted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from atpo_async.config import Config
from atpo_async.core.errors import SetupError, WaitTimeout
from atpo_async.core.naming.shards import WHOLE, Shard, index_of, role_of
from atpo_async.core.texts import shortened
from atpo_async.links import ports
from atpo_async.links.addresses import endpoint_of, port_of
from atpo_async.links.keys import LEARNERS
from atpo_async.links.server import Server
from atpo_async.ops.role import RoleContext
from atpo_async.run.endpoints import Endpoints, ShardEndpoints
from atpo_async.run.rundir import RunDir
from atpo_async.status import waits
from atpo_async.status.facts import publish_facts
from atpo_async.status.fleet import FLEET
from atpo_async.wire.messages import ActorToBuffer, LearnerToBuffer
from buffer.following.serving import FollowerSocket
from buffer.front import service as front
from buffer.front.messages import FrontToShard
from buffer.handlers.actors import ActorHandler, was_leased
from buffer.handlers.changes import Changes
from buffer.handlers.context import HandlerContext
from buffer.handlers.joined import JoinedHandler
from buffer.handlers.learner import LearnerHandler
from buffer.journal.journal import Journal
from buffer.journal.persistence import StatePersistence
from buffer.journal.slowness import SlowCommits
from buffer.leases.overview import actor_rows
from buffer.metrics_file import MetricsFile
from buffer.shard.front import FrontHandler
from buffer.shard.settings import of_shard
from buffer.shard.turns import TurnsHandler
from buffer.state import BufferState
from buffer.trees.index import places_of

log = logging.getLogger("atpo.buffer")

TICK_S = 0.5
"""How often leases are checked."""
AWAY_S = 2.0
"""A check of the leases that is late by more than this shows that the process stood still, not merely worked."""
END_HEARD_S = 5.0
"""After the run's end: how long actors have to learn of it."""
SETTLE_S = 0.2
"""After the last answer: how long the sockets stay open, for acknowledgements and repeats."""
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
        follower_bound: called with the endpoint for followers, before the first commit.
        rundir: for the journal and the actors' metrics; None writes no metrics.
        stopping: set to end early.
        journal: folder of the journal; in the run's folder, or in ``buffer.journal_dir``, if None.  Without a run's
            folder a temporary one.
        clock: seconds, monotonic.
        shard: which part of the run's buffer this is.  A shard binds ``actors`` for turns that actors send straight to
            it, and ``learner`` for its front.

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
        follower_bound: Callable[[str], None] = lambda endpoint: None,
        journal: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        shard: Shard = WHOLE,
    ) -> None:
        self._config = config = of_shard(config, shard)
        self._shard = shard
        self._stopping = stopping
        self._clock = clock
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        if journal is None and rundir is not None:
            journal = rundir.journal
            if shard != WHOLE:
                journal /= f"shard-{shard.index}-of-{shard.count}"
        if journal is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="atpo-journal-")
            journal = Path(self._scratch.name)
        buffer = config.buffer
        self.journal = Journal(
            journal, run=run, max_bytes=buffer.max_bytes, sync=buffer.journal_sync, gather_s=buffer.commit_ms / 1000,
            leased=lambda: rundir is None or was_leased(rundir),
            followed=buffer.follower, follower_wait=buffer.follower_wait,
        )  # fmt: skip
        self._slow_commits = SlowCommits(self.journal.folder, synced=buffer.journal_sync)
        self.state = self._recovered_state(run, endpoints)
        # What shards measure is in the metrics of their front.
        self._metrics = MetricsFile(None if rundir is None or shard != WHOLE else rundir.metrics_path)
        self._changes = Changes(stopping)
        self._links_bad = 0
        self._context = context = HandlerContext(
            config=config, run=run, state=self.state, journal=self.journal, metrics=self._metrics,
            changes=self._changes, clock=clock,
        )  # fmt: skip
        self._actor_handler = ActorHandler(context, at_once=shard != WHOLE)
        self._joined = JoinedHandler(
            context, rundir=rundir if shard == WHOLE else None, peers=lambda: self.learner.peers
        )  # fmt: skip
        self._learner_handler = LearnerHandler(
            context, joined=self._joined, endpoints=endpoints, count_bad_frames=self._count_bad_frames
        )  # fmt: skip
        self._front: FrontHandler | None = None
        self.actors, self.learner = self._servers(endpoints, former or Endpoints())
        relayed = self._actor_handler.relayed
        # What comes through a front was looked at there.
        relayed.is_relay = self.actors.is_relay if shard == WHOLE else relayed.is_named_by_one
        self.state.ledger.actors.is_relayed = lambda actor: relayed.depth(actor) > 0
        self._followers: FollowerSocket | None = None
        if buffer.follower:
            self._followers = FollowerSocket(
                config, run=run, journal=self.journal, folder=None if rundir is None else rundir.path,
                former_port=port_of((former or Endpoints()).follower), finished=lambda: self.state.finished,
                bound=follower_bound, clock=clock,
            )  # fmt: skip

    def _servers(self, endpoints: Endpoints, former: Endpoints) -> tuple[Server, Server]:
        """The sockets for actors and for the learner; of a shard those for turns and for its front."""
        actors, learner = self._actor_handler, self._learner_handler
        shared: dict[str, Any] = {"name": "buffer", "settings": self._config.links, "settled": self.journal.settle}
        for_actors: dict[str, Any] = {
            "receives": ActorToBuffer,
            "with_frames": True,
            "former_port": port_of(former.actors),
        }
        for_learner: dict[str, Any] = {"only": LEARNERS, "former_port": port_of(former.learner)}
        if self._shard == WHOLE:
            return (
                Server(
                    endpoints.actors, handler=actors.handle, setting="links.actors_port", **for_actors, **shared
                ),
                Server(
                    endpoints.learner, receives=LearnerToBuffer, handler=learner.handle, setting="links.learner_port",
                    **for_learner, **shared,
                ),
            )  # fmt: skip
        shared["name"] = role_of(self._shard.index)
        self._front = front = FrontHandler(self._context, actors, learner, stopping=self._stopping)
        turns = TurnsHandler(actors, name=shared["name"])
        return (
            Server(endpoints.actors, handler=turns.handle, setting="links.shards_port", **for_actors, **shared),
            Server(
                endpoints.learner,
                receives=FrontToShard,
                handler=front.handle,
                with_frames=True,
                **for_learner,
                **shared,
            ),
        )

    def _recovered_state(self, run: str, endpoints: Endpoints) -> BufferState:
        """The state that the journal holds, as the next incarnation; its changes go into the journal from here on."""
        recovered, now, seed = self.journal.recover(), self._clock(), self._config.run.seed
        state = BufferState(
            self._config, run=run, rng=np.random.default_rng(seed), now=now, store=self.journal, shard=self._shard
        )  # fmt: skip
        persistence = StatePersistence(state)
        found = persistence.restore(recovered.rows, recovered.state, now)
        if found:
            what_of_each = ", ".join(f"{n} {what}" for what, n in found.items())
            log.info("recovered from %s: %s", self.journal.folder, what_of_each)
        if state.weights_endpoint and endpoints.weights:
            # The learner's address of now; the run may have been restarted since it was recorded.
            state.weights_endpoint, state.announce_endpoint = endpoints.weights, endpoints.announce
        state.rng = np.random.default_rng([seed, state.incarnation])
        state.gauges = self._gauges
        self.journal.collect = lambda: persistence.collect(self.journal.put)
        return state

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            if self._scratch is not None:
                stack.callback(self._scratch.cleanup)
            await stack.enter_async_context(self.journal)
            if self._followers is not None:
                await stack.enter_async_context(self._followers)
            # The number of this incarnation is on disk before any tree id that contains it is sent.
            limit_s = self._config.links.give_up_s
            try:
                await self.journal.settle(timeout_s=limit_s)
            except TimeoutError:
                raise WaitTimeout(self.journal.why_no_commit(limit_s)) from None
            await stack.enter_async_context(self.actors)
            await stack.enter_async_context(self.learner)
            if self._front is not None:
                self._front.turns_endpoint = self.actors.endpoint
            self._opened = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(self.actors.close(), self.learner.close())
        self._write_records()
        self._actor_handler.close()
        self._learner_handler.close()
        self._joined.close()
        await self._opened.aclose()
        self._metrics.close()

    async def serve(self) -> None:
        """Waits for: the run's end.  Unblocked by: ``RunFinished``, once the actors know of it, or ``stopping``.

        Raises:
            JournalBroken: another process must take over.
            SetupError: a user's credit mode failed.
        """
        assert self.journal.broken is not None
        self._context.fault = fault = self._context.fault or asyncio.get_running_loop().create_future()
        async with asyncio.TaskGroup() as tasks:
            ticking = tasks.create_task(self._look_after_leases(), name="leases")
            stop = tasks.create_task(self._stopping.wait(), name="stopping")
            # Of several shards the front tells it, and then ends them.
            telling = self._tell_the_end() if self._front is None else self._stopping.wait()
            over = tasks.create_task(telling, name="tell the end")
            moving = tasks.create_task(self._move_records(), name="move records")
            ends: set[asyncio.Future[Any]] = {stop, over, self.journal.broken, fault}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in (ticking, stop, over, moving):
                task.cancel()
            for failed in (self.journal.broken, fault):
                if failed.done():
                    failed.result()
        log.info("buffer ends: %s", "the run is over" if self.state.finished else "asked to stop")

    def _gauges(self) -> dict[str, float]:
        """Counters of the parts around the state, for the metrics of a batch."""
        actors, learner = self.actors.counters, self.learner.counters
        sent = {f"buffer/{name}": actors[name] + learner[name] for name in actors}
        journal = self.journal.gauges()
        self._slow_commits.note(journal)
        followers = {} if self._followers is None else self._followers.followers.gauges()
        return {**journal, **followers, **sent, "buffer/refused_metrics": float(self._metrics.num_refused)}

    def facts(self) -> dict[str, object]:
        """For the buffer's status."""
        ledger, now = self.state.ledger, self._clock()
        relays = self._actor_handler.relayed.facts(ledger.actors.alive(now), now)
        return {
            **({"relays": relays} if relays else {}),
            "step": self.state.step,
            "version": self.state.version,
            "published": ledger.progress.published,
            "ready trees": len(self.state.pool),
            "leased trees": ledger.num_training,
            **({"rows to imitate": len(self.state.trees.registry.imitation)} if self._config.imitation.rows else {}),
            "actors alive": ledger.actors.num_alive(now),
            "journal failing": self.journal.held_up or "no",
        }

    def actor_facts(self) -> dict[str, dict[str, object]]:
        """Of each actor, for the run's status."""
        return actor_rows(self.state.ledger, self._clock())

    # --- loops -------------------------------------------------------------------------------------------------

    async def _look_after_leases(self) -> None:
        """Expire leases of the silent and the late.  Waits for: the clock."""
        looked = self._clock()
        while True:
            await asyncio.sleep(TICK_S)
            looked, away_s, now = self._clock(), self._clock() - looked - TICK_S, self._clock()
            if away_s > AWAY_S:
                # The process was stopped, or its machine slept: no actor could reach it, so none was late.
                log.warning("the buffer itself stood still for %.1f s; every lease gets that time again", away_s)
                self.state.ledger.excuse(away_s, now)
                await asyncio.sleep(TICK_S)
                now = self._clock()
            # The link's own heartbeats count: an actor that waits for its engine reports late but lives.
            for name, silent_s in self.actors.silences():
                if not self._actor_handler.relayed.is_known(name):
                    self.state.ledger.actors.heard(name, now - silent_s)
            # At the end ``_tell_the_end`` waits for actors to fall silent, which no message signals.
            if self._front is not None and self._front.front_away_s:
                continue  # no actor can report: none of them is late
            if self.state.tick(now) or self.state.finished:
                self._changes.notify()
            self._write_records()

    async def _move_records(self) -> None:
        """Move records out of sparse chunks, so that these can be freed.  Waits for: the clock, then the disk."""
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

    async def _tell_the_end(self) -> None:
        """Waits for: every live actor to be sent the end of the run.  Unblocked by: their next requests for leases;
        given up after ``END_HEARD_S``."""
        await self._changes.until(lambda: self.state.finished or None, timeout_s=None)
        await self._changes.until(lambda: next(self._not_told(), None) is None or None, timeout_s=END_HEARD_S)
        if not_told := sorted(self._not_told()):
            log.warning("the run is over; not heard by %s", shortened(", ".join(not_told)))
        await asyncio.sleep(SETTLE_S)

    def _not_told(self) -> Iterator[str]:
        """Live actors that were not sent the run's end yet, and ranks of a joined learner that pass on their last
        lines."""
        soon = 2 * self._config.links.heartbeat_s
        for name, silent_s in self.actors.silences():
            if silent_s < soon and not self._actor_handler.knows_the_end(name):
                yield name
        yield from self._joined.still_passing_on

    # --- files -------------------------------------------------------------------------------------------------

    def _count_bad_frames(self) -> None:
        bad = self.actors.bad_messages + self.learner.bad_messages
        for _ in range(bad - self._links_bad):
            self.state.count_bad_message()
        self._links_bad = bad

    def _write_records(self) -> None:
        for step, version, metrics in self.state.drain_records():
            self._metrics.write(step, version, metrics)


async def serve(ctx: RoleContext) -> None:
    """The buffer's role, or that of one of its shards: bind, record the addresses, serve until the end.

    Raises:
        SetupError: the port is taken, or there is no run folder.
    """
    if ctx.rundir is None:
        raise SetupError("the buffer needs the run's folder; start it through `atpo train` or on a run folder")
    count, index = ctx.config.buffer.shards, index_of(ctx.name)
    if index is not None and index >= count:
        raise SetupError(f"{ctx.name} is no role of this run: buffer.shards = {count}")
    if count == 1:
        await _serve(ctx, ctx.rundir)
    elif index is not None:
        await _serve_shard(ctx, ctx.rundir, Shard(index, count))
    else:
        await front.serve(ctx)


async def _serve_shard(ctx: RoleContext, rundir: RunDir, shard: Shard) -> None:
    listening, links = rundir.listening, ctx.config.links
    former = listening.shards().get(shard.index, ShardEndpoints(front="", turns=""))
    port = links.shards_port + shard.index if links.shards_port else 0
    service = BufferService(
        ctx.config,
        run=ctx.run_id,
        endpoints=Endpoints(actors=endpoint_of(links.host, port), learner=endpoint_of(links.host, 0)),
        rundir=rundir,
        stopping=ctx.stopping,
        former=Endpoints(actors=former.turns, learner=former.front),
        shard=shard,
    )
    async with service:
        there = ShardEndpoints(front=service.learner.endpoint, turns=service.actors.endpoint)
        listening.note_shard(shard.index, there)
        ctx.log.info("run %s: turns at %s, the front at %s", ctx.run_id, there.turns, there.front)
        publish_facts("buffer", service.facts)
        waits.phase("serving")
        await service.serve()


async def _serve(ctx: RoleContext, rundir: RunDir) -> None:
    listening, links = rundir.listening, ctx.config.links
    now = listening.now()
    asked = replace(now, actors=ports.to_bind(links, "actors"), learner=ports.to_bind(links, "learner"))
    service = BufferService(
        ctx.config,
        run=ctx.run_id,
        endpoints=asked,
        rundir=rundir,
        stopping=ctx.stopping,
        former=listening.former(),
        follower_bound=lambda endpoint: listening.note(follower=endpoint),
    )
    if not now.weights:
        # The journal has the learner's address in an earlier life of the run; the learner will report its present one.
        service.state.weights_endpoint = service.state.announce_endpoint = ""
    async with service:
        bound = replace(asked, actors=service.actors.endpoint, learner=service.learner.endpoint)
        listening.note(actors=bound.actors, learner=bound.learner)
        ctx.log.info("run %s: actors at %s, learner at %s", ctx.run_id, bound.actors, bound.learner)
        publish_facts("buffer", service.facts)
        publish_facts(FLEET, service.actor_facts)
        waits.phase("serving")
        await service.serve()
