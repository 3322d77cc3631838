"""Handlers with and without a task of their own, and what a slow or hostile end can cost the other."""

from __future__ import annotations

import asyncio
import gc
import logging
import struct
import warnings
from collections.abc import Awaitable
from typing import Any

import numpy as np
import pytest
import zmq
import zmq.asyncio

from atpo_async.core.errors import BadMessage, PeerLost
from atpo_async.links.announcements import Announcer, Listener
from atpo_async.links.client import Client
from atpo_async.links.frames import LINK, PING, REPLY, REQUEST, SEND, SENDS, worth_a_line
from atpo_async.links.server import Server, sends
from atpo_async.wire import codec
from atpo_async.wire import messages as m
from atpo_async.wire.records import pack
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
from tests.raw_link_support import link_frame, pong, raw_dealer
from tests.waiting_support import LIMIT_S, until, within

# --- handlers that need no task ---------------------------------------------------------------------------------


async def test_a_plain_function_handles_in_order_and_refuses_what_it_does_not_take() -> None:
    got: list[int] = []
    refused: list[int] = []

    def handler(peer: str, message: Any) -> Any:
        if isinstance(message, m.LeaseRequest):
            return NO_LEASES
        got.append(message.num_turns)
        if message.num_turns % 10 == 3:
            raise BadMessage("a three")
        return None

    def note(message: Any, reason: str) -> None:
        assert reason == "a three"
        refused.append(message.num_turns)

    async with server(handler) as s, client(s.endpoint, on_refused=note) as c:
        for i in range(100):
            await within(c.send(closed(i)))
        await c.drain(timeout_s=LIMIT_S)
        assert isinstance(await c.request(LEASE_REQUEST, timeout_s=LIMIT_S), m.Leases)
        assert s.link_status()["peers"][0]["handled"] == 100
    assert got == list(range(100))
    assert refused == list(range(3, 100, 10))


async def test_a_function_that_waits_only_now_and_then_keeps_the_order() -> None:
    got: list[int] = []
    gate = asyncio.Event()

    async def later(number: int) -> None:
        await gate.wait()
        got.append(number)

    def handler(peer: str, message: Any) -> Awaitable[None] | None:
        if message.num_turns % 7 == 2:
            return later(message.num_turns)
        got.append(message.num_turns)
        return None

    async with server(handler) as s, client(s.endpoint) as c:
        for i in range(5):
            await within(c.send(closed(i)))
        await until(lambda: s.link_status()["peers"] and s.link_status()["peers"][0]["queued"] == 3)
        assert got == [0, 1]
        gate.set()
        for i in range(5, 40):
            await within(c.send(closed(i)))
        await c.drain(timeout_s=LIMIT_S)
    assert got == list(range(40))


async def test_a_plain_function_that_fails_is_run_again_and_what_comes_after_waits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sends, "RETRY_PAUSES_S", (0.0, 0.0))
    attempts: list[int] = []
    refused: list[str] = []

    def handler(peer: str, message: Any) -> None:
        attempts.append(message.num_turns)
        if message.num_turns == 1 and attempts.count(1) == 1:
            raise OSError("disk full")
        if message.num_turns == 3:
            raise KeyError("tree")

    async with server(handler) as s, client(s.endpoint, on_refused=lambda _, reason: refused.append(reason)) as c:
        for i in range(5):
            await c.send(closed(i))
        await c.drain(timeout_s=LIMIT_S)
        assert (c.stats.acked, c.stats.refused) == (4, 1)
    assert attempts == [0, 1, 1, 2, 3, 3, 3, 4]
    assert refused == ["buffer failed on it 3 times: KeyError: 'tree'"]
    assert "disk full" in caplog.text


async def test_closing_a_server_leaves_no_handler_half_begun() -> None:
    begun = asyncio.Event()

    async def later() -> None:
        raise AssertionError("the server was closed before this could run")

    def handler(peer: str, message: Any) -> Awaitable[None]:
        begun.set()
        return later()

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        async with server(handler) as s, client(s.endpoint) as c:
            await c.send(closed(1))
            # Woken in the very turn of the loop in which the handler was called: its task has not run yet.
            async with asyncio.timeout(LIMIT_S):
                await begun.wait()
            sends = session_of(s, "actor-0").sends
            await s.close()
            assert (sends.handled, len(sends.queue)) == (0, 1)
        del sends, s
        gc.collect()
    assert not [warning for warning in warned if "never awaited" in str(warning.message)]


# --- what the other end can cost --------------------------------------------------------------------------------


