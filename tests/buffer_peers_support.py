"""A running buffer with an actor and a learner at its sockets, and the messages that the two send."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from atpo_async.config import Config, build
from atpo_async.core.tree import Turn, VersionSpan
from atpo_async.links.client import Client
from atpo_async.run.endpoints import Endpoints
from atpo_async.wire.messages import (
    PROTOCOL,
    ActorHello,
    Batch,
    BufferToActor,
    BufferToLearner,
    Lease,
    LeaseRequest,
    Leases,
    SampleRequest,
    TreeClosed,
    TreeOpened,
    VersionPublished,
)
from buffer.service import BufferService
from buffer.state import BufferState
from buffer.trees.assembly import TreeMessage

LOOPBACK = Endpoints(actors="tcp://127.0.0.1:0", learner="tcp://127.0.0.1:0")
PROMPT = np.array([1, 2], dtype=np.int32)
SOON_S = 20.0
"""A deadline that only a hang reaches."""


def configured(**sections: Any) -> Config:
    sections.setdefault("staleness", {"trees_per_batch": 2, "max_lag": 1})
    sections.setdefault("search", {"initial_rollouts": 4, "rounds": 0})
    return build(sections)


def hello(config: Config, **changes: Any) -> ActorHello:
    fields: dict[str, Any] = {
        "protocol": PROTOCOL,
        "run": "r",
        "actor": "a",
        "environment": config.task_name,
        "search_leaves": config.search.max_leaves,
    }
    return ActorHello(**(fields | changes))


def published(version: int = 0) -> VersionPublished:
    return VersionPublished(run="r", version=version, weights_endpoint="tcp://w:1", announce_endpoint="tcp://n:1")


def ask(step: int = 0, version: int = 0, **changes: Any) -> SampleRequest:
    fields: dict[str, Any] = {"rank": 0, "num_ranks": 1, "num_trees": 2, "wait_s": SOON_S}
    return SampleRequest(run="r", step=step, version=version, **(fields | changes))


def wants(count: int, actor: str = "a") -> LeaseRequest:
    return LeaseRequest(run="r", actor=actor, count=count, version=0)


def leaf(lease: Lease, turn_id: int, reward: float, *, tokens: int = 3, version: int = 0, **changes: Any) -> Turn:
    fields: dict[str, Any] = {
        "parent_id": 0,
        "observation": np.zeros(0, dtype=np.int32),
        "action": np.arange(tokens, dtype=np.int32),
        "logprobs": np.full(tokens, -0.5, dtype=np.float32),
        "spans": (VersionSpan(version, 0, tokens),),
        "end": "done",
        "reward": reward,
        "success": reward > 0,
    }
    return Turn(
        run="r", tree_id=lease.tree_id, turn_id=turn_id, lease_epoch=lease.epoch, expansion_round=0, generate_s=0.0,
        environment_s=0.0, **(fields | changes),
    )  # fmt: skip


def inner(lease: Lease, turn_id: int, *, tokens: int = 3) -> Turn:
    return msgspec.structs.replace(leaf(lease, turn_id, 0.0, tokens=tokens), end="continue", reward=None, success=None)


def opened(lease: Lease) -> TreeOpened:
    return TreeOpened(run="r", tree_id=lease.tree_id, lease_epoch=lease.epoch, prompt=PROMPT)


def closed(lease: Lease, num_turns: int, failed: int = 0, why: str = "environment_failed") -> TreeClosed:
    failures = {why: failed} if failed else {}
    return TreeClosed(
        run="r", tree_id=lease.tree_id, lease_epoch=lease.epoch, num_turns=num_turns, failed_branches=failed,
        failures=failures,
    )  # fmt: skip


def grown(lease: Lease, rewards: Sequence[float] = (1.0, 0.0), /, **changes: Any) -> list[TreeMessage]:
    turns = [leaf(lease, i, reward, **changes) for i, reward in enumerate(rewards, start=1)]
    return [opened(lease), *turns, closed(lease, len(turns))]


class Peers:
    """A running buffer with one actor and one learner connected to it."""

    def __init__(self, service: BufferService, actor: Client, learner: Client, config: Config) -> None:
        self.service = service
        self.actor = actor
        self.learner = learner
        self.config = config
        self.refusals: list[str] = []
        actor.on_refused = lambda message, reason: self.refusals.append(reason)

    async def leases(self, count: int) -> tuple[Lease, ...]:
        answer = await self.actor.request(wants(count), timeout_s=SOON_S)
        assert isinstance(answer, Leases)
        return answer.leases

    async def send(self, *messages: Any) -> None:
        for message in messages:
            await self.actor.send(message)
        await self.actor.drain(timeout_s=SOON_S)

    async def tell(self, *messages: Any) -> None:
        for message in messages:
            await self.learner.send(message)
        await self.learner.drain(timeout_s=SOON_S)

    async def batch(self, request: SampleRequest) -> Batch:
        answer = await self.learner.request(request, timeout_s=SOON_S)
        assert isinstance(answer, Batch)
        return answer


@contextlib.asynccontextmanager
async def running(config: Config | None = None, **options: Any) -> AsyncIterator[Peers]:
    config = config or configured()
    settings = config.links
    options = {"endpoints": LOOPBACK, "rundir": None, "stopping": asyncio.Event()} | options
    service = BufferService(config, run="r", **options)
    async with service:
        serving = asyncio.create_task(service.serve(), name="buffer under test")
        actor = Client(
            service.actors.endpoint, peer="buffer", identity="a", receives=BufferToActor, settings=settings
        )  # fmt: skip
        learner = Client(
            service.learner.endpoint, peer="buffer", identity="l", receives=BufferToLearner, settings=settings
        )
        async with actor, learner:
            yield Peers(service, actor, learner, config)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


@pytest.fixture
async def peers() -> AsyncIterator[Peers]:
    async with running() as made:
        yield made


@pytest.fixture
def state() -> BufferState:
    return stateful(configured())


def stateful(config: Config) -> BufferState:
    made = BufferState(config, run="r", rng=np.random.default_rng(0), now=0.0)
    made.publish(published())
    return made


def limited(max_reissues: int) -> BufferState:
    """One task and no more."""
    return stateful(
        configured(
            run={"max_tasks": 1},
            staleness={"trees_per_batch": 1, "max_lag": 8},
            buffer={"max_reissues": max_reissues},
        )
    )


def take(state: BufferState, messages: Sequence[TreeMessage]) -> None:
    for message in messages:
        state.take(message, 0.0)
