"""Peers that speak a link's frames by hand: what they say and as whom is the test's to choose."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from atpo_async.links.keys import load_pair, load_public


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


def link_frame(kind: int, session: int = 1, a: int = 0, b: int = 0) -> bytes:
    return struct.pack("<2sBQQQ", b"a1", kind, session, a, b)
