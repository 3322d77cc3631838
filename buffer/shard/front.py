"""Handles what the front asks of a shard and passes on to it; an answer is sent only after its commit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from atpo_async.core.errors import BadMessage
from atpo_async.core.naming.shards import role_of
from atpo_async.core.tree import Turn
from atpo_async.wire import messages as m
from buffer.batches.parts import PartServer
from buffer.batches.served import ServedBatch
from buffer.front import messages as f
from buffer.handlers.actors import ActorHandler
from buffer.handlers.context import HandlerContext
from buffer.handlers.learner import LearnerHandler
from buffer.handlers.pending_answers import SETTLE_WAIT_S
from buffer.leases.admission import Elsewhere
from buffer.leases.overview import actor_rows
from buffer.shard.states import state_of
from buffer.trees.assembly import Frames

AWAY_S = 2.0
"""A front that asks nothing for longer does not hear actors either: their silence does not count."""


class FrontHandler:
    """Answers the front.

    Args:
        context: of the shard.
        actors, learner: its handlers; what the front passes on is handled as if it came from the sender itself.
        stopping: set when the front says that the run is over.
    """

    def __init__(
        self, context: HandlerContext, actors: ActorHandler, learner: LearnerHandler, *, stopping: asyncio.Event
    ) -> None:
        assert isinstance(context.state.batch_server, PartServer)
        self._context = context
        self._state, self._journal, self._changes = context.state, context.journal, context.changes
        self._parts = context.state.batch_server
        self._actors, self._learner = actors, learner
        self._stopping = stopping
        self.turns_endpoint = ""
        self._looked = context.clock()
        self._front = 0
        """The front that prepared a batch last."""

    @property
    def front_away_s(self) -> float:
        """Seconds since the front asked last, where that is long; 0 otherwise."""
        away = self._context.clock() - self._looked
        return away if away > AWAY_S else 0.0

    def handle(self, peer: str, message: Any, frames: Frames) -> Awaitable[m.Message | None] | None:
        """One message from the front.

        Raises:
            BadMessage: the message is refused.
        """
        match message:
            case f.ShardAsk():
                return self._answer(f.question_in(message))
            case Turn() | m.TreeOpened() | m.TreeClosed():
                held = self._state.ledger.held(message.tree_id)
                return self._actors.handle(peer if held is None else held.holder, message, frames)
            case m.ActorHello() | m.LeaseReturned() | m.ActorReport():
                return self._actors.handle(message.actor, message, frames)
        return self._learner.handle(peer, message)

    async def _answer(self, question: f.Question) -> m.Message:
        match question:
            case f.Look():
                return f.answered(await self._look(question))
            case f.Grant():
                return await self._grant(question)
            case f.GiveBack():
                if self._state.returned(question.actor, question.tree_ids):
                    self._changes.notify()
                return f.answered(f.Done())
            case f.Prepare():
                self._front = question.front
                ledger = self._state.ledger
                ledger.elsewhere = replace(ledger.elsewhere, ready=question.ready)
                ledger.limits.pace.taken(question.request.version, self._context.clock())
                part = self._described(self._parts.prepare(question.request))
                self._changes.notify()
                # Its numbers are those of when it is sent: meanwhile leases may be granted, and sent before it.
                return await self._settled(lambda: f.Prepared(state=self.state(), part=part))
            case f.Weigh():
                return f.answered(self._weigh(question))
            case f.TakePart() | f.UndoPart() if question.front != self._front:
                # Of a front that was replaced since, or such a one came in between: all of it is to be asked anew.
                return f.answered(f.Gone())
            case f.TakePart():
                taken = self._parts.take(question, self._context.clock())
                self._changes.notify()
                if taken is None:
                    return f.answered(f.Gone())
                made = self._parts.describe(taken)
                return await self._settled(lambda: made)
            case f.UndoPart():
                self._parts.undo_part(question.step, question.batch_id)
                self._changes.notify()
                return await self._settled(f.Done)
            case f.Fetch():
                return await self._fetch(question)
            case f.LookAtEvaluation():
                found = self._state.ledger.evaluations.find(question.step)
                entry = None if found is None else found.snapshot()
                return await self._settled(lambda: f.EvaluationPart(entry=entry))
            case f.LookAtActors():
                found_rows = actor_rows(self._state.ledger, self._context.clock())
                return f.answered(msgspec.convert({"rows": found_rows}, f.ActorRows))
            case f.End():
                self._stopping.set()
                return f.answered(f.Done())

    def state(self) -> f.ShardState:
        return state_of(
            self._state, changes=self._changes.count, failing=self._journal.failing,
            turns_endpoint=self.turns_endpoint, now=self._context.clock(),
        )  # fmt: skip

    async def _look(self, look: f.Look) -> f.ShardState:
        """Waits for: a change, at most ``wait_s``.  Unblocked by: trees, leases, evaluations, the learner."""
        now = self._context.clock()
        if away_s := self.front_away_s:
            self._state.ledger.excuse(away_s, now)
        self._looked = now
        for actor, silent_s in look.heard.items():
            self._state.ledger.actors.heard(actor, now - silent_s)
        await self._changes.until(lambda: self._changes.count != look.seen or None, timeout_s=look.wait_s)
        self._looked = self._context.clock()
        return self.state()

    async def _grant(self, grant: f.Grant) -> m.Message:
        self._state.ledger.elsewhere = Elsewhere(
            under_lease=grant.under_lease, ready=grant.ready, produced=grant.produced, blocked_by=grant.blocked_by
        )
        try:
            answer = self._actors.handle(grant.request.actor, grant.request, ())
            assert answer is not None
            return await answer
        finally:
            # Whatever came of it: the front waits for numbers that have it.
            self._changes.notify()

    def _described(self, served: ServedBatch | None) -> f.Part | None:
        return None if served is None else self._parts.describe(served)

    def _weigh(self, weigh: f.Weigh) -> f.Weighed:
        ready = self._parts.weigh(weigh.highest)
        return f.Weighed(
            entered=ready.entered.astype(np.int64).tobytes(), priority=ready.priority.astype(np.float64).tobytes(),
            oldest=ready.oldest.astype(np.int64).tobytes(), unserved=ready.unserved.tobytes(), version=ready.version,
        )  # fmt: skip

    async def _settled(self, answer: Callable[[], f.Answer]) -> m.Message:
        """The answer, made once all that was decided by now is on disk."""
        try:
            await self._journal.settle(at_once=True, timeout_s=SETTLE_WAIT_S)
        except TimeoutError:
            return f.answered(
                f.Unwritten(reason=f"{role_of(self._state.shard.index)}: {self._context.why_unwritten()}")
            )
        return f.answered(answer())

    async def _fetch(self, fetch: f.Fetch) -> m.Message:
        share = self._parts.fetch(fetch.step, fetch.batch_id, fetch.tree_ids)
        if share is None:
            raise BadMessage(f"batch {fetch.batch_id} of step {fetch.step} is not here any more")
        return share.batch(await self._journal.load(share.places))
