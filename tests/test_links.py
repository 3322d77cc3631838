"""Links over real sockets on loopback: windows, acks, restarts, requests, refusals, hostile peers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
from functools import partial
from typing import Any

import numpy as np
import pytest

from atpo_async.core.errors import BadMessage, PeerLost, SetupError
from atpo_async.links.announcements import Announcer, Listener
from atpo_async.links.client import Client
from atpo_async.links.server import Server, sends
from atpo_async.wire import codec
from atpo_async.wire import messages as m
from tests.links_support import (
    ANY_PORT,
    FAST,
    LEASE_REQUEST,
    NO_LEASES,
    Buffer,
    client,
    closed,
    fast,
    server,
    session_of,
)
from tests.raw_link_support import link_frame, raw_dealer
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


# --- requests --------------------------------------------------------------------------------------------------


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
    buffer = Buffer()
    buffer.open.clear()
    async with server(buffer) as s, client(s.endpoint) as c:
        asking = asyncio.create_task(c.request(LEASE_REQUEST, timeout_s=LIMIT_S))
        await until(lambda: buffer.requests == 1)
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
    buffer = Buffer()
    buffer.open.clear()
    async with server(buffer) as s, client(s.endpoint) as c:
        asking = asyncio.create_task(c.request(LEASE_REQUEST, timeout_s=LIMIT_S))
        await until(lambda: buffer.requests == 1)
        await c.close()
        with pytest.raises(PeerLost, match="is closed"):
            await within(asking)
        with pytest.raises(PeerLost, match="is closed"):
            await c.send(closed(1))


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


# --- hostile peers ---------------------------------------------------------------------------------------------


async def test_bad_frames_are_counted_and_logged_with_their_sender_and_the_service_stays_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "atpo.links")
    buffer = Buffer()
    good = codec.encode(closed(7))
    bad: list[list[Any]] = [
        [b""],
        [b"garbage"],
        [b"x" * 27],
        [link_frame(99)],
        [link_frame(1)],
        [link_frame(1, a=1), b"\xc1", b""],
        [link_frame(1, a=2, b=9), *good],
        [link_frame(1, a=2), good[0]],
        [link_frame(2), b"\x81", b""],
        [link_frame(3, a=1, b=2), b""],
        [link_frame(3, a=5), b"odd"],
    ]
    async with server(buffer) as s, client(s.endpoint) as c, raw_dealer(s.endpoint) as stranger:
        for frames in bad:
            await stranger.send_multipart(frames)
        await until(lambda: s.bad_messages >= len(bad))
        assert "from stranger" in caplog.text
        await c.send(closed(1))
        await c.drain(timeout_s=LIMIT_S)
        assert isinstance(await c.request(LEASE_REQUEST, timeout_s=LIMIT_S), m.Leases)
        assert s.bad_messages == len(bad)
    assert buffer.got == [1]


async def test_a_frame_over_the_limit_never_reaches_the_process() -> None:
    buffer = Buffer()
    async with server(buffer) as s, client(s.endpoint) as c, raw_dealer(s.endpoint) as stranger:
        await stranger.send_multipart([link_frame(1), b"x", bytes(FAST.max_message_bytes + 5000)])
        await c.send(closed(1))
        await c.drain(timeout_s=LIMIT_S)
        assert "stranger" not in s.peers
    assert buffer.got == [1]


async def test_a_flood_past_the_window_is_dropped_and_not_kept() -> None:
    buffer = Buffer()
    buffer.open.clear()
    async with server(buffer) as s, raw_dealer(s.endpoint) as stranger:
        frames = codec.encode(closed(7))
        for seq in range(20 * FAST.window):
            await stranger.send_multipart([link_frame(1, a=seq), *frames])
        await stranger.send_multipart([link_frame(3, a=20 * FAST.window), b""])
        reply = await within(stranger.recv_multipart())
        while reply[0][2] != 7:
            reply = await within(stranger.recv_multipart())
        # The ping's answer says where the rest must go on from.
        assert s.peers["stranger"].queued == 4 * FAST.window
        assert struct.unpack("<2sBQQQ", reply[0])[4] == 4 * FAST.window


# --- setting up ------------------------------------------------------------------------------------------------


async def test_a_port_in_use_is_a_setup_error_that_names_it() -> None:
    async with server(Buffer()) as s:
        with pytest.raises(
            SetupError, match=rf"= {s.endpoint.rpartition(':')[2]} is in use on 127\.0\.0\.1 by process"
        ):
            await server(Buffer(), s.endpoint).__aenter__()


@pytest.mark.parametrize(
    "endpoint",
    ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://192.0.2.7:0", "tcp://[::]:0", "tcp://a.example:0", "tcp://eth0:0"],
)
async def test_binding_off_loopback_without_keys_is_refused_with_the_way_out(endpoint: str) -> None:
    for end in (server(Buffer(), endpoint), Announcer(endpoint, settings=FAST)):
        with pytest.raises(SetupError, match=r"without keys: it is not a loopback address; set links.keys_dir"):
            await end.__aenter__()


async def test_connecting_off_loopback_without_keys_is_refused() -> None:
    for end in (client("tcp://192.0.2.7:5555"), Listener("tcp://a.example:1", receives=m.Refused, settings=FAST)):
        with pytest.raises(SetupError, match="will not connect to"):
            await end.__aenter__()


@pytest.mark.parametrize("endpoint", ["nonsense", "tcp://127.0.0.1:99999"])
async def test_an_endpoint_that_is_none_is_a_setup_error(endpoint: str) -> None:
    for end in (server(Buffer(), endpoint), client(endpoint)):
        with pytest.raises(SetupError):
            await end.__aenter__()


# --- announcements ---------------------------------------------------------------------------------------------


def announced(version: int) -> m.WeightsAnnounced:
    return m.WeightsAnnounced(run="r", version=version, total_bytes=1, sha256="", host_id="h", shm_path=None)


async def _hear_one(announcer: Announcer, listener: Listener) -> m.WeightsAnnounced:
    """Announce until the subscription has arrived."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            await announcer.publish(announced(1))
            if (heard := await listener.next(timeout_s=0.02)) is not None:
                assert isinstance(heard, m.WeightsAnnounced)
                return heard


async def test_announcements_reach_a_listener_and_silence_is_none() -> None:
    async with (
        Announcer(ANY_PORT, settings=FAST) as announcer,
        Listener(announcer.endpoint, receives=m.WeightsAnnounced, settings=FAST) as listener,
    ):
        assert (await _hear_one(announcer, listener)).version == 1
        while await listener.next(timeout_s=0.02) is not None:
            pass
        await announcer.publish(announced(2))
        await announcer.publish(announced(3))
        heard = [await listener.next(timeout_s=LIMIT_S) for _ in range(2)]
        assert [h.version for h in heard] == [2, 3]
        await announcer.publish(m.RunFinished(run="r"))
        await announcer.publish(announced(4))
        assert (await listener.next(timeout_s=LIMIT_S)).version == 4
        assert listener.bad_messages == 1
