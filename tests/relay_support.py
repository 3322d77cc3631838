"""A head with a buffer and a publisher of weights, relays, and actors behind them: real sockets in one process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.joining import Place, buffer_link, join, reachable
from actors.weights.fetcher import WeightsFetcher
from atpo_async.config import Config, build
from atpo_async.links.announcements import Listener
from atpo_async.links.client import Client, RoutedClient
from atpo_async.ops.role import RoleContext
from atpo_async.relay.relay import Relay
from atpo_async.run.endpoints import Endpoints
from atpo_async.wire import messages as m
from buffer.service import BufferService
from tests.buffer_peers_support import LOOPBACK
from tests.waiting_support import LIMIT_S, until, within

if TYPE_CHECKING:
    from learner.weights.publisher import Publisher

ANYWHERE = "tcp://127.0.0.1:0"
RUN = "r"
LINKS = {"heartbeat_s": 0.05, "deadline_s": 10.0, "give_up_s": 20.0}
WEIGHTS = {"transport": "chunks", "chunk_bytes": 4096, "poll_s": 0.02, "shared_memory": False}


def configured(**sections: Any) -> Config:
    return build(
        {
            "staleness": {"trees_per_batch": 8, "max_lag": 1},
            "search": {"initial_rollouts": 4, "rounds": 0},
            "actor": {"report_every_s": 0.1},
            **sections,
            "links": {**LINKS, **sections.get("links", {})},
            "weights": {**WEIGHTS, **sections.get("weights", {})},
        }
    )


class Head:
    """A buffer and a learner's weights."""

    def __init__(self, service: BufferService, publisher: Publisher, config: Config) -> None:
        self.service, self.publisher, self.config = service, publisher, config
        self.requests: list[m.ActorToLearner] = []
        """That came to the learner's weights port."""
        answered = publisher._handle

        async def noted(peer: str, request: m.ActorToLearner) -> m.LearnerToActor:
            self.requests.append(request)
            return await answered(peer, request)

        publisher._server._requests._handling._handler = noted

    @property
    def endpoint(self) -> str:
        return self.service.actors.endpoint

    @property
    def actors(self) -> set[str]:
        """Names of the peers that the buffer has."""
        return set(self.service.actors.peers)

    async def publish(self, version: int) -> m.WeightsAnnounced:
        from learner.weights.staging import Staged  # an actor of a test needs no torch
        from tests.deltas_support import weights_of

        announced = self.publisher.store.add(
            version,
            Staged(weights_of(version), "float32"),
            probe_tokens=np.zeros((1, 3), dtype=np.int32),
            probe_logprobs=np.zeros(2, dtype=np.float32),
        )
        await self.publisher.announce(announced)
        self.service.state.publish(
            m.VersionPublished(
                run=RUN, version=version, weights_endpoint=self.publisher.weights_endpoint,
                announce_endpoint=self.publisher.announce_endpoint,
            )
        )  # fmt: skip
        self.service._changes.notify()
        return announced

    def chunks(self, version: int) -> list[tuple[int, int]]:
        """(base, index) of the chunks of a version that were asked for."""
        return sorted(
            (each.base, each.index)
            for each in self.requests
            if isinstance(each, m.ChunkRequest) and each.version == version
        )

    def held_by(self, name: str) -> set[str]:
        """Trees that are leased to an actor."""
        return {held.tree_id for held in self.service.state.ledger.held_by(name)}


@contextlib.asynccontextmanager
async def head(folder: Path, **sections: Any) -> AsyncIterator[Head]:
    from learner.weights.publisher import Publisher
    from learner.weights.store import WeightsStore

    config = configured(**sections)
    folder.mkdir(exist_ok=True)  # noqa: ASYNC240  (once, before anything runs)
    store = WeightsStore(run=RUN, fallback=folder / "scratch", settings=config.weights)
    service = BufferService(
        config, run=RUN, endpoints=LOOPBACK, rundir=None, stopping=asyncio.Event(), journal=folder / "journal"
    )
    async with (
        Publisher(store, weights_endpoint=ANYWHERE, announce_endpoint=ANYWHERE, settings=config.links) as publisher,
        service,
    ):
        serving = asyncio.create_task(service.serve(), name="buffer under test")
        made = Head(service, publisher, config)
        await made.publish(0)
        try:
            yield made
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)


