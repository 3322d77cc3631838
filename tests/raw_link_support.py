"""Peers that speak a link's frames by hand: what they say and as whom is the test's to choose."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from atpo_async.links.frames import ACK, LINK, PONG
from atpo_async.links.keys import load_pair, load_public
from tests.waiting_support import within


@contextlib.asynccontextmanager
async def raw_dealer(
    endpoint: str, identity: bytes = b"stranger", *, keys: Path | None = None, **options: Any
) -> AsyncIterator[zmq.asyncio.Socket]:
    """A socket that says what the test says, and as whom the test says; ``options`` are of libzmq."""
    context = zmq.asyncio.Context()
    try:
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, identity)
        if keys is not None:
            socket.curve_publickey, socket.curve_secretkey = load_pair(keys, "client")
            socket.curve_serverkey = load_public(keys / "server.key")
        for name, value in options.items():
            setattr(socket, name, value)
        socket.connect(endpoint)
        yield socket
    finally:
        context.destroy(linger=0)


async def pong(stranger: zmq.asyncio.Socket) -> tuple[int, int, int]:
    """Session and the two numbers of the answer to a ping; nothing but acknowledgements may come before it."""
    while (answer := LINK.unpack((await within(stranger.recv_multipart()))[0]))[1] != PONG:
        assert answer[1] == ACK
    return answer[2], answer[3], answer[4]


def link_frame(kind: int, session: int = 1, a: int = 0, b: int = 0) -> bytes:
    return struct.pack("<2sBQQQ", b"a1", kind, session, a, b)
