"""ZeroMQ sockets on the event loop, their options and keys: what clients, servers and announcements have in common."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Self

import zmq
from zmq.utils.monitor import parse_monitor_message

from atpo_async.config import LinksConfig
from atpo_async.core.errors import SetupError
from atpo_async.links import addresses, ports
from atpo_async.links.frames import limits_of, worth_a_line
from atpo_async.links.keys import CLIENT_KEY, SERVER_KEY, KeyFolder, load_pair, load_public
from atpo_async.status.facts import LINKS, publish_facts, withdraw_facts
from atpo_async.wire import codec

log = logging.getLogger("atpo.links")

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]

# As plain integers: these are used for every frame.
_NOBLOCK = int(zmq.NOBLOCK)
_NOBLOCK_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_ZERO_COPY_BYTES = 1 << 16
_TRACKED_BYTES = 1 << 12
"""Frames of replies that are smaller are not counted: their number is bounded."""

BURST = 8
"""Messages taken from a socket, or handled, before others on the loop get their turn (what travelled together is not
parted).  From a commit's end to the next one's beginning the loop goes round several times, so a round has to be short
(measured: 32 costs an eighth of the throughput)."""
_MAX_FRAMES = 16
"""Of a message; what more a hostile peer puts into one is read and thrown away."""
_FIND_EVERY_S = 0.1
_RECONNECT_MS = 50
_RECONNECT_MAX_MS = 1000
_MAX_ADDRESSES = 1024
_LOCAL = ("ipc://", "inproc://")
_SILENT_BEATS = 5
"""Heartbeats without a sign of life after which a connection that seems to be up is made anew."""

# What a connection that came to nothing was, by the protocol error that libzmq reports of it.
_HANDSHAKE_S = 10.0
"""At the least: several round trips of a slow link."""
_NO_KEY, _WRONG_SERVER_KEY, _NO_HANDSHAKE = "speaks without a key", "has another server's key", "no handshake"
_HANDSHAKE_FAILURES = {
    int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH): _NO_KEY,
    int(zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC): _WRONG_SERVER_KEY,
}


def is_loopback(endpoint: str) -> bool:
    """Whether only this machine can take part."""
    if endpoint.startswith(_LOCAL):
        return True
    return endpoint.startswith("tcp://") and addresses.is_loopback(addresses.host_of(endpoint))


def _require_valid(endpoint: str) -> None:
    """libzmq itself takes port 99999 and means 34463."""
    if endpoint.startswith(_LOCAL):
        return
    try:
        if not endpoint.startswith("tcp://"):
            raise ValueError("expected tcp://HOST:PORT")
        addresses.split(endpoint)
    except ValueError as exc:
        raise SetupError(f"endpoint {endpoint!r} is none; {exc}") from None


def _require_keys_off_loopback(endpoint: str, settings: LinksConfig, verb: str) -> None:
    _require_valid(endpoint)
    if settings.keys_dir is None and not is_loopback(endpoint):
        raise SetupError(
            f"will not {verb} {endpoint} without keys: it is not a loopback address; "
            "set links.keys_dir to a folder with CURVE keys (`atpo keys new` makes one), or use links.host 127.0.0.1"
        )


class Pump:
    """A zmq socket on the event loop.

    zmq's descriptor is edge-triggered and shared by both directions: a send can swallow the edge that told of
    input.  So after every send, and after a burst that may have left input behind, the socket is looked at again.

    Args:
        socket: non-blocking use only.
        on_message: called with the frames of a message and with the sender's user id, which the allow-list gave it;
            returns how many messages were in it, where that is not one.
        on_turn: called after each burst.
        users: whether there is an allow-list; else the user id is empty.
    """

    def __init__(
        self,
        socket: Socket,
        on_message: Callable[[list[codec.Buffer], str], int | None],
        on_turn: Callable[[], None] | None = None,
        *,
        users: bool = False,
    ) -> None:
        self._socket = socket
        self._on_message = on_message
        self._on_turn = on_turn
        self._users = users
        self._loop = asyncio.get_running_loop()
        self._scheduled = False
        self._fd = int(socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._turn)
        self.look_again()

    @property
    def closed(self) -> bool:
        return bool(self._socket.closed)

    def send(self, frames: Sequence[codec.Buffer]) -> bool:
        """Whether the socket took them; it does not when nobody is connected, or when they do not read."""
        send, last = self._socket.send, len(frames) - 1
        try:
            for i, frame in enumerate(frames):
                # Large frames go out without a copy; for small ones the copy is cheaper.
                send(frame, _NOBLOCK if i == last else _NOBLOCK_MORE, len(frame) < _ZERO_COPY_BYTES)
        except zmq.Again:
            return False
        except zmq.ZMQError as exc:
            if exc.errno == zmq.EHOSTUNREACH:
                return False
            raise
        if not self._scheduled:
            self.look_again()
        return True

    def send_tracked(self, frames: Sequence[codec.Buffer]) -> list[zmq.MessageTracker] | None:
        """``send``, and who tells when libzmq has let go of each frame of some size; None where it was not taken."""
        trackers = []
        try:
            for i, frame in enumerate(frames):
                flags = _NOBLOCK if i == len(frames) - 1 else _NOBLOCK_MORE
                if len(frame) < _TRACKED_BYTES:
                    self._socket.send(frame, flags, True)
                    continue
                tracker = self._socket.send(
                    zmq.Frame(frame, track=True, copy=False, copy_threshold=0), flags, False, True
                )
                assert isinstance(tracker, zmq.MessageTracker)
                trackers.append(tracker)
        except zmq.Again:
            return None
        except zmq.ZMQError as exc:
            if exc.errno == zmq.EHOSTUNREACH:
                return None
            raise
        self.look_again()
        return trackers

    def look_again(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._turn)

    def close(self) -> None:
        if not self._socket.closed:
            self._loop.remove_reader(self._fd)
            self._socket.close(0)

    def _turn(self) -> None:
        self._scheduled = False
        receive, on_message, users = self._socket.recv, self._on_message, self._users
        taken = 0
        while taken < BURST:
            if self._socket.closed:
                return
            try:
                # As frame objects: those know whether more follow, asking the socket costs as much as a frame.
                frame = receive(_NOBLOCK, False)
                first = frame
                frames: list[codec.Buffer] = [frame.bytes]
                while frame.more:
                    frame = receive(_NOBLOCK, False)
                    if len(frames) < _MAX_FRAMES:
                        frames.append(frame.bytes if len(frame) < _ZERO_COPY_BYTES else frame.buffer)
            except zmq.Again:
                break
            taken += 1
            try:
                taken += (on_message(frames, str(first.get("User-Id")) if users else "") or 1) - 1
            # Whatever one message did, the ones behind it must still be read: no further edge would tell of them.
            except Exception:
                log.exception("a frame could not be handled")
        else:
            self.look_again()
        if self._on_turn is not None:
            self._on_turn()


# --- who is let in ---------------------------------------------------------------------------------------------


class Refusals:
    """Counts who was not let in, and logs it: the first ones of an address, then ever more sparsely."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        """Reason -> how often."""
        self._lines: OrderedDict[tuple[str, str], int] = OrderedDict()

    def note(self, endpoint: str, address: str, reason: str, fact: str = "") -> None:
        """One more.  ``fact`` is the rest of the sentence."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        count = self._lines.pop((address, reason), 0) + 1
        self._lines[address, reason] = count
        if len(self._lines) > _MAX_ADDRESSES:
            self._lines.popitem(last=False)
        if count == 1 or (count > 3 and worth_a_line(count)):
            log.warning("%s refused %s (%d times): %s%s", endpoint, address, count, reason, fact)

    @property
    def total(self) -> int:
        return sum(self.counts.values())


