"""The sockets of the weights: announces new versions to actors, and answers their requests from the store."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Self

from atpo_async.config import LinksConfig
from atpo_async.links.addresses import port_of
from atpo_async.links.announcements import Announcer
from atpo_async.links.server import Server
from atpo_async.run.endpoints import Endpoints
from atpo_async.wire.messages import ActorToLearner, LearnerToActor, WeightsAnnounced
from learner.weights.store import WeightsStore


class Publisher:
    """The store behind its two sockets.  ``async with``: listening from the start, files removed at the end.

    Requests are answered on the event loop while training runs in a thread of its own, so neither waits for the other.

    Args:
        weights_endpoint, announce_endpoint: to bind; port 0 takes a free one, the one of ``former`` where that is free.
    """

    def __init__(
        self,
        store: WeightsStore,
        *,
        weights_endpoint: str,
        announce_endpoint: str,
        settings: LinksConfig,
        former: Endpoints | None = None,
    ) -> None:
        self.store = store
        former = former or Endpoints()
        self._server = Server(
            weights_endpoint,
            name="learner",
            receives=ActorToLearner,
            handler=self._handle,
            settings=settings,
            former_port=port_of(former.weights),
            setting="links.weights_port",
        )
        self._announcer = Announcer(
            announce_endpoint,
            settings=settings,
            former_port=port_of(former.announce),
            setting="links.announce_port",
        )
        self._stack = contextlib.AsyncExitStack()

    @property
    def weights_endpoint(self) -> str:
        return self._server.endpoint

    @property
    def counters(self) -> dict[str, float]:
        """The server's counters and the transport's."""
        return self._server.counters | self.store.counters

    @property
    def announce_endpoint(self) -> str:
        return self._announcer.endpoint

    async def __aenter__(self) -> Self:
        try:
            await self._stack.enter_async_context(self._server)
            await self._stack.enter_async_context(self._announcer)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()
        self.store.close()

    async def announce(self, announcement: WeightsAnnounced) -> None:
        """Announce a version to the actors that listen; others learn of it when they ask."""
        await self._announcer.publish(announcement)

    async def _handle(self, peer: str, request: ActorToLearner) -> LearnerToActor:
        await self.store.ready(request)
        return self.store.answer(request)
