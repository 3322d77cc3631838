"""Several sends in one frame: what travels together, and frames that are damaged, repeated or too large."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from atpo_async.links.frames import LINK, MAX_SENDS, PING, REQUEST, SEND, SENDS, SENDS_BYTES
from atpo_async.links.server import Server
from atpo_async.wire import codec
from atpo_async.wire import messages as m
from atpo_async.wire.records import pack
from tests.links_support import ANY_PORT, LEASE_REQUEST, Buffer, client, closed, fast, server
from tests.raw_link_support import link_frame, pong, raw_dealer
from tests.test_links_limits import chunk
from tests.waiting_support import LIMIT_S, until


def watched(s: Server) -> list[tuple[int, int, int]]:
    """What comes from now on, as (kind, first number, frames' bytes)."""
    seen: list[tuple[int, int, int]] = []
    pump = s._pump
    assert pump is not None
    handle = pump._on_message

    def on_message(frames: list[codec.Buffer], user: str) -> int | None:
        _, kind, _, a, _ = LINK.unpack(frames[1])
        if kind in (SEND, SENDS, REQUEST):
            seen.append((kind, a, sum(map(len, frames[2:]))))
        return handle(frames, user)

    pump._on_message = on_message
    return seen


def together(*messages: Any) -> bytes:
    return pack(*map(codec.encode, messages))


async def test_what_is_sent_before_the_loop_goes_round_travels_together() -> None:
    buffer = Buffer()
    async with server(buffer) as s, client(s.endpoint) as c:
        await until(lambda: c.connected)
        seen = watched(s)
        for i in range(5):
            await c.send(closed(i))
        await c.drain(timeout_s=LIMIT_S)
        await c.send(closed(5))
        await c.drain(timeout_s=LIMIT_S)
        assert [(kind, first) for kind, first, _ in seen] == [(SENDS, 0), (SEND, 5)]
        assert (c.stats.acked, c.stats.resent) == (6, 0)
    assert buffer.got == list(range(6))


async def test_what_travels_together_is_limited_in_number_and_bytes_and_what_is_large_goes_alone() -> None:
    got: list[int] = []
    wide = fast(window=2 * MAX_SENDS)
    sizes = [*[8] * (MAX_SENDS + 3), SENDS_BYTES + 8, *[SENDS_BYTES // 4] * 4]

    def take(peer: str, message: m.Chunk) -> None:
        got.append(len(message.data))

    async with (
        Server(ANY_PORT, name="weights", receives=m.Chunk, handler=take, settings=wide) as s,
        client(s.endpoint, wide) as c,
    ):
        await until(lambda: c.connected)
        seen = watched(s)
        for nbytes in sizes:
            await c.send(chunk(nbytes))
        await c.drain(timeout_s=LIMIT_S)
    # Four quarters and what they say of themselves are more than fits.
    assert [(kind, first) for kind, first, _ in seen] == [
        (SENDS, 0),
        (SENDS, MAX_SENDS),
        (SEND, MAX_SENDS + 3),
        (SENDS, MAX_SENDS + 4),
        (SEND, MAX_SENDS + 7),
    ]
    assert got == sizes


async def test_a_request_does_not_overtake_the_sends_before_it() -> None:
    buffer = Buffer()
    async with server(buffer) as s, client(s.endpoint) as c:
        await until(lambda: c.connected)
        seen = watched(s)
        await c.send(closed(0))
        await c.send(closed(1))
        await c.request(LEASE_REQUEST, timeout_s=LIMIT_S)
        await c.drain(timeout_s=LIMIT_S)
        assert [kind for kind, *_ in seen] == [SENDS, REQUEST]


async def test_of_a_frame_with_repeats_only_the_new_sends_are_handled() -> None:
    buffer = Buffer()
    async with server(buffer) as s, raw_dealer(s.endpoint) as stranger:
        await stranger.send_multipart([link_frame(SENDS), together(closed(0), closed(1))])
        await stranger.send_multipart([link_frame(SENDS), together(closed(0), closed(1), closed(2))])
        await until(lambda: len(buffer.got) == 3)
        # One is missing before these: they are asked for again, by what the answer to a ping says.
        await stranger.send_multipart([link_frame(SENDS, a=4), together(closed(4), closed(5))])
        await stranger.send_multipart([link_frame(PING, a=6, b=0)])
        assert (await pong(stranger))[1:] == (6, 3)
        assert s.bad_messages == 0
    assert buffer.got == [0, 1, 2]


@pytest.mark.parametrize(
    ("frames", "fact"),
    [
        ([together(closed(0), closed(1))[:-8]], "sends from 0 on: record with "),
        ([together(closed(0)) + bytes(8)], "sends from 0 on: record at byte "),
        ([together(*[closed(i) for i in range(MAX_SENDS + 1)])], f"bytes follow the last of {MAX_SENDS} records"),
        ([together(closed(0)), together(closed(1))], "sends in 2 frames; expected 1"),
        ([], "sends in 0 frames; expected 1"),
    ],
)
async def test_what_is_damaged_is_dropped_as_a_whole_and_comes_again(
    frames: Sequence[bytes], fact: str, caplog: pytest.LogCaptureFixture
) -> None:
    buffer = Buffer()
    async with server(buffer) as s, raw_dealer(s.endpoint) as stranger:
        await stranger.send_multipart([link_frame(SENDS), *frames])
        await until(lambda: s.bad_messages == 1)
        assert fact in caplog.text
        assert buffer.got == []
        await stranger.send_multipart([link_frame(SENDS), together(closed(0), closed(1))])
        await until(lambda: buffer.got == [0, 1])
        assert s.bad_messages == 1


async def test_one_bad_message_among_good_ones_is_refused_and_the_others_are_taken() -> None:
    buffer = Buffer()
    refused: list[tuple[int, str]] = []
    async with server(buffer) as s, client(s.endpoint) as c:
        c.on_refused = lambda message, reason: refused.append((message.num_turns, reason))
        for number in (0, -1, 2):
            await c.send(closed(number))
        await c.drain(timeout_s=LIMIT_S)
        assert [number for number, _ in refused] == [-1]
        assert "num_turns is -1" in refused[0][1]
        assert (c.stats.acked, c.stats.refused, s.bad_messages) == (2, 1, 1)
    assert buffer.got == [0, 2]


async def test_sends_in_one_frame_count_towards_the_window() -> None:
    buffer = Buffer()
    buffer.open.clear()
    async with server(buffer) as s, raw_dealer(s.endpoint) as stranger:
        for first in range(0, 10 * MAX_SENDS, MAX_SENDS):
            numbers = range(first, first + MAX_SENDS)
            await stranger.send_multipart([link_frame(SENDS, a=first), together(*map(closed, numbers))])
        await stranger.send_multipart([link_frame(PING, a=10 * MAX_SENDS, b=0)])
        assert (await pong(stranger))[2] == s._sends.max_ahead
        assert s.peers["stranger"].queued <= s._sends.max_ahead
        buffer.open.set()