class Doorkeeper:
    """Answers libzmq's question (ZAP, RFC 27) who may connect: those whose public key lies in the folder.

    The key becomes the connection's user id, which libzmq attaches to every message of it.
    """

    def __init__(self, context: Context, keys: KeyFolder, refusals: Refusals, endpoint: str) -> None:
        self._keys = keys
        self._refusals = refusals
        self._endpoint = endpoint
        socket = context.socket(zmq.REP)
        socket.linger = 0
        socket.bind("inproc://zeromq.zap.01")
        self._pump = Pump(socket, self._on_question)

    def close(self) -> None:
        self._pump.close()

    def _on_question(self, frames: list[codec.Buffer], _: str) -> None:
        version, request_id, _domain, address, _identity, mechanism, *credentials = map(bytes, frames)
        key = zmq.utils.z85.encode(credentials[0]).decode() if mechanism == b"CURVE" and credentials else ""
        # At every connection, so that a key can be added or taken away while the run goes on.
        self._keys.look()
        allowed = key in self._keys.names
        if not allowed:
            reason = "is no learner's key" if key in self._everybody() else "unknown key"
            where = f", its public key {key} is not in {self._keys.folder}"
            self._refusals.note(self._endpoint, address.decode(errors="replace"), reason, where)
        status = [b"200", b"OK", key.encode()] if allowed else [b"400", b"unknown key", b""]
        self._pump.send([version, request_id, *status, b""])

    def _everybody(self) -> frozenset[str]:
        if not self._keys.learners_only:
            return frozenset()
        everybody = KeyFolder(self._keys.folder)
        everybody.look()
        return frozenset(everybody.names)


