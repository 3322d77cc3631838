"""A relay's loop: it joins a run, serves actors that join through it, and ends with the run.

Who waits for whom: an actor's turn waits for the buffer's acknowledgement, an actor's request for the buffer's answer;
the weights are fetched and served beside that.  A relay whose upstream falls silent goes past it where it knows what
lies beyond, and waits and connects again otherwise, for ``links.give_up_s``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from atpo_async.config import LinksConfig, WeightsConfig
from atpo_async.links import ports
from atpo_async.links.keys import UPSTREAM_KEY, load_public
from atpo_async.links.server import Server
from atpo_async.links.way import Way
from atpo_async.relay.passages import Own, Passages
from atpo_async.relay.uplink import Uplink
from atpo_async.relay.weights import RelayedWeights
from atpo_async.status import waits
from atpo_async.status.facts import publish_facts, withdraw_facts
from atpo_async.wire.messages import ActorToBuffer, Welcome

log = logging.getLogger("atpo.relay")

END_HEARD_S = 5.0
"""After the run's end: how long actors have to learn of it."""
TIDY_S = 1.0


class Relay:
    """One relay.  Use as an async context; ``serve`` runs until the run is over or ``stopping`` is set.

    Args:
        join: endpoint of the buffer's socket for actors, or of another relay's.
        name: what it calls itself; where there are no keys, the names of its actors begin with it.
        links: settings; ``host`` and the ports are where it listens.
        weights: settings.
        stopping: set to end early.
        folder: for the versions, as of ``RelayedVersions``.
        run: identity of the run; empty for whichever runs there.

    Raises:
        SetupError: it cannot listen there, or has not the keys for it.
    """

    def __init__(
        self,
        *,
        join: str,
        name: str,
        links: LinksConfig,
        weights: WeightsConfig,
        stopping: asyncio.Event,
        folder: Path | None = None,
        run: str = "",
    ) -> None:
        key = "" if links.keys_dir is None else load_public(links.keys_dir / f"{UPSTREAM_KEY}.key").decode()
        self._name, self._links, self._stopping = name, links, stopping
        self.weights = RelayedWeights(
            name, links=links, weights=weights, folder=folder, is_wanted=lambda: len(self.passages) > 0
        )
        self.uplink = Uplink(name, way=Way(join, key), run=run, settings=links, on_welcome=self._welcomed)
        self.passages = Passages(
            name, settings=links, beside=self.uplink.link, own=self._own, introduced=self.uplink.passed_on,
            is_relay=lambda peer: self.actors.is_relay(peer),
        )  # fmt: skip
        self.actors = Server(
            ports.to_bind(links, "actors"), name="relay", receives=ActorToBuffer, handler=self.passages.handle,
            settings=links, with_frames=True, setting="links.actors_port",
        )  # fmt: skip
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self.weights)
            await stack.enter_async_context(self.uplink.link)
            stack.push_async_callback(self.passages.close)
            await stack.enter_async_context(self.actors)
            publish_facts("relay", self.facts)
            stack.callback(withdraw_facts, "relay")
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def facts(self) -> dict[str, Any]:
        """For the relay's status."""
        versions = self.weights.versions
        newest = None if versions is None else versions.newest
        return {
            "run": self.uplink.run,
            "upstream": self.uplink.link.endpoint,
            "actors": [passage.peer for passage in self.passages],
            "version": -1 if newest is None else newest.version,
            "versions fetched": 0 if versions is None else versions.fetched,
            "does not fit": "no" if versions is None else versions.does_not_fit or "no",
        }

    async def serve(self) -> None:
        """Waits for: the run's end.  Unblocked by: the buffer saying so, once the actors know of it, or ``stopping``.

        Raises:
            SetupError: upstream refuses this relay for good.
            WaitTimeout, PeerLost: it was silent for ``links.give_up_s``.
        """
        async with asyncio.TaskGroup() as tasks:
            loops = [
                tasks.create_task(self.weights.follow(), name="weights"),
                tasks.create_task(self._look_after_peers(), name="peers"),
            ]
            stop = tasks.create_task(self._stopping.wait(), name="stopping")
            over = tasks.create_task(self._until_over(), name="the run's end")
            ends: set[asyncio.Future[Any]] = {stop, over, self.passages.failed}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in (*loops, stop, over):
                task.cancel()
            if self.passages.failed.done():
                self.passages.failed.result()
        log.info("relay ends: %s", "the run is over" if self.uplink.finished else "asked to stop")

    async def _until_over(self) -> None:
        """Waits for: the run's end, and for the actors to hear of it.  Unblocked by: the buffer; given up after
        ``END_HEARD_S``."""
        staying = asyncio.create_task(self.uplink.stay(), name="stay")
        try:
            while not (staying.done() or any(passage.finished for passage in self.passages)):
                await asyncio.wait({staying}, timeout=TIDY_S)
            if staying.done():
                staying.result()
        finally:
            staying.cancel()
        self.uplink.finished = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_HEARD_S):
                while any(not passage.finished and passage.is_alive for passage in self.passages):  # noqa: ASYNC110
                    await asyncio.sleep(self._links.heartbeat_s / 4)

    async def _look_after_peers(self) -> None:
        """Waits for: the clock."""
        while True:
            await asyncio.sleep(self._links.heartbeat_s)
            await self.passages.look_after(dict(self.actors.silences()))
            waits.progress("heartbeats")

    def _own(self) -> Own:
        return Own(self.weights.server.endpoint, self.weights.announcer.endpoint)

    def _welcomed(self, welcome: Welcome, server_key: str) -> None:
        self.weights.look_at(welcome.run, welcome.weights_endpoint, welcome.announce_endpoint, server_key)
