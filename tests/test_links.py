"""Sends over real sockets on loopback: windows, acknowledgements, restarts, refusals, waits that last too long."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial
from typing import Any

import pytest

from atpo_async.core.errors import BadMessage, PeerLost
from atpo_async.links.client import Client
from atpo_async.links.server import sends
from tests.links_support import FAST, LEASE_REQUEST, Buffer, client, closed, fast, server, session_of
from tests.waiting_support import LIMIT_S, until, within

# --- sends -----------------------------------------------------------------------------------------------------


async def test_sends_arrive_in_order_and_are_acknowledged_after_the_handler() -> None:
    buffer = Buffer()
    async with server(buffer) as s, client(s.endpoint) as c:
        for i in range(200):
            await within(c.send(closed(i)))
        await c.drain(timeout_s=LIMIT_S)
        assert buffer.got == list(range(200))
        assert (c.stats.sent, c.stats.acked, c.stats.unacked, c.stats.refused) == (200, 200, 0, 0)


async def test_a_full_window_blocks_the_sender_until_an_ack_and_the_wait_is_measured() -> None:
    buffer = Buffer()
    buffer.open.clear()
    async with server(buffer) as s, client(s.endpoint) as c:
        for i in range(FAST.window):
            await within(c.send(closed(i)))
        assert c.stats.waited_s == 0.0
        ninth = asyncio.create_task(c.send(closed(FAST.window)))
        await until(lambda: s.peers.get("actor-0") is not None and s.peers["actor-0"].queued == FAST.window)
        # The sender's task may not have run yet.
        await until(lambda: c.stats.waited_s > 0.0)
        assert not ninth.done()
        assert c.stats.unacked == FAST.window
        buffer.open.set()
        await within(ninth)
        await c.drain(timeout_s=LIMIT_S)
        assert c.stats.waited_s > 0.0
    assert buffer.got == list(range(FAST.window + 1))


async def test_what_is_unacked_is_sent_again_after_the_server_restarts_on_its_port() -> None:
    first, second = Buffer(), Buffer()
    async with contextlib.AsyncExitStack() as stack:
        s = await stack.enter_async_context(server(first))
        c = await stack.enter_async_context(client(s.endpoint))
        for i in range(4):
            await c.send(closed(i))
        await c.drain(timeout_s=LIMIT_S)
        first.open.clear()
        for i in range(4, 10):
            await c.send(closed(i))
        await until(lambda: s.peers["actor-0"].queued > 0)
        await s.close()
        await c.send(closed(10))
        await stack.enter_async_context(server(second, s.endpoint))
        for i in range(11, 40):
            await within(c.send(closed(i)))
        await c.drain(timeout_s=LIMIT_S)
        assert first.got == list(range(4))
        assert second.got == list(range(4, 40))
        assert c.stats.resent > 0
        assert c.stats.acked == 40


async def test_a_server_that_closes_acknowledges_nothing_its_handler_has_not_taken() -> None:
    buffer = Buffer()
    buffer.open.clear()
    async with server(buffer) as s, client(s.endpoint) as c:
        for i in range(3):
            await c.send(closed(i))
        await until(lambda: s.peers.get("actor-0") is not None and s.peers["actor-0"].queued == 3)
        sends = session_of(s, "actor-0").sends
        await s.close()
        assert (sends.handled, len(sends.queue)) == (0, 3)
        assert c.stats.acked == 0


async def test_many_restarts_under_fire_lose_nothing_and_keep_the_order() -> None:
    got: list[int] = []

    async def handler(peer: str, message: Any) -> None:
        await asyncio.sleep(0)
        got.append(message.num_turns)

    total = 1000

    async def feed(c: Client) -> None:
        for i in range(total):
            await c.send(closed(i))
        await c.drain(timeout_s=LIMIT_S)

    s = server(handler)
    async with s:
        endpoint = s.endpoint
        async with client(endpoint) as c:
            feeding = asyncio.create_task(feed(c))

            def reached(goal: int) -> bool:
                return len(got) >= goal or feeding.done()

            for goal in (50, 150, 300):
                await until(partial(reached, goal))
                await s.close()
                s = server(handler, endpoint)
                await s.__aenter__()
            await within(feeding)
            await s.close()
    # At least once: what a dying server handled and could not acknowledge comes again, right where it was.
    assert list(dict.fromkeys(got)) == list(range(total))


class CutWire:
    """A TCP relay whose connections can be cut in the middle of whatever they carry."""

    def __init__(self, target: str) -> None:
        self._port = int(target.rpartition(":")[2])
        self._writers: list[asyncio.StreamWriter] = []
        self.cuts = 0

    async def __aenter__(self) -> CutWire:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        self.endpoint = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()

    def cut(self) -> None:
        self.cuts += bool(self._writers)
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, far_writer]
        await asyncio.gather(self._carry(reader, far_writer), self._carry(far_reader, writer))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(4096):
                writer.write(data)
        writer.transport.abort()


async def test_cut_connections_lose_nothing_and_repeat_nothing_to_the_handler() -> None:
    buffer = Buffer()
    total = 1000
    async with server(buffer) as s, CutWire(s.endpoint) as wire_, client(wire_.endpoint) as c:

        async def feed() -> None:
            for i in range(total):
                await c.send(closed(i))
                if i % 10 == 0:
                    await c.request(LEASE_REQUEST, timeout_s=LIMIT_S)
            await c.drain(timeout_s=LIMIT_S)

        feeding = asyncio.create_task(feed())

        def reached(goal: int) -> bool:
            return len(buffer.got) >= goal or feeding.done()

        for goal in range(50, total, 150):
            await until(partial(reached, goal))
            wire_.cut()
        await within(feeding)
        assert wire_.cuts > 0
    assert buffer.got == list(range(total))
    assert buffer.requests == total // 10


async def test_the_client_may_start_before_the_server() -> None:
    buffer = Buffer()
    async with server(buffer) as s:
        endpoint = s.endpoint
    async with client(endpoint) as c:
        await c.send(closed(1))
        asking = asyncio.create_task(c.request(LEASE_REQUEST, timeout_s=LIMIT_S))
        async with server(buffer, endpoint):
            assert (await asking).retry_after_s == 1.0
            await c.drain(timeout_s=LIMIT_S)
    assert buffer.got == [1]


async def test_repeats_in_one_session_are_acknowledged_again_and_not_handled_again() -> None:
    buffer = Buffer()
    async with server(buffer) as s, client(s.endpoint) as c:
        for i in range(3):
            await c.send(closed(i))
        await c.drain(timeout_s=LIMIT_S)
        buffer.open.clear()
        await c.send(closed(3))
        # It leaves with the loop's next round; from then on it is a repeat.
        await asyncio.sleep(0)
        c._on_connected()
        c._on_connected()
        buffer.open.set()
        await c.drain(timeout_s=LIMIT_S)
        await c.request(LEASE_REQUEST, timeout_s=LIMIT_S)
        assert c.stats.resent >= 2
    assert buffer.got == [0, 1, 2, 3]


async def test_a_lost_message_is_noticed_by_the_heartbeat_and_sent_again() -> None:
    buffer = Buffer()
    async with server(buffer) as s, client(s.endpoint) as c:
        await c.send(closed(0))
        await c.drain(timeout_s=LIMIT_S)
        # As if the connection had swallowed it: counted as put on the wire, and never there.
        pump, c._pump = c._pump, None
        await c.send(closed(1))
        c._window.advance(1)
        c._pump = pump
        await c.send(closed(2))
        await c.drain(timeout_s=LIMIT_S)
    assert buffer.got == [0, 1, 2]


async def test_a_new_client_of_the_same_name_takes_over_and_the_old_one_is_told() -> None:
    buffer = Buffer()
    async with server(buffer) as s, client(s.endpoint) as old:
        await old.send(closed(1))
        await old.drain(timeout_s=LIMIT_S)
        async with client(s.endpoint) as new:
            await new.send(closed(2))
            await new.drain(timeout_s=LIMIT_S)
            with pytest.raises(PeerLost, match="another process has taken that name"):
                await old.request(LEASE_REQUEST, timeout_s=LIMIT_S)
            with pytest.raises(PeerLost, match="actor-0"):
                await old.send(closed(3))
            for i in range(4, 7):
                await new.send(closed(i))
                await new.drain(timeout_s=LIMIT_S)
    assert buffer.got == [1, 2, 4, 5, 6]


async def test_a_restarted_client_goes_on_under_its_name() -> None:
    buffer = Buffer()
    async with server(buffer) as s:
        for i in range(3):
            async with client(s.endpoint) as c:
                await c.send(closed(i))
                await c.drain(timeout_s=LIMIT_S)
    assert buffer.got == [0, 1, 2]


# --- refusals and failures -------------------------------------------------------------------------------------


async def test_a_send_the_handler_refuses_is_reported_and_the_next_ones_go_on() -> None:
    refused: list[tuple[int, str]] = []

    async def handler(peer: str, message: Any) -> None:
        if message.num_turns == 1:
            raise BadMessage("other bytes under the same key")

    def note(message: Any, reason: str) -> None:
        refused.append((message.num_turns, reason))

    async with server(handler) as s, client(s.endpoint, on_refused=note) as c:
        for i in range(3):
            await c.send(closed(i))
        await c.drain(timeout_s=LIMIT_S)
        assert refused == [(1, "other bytes under the same key")]
        assert (c.stats.acked, c.stats.refused) == (2, 1)


async def test_a_send_that_breaks_its_promises_is_refused_and_counted() -> None:
    refused: list[str] = []
    buffer = Buffer()
    async with server(buffer) as s, client(s.endpoint, on_refused=lambda _, reason: refused.append(reason)) as c:
        await c.send(closed(-1))
        await c.send(closed(2))
        await c.drain(timeout_s=LIMIT_S)
        assert "num_turns is -1" in refused[0]
        assert s.bad_messages == 1
    assert buffer.got == [2]


async def test_a_handler_that_fails_once_is_run_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sends, "RETRY_PAUSES_S", (0.0, 0.0))
    attempts: list[int] = []

    async def handler(peer: str, message: Any) -> None:
        attempts.append(message.num_turns)
        if len(attempts) == 1:
            raise OSError("disk full")

    async with server(handler) as s, client(s.endpoint) as c:
        await c.send(closed(1))
        await c.send(closed(2))
        await c.drain(timeout_s=LIMIT_S)
        assert (c.stats.acked, c.stats.refused) == (2, 0)
    assert attempts == [1, 1, 2]
    assert "disk full" in caplog.text


async def test_a_handler_that_keeps_failing_refuses_that_message_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sends, "RETRY_PAUSES_S", (0.0, 0.0))
    refused: list[str] = []

    async def handler(peer: str, message: Any) -> None:
        if message.num_turns == 1:
            raise KeyError("tree")

    async with server(handler) as s, client(s.endpoint, on_refused=lambda _, reason: refused.append(reason)) as c:
        await c.send(closed(1))
        await c.send(closed(2))
        await c.drain(timeout_s=LIMIT_S)
        assert refused == ["buffer failed on it 3 times: KeyError: 'tree'"]
        assert c.stats.acked == 1


# --- waits that last too long ----------------------------------------------------------------------------------


async def test_a_wait_past_the_deadline_is_logged_with_who_waits_on_whom(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "atpo.links")
    buffer = Buffer()
    buffer.open.clear()
    impatient = fast(window=1, heartbeat_s=0.01, deadline_s=0.02)
    async with server(buffer, settings=impatient) as s, client(s.endpoint, impatient) as c:
        await c.send(closed(1))
        waiting = asyncio.create_task(c.send(closed(2)))
        await until(lambda: "buffer has worked for" in caplog.text and "actor-0 has waited" in caplog.text)
        assert "TreeClosed waits for space in a window of 1" in caplog.text
        assert "on TreeClosed of actor-0, which waits for it" in caplog.text
        buffer.open.set()
        await within(waiting)


async def test_past_give_up_a_silent_peer_is_lost_loudly() -> None:
    async with server(Buffer()) as s:
        endpoint = s.endpoint
    hasty = fast(heartbeat_s=0.01, give_up_s=0.05)
    async with client(endpoint, hasty) as c:
        await c.send(closed(1))
        with pytest.raises(PeerLost, match=r"gives up on buffer at .*: no sign of life .* 1 messages unacknowledged"):
            await c.drain(timeout_s=LIMIT_S)
        with pytest.raises(PeerLost):
            await c.send(closed(2))


async def test_heartbeats_tell_both_sides_that_the_other_lives() -> None:
    buffer = Buffer()
    async with server(buffer) as s, client(s.endpoint) as c:
        await until(lambda: "actor-0" in s.peers and c.connected)
        before = c._heard_at
        await until(lambda: c._heard_at > before)
        assert s.peers["actor-0"].silent_s < LIMIT_S
        assert buffer.got == []


async def test_a_silent_client_is_forgotten() -> None:
    hasty = fast(heartbeat_s=0.01, give_up_s=0.05)
    async with server(Buffer(), settings=hasty) as s:
        async with client(s.endpoint, hasty) as c:
            await c.send(closed(1))
            await c.drain(timeout_s=LIMIT_S)
            assert set(s.peers) == {"actor-0"}
        await until(lambda: not s.peers)
