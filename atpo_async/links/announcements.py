"""Announcements: messages that reach the listeners connected at that moment, and may be missed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from typing import Any

import zmq

from atpo_async.config import LinksConfig
from atpo_async.core.errors import BadMessage
from atpo_async.links.binding import BindingLink
from atpo_async.links.connecting import ConnectingLink
from atpo_async.links.frames import encode_within, worth_a_line
from atpo_async.links.pump import Context, Pump, Socket
from atpo_async.wire import codec

log = logging.getLogger("atpo.links")


_UNREAD = 256
"""Announcements that wait at either end for a listener that does not read; past them the oldest are dropped."""
_BEAT = [b""]
"""A heartbeat: shows that the announcer lives and can be reached."""


class Announcer(BindingLink):
    """PUB: sends to the listeners connected now.  Nothing may depend on an announcement being received."""

    _pub: Socket | None = None

    def _open(self, context: Context) -> None:
        self._pub = self._socket(context, zmq.PUB)
        self._pub.setsockopt(zmq.SNDHWM, _UNREAD)
        self._bind(self._pub, context)
        self._spawn(self._beat(), "announcer heartbeat")

    async def _beat(self) -> None:
        """Waits for: the clock.  Ended by: close()."""
        while True:
            await asyncio.sleep(self.settings.heartbeat_s)
            if self._pub is not None and not self._pub.closed:
                self._pub.send_multipart(_BEAT, zmq.NOBLOCK)

    def _close_sockets(self) -> None:
        super()._close_sockets()
        if self._pub is not None:
            self._pub.close(0)

    @property
    def title(self) -> str:
        return f"announcements at {self.endpoint}"

    def link_status(self) -> dict[str, Any]:
        return {
            "kind": "announcer",
            "name": "announcements",
            "endpoint": self.endpoint,
            "keys": self._keys is not None,
            "refused_connections": dict(self._refused.counts),
        }

    async def publish(self, message: Any) -> None:
        """Send to the listeners connected now.  Raises BadMessage if the message is none or too large."""
        if self._pub is not None and not self._pub.closed:
            self._pub.send_multipart(encode_within(message, self._limits), zmq.NOBLOCK)


class Listener(ConnectingLink):
    """SUB: announcements, oldest first; past 256 unread ones the oldest are dropped."""

    def __init__(self, endpoint: str, *, receives: Any, settings: LinksConfig) -> None:
        super().__init__(endpoint, settings)
        self.bad_messages = 0
        self._receives = receives
        self._pump: Pump | None = None
        self._unread: deque[Any] = deque(maxlen=_UNREAD)
        self._arrived = asyncio.Event()

    def _open(self, context: Context) -> None:
        socket = self._socket(context, zmq.SUB)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._connect(socket)
        self._pump = Pump(socket, self._on_frames)
        self._spawn(self._watch(), "listener heartbeat")

    async def _watch(self) -> None:
        """Waits for: the clock.  Ended by: close()."""
        while True:
            await asyncio.sleep(self.settings.heartbeat_s)
            self._renew("a listener's")

    def _close_sockets(self) -> None:
        super()._close_sockets()
        if self._pump is not None:
            self._pump.close()

    @property
    def title(self) -> str:
        return f"announcements from {self.endpoint}"

    def link_status(self) -> dict[str, Any]:
        return {
            "kind": "listener",
            "name": "announcements",
            "unread": len(self._unread),
            "bad": self.bad_messages,
            **self.connection_status(),
        }

    def _on_frames(self, frames: list[codec.Buffer], _: str) -> None:
        self._silent_beats = 0
        if frames == _BEAT:
            return
        try:
            message = codec.decode(frames, self._receives, limits=self._limits)
        except BadMessage as exc:
            self.bad_messages += 1
            if worth_a_line(self.bad_messages):
                log.warning("bad announcement %d from %s: %s", self.bad_messages, self.endpoint, exc)
            return
        self._unread.append(message)
        self._arrived.set()

    async def next(self, *, timeout_s: float) -> Any:
        """The next announcement, or None if there is none within ``timeout_s``."""
        if not self._unread:
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._arrived.wait()
        return self._unread.popleft() if self._unread else None
