"""Ends that connect: they watch their connection, and make it anew where libzmq would not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from atpo_async.config import LinksConfig
from atpo_async.core.errors import SetupError
from atpo_async.links import addresses
from atpo_async.links.authentication import require_keys_off_loopback
from atpo_async.links.keys import CLIENT_KEY, SERVER_KEY, load_pair, load_public
from atpo_async.links.link import Link
from atpo_async.links.pump import Pump, Socket
from atpo_async.wire import codec

log = logging.getLogger("atpo.links")

_FIND_EVERY_S = 0.1
_SILENT_BEATS = 5
"""Heartbeats without a sign of life after which a connection that seems to be up is made anew."""


class ConnectingLink(Link):
    """A link that connects: it watches its connection and tries again where libzmq would not.

    Args:
        endpoint: of the other end; empty where it is not known yet, which needs ``locate``.
        locate: returns the other end's endpoint, empty while it is not known.  It is called once a heartbeat while
            there is no connection, so that an end that was restarted at another address is found.
    """

    def __init__(self, endpoint: str, settings: LinksConfig, *, locate: Callable[[], str] | None = None) -> None:
        super().__init__(endpoint, settings)
        self._locate = locate
        self._monitor: Pump | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._end: Socket | None = None
        self._connected = False
        self._silent_beats = 0
        self._trouble = ""
        self._server_key = ""
        """Public key of the other end (Z85); empty for ``server.key`` of the folder."""

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def trouble(self) -> str:
        """Why the last connection failed, as far as this end knows."""
        return self._trouble

    def connection_status(self) -> dict[str, Any]:
        """Part of ``link_status``."""
        return {
            "endpoint": self.endpoint,
            "keys": self.settings.keys_dir is not None,
            "connected": self._connected,
            "trouble": self._trouble,
        }

    def _on_connected(self) -> None:
        """A connection is up; the previous one may have lost anything."""

    def _on_lost(self) -> None:
        """The connection broke; libzmq goes on trying."""

    def _connect(self, socket: Socket) -> None:
        folder = self.settings.keys_dir
        if folder is not None:
            socket.curve_publickey, socket.curve_secretkey = load_pair(folder, CLIENT_KEY)
        events = (
            zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_DISCONNECTED
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        )
        self._end = socket
        self._monitor = Pump(socket.get_monitor_socket(events), self._on_event)
        if self._locate is not None:
            self.endpoint = self._locate() or self.endpoint
        if self.endpoint:
            self._dial(socket)
        elif self._locate is not None:
            self._spawn(self._find(), f"{self.title} finds the other end")

    async def _find(self) -> None:
        """Waits for: the other end's endpoint.  Ended by: that, or close()."""
        while not self.endpoint:
            await asyncio.sleep(min(_FIND_EVERY_S, self.settings.heartbeat_s))
            self._follow()

    def _dial(self, socket: Socket) -> None:
        require_keys_off_loopback(self.endpoint, self.settings, "connect to")
        if (folder := self.settings.keys_dir) is not None:
            socket.curve_serverkey = self._server_key.encode() or load_public(folder / f"{SERVER_KEY}.key")
        socket.setsockopt(zmq.IPV6, int(addresses.is_ipv6(addresses.host_of(self.endpoint))))
        try:
            socket.connect(self.endpoint)
        except zmq.ZMQError as exc:
            raise SetupError(f"cannot connect to {self.endpoint}: {exc.strerror}; expected tcp://host:port") from None

    def _follow(self) -> None:
        """Once a heartbeat while there is no connection: connect to where the other end listens now."""
        found = "" if self._locate is None else self._locate()
        socket = self._end
        if not found or found == self.endpoint or socket is None or socket.closed:
            return
        log.info("%s: the other end is at %s now (before: %s)", self.title, found, self.endpoint or "unknown")
        self.move(found, self._server_key)

    def move(self, endpoint: str, server_key: str = "") -> None:
        """Connect to another server from now on.

        Args:
            endpoint: of it.
            server_key: its public key (Z85); empty for ``server.key`` of the folder.
        """
        socket = self._end
        if socket is None or socket.closed:
            self.endpoint, self._server_key = endpoint, server_key
            return
        if self.endpoint:
            with contextlib.suppress(zmq.ZMQError):
                socket.disconnect(self.endpoint)
        self._connected = False
        self.endpoint, self._server_key = endpoint, server_key
        try:
            self._dial(socket)
        except SetupError as exc:
            self._trouble = str(exc)
            log.error("%s: %s", self.title, exc)

    def _close_sockets(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
        if self._monitor is not None:
            self._monitor.close()

    def _on_event(self, frames: list[codec.Buffer], _: str) -> None:
        kind = parse_monitor_message([bytes(frame) for frame in frames])["event"]
        if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._connected = True
            self._silent_beats = 0
            self._trouble = ""
            self._on_connected()
            return
        if kind == zmq.EVENT_DISCONNECTED:
            if self._connected:
                self._connected = False
                self._on_lost()
            return
        if kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._trouble = "it refused our key: our public key must lie in its links.keys_dir"
        else:
            self._trouble = "the handshake failed: both ends need keys or neither, and server.key must be that server's"
        # libzmq takes a refusal as final.  It is not: the key may be added, the server may be another one by then.
        self._try_later()

    def _try_later(self) -> None:
        if self._retry is None:
            self._retry = asyncio.get_running_loop().call_later(self.settings.heartbeat_s, self._reconnect)

    def _reconnect(self) -> None:
        self._retry = None
        socket = self._end
        if socket is not None and not socket.closed and not self._connected:
            with contextlib.suppress(zmq.ZMQError):
                socket.disconnect(self.endpoint)
            if self.endpoint:
                socket.connect(self.endpoint)

    def _renew(self, whose: str) -> None:
        """Once a heartbeat: make a connection anew that seems to be up and carries nothing.

        libzmq may never notice it, nor the kernel where a third machine stands in between.
        """
        if not self._connected:
            self._follow()
        # Counted and not timed: our own loop may have stood still, with what came waiting in the socket.
        self._silent_beats += 1
        if self._connected and self._silent_beats > _SILENT_BEATS:
            log.info("%s connection is made anew: nothing came over it for %d heartbeats", whose, _SILENT_BEATS)
            self._connected = False
            self._reconnect()
