"""Ends that bind: which port they take, with which keys, and how many connections they refused."""

from __future__ import annotations

import logging

import zmq
from zmq.utils.monitor import parse_monitor_message

from atpo_async.config import LinksConfig
from atpo_async.links import addresses, ports
from atpo_async.links.authentication import Authenticator, RefusedConnections, require_keys_off_loopback
from atpo_async.links.keys import SERVER_KEY, KeyFolder, load_pair
from atpo_async.links.link import Link
from atpo_async.links.pump import Context, Pump, Socket
from atpo_async.wire import codec

log = logging.getLogger("atpo.links")

# Why a handshake failed, by the protocol error that libzmq reports.
_NO_KEY, _WRONG_SERVER_KEY, _NO_HANDSHAKE = "speaks without a key", "has another server's key", "no handshake"
_HANDSHAKE_FAILURES = {
    int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH): _NO_KEY,
    int(zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC): _WRONG_SERVER_KEY,
}


class BindingLink(Link):
    """A link that binds: with keys if there are any, and it counts the connections that it refuses.

    Args:
        endpoint: with port 0 any free one is taken, ``former_port`` where that is free.
        former_port: where it listened before, and peers may still try to reach it; 0 for none.
        setting: the configuration's field that sets the port, for errors: ``links.actors_port``.
        only: with keys, let in only those of this sub-folder (``keys.LEARNERS``, ``keys.FOLLOWERS``); empty for all.
    """

    def __init__(
        self,
        endpoint: str,
        settings: LinksConfig,
        *,
        former_port: int = 0,
        setting: str = "the port in [links]",
        only: str = "",
    ) -> None:
        super().__init__(endpoint, settings)
        self._former_port = former_port
        self._setting = setting
        self._refused = RefusedConnections()
        self._keys = None if settings.keys_dir is None else KeyFolder(settings.keys_dir, only=only)
        self._authenticator: Authenticator | None = None
        self._monitor: Pump | None = None

    @property
    def refused_connections(self) -> int:
        """Connections refused since the start."""
        return self._refused.total

    def _bind(self, socket: Socket, context: Context) -> None:
        """Bind, and learn the real endpoint."""
        require_keys_off_loopback(self.endpoint, self.settings, "bind")
        if self._keys is not None:
            public, secret = load_pair(self._keys.folder, SERVER_KEY)
            self._keys.look()
            # Before the bind: without an allow-list libzmq admits every peer.
            self._authenticator = Authenticator(context, self._keys, self._refused, self.endpoint)
            socket.curve_server = True
            socket.curve_publickey, socket.curve_secretkey = public, secret
            socket.setsockopt(zmq.ZAP_DOMAIN, b"atpo")
        failures = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        self._monitor = Pump(socket.get_monitor_socket(failures), self._on_failure)
        host = addresses.bindable(addresses.host_of(self.endpoint))
        socket.setsockopt(zmq.IPV6, int(addresses.is_ipv6(host)))
        self._bind_port(socket, host, addresses.port_of(self.endpoint))
        bound = socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        self.endpoint = bound.rstrip(b"\0").decode()

    def _bind_port(self, socket: Socket, host: str, port: int) -> None:
        former = self._former_port
        if port == 0 and former:
            try:
                socket.bind(addresses.endpoint_of(host, former))
                return
            except zmq.ZMQError as exc:
                why = f"is in use by {ports.holder(former)}" if exc.errno == zmq.EADDRINUSE else f": {exc.strerror}"
                log.warning(
                    "port %d, where %s was until now, %s; taking another: who was given that address needs the new one",
                    former, self.title.partition(" at ")[0], why,
                )  # fmt: skip
        try:
            socket.bind(addresses.endpoint_of(host, port))
        except zmq.ZMQError as exc:
            raise ports.refused(exc.errno, host=host, port=port, setting=self._setting) from None

    def _close_sockets(self) -> None:
        for pump in (self._monitor, self._authenticator):
            if pump is not None:
                pump.close()

    def _on_failure(self, frames: list[codec.Buffer], _: str) -> None:
        event = parse_monitor_message([bytes(frame) for frame in frames])
        reason = _NO_HANDSHAKE
        if event["event"] == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            reason = _HANDSHAKE_FAILURES.get(event["value"], reason)
        # libzmq reports no address of these: the connection is closed by the time it reports them.
        self._refused.note(self.endpoint, "a connection", reason)