# --- links -----------------------------------------------------------------------------------------------------


class Link:
    """What all ends share: a context of its own, options, keys, owned tasks, the way in and out."""

    def __init__(self, endpoint: str, settings: LinksConfig) -> None:
        self.endpoint = endpoint
        self.settings = settings
        self._limits = limits_of(settings)
        self._context: Context | None = None
        self._published = ""
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        # One context each: CURVE's allow-list belongs to a context.
        self._context = zmq.Context()
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
        """Tells this link from the others of its process."""
        raise NotImplementedError

    def link_status(self) -> dict[str, Any]:
        """This end for people and for JSON; seconds are as of now."""
        raise NotImplementedError

    def _close_context(self) -> None:
        if self._context is not None:
            self._context.destroy(linger=0)
            self._context = None

    def _open(self, context: Context) -> None:
        raise NotImplementedError

    def _close_sockets(self) -> None:
        raise NotImplementedError

    def _now(self) -> float:
        """Seconds, monotonic, as the event loop's; from any thread."""
        return time.monotonic()

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
        # Room for the link frame and the routing id; the exact limit is the wire's, before it parses.
        socket.setsockopt(zmq.MAXMSGSIZE, self.settings.max_message_bytes + 4096)
        # A greeting that was cut short is waited for no longer; with libzmq's 30 s it would be.
        socket.setsockopt(zmq.HANDSHAKE_IVL, int(1000 * max(_HANDSHAKE_S, 5 * self.settings.heartbeat_s)))
        socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        # The kernel finds connections that died without a word: pings keep something unacknowledged under way, and
        # keep-alives do where nobody pings.  Not libzmq's own heartbeats: with a full receive queue they abort the
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


