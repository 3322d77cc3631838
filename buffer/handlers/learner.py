"""Handles messages of the learner's ranks: batches, evaluations, confirmations; an answer is sent after its commit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from atpo_async.core.errors import BadMessage
from atpo_async.run.endpoints import Endpoints
from atpo_async.status import waits
from atpo_async.wire import joined as j
from atpo_async.wire import messages as m
from buffer.batches.served import Share
from buffer.handlers.context import HandlerContext
from buffer.handlers.joined import JoinedHandler
from buffer.handlers.pending_answers import PendingAnswer
from buffer.pool.checked import SamplerFault

log = logging.getLogger("atpo.buffer")


class LearnerHandler:
    """Answers the learner.

    Args:
        context: the buffer's.
        joined: answers a learner that joined by address.
        endpoints: where the learner publishes, for an evaluation that is requested before its publication was received.
        count_bad_frames: called before a batch is made, whose metrics have their number.
    """

    def __init__(
        self,
        context: HandlerContext,
        *,
        joined: JoinedHandler,
        endpoints: Endpoints,
        count_bad_frames: Callable[[], None],
    ) -> None:
        self._context = context
        self._joined = joined
        self._state, self._journal, self._changes = context.state, context.journal, context.changes
        self._endpoints = endpoints
        self._count_bad_frames = count_bad_frames
        self._batch_deferred = waits.DeferredAnswers("the request for a batch")
        self._evaluation_deferred = waits.DeferredAnswers("the question for an evaluation")
        self._pending: PendingAnswer[int] | None = None
        """Number of the batch that was made last, until it is committed and after."""

    def close(self) -> None:
        """Send no further answers."""
        if self._pending is not None:
            self._pending.drop()

    async def handle(self, peer: str, message: Any) -> m.Message | None:
        """One message from a learner's rank: the reply to a request, None for a send.

        Raises:
            BadMessage: the message is refused, or the sampler failed.
        """
        try:
            if isinstance(message, j.JoinedToBuffer):
                return await self._joined.handle(peer, message)
            self._context.check_run(message)
            return await self._for_learner(message)
        except SamplerFault as exc:
            log.error("batch refused: %s", exc)
            raise BadMessage(str(exc)) from exc
        except BadMessage as exc:
            self._context.note_refusal(peer, message, exc)
            raise

    async def _for_learner(self, message: Any) -> m.Message | None:
        match message:
            case m.SampleRequest():
                return await self._sample(message)
            case m.EvalQuery():
                return await self._eval_result(message)
            case m.Trained():
                self._state.trained(message)
            case m.Checkpointed():
                self._state.checkpointed(message)
                if message.where:
                    await self._joined.note_checkpoint(message)
            case m.VersionPublished():
                self._state.publish(message)
            case m.EvalRequest():
                self._state.evaluate(message)
            case m.RunFinished():
                self._state.finish()
        self._changes.notify()
        return None

    async def _sample(self, request: m.SampleRequest) -> m.Message:
        """Waits for: enough fresh trees with signal, at most ``wait_s``.  Unblocked by: actors closing trees."""
        if not 0 <= request.rank < request.num_ranks:
            raise BadMessage(f"rank {request.rank} of {request.num_ranks} does not exist")

        def made() -> Share | m.Exhausted | None:
            self._count_bad_frames()
            before = self._state.batches.next_id
            share = self._state.draw(request, self._context.clock())
            if self._state.batches.next_id != before:
                self._changes.notify()
            if share is None:
                ready = f"{len(self._state.pool)} of {request.num_trees} are ready"
                self._batch_deferred.goes_on(f"trees for batch {request.step} ({ready})", on="actors")
            return share

        share: Share | m.Exhausted | None = await self._changes.until(made, timeout_s=request.wait_s)
        if share is None:
            return m.NotYet(
                waiting_for=self._state.waiting_for(request, self._context.clock()),
                progress=self._state.counters.progress,
                checkpoint_wanted=self._state.checkpoint_wanted,
            )
        self._batch_deferred.over()
        waits.progress("batches")
        return await self._given(share)

    async def _given(self, share: Share | m.Exhausted) -> m.Message:
        """The answer, once committed: a buffer that starts after a kill must serve all ranks from the same batch."""
        number = -1 if isinstance(share, m.Exhausted) else share.head.batch_id
        pending = self._pending
        if pending is None or pending.answer != number:
            if pending is not None:
                pending.drop()
            pending = self._pending = PendingAnswer(number, self._journal.settle(at_once=True))
        records = [] if isinstance(share, m.Exhausted) else await self._journal.load(share.places)
        if not await pending.committed():
            return m.NotYet(waiting_for=self._context.why_unwritten(), progress=self._state.counters.progress)
        if isinstance(share, m.Exhausted):
            self._pending = None  # a repeated answer may depend on a newer state
            return share
        return share.batch(records)

    async def _eval_result(self, query: m.EvalQuery) -> m.EvalResult:
        """Waits for: the evaluation's last tree.  Unblocked by: actors closing trees, lost leases being given up.

        Raises:
            BadMessage: no such evaluation, so that the learner asks for it again after this buffer was restarted.
        """
        evaluation = self._state.ledger.evaluations.find(query.step)
        if evaluation is None:
            raise BadMessage(f"no evaluation of step {query.step} is known here; the buffer may have restarted")

        def done() -> m.EvalResult | None:
            result = self._state.eval_result(query.step)
            if result.done:
                self._evaluation_deferred.over()
                return result
            so_far = f"the {result.num_tasks} tasks of an evaluation ({result.num_done} done)"
            self._evaluation_deferred.goes_on(so_far, on="actors")
            return None

        result: m.EvalResult | None = await self._changes.until(done, timeout_s=query.wait_s)
        if result is None and self._state.ledger.progress.published is None:
            # The learner requested the evaluation after a publication that an earlier buffer received: without this the
            # evaluation would wait for trees, and the trees for a publication that comes after them.
            self._state.publish(
                m.VersionPublished(
                    run=self._context.run,
                    version=evaluation.version,
                    weights_endpoint=self._endpoints.weights,
                    announce_endpoint=self._endpoints.announce,
                )
            )
            self._changes.notify()
        result = result or self._state.eval_result(query.step)
        if result.done:
            await self._journal.settle()
        return result
