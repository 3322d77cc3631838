"""Leases of trees: asking the buffer for them, waiting until it admits some, and giving back what is not grown.

Every answer also contains the learner's address: an actor that uses another one finds out here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from atpo_async.config import Config
from atpo_async.core.errors import AtpoError, PeerLost
from atpo_async.links.addresses import seen_from
from atpo_async.links.client import Client
from atpo_async.status import waits
from atpo_async.status.waits import BoundedWait
from atpo_async.wire.messages import LeaseRequest, LeaseReturned, Leases, Refused

log = logging.getLogger("atpo.actor")

RETURN_TIMEOUT_S = 2.0
"""How long a stopping actor waits for the buffer to take its leases back."""


class LearnerMoved(AtpoError):
    """The learner was restarted at another address."""

    def __init__(self, text: str, *, weights_endpoint: str, announce_endpoint: str) -> None:
        super().__init__(text)
        self.weights_endpoint = weights_endpoint
        self.announce_endpoint = announce_endpoint


class LeaseSource:
    """The source of one actor's leases.

    Args:
        run, name: of the run and of this actor.
        config: the run's configuration.
        buffer: link to the buffer.
        learner: where this actor looks for the learner's weights.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        run: str,
        name: str,
        config: Config,
        buffer: Client,
        learner: Callable[[], str],
        clock: Callable[[], float],
    ) -> None:
        self._run, self._name, self._config = run, name, config
        self._buffer, self._learner = buffer, learner
        self._clock = clock
        self._no_lease: BoundedWait | None = None
        self._closed_because: str | None = None

    async def ask(self, count: int, *, version: int) -> Leases:
        """One answer from the buffer; waits up to ``links.give_up_s`` while the buffer is away.

        Args:
            count: of leases; 0 to learn only the state of the run.
            version: that this actor generates with.

        Raises:
            PeerLost: the buffer refuses, or is away for too long.
            LearnerMoved: the buffer knows the learner at another address than this actor does.
        """
        began = self._clock()
        while True:
            request = LeaseRequest(run=self._run, actor=self._name, count=count, version=version)
            try:
                with waits.waiting(f"actor {self._name}", f"an answer about {count} leases", on="buffer"):
                    answer = await self._buffer.request(request, timeout_s=self._config.links.deadline_s)
            except PeerLost as exc:
                if self._clock() - began > self._config.links.give_up_s:
                    raise
                log.warning("actor %s waits for the buffer to grant leases: %s", self._name, exc)
                continue
            if isinstance(answer, Leases):
                self._check_where_the_learner_is(answer)
                return answer
            if isinstance(answer, Refused):
                raise PeerLost(f"the buffer refuses leases to actor {self._name}: {answer.reason}")
            raise PeerLost(f"the buffer answered a lease request with {type(answer).__name__}")

    async def until_admitted(self, answer: Leases, *, idle: bool) -> None:
        """Called when ``answer`` brought fewer leases than were asked for.

        Waits for: the buffer to admit trees.  Unblocked by: the time it names; an actor that grows nothing (``idle``)
        gives up after ``links.give_up_s``.
        """
        if answer.leases or not idle:
            self._no_lease = None
        else:
            self._no_lease = self._no_lease or BoundedWait(
                f"actor {self._name}", "a lease", self._config.links, self._clock, log=log, on="buffer"
            )
            if answer.closed_because != self._closed_because:
                self._no_lease.moved()  # the buffer waits for something else than before: the run goes on
            self._closed_because = answer.closed_because
            self._no_lease.again(answer.closed_because or "the buffer does not say why")
        await asyncio.sleep(answer.retry_after_s)

    async def give_back(self, tree_ids: tuple[str, ...], *, within_s: float = RETURN_TIMEOUT_S) -> None:
        """Hand leases back at the end, so that others need not wait for them to expire, once all turns are in.

        The buffer learns from it, also where there are none, that this actor asks for no more.
        """
        with contextlib.suppress(PeerLost, TimeoutError):
            async with asyncio.timeout(within_s):
                await self._buffer.send(LeaseReturned(run=self._run, actor=self._name, tree_ids=tree_ids))
                await self._buffer.drain(timeout_s=within_s)

    async def give_up(self, tree_id: str, reason: str) -> None:
        """Hand one lease back because the tree cannot become complete."""
        await self._buffer.send(LeaseReturned(run=self._run, actor=self._name, tree_ids=(tree_id,), reason=reason))

    def _check_where_the_learner_is(self, answer: Leases) -> None:
        if not answer.weights_endpoint or answer.finished:
            return
        said = seen_from(self._buffer.endpoint, answer.weights_endpoint)
        if said != self._learner():
            raise LearnerMoved(
                f"the learner is at {said} now, no longer at {self._learner()}",
                weights_endpoint=said,
                announce_endpoint=seen_from(self._buffer.endpoint, answer.announce_endpoint),
            )