def chunk(nbytes: int) -> m.Chunk:
    return m.Chunk(version=0, index=0, data=np.zeros(nbytes, np.uint8))


async def test_sends_that_wait_for_a_slow_handler_are_bounded_in_bytes_too() -> None:
    gate = asyncio.Event()
    taken: list[int] = []

    async def handler(peer: str, message: Any) -> None:
        await gate.wait()
        taken.append(message.data.nbytes)

    small = fast(window=64, max_message_bytes=1 << 16)
    async with (
        Server(ANY_PORT, name="sink", receives=m.LearnerToActor, handler=handler, settings=small) as s,
        Client(s.endpoint, peer="sink", identity="a", receives=m.Refused, settings=small) as c,
    ):
        for _ in range(64):
            await within(c.send(chunk(50_000)))
        await until(lambda: s.peers.get("a") is not None and s.peers["a"].queued >= 6)
        # Repeats, too: each heartbeat the client sends again what was not taken.
        resent = c.stats.resent
        await until(lambda: c.stats.resent > resent)
        status = s.link_status()["peers"][0]
        assert status["queued"] == 6
        assert 4 * small.max_message_bytes < status["queued_bytes"] <= 5 * small.max_message_bytes
        gate.set()
        await c.drain(timeout_s=LIMIT_S)
        assert s.link_status()["peers"][0]["queued_bytes"] == 0
    assert taken == [50_000] * 64


async def test_a_peer_that_asks_and_does_not_read_gets_no_more_than_a_queue_of_replies() -> None:
    asked = 1000
    answered = 0

    async def handler(peer: str, message: Any) -> Any:
        return chunk(900_000)

    settings = fast(heartbeat_s=60.0)
    async with (
        Server(ANY_PORT, name="learner", receives=m.ActorToLearner, handler=handler, settings=settings) as s,
        raw_dealer(s.endpoint, rcvhwm=1) as stranger,
        Client(s.endpoint, peer="learner", identity="good", receives=m.LearnerToActor, settings=settings) as c,
    ):
        frames = codec.encode(m.ChunkRequest(run="r", version=0, index=0))
        for _ in range(asked):
            await stranger.send_multipart([link_frame(REQUEST), *frames])
        await stranger.send_multipart([link_frame(SEND, a=9), *frames])
        # Others are served meanwhile, and by then all of it has been read.
        reply = await c.request(m.ChunkRequest(run="r", version=0, index=0), timeout_s=LIMIT_S)
        assert reply.data.nbytes == 900_000
        await until(lambda: "stranger" in s.peers and session_of(s, "stranger").sends.expected == 0)
        while await stranger.poll(500):
            got = await stranger.recv_multipart()
            assert LINK.unpack(got[0])[1] == REPLY
            answered += 1
    # Its queue here, and what two ends' TCP buffers hold.
    assert 1 <= answered <= 8 * FAST.window + 100


async def test_a_message_of_very_many_frames_is_one_bad_message_of_which_little_is_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    buffer = Buffer()
    async with server(buffer) as s, client(s.endpoint) as c, raw_dealer(s.endpoint) as stranger:
        await stranger.send_multipart([link_frame(SEND), *[b"x"] * 5000])
        await until(lambda: s.bad_messages == 1)
        await c.send(closed(1))
        await c.drain(timeout_s=LIMIT_S)
        assert s.bad_messages == 1
        assert "from stranger: a message of 14 frames" in caplog.text
    assert buffer.got == [1]


async def test_a_server_that_never_acknowledges_makes_the_sender_wait_and_then_give_up() -> None:
    context = zmq.asyncio.Context()
    try:
        silent = context.socket(zmq.ROUTER)
        silent.bind("tcp://127.0.0.1:0")
        endpoint = silent.get_string(zmq.LAST_ENDPOINT)
        async with client(endpoint, fast(heartbeat_s=0.02, give_up_s=1.0)) as c:
            for i in range(FAST.window):
                await within(c.send(closed(i)))
            with pytest.raises(PeerLost, match="actor-0"):
                await within(c.send(closed(99)))
            assert c.stats.unacked == FAST.window
            # A connection that is up and leads nowhere was made anew meanwhile.
            assert c.stats.resent >= FAST.window
    finally:
        context.destroy(linger=0)


