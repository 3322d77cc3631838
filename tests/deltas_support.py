"""A learner's publisher and an actor's fetcher of another host, with what passes between them to be looked at."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import torch

from actors.weights.fetcher import WeightsFetcher
from atpo_async.config import LinksConfig, WeightsConfig
from atpo_async.core.vocabulary import Precision
from atpo_async.links.announcements import Listener
from atpo_async.links.client import Client
from atpo_async.wire.messages import ActorToLearner, LearnerToActor, ManifestRequest, WeightsAnnounced
from learner.weights.publisher import Publisher
from learner.weights.staging import Staged
from learner.weights.store import WeightsStore

LINKS = LinksConfig()
ANYWHERE = "tcp://127.0.0.1:0"
Alter = Callable[[ActorToLearner, LearnerToActor], LearnerToActor]


def settings_of(transport: str = "chunks", **more: object) -> WeightsConfig:
    fields = {"transport": transport, "chunk_bytes": 4096, "poll_s": 0.01, "shared_memory": False}
    return WeightsConfig.model_validate({**fields, **more})


def weights_of(version: int, *, size: int = 20_000) -> dict[str, torch.Tensor]:
    """Of a model that is trained: each version moves a hundredth of the weights, by little."""
    source = torch.Generator().manual_seed(0)
    found = torch.randn(size, generator=source) * 0.02
    for _ in range(version):
        found = found + 1e-4 * (torch.rand(size, generator=source) < 0.01)
    return {"a": found, "b": torch.full((7, 5), float(version)), "tied": found, "none": torch.zeros(0, 3)}


class Asking:
    """The actor's client; ``alter`` changes what the learner answers, ``asked`` has every request."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.asked: list[ActorToLearner] = []
        self.alter: Alter = lambda request, answer: answer

    @property
    def endpoint(self) -> str:
        return self._client.endpoint

    async def request(self, message: ActorToLearner, *, timeout_s: float) -> LearnerToActor:
        self.asked.append(message)
        return self.alter(message, await self._client.request(message, timeout_s=timeout_s))


class Ends:
    """Both ends.

    Args:
        precision: of the payload.
    """

    def __init__(
        self, publisher: Publisher, fetcher: WeightsFetcher, asking: Asking, precision: Precision = "float32"
    ) -> None:
        self.publisher = publisher
        self.fetcher = fetcher
        self.asking = asking
        self.precision = precision

    def publish(self, version: int, tensors: dict[str, torch.Tensor] | None = None) -> WeightsAnnounced:
        return self.publisher.store.add(
            version,
            Staged(weights_of(version) if tensors is None else tensors, self.precision),
            probe_tokens=np.zeros((1, 3), dtype=np.int32),
            probe_logprobs=np.zeros(2, dtype=np.float32),
        )

    async def made(self, version: int, base: int) -> None:
        """Waits for: the difference to a version, as an actor that has ``base`` asks for it."""
        await self.publisher.store.ready(ManifestRequest(run="run", version=version, base=base))

    async def take(self, announced: WeightsAnnounced, fetcher: WeightsFetcher | None = None) -> bytes | None:
        """The bytes that an engine would be given; None where the version is gone."""
        fetcher = fetcher or self.fetcher
        weights = await fetcher.fetch(announced)
        if weights is None:
            return None
        payload = await asyncio.to_thread(weights.path.read_bytes)
        fetcher.release(weights)
        return payload

    async def pass_on(self, version: int, tensors: dict[str, torch.Tensor] | None = None) -> bytes | None:
        return await self.take(self.publish(version, tensors))

    def counts(self) -> dict[str, float]:
        """Of the actor's differences, since they were last taken, without the seconds."""
        found = self.fetcher.take_counts()
        start = "weights/differences/"
        return {
            name.removeprefix(start): value
            for name, value in found.items()
            if name.startswith(start) and not name.endswith("_s")
        }


@contextlib.asynccontextmanager
async def ends(
    folder: Path,
    learners: WeightsConfig | None = None,
    actors: WeightsConfig | None = None,
    *,
    precision: Precision = "float32",
) -> AsyncIterator[Ends]:
    learners = learners or settings_of()
    store = WeightsStore(run="run", fallback=folder / "scratch", settings=learners)
    async with (
        Publisher(store, weights_endpoint=ANYWHERE, announce_endpoint=ANYWHERE, settings=LINKS) as publisher,
        connected(publisher, actors or learners) as (fetcher, asking),
    ):
        yield Ends(publisher, fetcher, asking, precision)


@contextlib.asynccontextmanager
async def connected(
    publisher: Publisher, settings: WeightsConfig, name: str = "actor"
) -> AsyncIterator[tuple[WeightsFetcher, Asking]]:
    """One more actor."""
    async with (
        Client(
            publisher.weights_endpoint, peer="learner", identity=name, receives=LearnerToActor, settings=LINKS
        ) as client,
        Listener(publisher.announce_endpoint, receives=LearnerToActor, settings=LINKS) as listener,
    ):
        asking = Asking(client)
        fetcher = WeightsFetcher(run="run", client=asking, listener=listener, settings=settings)  # type: ignore[arg-type]
        try:
            yield fetcher, asking
        finally:
            fetcher.close()
