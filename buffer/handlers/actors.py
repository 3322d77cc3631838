"""Handles messages of actors: joining, leases, turns and reports; an answer is sent only after its commit."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable
from itertools import islice
from typing import Any

import msgspec

from atpo_async.config import Config
from atpo_async.core.errors import BadMessage, SetupError
from atpo_async.core.tree import Turn
from atpo_async.run.metrics import read_metrics
from atpo_async.run.rundir import RunDir
from atpo_async.status import waits
from atpo_async.wire import messages as m
from atpo_async.wire.records import TurnRecords
from buffer.handlers.context import HandlerContext
from buffer.handlers.lease_queue import MOST_LEASE_WAIT_S, LeaseQueue
from buffer.handlers.pending_answers import SETTLE_WAIT_S, PendingAnswer
from buffer.handlers.relayed import RelayedPeers
from buffer.leases.admission import Admitted
from buffer.leases.presence import Host
from buffer.metrics_file import may_be_called
from buffer.state import RETRY_S
from buffer.trees.assembly import Frames
from buffer.trees.index import StoredTurns

log = logging.getLogger("atpo.buffer")

LEASES_SHARE = 0.5
"""Share of links.max_message_bytes that committed turns may take in an answer with leases."""
MOST_MOVED = 1024
"""Actors of which a former name is known."""
FIRST_GRANT = "time/first_grant"
"""Metric: when the first lease of the run was granted, of whichever kind."""


class ActorHandler:
    """Answers actors.

    Args:
        context: the buffer's.
        at_once: no request for leases waits for admission; the front of several shards does.
    """

    def __init__(self, context: HandlerContext, *, at_once: bool = False) -> None:
        self._context = context
        self._at_once = at_once
        self._state, self._journal, self._changes = context.state, context.journal, context.changes
        self._deferred = waits.DeferredAnswers("requests for leases")
        self._pending: dict[str, PendingAnswer[m.Leases]] = {}
        """Actor -> leases that were granted to it and are not committed yet."""
        # With an exact lag a request goes out of date with the version that it names.
        most_wait_s = 0.0 if context.state.delay_line is not None else MOST_LEASE_WAIT_S
        self._queue = LeaseQueue(self._ask, most_wait_s=min(most_wait_s, context.config.links.deadline_s / 4))
        self._changes.on_change = self._queue.changed
        self._knows_the_end: set[str] = set()
        self.relayed = RelayedPeers(context)
        self._moved: dict[str, str] = {}
        """Former name of an actor -> the name under which it has gone on."""
        ledger = context.state.ledger
        self._leased = ledger.next_number > 1
        self._leased_training = ledger.tasks.any_begun

    def knows_the_end(self, actor: str) -> bool:
        """Whether an actor was sent the end of the run."""
        return actor in self._knows_the_end

    def close(self) -> None:
        """Send no further answers."""
        for peer in list(self._pending):
            self._drop_pending(peer)

    def handle(self, peer: str, message: Any, frames: Frames) -> Awaitable[m.Message] | None:
        """One message from an actor: the reply to a request, None for a send, which never waits here.

        Raises:
            BadMessage: the message is refused.
        """
        if isinstance(message, m.ActorHello | m.LeaseRequest | m.RelayHello):
            return self._answer_actor(peer, message)
        now = self._context.clock()
        try:
            self._context.check_run(message)
            if refusal := self.relayed.refusal(peer, message):
                raise BadMessage(refusal)
            self._state.ledger.actors.heard(peer, now)
            self._take(peer, message, now, frames)
        except BadMessage as exc:
            self._context.note_refusal(peer, message, exc)
            raise
        except SetupError as exc:
            self._context.end_with(exc)
            raise
        return None

    async def _answer_actor(self, peer: str, message: m.ActorHello | m.LeaseRequest | m.RelayHello) -> m.Message:
        if refusal := self.relayed.refusal(peer, message):
            return m.Refused(reason=refusal)
        if isinstance(message, m.RelayHello):
            return self._welcome_relay(peer, message)
        if isinstance(message, m.LeaseRequest):
            self._context.check_run(message)
            if peer in self._moved:
                # Passed on late by a relay that the actor has gone past: nothing may be granted to a name without one.
                return m.Refused(reason=f"{peer} has gone on as {self._moved[peer]}")
            return await self._lease(peer, message)
        welcome = self._welcome(peer, message, self._context.clock())
        if isinstance(welcome, m.Welcome):
            await self._journal.settle()
        return welcome

    def admitted(self, peer: str, hello: m.ActorHello) -> m.Refused | None:
        """Why an actor is not let in; None where it is."""
        return why_refused(self._context.config, self._context.run, peer, hello)

    def _welcome(self, peer: str, hello: m.ActorHello, now: float) -> m.Welcome | m.Refused:
        if (refused := self.admitted(peer, hello)) is not None:
            return refused
        if hello.continues and not self.relayed.is_right(hello.continues, hello.ticket):
            return m.Refused(reason=f"{peer} cannot go on as {hello.continues}: its ticket is not that of this name")
        self._moved.pop(peer, None)
        if hello.continues:
            self._go_on(hello.continues, peer, now)
        else:
            # A request of the process before that waits is answered with none: this one would never hear of the leases.
            self._queue.drop(peer)
            self._drop_pending(peer)
            self._state.hello(peer, now)
        self._state.ledger.actors.lives_on(peer, Host(hello.host, hello.host_id))
        self._changes.notify()
        return self._welcome_of(peer)

    def _welcome_of(self, peer: str) -> m.Welcome:
        return m.Welcome(
            run=self._context.run,
            weights_endpoint=self._state.weights_endpoint,
            announce_endpoint=self._state.announce_endpoint,
            name=peer,
            ticket=self.relayed.ticket(peer),
            finished=self._state.finished,
        )

    def _welcome_relay(self, peer: str, hello: m.RelayHello) -> m.Message:
        if refusal := self.relayed.hello(peer, hello, self._context.clock()):
            return m.Refused(reason=refusal)
        if self._state.finished:
            self._knows_the_end.add(peer)
            self._changes.notify()
        return self._welcome_of(peer)

    def _go_on(self, former: str, peer: str, now: float) -> None:
        """An actor has come another way: what it held under its former name it holds as ``peer``."""
        # A relay on its way may have gone on in the meantime, and the actor under another name with it, unknown to it.
        followed = {former}
        while (later := self._moved.get(former)) is not None and later not in followed:
            followed.add(later)
            former = later
        if former == peer:
            self._state.ledger.actors.heard(peer, now)
            return
        self._queue.drop(former)  # nothing may be granted any more to a name that no process has
        pending = self._pending.get(former)
        if pending is not None:
            # Granted, and never sent there.
            self._state.returned(former, [lease.tree_id for lease in pending.answer.leases])
            self._drop_pending(former)
        moved = self._state.ledger.goes_on(former, peer, now)
        self._moved[former] = peer
        if len(self._moved) > MOST_MOVED:
            del self._moved[next(iter(self._moved))]
        self.relayed.moves += 1
        log.info("actor %s goes on as %s, with %d leases", former, peer, moved)

    async def _lease(self, peer: str, request: m.LeaseRequest) -> m.Leases:
        """Waits for: admission, then the commit.  Unblocked by: a batch taken, a version published, an evaluation, a
        lost lease; the disk.

        Leases are sent after the commit that holds them and not before, however slow the disk is: a buffer that is
        started after a kill must know of them.  Until then nothing more is granted to this actor.
        """
        pending = self._pending.get(peer)
        if pending is None:
            leases = await self._admitted(peer, request)
            pending = self._pending.get(peer)  # the answer goes to a later request
            if pending is not None:
                self._state.returned(peer, [lease.tree_id for lease in leases.leases])
            elif not leases.leases:
                if leases.finished:
                    self._knows_the_end.add(peer)
                    self._changes.notify()
                return leases
            else:
                leases = self._as_many_as_fit(peer, leases)
                pending = self._pending[peer] = PendingAnswer(leases, self._journal.settle())
        asked = pending.ask()
        if not await pending.committed() or not pending.is_latest(asked):
            why = self._context.why_unwritten()
            self._deferred.goes_on(why, on=waits.DISK)
            return m.Leases(leases=(), closed_because=why, retry_after_s=RETRY_S, finished=False)
        self._drop_pending(peer)
        return await self._granted(peer, pending.answer)

    async def _admitted(self, peer: str, request: m.LeaseRequest) -> m.Leases:
        """The leases that can be granted; none, with the reason, after a while, or at once where nothing may wait."""
        leases = self._ask(peer, request).leases if self._at_once else await self._queue.answer(peer, request)
        if leases.leases or leases.finished:
            self._deferred.over()
        else:
            why = leases.closed_because or "all tasks of an evaluation are under way"
            self._deferred.goes_on(f"another lease to become possible ({why})", on=self._admits())
        return leases

    def _ask(self, peer: str, request: m.LeaseRequest) -> Admitted:
        if self._journal.failing is not None:
            why = self._context.why_unwritten()
            none = m.Leases(leases=(), closed_because=why, retry_after_s=SETTLE_WAIT_S, finished=False)
            return Admitted(none, only_here=False)
        return self._state.admit(peer, request.count, self._context.clock(), engine_version=request.version)

    async def _granted(self, peer: str, leases: m.Leases) -> m.Leases:
        """The answer with those leases that are still this actor's, and the turns that they have already."""
        there = tuple(lease for lease in leases.leases if self._state.has(peer, lease))
        if not self._leased:
            # Before the first lease is sent: from here on an empty journal is not a new one.
            self._leased = True
            self._context.metrics.write(self._state.step, self._state.version, {FIRST_GRANT: time.time()})
        if not self._leased_training and any(lease.kind == "train" for lease in there):
            self._leased_training = True
            self._context.metrics.write(self._state.step, self._state.version, {"time/first_lease": time.time()})
        return await self._with_turns(msgspec.structs.replace(leases, leases=there))

    def _drop_pending(self, peer: str) -> None:
        """Forget the pending answer of this actor: it was sent, or its leases are not the actor's any more."""
        if (pending := self._pending.pop(peer, None)) is not None:
            pending.drop()

    def _admits(self) -> str:
        """The role that admission waits for, for the status of the buffer."""
        if self._journal.failing is not None:
            return waits.DISK
        evaluating = any(e.blocking and not e.done for e in self._state.ledger.evaluations)
        return "actors" if evaluating and self._state.ledger.progress.published is not None else "learner"

    def _as_many_as_fit(self, peer: str, leases: m.Leases) -> m.Leases:
        """The leases whose turns fit into one answer, at least one; the others are returned, to be requested again."""
        # The front of several shards answers an actor with the leases of all of them.
        space, fitting = self._context.config.links.max_message_bytes * LEASES_SHARE / self._state.shard.count, 0
        for lease in leases.leases:
            committed = lease.committed
            space -= int(committed.rows["nbytes"].sum()) if isinstance(committed, StoredTurns) else 0
            if space < 0 and fitting:
                break
            fitting += 1
        if fitting == len(leases.leases):
            return leases
        self._state.returned(peer, [lease.tree_id for lease in leases.leases[fitting:]])
        return msgspec.structs.replace(leases, leases=leases.leases[:fitting])

    async def _with_turns(self, leases: m.Leases) -> m.Leases:
        """Adds the turns that are there already, read from the journal in one transaction, of one consistent state."""
        stored = [each.committed.places if isinstance(each.committed, StoredTurns) else [] for each in leases.leases]
        records = iter(await self._journal.load([place for places in stored for place in places]))
        found = [
            msgspec.structs.replace(lease, committed=TurnRecords.raw(list(islice(records, len(places))), len(places)))
            for lease, places in zip(leases.leases, stored, strict=True)
        ]
        return msgspec.structs.replace(leases, leases=tuple(found))

    def _take(
        self,
        peer: str,
        message: m.TreeOpened | Turn | m.TreeClosed | m.LeaseReturned | m.ActorReport,
        now: float,
        frames: Frames,
    ) -> None:
        match message:
            case Turn() | m.TreeOpened() | m.TreeClosed():
                try:
                    came_to_an_end = self._state.take(message, now, frames)
                except BadMessage as exc:
                    self._state.refused(peer, message, str(exc))
                    raise
                waits.progress("messages")
                if came_to_an_end:
                    self._changes.notify(freed=peer)
            case m.ActorReport():
                self._state.ledger.actors.lives_on(peer, Host(message.host, message.host_id))
                pending = self._pending.get(peer)
                # The actor cannot know of these yet.
                not_out = [] if pending is None else [lease.tree_id for lease in pending.answer.leases]
                if self._state.report(peer, [*message.tree_ids, *not_out], now):
                    self._changes.notify()
                self._context.metrics.report(peer, self._state.step, message.version, message.metrics)
            case m.LeaseReturned():
                trees: tuple[str, ...] | None = message.tree_ids
                if not message.reason:
                    # A request of it may wait still; whatever that was granted it would never hear of.
                    self._queue.drop(peer)
                    self._state.ledger.actors.leaves(peer)
                    trees = None
                if self._state.returned(peer, trees, message.reason):
                    self._changes.notify()