async def test_a_listener_that_hears_nothing_not_even_heartbeats_connects_anew() -> None:
    context = zmq.asyncio.Context()
    try:
        mute = context.socket(zmq.XPUB)
        mute.xpub_verbose = True
        mute.bind("tcp://127.0.0.1:0")
        endpoint = mute.get_string(zmq.LAST_ENDPOINT)
        async with Listener(endpoint, receives=m.WeightsAnnounced, settings=FAST) as listener:
            subscribed = 0
            while subscribed < 3:
                subscribed += await within(mute.recv()) == b"\1"
            assert await listener.next(timeout_s=0.0) is None
    finally:
        context.destroy(linger=0)


async def test_announcers_heartbeats_keep_a_listeners_connection_and_are_no_announcements() -> None:
    async with (
        Announcer(ANY_PORT, settings=FAST) as announcer,
        Listener(announcer.endpoint, receives=m.WeightsAnnounced, settings=FAST) as listener,
    ):
        beats = 0
        heard = listener._on_frames

        def note(frames: list[codec.Buffer], user: str) -> None:
            nonlocal beats
            beats += 1
            assert listener.connected
            heard(frames, user)

        assert listener._pump is not None
        listener._pump._on_message = note
        await until(lambda: beats >= 20)
        assert await listener.next(timeout_s=0.0) is None
        assert listener.bad_messages == 0


async def test_a_peer_that_says_nothing_of_use_costs_a_session_and_no_more() -> None:
    buffer = Buffer()
    async with server(buffer) as s, raw_dealer(s.endpoint) as stranger:
        for _ in range(100):
            await stranger.send_multipart([link_frame(PING), b""])
        await until(lambda: s.link_status()["peers"] and session_of(s, "stranger").sends.expected == 0)
        (peer,) = s.link_status()["peers"]
        assert (peer["queued"], peer["queued_bytes"], peer["unsettled"], peer["requests"]) == (0, 0, 0, [])


@pytest.mark.parametrize("kind", [SEND, SENDS, PING])
async def test_numbers_at_the_end_of_their_range_are_bad_and_hold_nobody_up(kind: int) -> None:
    """One more would not fit into the frame that acknowledges it."""
    buffer = Buffer()
    end = 2**64 - 1
    bodies: dict[int, list[codec.Buffer]] = {
        SEND: codec.encode(closed(7)),
        SENDS: [pack(*[codec.encode(closed(7))] * 3)],
        PING: [],
    }
    async with server(buffer) as s, client(s.endpoint) as c, raw_dealer(s.endpoint) as stranger:
        for number, sent in enumerate((end, end - 1, 2**63)):
            await stranger.send_multipart([link_frame(kind, a=sent, b=sent), *bodies[kind]])
            await c.send(closed(number))
            await c.drain(timeout_s=LIMIT_S)
        await until(lambda: s.bad_messages == 3)
        # The last that is none too many.
        last = 2**63 - 1
        await stranger.send_multipart([link_frame(SEND, a=last, b=last), *codec.encode(closed(9))])
        await stranger.send_multipart([link_frame(PING, a=last + 1, b=last)])
        assert (await pong(stranger))[1:] == (last + 1, last + 1)
    assert buffer.got == [0, 1, 2, 9]


def test_repeated_events_are_logged_ever_more_sparsely() -> None:
    assert [n for n in range(1, 20_001) if worth_a_line(n)] == [1, 2, 3, 10, 100, 1000, 10_000]


# --- hostile peers ----------------------------------------------------------------------------------------------------


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


async def test_a_client_that_begins_life_after_life_has_one_queue_for_all_of_them() -> None:
    buffer = Buffer()
    buffer.open.clear()
    most, first = 4 * FAST.window, 10
    async with server(buffer) as s, raw_dealer(s.endpoint) as stranger:

        async def live(life: int, begin: int, count: int) -> int:
            """Send so many and return how many were taken."""
            for seq in range(begin, begin + count):
                await stranger.send_multipart([link_frame(SEND, session=life, a=seq), *codec.encode(closed(life))])
            await stranger.send_multipart([link_frame(PING, session=life, a=begin + count), b""])
            while (answer := await pong(stranger))[0] != life:
                pass
            return answer[2]

        taken = [await live(life, 0, first if life == 1 else most) for life in range(1, 7)]
        assert taken == [first, most - first, 0, 0, 0, 0], "what waits of earlier lives counts"
        last = session_of(s, "stranger").sends
        assert last.earlier() == (most, sum(each.queued_bytes for each in last.before))
        assert len(last.before) == 2
        buffer.open.set()
        await until(lambda: len(buffer.got) == most)
        assert await live(6, 0, most) == most, "and no longer once it is handled"
        await until(lambda: len(buffer.got) == 2 * most)
        assert not last.before
    assert sorted(buffer.got) == [1] * first + [2] * (most - first) + [6] * most
