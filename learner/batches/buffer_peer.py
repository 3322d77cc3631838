"""A rank's requests to the buffer: how long it waits for an answer, and what each answer means."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from atpo_async.config import LinksConfig
from atpo_async.core.errors import PeerLost, SetupError
from atpo_async.links.client import Client
from atpo_async.status.waits import BoundedWait
from atpo_async.wire.messages import Batch, EvalQuery, Exhausted, LearnerToBuffer, NotYet, Refused, SampleRequest
from learner.ranks import Ranks, Wanted

T = TypeVar("T")

REQUEST_WAIT_S = 2.0
"""How long the buffer may hold a request before it answers "not yet"."""
REPEAT_S = 5.0
"""While waiting, the learner repeats its published version to the buffer, which may have been restarted."""


class BufferPeer:
    """One rank's requests to the buffer.

    Args:
        link: to the buffer.
        run: identity of the run.
        ranks: decides which share of a batch is requested.
        settings: deadlines.
        stopping: set when the role has to end; no wait outlasts it.
    """

    def __init__(
        self,
        link: Client,
        *,
        run: str,
        ranks: Ranks,
        settings: LinksConfig,
        stopping: asyncio.Event,
        log: logging.Logger,
    ) -> None:
        self.link = link
        self.run_id = run
        self.settings = settings
        self.stopping = stopping
        self.exhausted_because = ""
        """Why there is no further batch, once the buffer has reported that."""
        self._ranks = ranks
        self._log = log

    async def send(self, message: LearnerToBuffer) -> None:
        """Send a message.  Raises PeerLost when the buffer accepts nothing any more."""
        await self.link.send(message)

    async def next_batch(
        self,
        *,
        step: int,
        version: int,
        num_trees: int,
        is_saved: bool,
        repeat: Callable[[], Awaitable[None]],
        saving: Callable[[], str] = lambda: "",
    ) -> Batch | Wanted | None:
        """This rank's share of the next batch, or the buffer's other request; None when the role has to stop first.

        Waits for: enough fresh trees.  Unblocked by: the buffer's answer.

        Args:
            step: batches trained so far.
            version: of the weights now.
            num_trees: of a whole batch.
            is_saved: whether a checkpoint now would add nothing.
            repeat: sends again what a restarted buffer does not know.
            saving: why the checkpoint that the buffer wants is not durable yet; that is waited for as a full disk is.

        Raises:
            WaitTimeout: no batch, and no progress towards one for ``links.give_up_s``; names what is missing.
            SetupError: the buffer refuses this learner.
        """
        wait = self.bounded_wait(f"batch {step} ({num_trees} trees)")
        repeated_at_s = now_s()
        progress: int | None = None
        while not self.stopping.is_set():
            request = SampleRequest(
                run=self.run_id,
                rank=self._ranks.rank,
                num_ranks=self._ranks.num_ranks,
                step=step,
                version=version,
                num_trees=num_trees,
                wait_s=REQUEST_WAIT_S,
            )
            reply = await self.ask(request)
            if isinstance(reply, Batch):
                return reply
            if isinstance(reply, Exhausted):
                self.exhausted_because = reply.reason
                self._log.info("no further batch: %s", reply.reason)
                return Wanted.END
            if isinstance(reply, NotYet) and reply.checkpoint_wanted and not is_saved:
                return Wanted.CHECKPOINT
            if isinstance(reply, NotYet) and reply.progress != progress:
                progress = reply.progress
                wait.moved()
            if isinstance(reply, NotYet) and reply.checkpoint_wanted and (why := saving()):
                wait.moved()
                wait.again(f"a durable checkpoint: {why}")
            else:
                wait.again(reply.waiting_for if isinstance(reply, NotYet) else self.no_answer)
            if now_s() - repeated_at_s > REPEAT_S:
                repeated_at_s = now_s()
                await repeat()
        return None

    async def ask(self, request: SampleRequest | EvalQuery) -> Any:
        """The buffer's reply; None if it gave none in time, or the role has to stop.

        Raises:
            SetupError: the buffer refuses this learner; a refused ``EvalQuery`` is a reply.
        """
        try:
            reply = await self.unless_stopping(
                self.link.request(request, timeout_s=REQUEST_WAIT_S + self.settings.deadline_s)
            )
        except PeerLost as exc:
            self._log.warning("%s", exc)
            return None
        if isinstance(reply, Refused) and isinstance(request, SampleRequest):
            raise SetupError(f"the buffer at {self.link.endpoint} refuses the learner: {reply.reason}")
        return reply

    @property
    def no_answer(self) -> str:
        """The reason for a wait while the buffer is silent."""
        return f"no answer from {self.link.endpoint}"

    def bounded_wait(self, what: str) -> BoundedWait:
        """A wait for an answer of the buffer."""
        return BoundedWait("the learner", what, self.settings, now_s, log=self._log, on="buffer")

    async def unless_stopping(self, awaitable: Awaitable[T]) -> T | None:
        """The result of ``awaitable``; None, and it is cancelled, when the role has to stop first."""
        work = asyncio.ensure_future(awaitable)
        stop = asyncio.ensure_future(self.stopping.wait())
        try:
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            return await work if work.done() else None
        finally:
            for task in (work, stop):
                task.cancel()
            await asyncio.gather(work, stop, return_exceptions=True)


def now_s() -> float:
    """The running loop's clock, seconds, monotonic."""
    return asyncio.get_running_loop().time()
