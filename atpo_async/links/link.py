"""What all ends of links share: opening and closing, socket options, tasks of their own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

import zmq

from atpo_async.config import LinksConfig
from atpo_async.links.frames import limits_of
from atpo_async.links.pump import Context, Socket
from atpo_async.status.facts import LINKS, publish_facts, withdraw_facts

log = logging.getLogger("atpo.links")

_HANDSHAKE_S = 10.0
"""At the least: several round trips of a slow link."""
_RECONNECT_MS = 50
_RECONNECT_MAX_MS = 1000


class Link:
    """One end of a link: it owns a ZeroMQ context, a socket with the options of all links, and its tasks.

    It is open inside ``async with``.
    """

    def __init__(self, endpoint: str, settings: LinksConfig) -> None:
        self.endpoint = endpoint
        self.settings = settings
        self._limits = limits_of(settings)
        self._context: Context | None = None
        self._beside: Link | None = None
        """Another open link of this process, whose context this one uses too."""
        self._published = ""
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        # One context each: CURVE's allow-list belongs to a context.
        self._context = zmq.Context() if self._beside is None else self._beside._context
        if self._context is None:
            raise AssertionError("the link beside this one is not open")
        try:
            self._open(self._context)
        except BaseException:
            await self.close()
            raise
        self._published = f"{LINKS}{self.title}"
        publish_facts(self._published, self.link_status)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what is under way and close the socket at once; what is unacknowledged is lost.  Idempotent."""
        if self._published:
            withdraw_facts(self._published)
            self._published = ""
        # First the sockets: what arrived while tasks end would start new ones.
        self._close_sockets()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        try:
            if tasks:
                await asyncio.wait(tasks)
        finally:
            self._close_context()

    @property
    def title(self) -> str:
        """Name of this end, different from those of the other ends of its process."""
        raise NotImplementedError

    def link_status(self) -> dict[str, Any]:
        """State of this end, for people and as JSON; seconds count up to now."""
        raise NotImplementedError

    def _close_context(self) -> None:
        if self._context is not None and self._beside is None:
            self._context.destroy(linger=0)
        self._context = None

    def _open(self, context: Context) -> None:
        raise NotImplementedError

    def _close_sockets(self) -> None:
        raise NotImplementedError

    def _spawn(self, coro: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(coro, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("task %s failed", task.get_name(), exc_info=exc)

    def _socket(self, context: Context, kind: int) -> Socket:
        socket = context.socket(kind)
        socket.linger = 0
        # The link frame and the routing id come on top; the exact limit is the wire's, before it parses.
        socket.setsockopt(zmq.MAXMSGSIZE, self.settings.max_message_bytes + 4096)
        # Limits the wait for the rest of a greeting that was cut short, for which libzmq waits 30 s.
        socket.setsockopt(zmq.HANDSHAKE_IVL, int(1000 * max(_HANDSHAKE_S, 5 * self.settings.heartbeat_s)))
        socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        # The kernel finds connections that died without a word: pings keep something unacknowledged under way, and
        # keep-alives do where no pings are sent.  Not libzmq's own heartbeats: with a full receive queue they abort the
        # process when the peer goes away (known, and open in libzmq 4.3.5).
        beat_s = max(1, round(self.settings.heartbeat_s))
        socket.setsockopt(zmq.TCP_MAXRT, 5000 * beat_s)
        for option, value in (
            (zmq.TCP_KEEPALIVE, 1),
            (zmq.TCP_KEEPALIVE_IDLE, beat_s),
            (zmq.TCP_KEEPALIVE_INTVL, beat_s),
            (zmq.TCP_KEEPALIVE_CNT, 5),
        ):
            socket.setsockopt(option, value)
        return socket
