"""A server and clients on loopback, a handler that can be held back, and strangers on a raw socket."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from atpo_async.config import LinksConfig
from atpo_async.links.client import Client
from atpo_async.links.server import Server
from atpo_async.links.server.sessions import Session
from atpo_async.run.endpoints import Endpoints
from atpo_async.wire import messages as m

ANY_PORT = "tcp://127.0.0.1:0"
FAST = LinksConfig(window=8, heartbeat_s=0.05, deadline_s=10.0, give_up_s=20.0, max_message_bytes=1 << 20)


def changed(settings: LinksConfig, **changes: Any) -> LinksConfig:
    """``settings`` with other values, which may lie outside the bounds of a configuration."""
    return settings.model_copy(update=changes)


def fast(**changes: Any) -> LinksConfig:
    """``FAST`` with other values."""
    return changed(FAST, **changes)


_HELD: list[socket.socket] = []
"""Bound and not listening, until this process ends: no other process is given their ports meanwhile."""


def reserved_port() -> int:
    """A port of 127.0.0.1 at which nothing listens, and where a socket with SO_REUSEADDR, as ZeroMQ's, may."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    _HELD.append(holder)
    port: int = holder.getsockname()[1]
    return port


def reserved_endpoints() -> Endpoints:
    """Four of them, for a test that has to know them before its roles listen."""
    return Endpoints(*(f"tcp://127.0.0.1:{reserved_port()}" for _ in range(4)))


def closed(number: int, tree_id: str = "t") -> m.TreeClosed:
    return m.TreeClosed(run="r", tree_id=tree_id, lease_epoch=0, num_turns=number, failed_branches=0, failures={})


LEASE_REQUEST = m.LeaseRequest(run="r", actor="a", count=1, version=0)
NO_LEASES = m.Leases(leases=(), closed_because=None, retry_after_s=1.0, finished=False)


class Buffer:
    """A handler that notes what it gets and can be held back."""

    def __init__(self) -> None:
        self.got: list[int] = []
        self.open = asyncio.Event()
        self.open.set()
        self.requests = 0

    async def __call__(self, peer: str, message: Any) -> Any:
        if isinstance(message, m.LeaseRequest):
            self.requests += 1
            await self.open.wait()
            return NO_LEASES
        await self.open.wait()
        self.got.append(message.num_turns)
        return None


def server(handler: Any, endpoint: str = ANY_PORT, settings: LinksConfig = FAST, **more: Any) -> Server:
    return Server(endpoint, name="buffer", receives=m.ActorToBuffer, handler=handler, settings=settings, **more)


def client(endpoint: str, settings: LinksConfig = FAST, identity: str = "actor-0", **more: Any) -> Client:
    return Client(endpoint, peer="buffer", identity=identity, receives=m.BufferToActor, settings=settings, **more)


def session_of(s: Server, name: str) -> Session:
    session = s.sessions.named(name)
    assert session is not None, f"{s.name} knows no client {name}"
    return session