class BindingLink(Link):
    """A link that binds: with keys if there are any, and it counts whom it does not let in.

    Args:
        endpoint: with port 0 any free one is taken, ``former_port`` where that is free.
        former_port: where it listened before, and peers may look for it still; 0 for none.
        setting: what decides about the port, for errors: ``links.actors_port``.
        learners_only: with keys, let in only those that may be the learner.
    """

    def __init__(
        self,
        endpoint: str,
        settings: LinksConfig,
        *,
        former_port: int = 0,
        setting: str = "the port in [links]",
        learners_only: bool = False,
    ) -> None:
        super().__init__(endpoint, settings)
        self._former_port = former_port
        self._setting = setting
        self._refusals = Refusals()
        self._keys = None if settings.keys_dir is None else KeyFolder(settings.keys_dir, learners_only=learners_only)
        self._doorkeeper: Doorkeeper | None = None
        self._monitor: Pump | None = None

    @property
    def refused_connections(self) -> int:
        """Connections not let in, since the start."""
        return self._refusals.total

    def _bind(self, socket: Socket, context: Context) -> None:
        """Bind, and learn the real endpoint."""
        _require_keys_off_loopback(self.endpoint, self.settings, "bind")
        if self._keys is not None:
            public, secret = load_pair(self._keys.folder, SERVER_KEY)
            self._keys.look()
            # Before the bind: without an allow-list libzmq lets everybody in.
            self._doorkeeper = Doorkeeper(context, self._keys, self._refusals, self.endpoint)
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
        for pump in (self._monitor, self._doorkeeper):
            if pump is not None:
                pump.close()

    def _on_failure(self, frames: list[codec.Buffer], _: str) -> None:
        event = parse_monitor_message([bytes(frame) for frame in frames])
        reason = _NO_HANDSHAKE
        if event["event"] == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            reason = _HANDSHAKE_FAILURES.get(event["value"], reason)
        # libzmq tells no address of these: the connection is gone by the time it reports them.
        self._refusals.note(self.endpoint, "a connection", reason)


class ConnectingLink(Link):
    """A link that connects: it watches its connection and tries again where libzmq would not.

    Args:
        endpoint: empty where it is not known yet; then ``locate`` has to be there.
        locate: where the other end is now, or nothing while that is not known: asked once a heartbeat while there is no
            connection, so that an end that came back elsewhere is found.
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

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def trouble(self) -> str:
        """Why the last connection came to nothing, as far as it is known here."""
        return self._trouble

    def _on_connected(self) -> None:
        """A connection is up; the one before may have swallowed anything."""

    def _on_lost(self) -> None:
        """The connection broke; libzmq goes on trying."""

    def _connect(self, socket: Socket) -> None:
        folder = self.settings.keys_dir
        if folder is not None:
            socket.curve_publickey, socket.curve_secretkey = load_pair(folder, CLIENT_KEY)
            socket.curve_serverkey = load_public(folder / f"{SERVER_KEY}.key")
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
        """Waits for: the other end to say where it listens.  Ended by: that, or close()."""
        while not self.endpoint:
            await asyncio.sleep(min(_FIND_EVERY_S, self.settings.heartbeat_s))
            self._follow()

    def _dial(self, socket: Socket) -> None:
        _require_keys_off_loopback(self.endpoint, self.settings, "connect to")
        socket.setsockopt(zmq.IPV6, int(addresses.is_ipv6(addresses.host_of(self.endpoint))))
        try:
            socket.connect(self.endpoint)
        except zmq.ZMQError as exc:
            raise SetupError(f"cannot connect to {self.endpoint}: {exc.strerror}; expected tcp://host:port") from None

    def _follow(self) -> None:
        """Once a heartbeat while there is no connection: go where the other end is now."""
        found = "" if self._locate is None else self._locate()
        socket = self._end
        if not found or found == self.endpoint or socket is None or socket.closed:
            return
        log.info("%s: the other end is at %s now (before: %s)", self.title, found, self.endpoint or "unknown")
        if self.endpoint:
            with contextlib.suppress(zmq.ZMQError):
                socket.disconnect(self.endpoint)
        self.endpoint = found
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
        """Once a heartbeat: make a connection anew that is up and leads nowhere, which libzmq may never notice, nor the
        kernel where something stands in between."""
        if not self._connected:
            self._follow()
        # Counted and not timed: our own loop may have stood still, with what came waiting in the socket.
        self._silent_beats += 1
        if self._connected and self._silent_beats > _SILENT_BEATS:
            log.info("%s connection is made anew: nothing came over it for %d heartbeats", whose, _SILENT_BEATS)
            self._connected = False
            self._reconnect()
