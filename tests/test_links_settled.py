"""A server that acknowledges only what has been settled, and handlers that see the frames of a message."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from atpo_async.core.errors import BadMessage
from atpo_async.links.frames import ACK, PING, PONG, REFUSE, SEND
from atpo_async.links.server import acknowledgements
from atpo_async.wire import codec
from atpo_async.wire import messages as m
from tests.links_support import FAST, LEASE_REQUEST, NO_LEASES, Buffer, client, closed, fast, server
from tests.raw_link_support import link_frame, raw_dealer
from tests.waiting_support import LIMIT_S, until, within


class Disk:
    """Settles when it is let, and knows what had been handled when each of its calls began."""

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer
        self._permits = asyncio.Semaphore(0)
        self.began: list[int] = []
        self.failures = 0

    async def __call__(self) -> None:
        self.began.append(len(self._buffer.got))
        await self._permits.acquire()
        if self.failures:
            self.failures -= 1
            raise OSError("no space left on device")

    def let(self, calls: int = 1) -> None:
        for _ in range(calls):
            self._permits.release()


async def test_nothing_is_acknowledged_before_it_is_settled_and_handlers_run_on_meanwhile() -> None:
    buffer = Buffer()
    disk = Disk(buffer)
    async with server(buffer, settled=disk) as s, client(s.endpoint) as c:
        await within(c.send(closed(0)))
        await until(lambda: len(disk.began) == 1)
        for i in range(1, FAST.window):
            await within(c.send(closed(i)))
        await until(lambda: len(buffer.got) == FAST.window)
        assert c.stats.acked == 0
        assert s.peers["actor-0"].unsettled == FAST.window
        disk.let()
        # Only what was handled before the first call began; the rest waits for the second, one call for all of it.
        await until(lambda: c.stats.acked == disk.began[0])
        await until(lambda: disk.began == [1, FAST.window])
        assert c.stats.acked == 1
        disk.let()
        await c.drain(timeout_s=LIMIT_S)
        assert s.peers["actor-0"].unsettled == 0
    assert buffer.got == list(range(FAST.window))


async def test_while_nothing_settles_a_sender_waits_for_space_in_its_window() -> None:
    buffer = Buffer()
    disk = Disk(buffer)
    async with server(buffer, settled=disk) as s, client(s.endpoint) as c:
        for i in range(FAST.window):
            await within(c.send(closed(i)))
        one_more = asyncio.create_task(c.send(closed(FAST.window)))
        await until(lambda: len(buffer.got) == FAST.window and c.stats.waited_s > 0.0)
        assert not one_more.done()
        disk.let(2 * FAST.window)
        await within(one_more)
        await c.drain(timeout_s=LIMIT_S)


async def test_what_a_stranger_sends_past_the_window_is_dropped_while_nothing_settles() -> None:
    buffer = Buffer()
    async with server(buffer, settled=Disk(buffer)) as s, raw_dealer(s.endpoint) as stranger:
        for seq in range(20 * FAST.window):
            await stranger.send_multipart([link_frame(SEND, a=seq), *codec.encode(closed(seq))])
        await stranger.send_multipart([link_frame(PING, a=20 * FAST.window), b""])
        reply = await within(stranger.recv_multipart())
        while reply[0][2] != PONG:
            reply = await within(stranger.recv_multipart())
        assert reply[0] == link_frame(PONG, a=20 * FAST.window, b=4 * FAST.window)
        await until(lambda: len(buffer.got) == 4 * FAST.window)
        assert s.peers["stranger"].unsettled == 4 * FAST.window


async def test_a_settling_that_fails_is_tried_again_and_acknowledges_nothing_until_it_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(acknowledgements, "SETTLE_PAUSES_S", (0.0,))
    buffer = Buffer()
    disk = Disk(buffer)
    disk.failures = 5
    async with server(buffer, settled=disk) as s, client(s.endpoint) as c:
        await within(c.send(closed(0)))
        disk.let(5)
        await until(lambda: len(disk.began) == 6)
        assert c.stats.acked == 0
        assert "no space left on device" in caplog.text
        disk.let()
        await c.drain(timeout_s=LIMIT_S)
    assert buffer.got == [0]


async def test_a_settling_that_hangs_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "atpo.links")
    buffer = Buffer()
    impatient = fast(heartbeat_s=0.01, deadline_s=0.02)
    async with server(buffer, settings=impatient, settled=Disk(buffer)) as s, client(s.endpoint) as c:
        await within(c.send(closed(0)))
        await until(lambda: "settling sends of 1 peers" in caplog.text)
        assert "nothing is acknowledged" in caplog.text


async def test_refusals_too_wait_until_they_are_settled() -> None:
    refused: list[int] = []
    buffer = Buffer()
    disk = Disk(buffer)

    async def handler(peer: str, message: Any) -> Any:
        buffer.got.append(message.num_turns)
        if message.num_turns == 1:
            raise BadMessage("other bytes under the same key")

    def note(message: Any, _: str) -> None:
        refused.append(message.num_turns)

    async with server(handler, settled=disk) as s, client(s.endpoint, on_refused=note) as c:
        for i in range(3):
            await c.send(closed(i))
        await until(lambda: len(buffer.got) == 3)
        # The pings in between are answered, and even so nothing is said of what is not settled.
        heard = c._heard_at
        await until(lambda: c._heard_at > heard)
        assert not refused
        assert c.stats.acked == 0
        disk.let(3)
        await c.drain(timeout_s=LIMIT_S)
        assert refused == [1]
        assert (c.stats.acked, c.stats.refused) == (2, 1)


async def test_not_even_a_ping_gets_a_refusal_out_that_is_not_settled() -> None:
    buffer = Buffer()
    disk = Disk(buffer)
    async with server(buffer, settled=disk) as s, raw_dealer(s.endpoint) as stranger:

        async def kinds_up_to(last: int) -> list[int]:
            seen: list[int] = []
            while not seen or seen[-1] != last:
                seen.append((await within(stranger.recv_multipart()))[0][2])
            return seen

        await stranger.send_multipart([link_frame(SEND), *codec.encode(closed(-1))])
        await until(lambda: len(disk.began) == 1)
        await stranger.send_multipart([link_frame(PING, a=1), b""])
        assert await kinds_up_to(PONG) == [ACK, PONG]
        disk.let()
        assert await kinds_up_to(ACK) == [REFUSE, ACK]


async def test_requests_do_not_wait_for_what_is_not_settled() -> None:
    buffer = Buffer()
    async with server(buffer, settled=Disk(buffer)) as s, client(s.endpoint) as c:
        await c.send(closed(0))
        assert isinstance(await c.request(LEASE_REQUEST, timeout_s=LIMIT_S), m.Leases)
        assert c.stats.acked == 0


async def test_what_was_handled_and_not_settled_comes_again_after_a_restart() -> None:
    first, second = Buffer(), Buffer()
    async with server(first, settled=Disk(first)) as s, client(s.endpoint) as c:
        for i in range(3):
            await c.send(closed(i))
        await until(lambda: first.got == [0, 1, 2])
        await s.close()
        async with server(second, s.endpoint):
            await c.drain(timeout_s=LIMIT_S)
    assert second.got == [0, 1, 2]


async def test_a_handler_may_see_the_frames_of_sends_and_requests() -> None:
    seen: list[tuple[str, list[bytes]]] = []

    async def handler(peer: str, message: Any, frames: list[bytes]) -> Any:
        seen.append((peer, frames))
        return NO_LEASES

    async with server(handler, with_frames=True) as s, client(s.endpoint) as c:
        await c.send(closed(5))
        await c.drain(timeout_s=LIMIT_S)
        await c.request(LEASE_REQUEST, timeout_s=LIMIT_S)
    assert seen == [("actor-0", codec.encode(closed(5))), ("actor-0", codec.encode(LEASE_REQUEST))]
