"""Requests: one reply each, asked again where it was lost, run once; how long they wait, and what ends them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from atpo_async.core.errors import BadMessage, PeerLost
from atpo_async.links.client import Client
from atpo_async.links.client.waits import Waits
from atpo_async.links.server import Server
from atpo_async.wire import messages as m
from tests.links_support import ANY_PORT, FAST, LEASE_REQUEST, NO_LEASES, Buffer, client, closed, server
from tests.waiting_support import LIMIT_S, until, within


@contextlib.asynccontextmanager
async def request_under_way() -> AsyncIterator[tuple[Buffer, Server, Client, asyncio.Task[Any]]]:
    """A server whose handler is held back, its client, and the request that the handler works on."""
    buffer = Buffer()
    buffer.open.clear()
    async with server(buffer) as s, client(s.endpoint) as c:
        asking = asyncio.create_task(c.request(LEASE_REQUEST, timeout_s=LIMIT_S))
        await until(lambda: buffer.requests == 1)
        yield buffer, s, c, asking


async def test_requests_run_beside_one_another_and_find_their_replies() -> None:
    gates = {i: asyncio.Event() for i in range(3)}

    async def handler(peer: str, message: Any) -> Any:
        await gates[message.index].wait()
        return m.Chunk(version=0, index=message.index, data=np.full(100_000, message.index, np.uint8))

    async with (
        Server(ANY_PORT, name="learner", receives=m.ActorToLearner, handler=handler, settings=FAST) as s,
        Client(s.endpoint, peer="learner", identity="a", receives=m.LearnerToActor, settings=FAST) as c,
    ):
        asking = [
            asyncio.create_task(c.request(m.ChunkRequest(run="r", version=0, index=i), timeout_s=LIMIT_S))
            for i in range(3)
        ]
        for i in (2, 0, 1):
            gates[i].set()
            chunk = await asking[i]
            assert chunk.index == i
            assert chunk.data.nbytes == 100_000
            assert (chunk.data == i).all()


async def test_a_request_without_a_reply_raises_peer_lost_that_names_both_ends() -> None:
    buffer = Buffer()
    buffer.open.clear()
    async with server(buffer) as s, client(s.endpoint) as c:
        with pytest.raises(PeerLost) as caught:
            await c.request(LEASE_REQUEST, timeout_s=0.05)
        text = str(caught.value)
        for part in ("actor-0", "buffer", s.endpoint, "LeaseRequest", "last sign of life"):
            assert part in text


async def test_a_request_to_nobody_raises_peer_lost() -> None:
    async with server(Buffer()) as s:
        endpoint = s.endpoint
    async with client(endpoint) as c:
        with pytest.raises(PeerLost, match="not connected"):
            await c.request(LEASE_REQUEST, timeout_s=0.05)
        await c.send(closed(1))
        with pytest.raises(PeerLost, match="drain"):
            await c.drain(timeout_s=0.05)


async def test_a_repeated_request_is_not_run_twice() -> None:
    async with request_under_way() as (buffer, s, c, asking):
        c._on_connected()
        await c.send(closed(1))
        await until(lambda: s.peers["actor-0"].requests == 1)
        buffer.open.set()
        assert (await asking).finished is False
        await c.drain(timeout_s=LIMIT_S)
    assert buffer.requests == 1


async def test_a_lost_reply_is_repeated_from_memory() -> None:
    buffer = Buffer()
    async with server(buffer) as s, client(s.endpoint) as c:
        await c.send(closed(0))
        await c.drain(timeout_s=LIMIT_S)
        lost: list[int] = []
        deliver = c._on_reply

        def lose_the_first(request_id: int, frames: list[bytes | memoryview]) -> None:
            if lost:
                deliver(request_id, frames)
            lost.append(request_id)

        c._on_reply = lose_the_first  # type: ignore[method-assign]
        reply = await c.request(LEASE_REQUEST, timeout_s=LIMIT_S)
        assert isinstance(reply, m.Leases)
        assert len(lost) == 2
    assert buffer.requests == 1


async def test_a_request_is_asked_again_after_the_server_restarts() -> None:
    first, second = Buffer(), Buffer()
    first.open.clear()
    async with server(first) as s, client(s.endpoint) as c:
        asking = asyncio.create_task(c.request(LEASE_REQUEST, timeout_s=LIMIT_S))
        await until(lambda: first.requests == 1)
        await s.close()
        async with server(second, s.endpoint):
            assert isinstance(await asking, m.Leases)
    assert (first.requests, second.requests) == (1, 1)


async def test_closing_the_server_cancels_the_requests_it_works_on() -> None:
    cancelled = asyncio.Event()

    async def handler(peer: str, message: Any) -> Any:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with server(handler) as s, client(s.endpoint) as c:
        asking = asyncio.create_task(c.request(LEASE_REQUEST, timeout_s=LIMIT_S))
        await until(lambda: s.peers.get("actor-0") is not None and s.peers["actor-0"].requests == 1)
        await s.close()
        assert cancelled.is_set()
        asking.cancel()


async def test_closing_the_client_ends_its_waits() -> None:
    async with request_under_way() as (_, _, c, asking):
        await c.close()
        with pytest.raises(PeerLost, match="is closed"):
            await within(asking)
        with pytest.raises(PeerLost, match="is closed"):
            await c.send(closed(1))


async def test_a_request_whose_handler_fails_is_refused_with_the_reason() -> None:
    async def handler(peer: str, message: Any) -> Any:
        if message.count == 1:
            raise RuntimeError("ledger closed")
        if message.count == 2:
            raise BadMessage("not your run")
        return None if message.count == 3 else NO_LEASES

    async with server(handler) as s, client(s.endpoint) as c:
        reasons = []
        for count in (1, 2, 3, 4):
            reply = await c.request(m.LeaseRequest(run="r", actor="a", count=count, version=0), timeout_s=LIMIT_S)
            reasons.append(getattr(reply, "reason", None))
    assert reasons == [
        "buffer failed on LeaseRequest: RuntimeError: ledger closed",
        "not your run",
        "buffer has no answer to LeaseRequest",
        None,
    ]


async def test_a_message_over_the_limit_is_refused_at_the_sender_and_in_replies() -> None:
    async def handler(peer: str, message: Any) -> Any:
        return m.Chunk(version=0, index=0, data=np.zeros(1 << 20, np.uint8))

    async with (
        Server(ANY_PORT, name="learner", receives=m.ActorToLearner, handler=handler, settings=FAST) as s,
        Client(s.endpoint, peer="learner", identity="a", receives=m.LearnerToActor, settings=FAST) as c,
    ):
        with pytest.raises(BadMessage, match=r"Chunk of .* exceeds links.max_message_bytes"):
            await c.send(m.Chunk(version=0, index=0, data=np.zeros(1 << 20, np.uint8)))
        reply = await c.request(m.ChunkRequest(run="r", version=0, index=0), timeout_s=LIMIT_S)
        assert "max_message_bytes" in reply.reason


async def test_all_waits_end_though_the_time_of_one_is_over_at_that_moment() -> None:
    waits = Waits()
    both = [waits.begin("its time is over", 0.0), waits.begin("it has time", LIMIT_S)]
    tasks = [asyncio.create_task(waits.run(wait, asyncio.Event().wait())) for wait in both]
    await asyncio.sleep(0)  # both wait
    await asyncio.sleep(0)
    assert both[0].timeout.expired()
    assert not tasks[0].done()
    waits.end()
    ended = await within(asyncio.gather(*tasks, return_exceptions=True))
    assert [type(failure) for failure in ended] == [TimeoutError, TimeoutError]
