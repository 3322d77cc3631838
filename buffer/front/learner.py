"""Answers the learner at the front: batches and evaluations of all shards; what it confirms goes to each of them."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from atpo_async.core.errors import BadMessage, PeerLost
from atpo_async.links.parcels import Parcel
from atpo_async.run.endpoints import Endpoints
from atpo_async.status import waits
from atpo_async.wire import joined as j
from atpo_async.wire import messages as m
from buffer.front import messages as f
from buffer.front.batches import FrontBatches
from buffer.front.context import FrontContext
from buffer.front.evaluations import FrontEvaluations
from buffer.handlers.joined import JoinedHandler
from buffer.pool.checked import SamplerFault

log = logging.getLogger("atpo.buffer")

AWAY_PAUSE_S = 0.2
"""After a shard that was away, before the learner is told so."""


class FrontLearner:
    """Answers the learner.

    Args:
        context: of the front.
        batches, evaluations: of all shards.
        joined: answers a learner that joined by address.
        endpoints: where the learner publishes, for an evaluation that is requested before its publication was received.
    """

    def __init__(
        self,
        context: FrontContext,
        batches: FrontBatches,
        evaluations: FrontEvaluations,
        *,
        joined: JoinedHandler,
        endpoints: Endpoints,
    ) -> None:
        self._context = context
        self._joined = joined
        self._shards, self._changes = context.shards, context.changes
        self._batches, self._evaluations = batches, evaluations
        self._endpoints = endpoints
        self._batch_deferred = waits.DeferredAnswers("the request for a batch")
        self._evaluation_deferred = waits.DeferredAnswers("the question for an evaluation")

    async def handle(self, peer: str, message: Any) -> m.Message | Parcel | None:
        """One message from a learner's rank: the reply to a request; of a send what has to arrive at the shards.

        Raises:
            BadMessage: the message is refused, or the sampler failed.
        """
        try:
            if isinstance(message, j.JoinedToBuffer):
                return await self._joined.handle(peer, message)
            self._context.check_run(message)
            match message:
                case m.SampleRequest():
                    return await self._sample(message)
                case m.EvalQuery():
                    return await self._eval_result(message)
            parcel = await self._shards.send_all(message)
            if isinstance(message, m.Checkpointed) and message.where:
                await self._joined.note_checkpoint(message)
            if isinstance(message, m.RunFinished):
                self._context.finished = True
            self._changes.notify()
            return parcel
        except SamplerFault as exc:
            log.error("batch refused: %s", exc)
            raise BadMessage(str(exc)) from exc
        except BadMessage as exc:
            self._context.note_refusal(peer, type(message).__name__, exc)
            raise

    # --- batches -----------------------------------------------------------------------------------------------

    async def _sample(self, request: m.SampleRequest) -> m.Message:
        """Waits for: enough fresh trees with signal in all shards, at most ``wait_s``.  Unblocked by: actors closing
        trees."""
        if not 0 <= request.rank < request.num_ranks:
            raise BadMessage(f"rank {request.rank} of {request.num_ranks} does not exist")
        loop = asyncio.get_running_loop()
        ends = loop.time() + request.wait_s
        while True:
            try:
                share = await self._batches.share(request)
            except (PeerLost, f.ShardAway) as exc:
                self._batch_deferred.goes_on(str(exc), on=self._shards.missing or waits.DISK)
                await asyncio.sleep(min(AWAY_PAUSE_S, request.wait_s))
                return self._not_yet(str(exc))
            if share is not None:
                self._batch_deferred.over()
                waits.progress("batches")
                return share
            ready = f"{self._shards.total('ready')} of {request.num_trees} are ready"
            self._batch_deferred.goes_on(f"trees for batch {request.step} ({ready})", on="actors")
            left = ends - loop.time()
            if left <= 0 or not await self._changes.until(
                lambda: self._batches.is_enough(request) or None, timeout_s=left
            ):
                return self._not_yet(self._waiting_for(request))

    def _not_yet(self, waiting_for: str) -> m.NotYet:
        states = self._shards.states
        return m.NotYet(
            waiting_for=waiting_for,
            progress=sum(state.progress for state in states),
            checkpoint_wanted=any(state.checkpoint_wanted for state in states),
        )

    def _waiting_for(self, request: m.SampleRequest) -> str:
        """Why no batch can be served yet, for the log."""
        shards, states = self._shards, self._shards.states
        turns = [state.last_turn_s for state in states if state.last_turn_s is not None]
        last = f"last turn {min(turns):.1f} s ago" if turns else "no turn yet"
        each = "; ".join(f"{link.name}: {link.state.drops}" for link in shards if link.state is not None)
        published = max((state.published for state in states if state.published is not None), default=None)
        return (
            f"trees: {shards.total('ready')} of {request.num_trees} ready, {shards.total('under_lease')} under lease "
            f"({each}); {last}; published version {published}, asked for at {request.version}"
        )

    # --- evaluations -------------------------------------------------------------------------------------------

    async def _eval_result(self, query: m.EvalQuery) -> m.EvalResult:
        """Waits for: the evaluation's last tree in any shard.  Unblocked by: actors closing trees, lost leases being
        given up.

        Raises:
            BadMessage: a shard knows no such evaluation, so that the learner asks for it again.
        """
        done: bool | None = await self._changes.until(
            lambda: self._evaluations.is_done(query.step) or None, timeout_s=query.wait_s
        )
        try:
            found = await self._evaluations.find(query.step)
        except (PeerLost, f.ShardAway) as exc:
            self._evaluation_deferred.goes_on(str(exc), on=self._shards.missing or waits.DISK)
            return m.EvalResult(step=query.step, done=False, success=None, num_done=0, num_tasks=1)
        if found is None:
            raise BadMessage(f"no evaluation of step {query.step} is known here; the buffer may have restarted")
        result = found.result()
        if result.done:
            self._evaluation_deferred.over()
            return result
        so_far = f"the {result.num_tasks} tasks of an evaluation ({result.num_done} done)"
        self._evaluation_deferred.goes_on(so_far, on="actors")
        if not done and all(state.published is None for state in self._shards.states):
            # The learner requested the evaluation after a publication that an earlier buffer received: without this the
            # evaluation would wait for trees, and the trees for a publication that comes after them.
            await self._shards.send_all(
                m.VersionPublished(
                    run=self._context.run,
                    version=found.version,
                    weights_endpoint=self._endpoints.weights,
                    announce_endpoint=self._endpoints.announce,
                )
            )
        return result
