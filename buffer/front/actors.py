"""Answers actors at the front: they join, lease trees and report here; messages of trees are passed on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Coroutine
from typing import Any

import msgspec

from atpo_async.core.errors import AtpoError, BadMessage, PeerLost
from atpo_async.core.naming.shards import shard_of
from atpo_async.links.parcels import Parcel
from atpo_async.status import waits
from atpo_async.wire import messages as m
from buffer.front import messages as f
from buffer.front.context import FrontContext
from buffer.front.leasing.admission import FrontAdmission
from buffer.front.leasing.queue import FrontQueue
from buffer.front.passing import Frames, Passed
from buffer.front.shards import Parcels, ShardLink
from buffer.handlers.actors import FIRST_GRANT, why_refused
from buffer.handlers.relayed import RelayedPeers
from buffer.state import RETRY_S

log = logging.getLogger("atpo.buffer")

HELLO_S = 3.0
"""An actor that joins waits this long for the shards, and is then told to ask again."""
GRANT_S = 10.0
"""A shard that has not granted leases by then is taken to be away; what it grants later is returned to it."""
LATE_S = 0.5
"""When one shard has granted leases, the others have this long to be in the same answer."""


class FrontActors:
    """Answers actors.

    Args:
        context: of the front.
    """

    def __init__(self, context: FrontContext) -> None:
        config = context.config
        self._context = context
        self._shards = context.shards
        self._admission = FrontAdmission(config.staleness, context.shards, max_tasks=config.run.max_tasks)
        self._queue = FrontQueue(self._granted, most_wait_s=config.links.deadline_s / 4)
        context.changes.on_change = lambda freed: self._queue.changed()
        self._deferred = waits.DeferredAnswers("requests for leases")
        self._knows_the_end: set[str] = set()
        self._leased: bool | None = None
        self._leased_training = False
        """Whether there were leases before; not known before the shards were heard."""
        self.relayed = RelayedPeers(context)
        self._late: set[asyncio.Task[Any]] = set()

    def knows_the_end(self, actor: str) -> bool:
        """Whether an actor was sent the end of the run."""
        return actor in self._knows_the_end

    def close(self) -> None:
        """Send no further answers."""
        self._queue.close()
        for task in self._late:
            task.cancel()

    async def handle(self, peer: str, message: Any, frames: Frames) -> m.Message | Parcel | None:
        """One message from an actor: the reply to a request; of a send what has to arrive at the shards.

        Raises:
            BadMessage: the message is refused.
        """
        try:
            if refusal := self.relayed.refusal(peer, message):
                raise BadMessage(refusal)
            match message:
                case m.ActorHello():
                    return await self._welcome(peer, message)
                case m.RelayHello():
                    return self._welcome_relay(peer, message)
            self._context.check_run(message)
            match message:
                case Passed():
                    waits.progress("messages")
                    return await self._shards.pass_on(shard_of(message.tree_id) or 0, message, frames)
                case m.LeaseRequest():
                    return await self._lease(peer, message)
                case m.ActorReport():
                    context = self._context
                    context.metrics.report(peer, context.step, message.version, message.metrics)
                    return await self._shards.send_all(msgspec.structs.replace(message, actor=peer))
                case m.LeaseReturned():
                    if not message.reason:
                        # It stops to grow trees: whatever was granted to a request that waits would reach it in vain.
                        self._queue.drop(peer)
                    return await self._give_back(peer, message.tree_ids, message.reason, all_hear=not message.reason)
        except BadMessage as exc:
            self._context.note_refusal(peer, getattr(message, "type", type(message).__name__), exc)
            raise
        return None

    def _welcome_relay(self, peer: str, hello: m.RelayHello) -> m.Message:
        if refusal := self.relayed.hello(peer, hello, self._context.clock()):
            return m.Refused(reason=refusal)
        if self._context.finished:
            self._knows_the_end.add(peer)
            self._context.changes.notify()
        return self._welcome_of(peer)

    def _welcome_of(self, peer: str) -> m.Welcome:
        known = self._none("")
        return m.Welcome(
            run=self._context.run,
            weights_endpoint=known.weights_endpoint,
            announce_endpoint=known.announce_endpoint,
            name=peer,
            ticket=self.relayed.ticket(peer),
            finished=self._context.finished,
        )

    async def _welcome(self, peer: str, hello: m.ActorHello) -> m.Message:
        """Waits for: every shard to know of it.  Unblocked by: their answers, ``HELLO_S``."""
        if (refused := why_refused(self._context.config, self._context.run, peer, hello)) is not None:
            return refused
        if hello.continues and not self.relayed.is_right(hello.continues, hello.ticket):
            return m.Refused(reason=f"{peer} cannot go on as {hello.continues}: its ticket is not that of this name")
        self.relayed.moves += bool(hello.continues) and hello.continues != peer
        if hello.continues != peer:
            # What is granted to a request that waits would reach the process before, or a name that none has any more.
            self._queue.drop(hello.continues or peer)
        later = m.Welcome(run=self._context.run, weights_endpoint="", announce_endpoint="")
        to_shards = msgspec.structs.replace(hello, actor=peer)
        asked = (link.client.request(to_shards, timeout_s=HELLO_S) for link in self._shards)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, PeerLost):
                return later
            if isinstance(answer, BaseException):
                raise answer
            if isinstance(answer, m.Refused):
                return answer
        known = [each for each in answers if isinstance(each, m.Welcome) and each.weights_endpoint]
        welcome = self._welcome_of(peer)
        if not known:
            return welcome
        return msgspec.structs.replace(
            welcome, weights_endpoint=known[0].weights_endpoint, announce_endpoint=known[0].announce_endpoint
        )

    # --- leases ------------------------------------------------------------------------------------------------

    async def _lease(self, peer: str, request: m.LeaseRequest) -> m.Leases:
        """Waits for: admission, then the shards' commits.  Unblocked by: a batch taken, a version published, an
        evaluation, a lost lease; the disk."""
        leases = self._none("") if not request.count else await self._queue.answer(peer, request)
        if not self.relayed.depth(peer):  # a relay's actor may not reach what the relay does
            leases = msgspec.structs.replace(leases, shards=self._addresses())
        if leases.finished:
            self._knows_the_end.add(peer)
            self._context.changes.notify()
        elif leases.leases:
            self._deferred.over()
            self._note_first(leases)
        elif request.count:
            why = leases.closed_because or "all tasks of an evaluation are under way"
            self._deferred.goes_on(f"another lease to become possible ({why})", on=self._waited_for())
        return leases

    def _waited_for(self) -> str:
        """The role that admission waits for, for the status of the buffer."""
        if missing := self._shards.missing:
            return missing
        if any(state.failing is not None for state in self._shards.states):
            return waits.DISK
        return "actors" if any(state.blocked_by is not None for state in self._shards.states) else "learner"

    def _none(self, why: str) -> m.Leases:
        finished = self._context.finished
        none = m.Leases(
            leases=(),
            closed_because="the run is over" if finished else why or None,
            retry_after_s=RETRY_S,
            finished=finished,
        )
        return self._with_addresses(none)

    def _with_addresses(self, leases: m.Leases) -> m.Leases:
        """The same with where the learner is."""
        state = next((state for state in self._shards.states if state.weights_endpoint), None)
        return msgspec.structs.replace(
            leases,
            weights_endpoint="" if state is None else state.weights_endpoint,
            announce_endpoint="" if state is None else state.announce_endpoint,
        )

    def _addresses(self) -> tuple[str, ...]:
        """Where the shards take turns."""
        return tuple("" if link.state is None else link.state.turns_endpoint for link in self._shards)

    def _granted(self, peer: str, request: m.LeaseRequest) -> m.Leases | Awaitable[m.Leases]:
        """The leases of a request, where a shard may give some; why not, where none may."""
        if self._context.finished:
            return self._none("")
        plan, why = self._admission.plan(request.count)
        if plan and self._leased is None:
            self._leased = any(state.leased_before for state in self._shards.states)
            self._leased_training = any(state.next_task >= len(self._shards) for state in self._shards.states)
        return self._ask(peer, request, plan, why) if plan else self._none(why or "")

    def _ask(self, peer: str, request: m.LeaseRequest, plan: dict[int, int], why: str | None) -> Awaitable[m.Leases]:
        """Ask the shards of a plan at once; counted from now on, whenever they answer."""
        tasks: dict[asyncio.Task[m.Leases], int] = {}
        for index, count in plan.items():
            link = self._shards.links[index]
            question = self._admission.grant(link, msgspec.structs.replace(request, actor=peer, count=count))
            link.asking += count
            task = asyncio.create_task(self._ask_one(link, question, count), name=f"leases of {link.name}")
            tasks[task] = index
        return self._together(peer, tasks, why)

    async def _ask_one(self, link: ShardLink, question: f.Grant, count: int) -> m.Leases:
        granted = 0
        try:
            answer = await link.client.request(f.asked(question), timeout_s=GRANT_S)
            if not isinstance(answer, m.Leases):
                return self._none(getattr(answer, "reason", f"{link.name} answers with {type(answer).__name__}"))
            granted = sum(lease.kind == "train" for lease in answer.leases)
            return answer
        except AtpoError as exc:
            return self._none(str(exc))
        finally:
            link.asking -= count
            link.granted += granted

    async def _together(self, peer: str, late: dict[asyncio.Task[m.Leases], int], why: str | None) -> m.Leases:
        """The leases of all shards that were asked, given with the index of each.

        Waits for: the shards that were asked; once one has granted leases, ``LATE_S`` for the others."""
        tasks = list(late)
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        while pending:
            some = any(task.result().leases for task in done)
            more, pending = await asyncio.wait(
                pending, timeout=LATE_S if some else None, return_when=asyncio.FIRST_COMPLETED
            )
            done |= more
            if some and not more:
                break
        for task, index in late.items():
            if task in pending:
                self._keep(self._return_late(peer, self._shards.links[index], task))
        found = [task.result() for task in tasks if task in done]
        leases = tuple(lease for each in found for lease in each.leases)
        reasons = [why, *(each.closed_because for each in found)]
        closed = next((reason for reason in reasons if reason is not None), None)
        return msgspec.structs.replace(self._none(closed or ""), leases=leases)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name="late leases")
        self._late.add(task)
        task.add_done_callback(self._late.discard)

    async def _return_late(self, peer: str, link: ShardLink, task: asyncio.Task[m.Leases]) -> None:
        """What a shard grants after its answer was given up goes back to it.  Waits for: the shard's answer."""
        if tree_ids := tuple(lease.tree_id for lease in (await task).leases):
            with contextlib.suppress(AtpoError):  # the actor does not report them: they are free then
                await link.ask(f.GiveBack(actor=peer, tree_ids=tree_ids), f.Done, timeout_s=GRANT_S)

    async def _give_back(self, peer: str, tree_ids: tuple[str, ...], reason: str, *, all_hear: bool = False) -> Parcel:
        together = Parcels()
        for link in self._shards:
            own = tuple(tree_id for tree_id in tree_ids if shard_of(tree_id) == link.index)
            if own or all_hear:
                returned = m.LeaseReturned(run=self._context.run, actor=peer, tree_ids=own, reason=reason)
                await link.send(returned, together.another())
        return together.whole()

    def _note_first(self, leases: m.Leases) -> None:
        """Before the first lease is sent: from here on an empty journal is not a new one."""
        context = self._context
        if not self._leased:
            self._leased = True
            context.metrics.write(context.step, context.version, {FIRST_GRANT: time.time()})
        if not self._leased_training and any(lease.kind == "train" for lease in leases.leases):
            self._leased_training = True
            context.metrics.write(context.step, context.version, {"time/first_lease": time.time()})