def why_refused(config: Config, run: str, peer: str, hello: m.ActorHello) -> m.Refused | None:
    """Why an actor is not let into a run; None where it is."""
    if hello.protocol != m.PROTOCOL:
        return m.Refused(reason=f"actor {hello.actor} speaks protocol {hello.protocol}, this buffer {m.PROTOCOL}")
    if hello.run not in ("", run):
        return m.Refused(reason=f"actor {hello.actor} belongs to run {hello.run!r}, this buffer to {run!r}")
    if not may_be_called(peer):
        return m.Refused(reason=f"{peer!r} is another role's name; give this actor one of its own (--name)")
    grown = config.task_name, config.max_leaves
    if (hello.environment, hello.search_leaves) != grown:
        return m.Refused(
            reason=f"actor {hello.actor} grows {hello.environment!r} trees of up to {hello.search_leaves} leaves, "
            f"this run {grown[0]!r} trees of {grown[1]}; start it with the run's configuration"
        )
    return None


def was_leased(rundir: RunDir) -> bool:
    """Whether a buffer of this run ever granted a lease, from the run's metrics."""
    signs = {FIRST_GRANT, "time/first_lease", "eval/failed"}
    return rundir.is_trained or (
        rundir.metrics_path.exists()
        and any(not signs.isdisjoint(record.metrics) for record in read_metrics(rundir.metrics_path))
    )