class Site:
    """A relay that serves, and can be ended as a kill ends it: at once."""

    def __init__(self, relay: Relay, serving: asyncio.Task[None]) -> None:
        self.relay, self.serving = relay, serving

    @property
    def endpoint(self) -> str:
        return self.relay.actors.endpoint

    async def kill(self) -> None:
        self.serving.cancel()
        await asyncio.gather(self.serving, return_exceptions=True)
        await self.relay.__aexit__(None, None, None)


@contextlib.asynccontextmanager
async def relay_to(
    where: str, name: str = "relay-1", *, folder: Path | None = None, joined: bool = True, run: str = "", port: int = 0,
    **sections: Any,
) -> AsyncIterator[Site]:  # fmt: skip
    config = configured(**{**sections, "links": {**sections.get("links", {}), "actors_port": port}})
    relay = Relay(
        join=where, name=name, links=config.links, weights=config.weights, stopping=asyncio.Event(), folder=folder,
        run=run,
    )  # fmt: skip
    await relay.__aenter__()
    serving = asyncio.create_task(relay.serve(), name=f"{name} under test")
    site = Site(relay, serving)
    try:
        if joined:
            await within(relay.uplink.joined.wait())
        yield site
    finally:
        await site.kill()


class Far:
    """An actor without an engine: its real link, its real place in the run, its real weights."""

    def __init__(self, link: RoutedClient, place: Place, fetcher: WeightsFetcher, client: Client) -> None:
        self.link, self.place, self.fetcher, self.client = link, place, fetcher, client
        self.refusals: list[str] = []
        link.on_refused = lambda message, reason: self.refusals.append(reason)

    @property
    def known_as(self) -> str:
        return self.place._known_as

    async def leases(self, count: int) -> tuple[m.Lease, ...]:
        found: list[m.Lease] = []
        while len(found) < count:
            request = m.LeaseRequest(run=RUN, actor="a", count=count - len(found), version=0)
            answer = await self.link.request(request, timeout_s=LIMIT_S)
            assert isinstance(answer, m.Leases)
            found += answer.leases
        return tuple(found)

    async def send(self, *messages: Any) -> None:
        for message in messages:
            await self.link.send(message)
        await self.link.drain(timeout_s=LIMIT_S)

    async def report(self, *leases: m.Lease) -> None:
        trees = tuple(lease.tree_id for lease in leases)
        await self.send(m.ActorReport(run=RUN, actor="a", version=0, tree_ids=trees, metrics={}))

    async def weights(self, version: int) -> bytes:
        """The bytes of a version, as soon as it is announced."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                announced = await self.fetcher.next()
                if announced is None or announced.version < version:
                    continue
                found = await self.fetcher.fetch(announced)
                if found is not None:
                    payload = await asyncio.to_thread(found.path.read_bytes)
                    self.fetcher.release(found)
                    return payload


@contextlib.asynccontextmanager
async def actor_at(where: str, name: str = "actor-0", **sections: Any) -> AsyncIterator[Far]:
    config = configured(**sections)
    ctx = RoleContext(
        config=config, run_id="", rundir=None, endpoints=Endpoints(actors=where), name=name, index=0,
        stopping=asyncio.Event(), log=logging.getLogger(name),
    )  # fmt: skip
    async with buffer_link(ctx) as link:
        found = await within(join(ctx, link))
        place, welcome = Place(ctx, link, found), reachable(found, link.endpoint)
        client = Client("", peer="learner", identity=name, receives=m.LearnerToActor, settings=config.links)
        listener = Listener("", receives=m.LearnerToActor, settings=config.links)

        def look_at(welcome: m.Welcome, server_key: str) -> None:
            client.move(welcome.weights_endpoint, server_key)
            listener.move(welcome.announce_endpoint, server_key)

        look_at(welcome, link.way.current.server_key)
        place.on_moved = look_at
        async with client, listener:
            fetcher = WeightsFetcher(run=RUN, client=client, listener=listener, settings=config.weights)
            try:
                yield Far(link, place, fetcher, client)
            finally:
                fetcher.close()


async def settles(head: Head) -> None:
    """Waits for: what the buffer has taken to be committed."""
    await within(head.service.journal.settle())


async def known_by(head: Head, name: str) -> None:
    await until(lambda: name in head.actors)
