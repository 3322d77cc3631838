"""A buffer of several shards in one process: the front and the shards at real sockets, an actor and a learner."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from atpo_async.config import Config
from atpo_async.core.naming.shards import Shard, shard_of
from atpo_async.links.client import Client
from atpo_async.wire.messages import BufferToActor, BufferToLearner, Leases
from buffer.front.service import FrontService
from buffer.service import BufferService
from tests.buffer_peers_support import LOOPBACK, SOON_S, configured, published, wants
from tests.waiting_support import until


def sharded(count: int = 2, **sections: Any) -> Config:
    sections["buffer"] = {"shards": count} | sections.get("buffer", {})
    sections["links"] = {"heartbeat_s": 0.2} | sections.get("links", {})
    return configured(**sections)


class Cluster:
    """The parts of one buffer, each of which can be ended as by a kill and started again.

    Args:
        config: the run's.
        folder: of the journals.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self._folder = config, folder
        self.shards: dict[int, BufferService] = {}
        self._stacks: dict[str, contextlib.AsyncExitStack] = {}
        self.front: FrontService
        self._where: dict[int, str] = {}
        self._at = LOOPBACK

    async def start_shard(self, index: int) -> None:
        service = BufferService(
            self.config, run="r", endpoints=LOOPBACK, rundir=None, stopping=asyncio.Event(),
            journal=self._folder / f"{index}", shard=Shard(index, self.config.buffer.shards),
        )  # fmt: skip
        await self._start(f"shard {index}", service)
        self.shards[index] = service
        self._where[index] = service.learner.endpoint

    async def start_front(self) -> None:
        self.front = FrontService(
            self.config, run="r", endpoints=LOOPBACK, rundir=None, stopping=asyncio.Event(),
            locate=lambda index: self._where.get(index, ""),
        )  # fmt: skip
        await self._start("front", self.front)

    async def _start(self, name: str, service: BufferService | FrontService) -> None:
        stack = contextlib.AsyncExitStack()
        await stack.enter_async_context(service)
        serving = asyncio.create_task(service.serve(), name=name)

        async def end() -> None:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

        stack.push_async_callback(end)
        self._stacks[name] = stack

    async def end(self, name: str) -> None:
        await self._stacks.pop(name).aclose()

    async def end_all(self) -> None:
        for name in reversed(list(self._stacks)):
            await self.end(name)

    async def heard(self) -> None:
        """Wait until the front knows all shards."""
        await until(lambda: not self.front.shards.missing and len(self.front.shards.states) == len(self.shards))


class ShardPeers:
    """A running cluster with an actor and a learner at its front."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.refusals: list[str] = []
        self.actor = self._link(cluster.front.actors.endpoint, "a", BufferToActor)
        self.actor.on_refused = lambda message, reason: self.refusals.append(reason)
        self.learner = self._link(cluster.front.learner.endpoint, "l", BufferToLearner)

    def _link(self, endpoint: str, identity: str, receives: Any) -> Client:
        return Client(
            endpoint, peer="buffer", identity=identity, receives=receives, settings=self.cluster.config.links,
            locate=lambda: self.endpoint_of(identity),
        )  # fmt: skip

    def endpoint_of(self, identity: str) -> str:
        """Where the front takes them now; a new one listens elsewhere."""
        front = self.cluster.front
        return front.learner.endpoint if identity == "l" else front.actors.endpoint

    def another(self, identity: str) -> Client:
        """A further peer at the front's socket for actors."""
        return self._link(self.cluster.front.actors.endpoint, identity, BufferToActor)

    async def leases(self, count: int) -> Leases:
        """As many leases, over as many requests as it takes."""
        answer = await self.actor.request(wants(count), timeout_s=SOON_S)
        assert isinstance(answer, Leases)
        found = answer
        while len(found.leases) < count and answer.leases:
            answer = await self.actor.request(wants(count - len(found.leases)), timeout_s=SOON_S)
            assert isinstance(answer, Leases)
            found = Leases(
                leases=(*found.leases, *answer.leases), closed_because=answer.closed_because, retry_after_s=0.0,
                finished=False, shards=answer.shards,
            )  # fmt: skip
        return found

    async def send(self, *messages: Any) -> None:
        for message in messages:
            await self.actor.send(message)
        await self.actor.drain(timeout_s=SOON_S)

    async def tell(self, *messages: Any) -> None:
        for message in messages:
            await self.learner.send(message)
        await self.learner.drain(timeout_s=SOON_S)


@contextlib.asynccontextmanager
async def cluster_of(config: Config, folder: Path) -> AsyncIterator[ShardPeers]:
    """All parts running, and the learner's first version published."""
    cluster = Cluster(config, folder)
    try:
        for index in range(config.buffer.shards):
            await cluster.start_shard(index)
        await cluster.start_front()
        await cluster.heard()
        peers = ShardPeers(cluster)
        async with peers.actor, peers.learner:
            await peers.tell(published())
            await until(lambda: all(state.published == 0 for state in cluster.front.shards.states))
            yield peers
    finally:
        await cluster.end_all()


def by_shard(leases: Leases) -> dict[int | None, list[int]]:
    """Shard -> its leased tasks."""
    found: dict[int | None, list[int]] = {}
    for lease in leases.leases:
        found.setdefault(shard_of(lease.tree_id), []).append(lease.task_index)
    return found
