"""asyncio ZeroMQ: windows, acknowledgements, heartbeats, CURVE.  The only module that imports zmq.

``Client`` (DEALER) and ``Server`` (ROUTER) carry two kinds of traffic.

*Sends* are data that must not be lost.  The client numbers them and keeps each until the server's handler is done
with it.  The server takes them in order: what it has taken before it drops, what comes after a gap it drops too, and
the client goes back and sends again from the first one missing.  A handler therefore sees every message at least
once, in order, and more than once only across a restart of the server or when the handler itself failed.

*Requests* have one reply each.  The client repeats those that a lost connection may have swallowed; the server
remembers which it is working on and its last replies, so that a repeated request is not run twice.  Requests do not
wait for sends: a request may overtake the sends before it.

Link frames (before the two frames of ``atpo_async.wire``, where there are any) are fixed structs.  Nothing on a
socket is pickled.  Off the loopback interface every socket needs CURVE keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import secrets
import struct
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq
import zmq.auth
from zmq.utils.monitor import parse_monitor_message

from atpo_async import wire
from atpo_async.config import LinksConfig
from atpo_async.errors import AtpoError, BadMessage, PeerLost, SetupError
from atpo_async.messages import Refused

log = logging.getLogger("atpo.links")

_LINK = struct.Struct("<2sBQQQ")
_MAGIC = b"a1"
_SEND, _REQUEST, _PING, _ACK, _REFUSE, _REPLY, _PONG, _REPLACED = range(1, 9)

# As plain integers: these are used for every frame.
_NOBLOCK = int(zmq.NOBLOCK)
_NOBLOCK_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_ZERO_COPY_BYTES = 1 << 16

_BURST = 128
"""Messages taken from a socket, or handled, before others on the loop get their turn."""
_RETRY_PAUSES_S = (0.05, 0.5, 2.0)
"""A handler that fails on a send is run again after these; then the message is refused."""
_MAX_REASON = 2000
_MAX_PEERS = 4096
_RECONNECT_MS = 50
_RECONNECT_MAX_MS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """How links behave; the fields are those of ``[links]`` in the configuration."""

    window: int = 256
    heartbeat_s: float = 2.0
    deadline_s: float = 60.0
    give_up_s: float = 600.0
    max_message_bytes: int = 64 << 20
    keys_dir: Path | None = None

    @classmethod
    def from_config(cls, config: LinksConfig) -> LinkSettings:
        return cls(
            window=config.window,
            heartbeat_s=config.heartbeat_s,
            deadline_s=config.deadline_s,
            give_up_s=config.give_up_s,
            max_message_bytes=config.max_message_bytes,
            keys_dir=config.keys_dir,
        )

    @property
    def limits(self) -> wire.Limits:
        return wire.Limits(message_bytes=self.max_message_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkStats:
    """Counters of a client since it was opened."""

    waited_s: float
    """Summed over senders: time that send() waited for room in the window."""
    sent: int
    acked: int
    resent: int
    unacked: int
    refused: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerInfo:
    """A client as its server sees it."""

    identity: str
    silent_s: float
    """Since its last sign of life."""
    queued: int
    """Sends taken and not handled yet."""
    unsettled: int
    """Sends handled and not settled yet; see ``Server``'s ``settled``."""
    requests: int
    """Requests being worked on."""


# --- keys ------------------------------------------------------------------------------------------------------

SERVER_KEY = "server"
CLIENT_KEY = "client"


def make_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a CURVE key pair: ``NAME.key`` (public) and ``NAME.key_secret`` (mode 0600).

    A host that serves needs ``server.key_secret`` and a ``.key`` file of everyone it lets in; a host that connects
    needs ``client.key``, ``client.key_secret`` and the server's ``server.key``.

    Raises:
        SetupError: the pair is there already.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    public, secret = folder / f"{name}.key", folder / f"{name}.key_secret"
    for path in (public, secret):
        if path.exists():
            raise SetupError(f"key {path} exists; remove it first if its peers shall lose access")
    # Made empty and closed to others first: the secret is never readable, not for an instant.
    secret.touch(mode=0o600)
    zmq.auth.create_certificates(folder, name)
    secret.chmod(0o600)
    return public, secret


def _load_public(path: Path) -> bytes:
    try:
        return zmq.auth.load_certificate(path)[0]
    except (OSError, ValueError) as exc:
        raise SetupError(
            f"no CURVE public key at {path} ({exc}); copy it there, or make one: atpo keys {path.parent}"
        ) from None


def _load_pair(folder: Path, name: str) -> tuple[bytes, bytes]:
    path = folder / f"{name}.key_secret"
    try:
        mode = path.stat().st_mode
        if mode & 0o077:
            raise SetupError(
                f"secret key {path} has mode {mode & 0o777:04o}; others must not read it: chmod 600 {path}"
            )
        public, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as exc:
        raise SetupError(f"no CURVE secret key at {path} ({exc}); make one: atpo keys {folder}") from None
    if secret is None:
        raise SetupError(f"{path} holds no secret key; remove it and make a pair: atpo keys {folder}")
    return public, secret


def _is_loopback(endpoint: str) -> bool:
    transport, _, address = endpoint.partition("://")
    if transport != "tcp":
        return transport in ("ipc", "inproc")
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _require_valid(endpoint: str) -> None:
    """libzmq itself takes port 99999 and means 34463."""
    transport, separator, address = endpoint.partition("://")
    if transport in ("ipc", "inproc") and address:
        return
    host, _, port = address.rpartition(":")
    if transport != "tcp" or not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise SetupError(f"endpoint {endpoint!r} is none; expected tcp://host:port with a port up to 65535")


def _require_keys_off_loopback(endpoint: str, settings: LinkSettings, verb: str) -> None:
    _require_valid(endpoint)
    if settings.keys_dir is None and not _is_loopback(endpoint):
        raise SetupError(
            f"will not {verb} {endpoint} without keys: it is not a loopback address; "
            "set links.keys_dir to a folder with CURVE keys (`atpo keys DIR` makes one), or use links.host 127.0.0.1"
        )


class _AllowList:
    """Answers libzmq's question (ZAP, RFC 27) who may connect: those whose public key lies in the folder."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], folder: Path) -> None:
        self._folder = folder
        socket = context.socket(zmq.REP)
        socket.linger = 0
        socket.bind("inproc://zeromq.zap.01")
        self._pump = _Pump(socket, self._on_question)

    def close(self) -> None:
        self._pump.close()

    def _on_question(self, frames: list[bytes]) -> None:
        version, request_id, _domain, address, _identity, mechanism, *credentials = frames
        key = zmq.utils.z85.encode(credentials[0]) if mechanism == b"CURVE" and credentials else b""
        try:
            # Read at every connection, so that a key can be added or taken away while the run goes on.
            allowed = key in zmq.auth.load_certificates(self._folder)
        except (OSError, ValueError) as exc:
            log.error("keys in %s cannot be read, nobody is let in: %s", self._folder, exc)
            allowed = False
        if not allowed:
            log.warning("refused %s: its public key %s is not in %s", address.decode(), key.decode(), self._folder)
        status = [b"200", b"OK", key] if allowed else [b"400", b"unknown key", b""]
        self._pump.send([version, request_id, *status, b""])


# --- sockets on the loop ---------------------------------------------------------------------------------------


class _Pump:
    """A zmq socket on the event loop.

    zmq's descriptor is edge-triggered and shared by both directions: a send can swallow the edge that told of
    input.  So after every send, and after a burst that may have left input behind, the socket is looked at again.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        on_frames: Callable[[list[bytes]], None],
        on_turn: Callable[[], None] | None = None,
    ) -> None:
        self._socket = socket
        self._on_frames = on_frames
        self._on_turn = on_turn
        self._loop = asyncio.get_running_loop()
        self._scheduled = False
        self._fd = int(socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._turn)
        self.look_again()

    @property
    def closed(self) -> bool:
        return bool(self._socket.closed)

    def send(self, frames: Sequence[wire.Buffer]) -> bool:
        """Whether the socket took them; it does not when nobody is connected."""
        send, last = self._socket.send, len(frames) - 1
        try:
            for i, frame in enumerate(frames):
                # Large frames go out without a copy; for small ones the copy is cheaper.
                send(frame, _NOBLOCK if i == last else _NOBLOCK_MORE, copy=len(frame) < _ZERO_COPY_BYTES)
        except zmq.Again:
            return False
        except zmq.ZMQError as exc:
            if exc.errno == zmq.EHOSTUNREACH:
                return False
            raise
        self.look_again()
        return True

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
        receive = self._socket.recv_multipart
        for _ in range(_BURST):
            if self._socket.closed:
                return
            try:
                frames = receive(_NOBLOCK)
            except zmq.Again:
                break
            try:
                self._on_frames(frames)
            # Whatever one message did, the ones behind it must still be read: no further edge would tell of them.
            except Exception:
                log.exception("a frame could not be handled")
        else:
            self.look_again()
        if self._on_turn is not None:
            self._on_turn()


class _Link:
    """What all ends share: a context of its own, options, keys, owned tasks, the way in and out."""

    def __init__(self, endpoint: str, settings: LinkSettings) -> None:
        self.endpoint = endpoint
        self.settings = settings
        self._limits = settings.limits
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._allow_list: _AllowList | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        # One context each: CURVE's allow-list belongs to a context.
        self._context = zmq.Context()
        try:
            self._open(self._context)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what is under way and close the socket at once; what is unacknowledged is lost.  Idempotent."""
        # First the sockets: what arrived while tasks end would start new ones.
        self._close_sockets()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        try:
            if tasks:
                await asyncio.wait(tasks)
        finally:
            if self._allow_list is not None:
                self._allow_list.close()
                self._allow_list = None
            if self._context is not None:
                self._context.destroy(linger=0)
                self._context = None

    def _open(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
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

    def _socket(self, context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
        socket = context.socket(kind)
        beat_ms = max(1, int(self.settings.heartbeat_s * 1000))
        socket.linger = 0
        # Room for the link frame and the routing id; the exact limit is the wire's, before it parses.
        socket.setsockopt(zmq.MAXMSGSIZE, self.settings.max_message_bytes + 4096)
        if "[" in self.endpoint:
            socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        # These find connections that died without a word, also while a busy loop leaves our own pings unanswered.
        socket.setsockopt(zmq.HEARTBEAT_IVL, beat_ms)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, max(3 * beat_ms, 1000))
        return socket

    def _bind(self, socket: zmq.Socket[bytes], context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Bind with keys if there are any, and learn the real endpoint."""
        folder = self.settings.keys_dir
        _require_keys_off_loopback(self.endpoint, self.settings, "bind")
        if folder is not None:
            public, secret = _load_pair(folder, SERVER_KEY)
            # Before the bind: without an allow-list libzmq lets everybody in.
            self._allow_list = _AllowList(context, folder)
            socket.curve_server = True
            socket.curve_publickey, socket.curve_secretkey = public, secret
            socket.setsockopt(zmq.ZAP_DOMAIN, b"atpo")
        try:
            socket.bind(self.endpoint)
        except zmq.ZMQError as exc:
            if exc.errno == zmq.EADDRINUSE:
                raise SetupError(
                    f"cannot bind {self.endpoint}: the port is in use; stop what listens there, "
                    "or set another port in [links] (0 takes any free one)"
                ) from None
            raise SetupError(f"cannot bind {self.endpoint}: {exc.strerror}; check links.host and the port") from None
        bound = socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        self.endpoint = bound.rstrip(b"\0").decode()


class _Connecting(_Link):
    """A link that connects: it watches its connection and tries again where libzmq would not."""

    def __init__(self, endpoint: str, settings: LinkSettings) -> None:
        super().__init__(endpoint, settings)
        self._monitor: _Pump | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._connected = False
        self._trouble = ""

    @property
    def connected(self) -> bool:
        return self._connected

    def _on_connected(self) -> None:
        """A connection is up; the one before may have swallowed anything."""

    def _on_lost(self) -> None:
        """The connection broke; libzmq goes on trying."""

    def _connect(self, socket: zmq.Socket[bytes]) -> None:
        folder = self.settings.keys_dir
        _require_keys_off_loopback(self.endpoint, self.settings, "connect to")
        if folder is not None:
            socket.curve_publickey, socket.curve_secretkey = _load_pair(folder, CLIENT_KEY)
            socket.curve_serverkey = _load_public(folder / f"{SERVER_KEY}.key")
        events = (
            zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_DISCONNECTED
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        )
        monitor = socket.get_monitor_socket(events)
        self._monitor = _Pump(monitor, lambda frames: self._on_event(socket, frames))
        try:
            socket.connect(self.endpoint)
        except zmq.ZMQError as exc:
            raise SetupError(f"cannot connect to {self.endpoint}: {exc.strerror}; expected tcp://host:port") from None

    def _close_sockets(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
        if self._monitor is not None:
            self._monitor.close()

    def _on_event(self, socket: zmq.Socket[bytes], frames: list[bytes]) -> None:
        kind = parse_monitor_message(frames)["event"]
        if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._connected = True
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
            self._trouble = "the handshake failed: both ends need keys, or neither"
        # libzmq takes a refusal as final.  It is not: the key may be added, the server may be another one by then.
        if self._retry is None:
            self._retry = asyncio.get_running_loop().call_later(self.settings.heartbeat_s, self._reconnect, socket)

    def _reconnect(self, socket: zmq.Socket[bytes]) -> None:
        self._retry = None
        if not socket.closed and not self._connected:
            with contextlib.suppress(zmq.ZMQError):
                socket.disconnect(self.endpoint)
            socket.connect(self.endpoint)


def _encode(message: Any, limits: wire.Limits) -> list[wire.Buffer]:
    """Frames of a message that a receiver with the same limits takes."""
    frames = wire.encode(message)
    size = sum(map(len, frames))
    if size > limits.message_bytes or len(frames[0]) > limits.header_bytes:
        raise BadMessage(
            f"{type(message).__name__} of {size} bytes ({len(frames[0])} of header) exceeds links.max_message_bytes = "
            f"{limits.message_bytes} (an eighth of it for the header); raise it for every role"
        )
    return frames


# --- client ----------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Wait:
    """Somebody waits: for the log, and so that a loss can end it early."""

    what: str
    since: float
    timeout: asyncio.Timeout
    for_room: bool
    reported_s: float = 0.0


@dataclass(slots=True)
class _Pending:
    frames: list[wire.Buffer]
    answer: asyncio.Future[Any]
    transmitted: bool = False


class Client(_Connecting):
    """One peer's end of a link to a server.

    Args:
        endpoint: ``tcp://host:port`` of the server.
        peer: what the server is called in logs and errors.
        identity: this client's name, unique among the server's clients; a newer client of the same name replaces it.
        receives: the message types that replies may have; ``Refused`` is always one of them.
        settings: window, heartbeats, deadlines, keys.
        on_refused: called with a sent message that the server refused for good, and its reason.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        peer: str,
        identity: str,
        receives: Any,
        settings: LinkSettings,
        on_refused: Callable[[Any, str], None] | None = None,
    ) -> None:
        super().__init__(endpoint, settings)
        if not identity or len(identity.encode()) > 255 or identity[0] == "\0":
            raise SetupError(f"a link's identity must have 1 to 255 bytes, got {identity!r}")
        self.peer = peer
        self.identity = identity
        self.on_refused = on_refused
        self.on_acked: Callable[[int], None] | None = None
        """Called with how many sends are done with, acknowledged or refused, whenever there are more."""
        self._receives = receives | Refused
        self._session = secrets.randbits(64)
        self._pump: _Pump | None = None
        self._heard_at = 0.0
        self._owed_since = 0.0
        self._failure: AtpoError | None = None
        self._waits: set[_Wait] = set()
        # Sends.  base <= cursor <= next; those from base on are kept, those from cursor on are not on the wire.
        self._kept: dict[int, tuple[Any, list[wire.Buffer]]] = {}
        self._base = self._cursor = self._next = 0
        self._furthest = 0
        self._refusals: dict[int, str] = {}
        self._room = asyncio.Semaphore(settings.window)
        self._all_acked = asyncio.Event()
        self._all_acked.set()
        # Requests.
        self._pending: dict[int, _Pending] = {}
        self._next_request = 0
        self._request_room = asyncio.Semaphore(settings.window)
        self._waited_s = 0.0
        self._acked = self._resent = self._refused = 0

    @property
    def stats(self) -> LinkStats:
        now = self._now()
        return LinkStats(
            waited_s=self._waited_s + sum(now - w.since for w in self._waits if w.for_room),
            sent=self._next,
            acked=self._acked,
            resent=self._resent,
            unacked=len(self._kept),
            refused=self._refused,
        )

    @property
    def silent_s(self) -> float:
        """Since the server's last sign of life."""
        return self._now() - self._heard_at

    async def send(self, message: Any) -> None:
        """Send at least once.  Waits for: room in the window.  Unblocked by: the server's acknowledgements.

        Returns when the message is kept and on its way, not when it is acknowledged; see ``drain``.

        Raises:
            PeerLost: there was no room for ``give_up_s``, or the server is silent for that long.
            BadMessage: the message is none or too large.
        """
        frames = _encode(message, self._limits)
        if self._failure is not None:
            raise self._failure
        if self._room.locked():
            await self._wait(
                self._room.acquire(),
                what=f"{type(message).__name__} waits for room in a window of {self.settings.window}",
                timeout_s=self.settings.give_up_s,
                for_room=True,
            )
        else:
            # Does not suspend: the semaphore is free.
            await self._room.acquire()
        self._note_owed()
        self._kept[self._next] = (message, frames)
        self._next += 1
        self._all_acked.clear()
        self._transmit()

    async def request(self, message: Any, *, timeout_s: float) -> Any:
        """The server's reply, which may be ``Refused``.  Waits for: its handler.  Unblocked by: the reply.

        Raises:
            PeerLost: no reply within ``timeout_s``.
            BadMessage: the message or its reply is none or too large.
        """
        frames = _encode(message, self._limits)
        if self._failure is not None:
            raise self._failure
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        return await self._wait(
            self._exchange(_Pending(frames, answer)),
            what=f"{type(message).__name__} waits for its reply",
            timeout_s=timeout_s,
        )

    async def drain(self, *, timeout_s: float) -> None:
        """Wait until everything sent is acknowledged or refused.  Raises PeerLost after ``timeout_s``."""
        if self._failure is not None:
            raise self._failure
        if self._kept:
            await self._wait(self._all_acked.wait(), what="drain waits for acknowledgements", timeout_s=timeout_s)

    # --- internals

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _open(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        socket = self._socket(context, zmq.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, self.identity.encode())
        # Only onto a live connection: libzmq would keep messages for the next one, behind our back and out of order.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        # The window bounds what is in flight.
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        self._heard_at = self._now()
        self._connect(socket)
        self._pump = _Pump(socket, self._on_frames, self._transmit)
        self._spawn(self._beat(), f"{self.identity}->{self.peer} heartbeat")

    def _close_sockets(self) -> None:
        if self._kept:
            log.warning("%s closes with %d messages unacknowledged by %s", self.identity, len(self._kept), self._peer())
        super()._close_sockets()
        if self._pump is not None:
            self._pump.close()
        self._fail(PeerLost(f"the link of {self.identity} to {self._peer()} is closed"))

    def _peer(self) -> str:
        return f"{self.peer} at {self.endpoint}"

    async def _wait(self, awaitable: Awaitable[Any], *, what: str, timeout_s: float, for_room: bool = False) -> Any:
        wait = _Wait(what, self._now(), asyncio.timeout(timeout_s), for_room)
        self._waits.add(wait)
        try:
            async with wait.timeout:
                return await awaitable
        except TimeoutError:
            raise self._failure or PeerLost(self._explain(wait)) from None
        finally:
            self._waits.discard(wait)
            if for_room:
                self._waited_s += self._now() - wait.since

    def _explain(self, wait: _Wait) -> str:
        now = self._now()
        state = "connected" if self._connected else "not connected"
        trouble = f", {self._trouble}" if self._trouble else ""
        return (
            f"{self.identity} has waited {now - wait.since:.1f} s for {self._peer()}: {wait.what} "
            f"({state}, last sign of life {now - self._heard_at:.1f} s ago{trouble})"
        )

    def _note_owed(self) -> None:
        """From now on the server owes us a sign of life; before, its silence did not matter."""
        if not self._kept and not self._pending:
            self._owed_since = self._now()

    def _fail(self, failure: AtpoError) -> None:
        """For good: everybody who waits, and whoever calls from now on, gets ``failure``."""
        self._failure = self._failure or failure
        self._end_waits()

    def _end_waits(self) -> None:
        for wait in self._waits:
            wait.timeout.reschedule(self._now())

    async def _exchange(self, pending: _Pending) -> Any:
        async with self._request_room:
            self._note_owed()
            request_id = self._next_request
            self._next_request += 1
            self._pending[request_id] = pending
            try:
                self._transmit_request(request_id, pending)
                return await pending.answer
            finally:
                del self._pending[request_id]

    def _link(self, kind: int, a: int = 0, b: int = 0) -> bytes:
        return _LINK.pack(_MAGIC, kind, self._session, a, b)

    def _transmit(self) -> None:
        """Put on the wire, in order, what is not there; stops when the socket takes no more (no connection)."""
        pump = self._pump
        if pump is None or pump.closed:
            return
        while self._cursor < self._next:
            if not pump.send((self._link(_SEND, self._cursor, self._base), *self._kept[self._cursor][1])):
                return
            self._cursor += 1
            if self._cursor > self._furthest:
                self._furthest = self._cursor
            else:
                self._resent += 1
        for request_id, pending in self._pending.items():
            if not pending.transmitted and not self._transmit_request(request_id, pending):
                return

    def _transmit_request(self, request_id: int, pending: _Pending) -> bool:
        floor = next(iter(self._pending))
        if self._pump is None or self._pump.closed:
            return False
        pending.transmitted = self._pump.send((self._link(_REQUEST, request_id, floor), *pending.frames))
        return pending.transmitted

    def _on_connected(self) -> None:
        self._start_over()

    def _on_lost(self) -> None:
        log.info("%s lost its connection to %s; it goes on trying", self.identity, self._peer())

    def _start_over(self) -> None:
        """Everything that is not acknowledged or answered goes out again."""
        self._cursor = self._base
        for pending in self._pending.values():
            pending.transmitted = False
        self._transmit()

    def _ping(self) -> None:
        if self._pump is not None and not self._pump.closed:
            ids = [i for i, pending in self._pending.items() if pending.transmitted]
            self._pump.send((self._link(_PING, self._cursor, self._base), struct.pack(f"<{len(ids)}Q", *ids)))

    async def _beat(self) -> None:
        """Ping, and look at who has waited too long.  Waits for: the clock.  Ended by: close()."""
        while True:
            await asyncio.sleep(self.settings.heartbeat_s)
            self._ping()
            self._report_waits()

    def _report_waits(self) -> None:
        now, settings = self._now(), self.settings
        for wait in self._waits:
            waited_s = now - wait.since
            if waited_s - wait.reported_s > settings.deadline_s:
                wait.reported_s = waited_s
                log.warning("%s", self._explain(wait))
        silent_s = now - max(self._heard_at, self._owed_since)
        if (self._kept or self._pending) and silent_s > settings.give_up_s and self._failure is None:
            trouble = f" ({self._trouble})" if self._trouble else ""
            self._fail(
                PeerLost(
                    f"{self.identity} gives up on {self._peer()}: no sign of life for {silent_s:.1f} s with "
                    f"{len(self._kept)} messages unacknowledged and {len(self._pending)} requests open{trouble}"
                )
            )
            log.error("%s", self._failure)

    def _on_frames(self, frames: list[bytes]) -> None:
        try:
            magic, kind, session, a, b = _LINK.unpack(frames[0])
        except struct.error:
            magic = b""
        if magic != _MAGIC:
            log.warning("%s got a frame from %s that is no link frame; dropped", self.identity, self._peer())
            return
        self._heard_at = self._now()
        if session != self._session:
            return
        if kind == _ACK:
            self._on_ack(a)
        elif kind == _REPLY:
            self._on_reply(a, frames[1:])
        elif kind == _REFUSE:
            if self._base <= a < self._next and len(frames) > 1:
                self._refusals[a] = frames[1].decode(errors="replace")
        elif kind == _PONG:
            self._on_pong(a, b, frames[1] if len(frames) > 1 else b"")
        elif kind == _REPLACED:
            self._fail(
                PeerLost(f"{self._peer()} has dropped {self.identity}: another process has taken that name since")
            )
            # Connected on, we would throw our successor out with every reconnection, and it us.
            self._close_sockets()

    def _on_ack(self, handled: int) -> None:
        """Everything below ``handled`` has been handled."""
        if not self._base < handled <= self._next:
            return
        for seq in range(self._base, handled):
            message, _ = self._kept.pop(seq)
            self._room.release()
            if (reason := self._refusals.pop(seq, None)) is None:
                self._acked += 1
                continue
            self._refused += 1
            log.warning("%s refused %s of %s: %s", self._peer(), type(message).__name__, self.identity, reason)
            if self.on_refused is not None:
                try:
                    self.on_refused(message, reason)
                # The rest of this acknowledgement must be taken whatever the owner makes of the refusal.
                except Exception:
                    log.exception("on_refused of %s failed", self.identity)
        self._base = handled
        self._cursor = max(self._cursor, handled)
        if not self._kept:
            self._all_acked.set()
        if self.on_acked is not None:
            self.on_acked(handled)

    def _on_reply(self, request_id: int, frames: list[bytes]) -> None:
        pending = self._pending.get(request_id)
        if pending is None or pending.answer.done():
            return
        try:
            pending.answer.set_result(wire.decode(frames, self._receives, limits=self._limits))
        except BadMessage as exc:
            pending.answer.set_exception(BadMessage(f"reply of {self._peer()}: {exc}"))

    def _on_pong(self, cursor: int, expected: int, again: bytes) -> None:
        """When our ping came, the server had taken the sends below ``expected``.

        The ping left after those below ``cursor``, and messages of one connection keep their order, so what is
        missing was lost.
        """
        if self._base <= expected < cursor <= self._cursor:
            self._cursor = expected
        if len(again) % 8 == 0:
            for (request_id,) in struct.iter_unpack("<Q", again):
                if (pending := self._pending.get(request_id)) is not None:
                    pending.transmitted = False
        self._transmit()


# --- server ----------------------------------------------------------------------------------------------------

Handler = Callable[..., Awaitable[Any]]
"""``handler(peer, message)``, with ``with_frames`` ``handler(peer, message, frames)``."""


@dataclass(slots=True, eq=False)
class _Working:
    """A handler at work: for the log."""

    what: str
    since: float
    reported_s: float = 0.0
    task: asyncio.Task[None] | None = None


@dataclass(slots=True, eq=False)
class _Session:
    """One life of one client."""

    peer: bytes
    name: str
    nonce: int
    heard_at: float
    # Sends: base <= settled <= handled <= expected.  None until the client has said where it stands.
    expected: int | None = None
    handled: int = 0
    settled: int = 0
    base: int = 0
    queue: deque[Any] = field(default_factory=deque)
    refusals: dict[int, str] = field(default_factory=dict)
    worker: asyncio.Task[None] | None = None
    working: _Working | None = None
    ack_due: bool = False
    # Requests.
    requests: dict[int, _Working] = field(default_factory=dict)
    replies: OrderedDict[int, list[wire.Buffer]] = field(default_factory=OrderedDict)
    reply_bytes: int = 0


class Server(_Link):
    """The end that many clients connect to.

    Args:
        endpoint: ``tcp://host:port`` to bind; port 0 takes a free one, ``server.endpoint`` then has it.
        name: what this server is called in logs and errors.
        receives: the message types it takes.
        handler: called with the client's identity and the message.  For a send, returning acknowledges it; raising
            BadMessage refuses it for good; any other exception is logged, the handler is run again after a pause,
            and after the last attempt the message is refused, so that one message cannot hold up those behind it.
            For a request, what it returns is the reply; any exception becomes ``Refused``.  Sends of one peer are
            handled one after another in order; requests run beside them as tasks of their own.
        settings: window, heartbeats, deadlines, keys.
        settled: if given, what the handlers of sends have taken is acknowledged, or refused, only once a call of this
            that began after they returned has returned too: where they only note, this makes durable.  Handlers of
            further sends run meanwhile, and one call serves all that was handled before it began.  While it hangs
            nothing is acknowledged; if it raises, neither, and it is called again after a pause.
        with_frames: the handler gets a third argument, the two frames of the message as they came (bytes).
    """

    def __init__(
        self,
        endpoint: str,
        *,
        name: str,
        receives: Any,
        handler: Handler,
        settings: LinkSettings,
        settled: Callable[[], Awaitable[None]] | None = None,
        with_frames: bool = False,
    ) -> None:
        super().__init__(endpoint, settings)
        self.name = name
        self.bad_messages = 0
        self._receives = receives
        self._handler = handler
        self._settled = settled
        self._with_frames = with_frames
        self._unsettled: set[_Session] = set()
        self._settler: asyncio.Task[None] | None = None
        self._settling: _Working | None = None
        self._pump: _Pump | None = None
        self._sessions: dict[bytes, _Session] = {}
        self._replaced: OrderedDict[int, None] = OrderedDict()
        self._acks_due: list[_Session] = []
        self._flush_scheduled = False

    @property
    def peers(self) -> dict[str, PeerInfo]:
        """Clients heard of within ``give_up_s``, by identity."""
        now = self._now()
        return {
            s.name: PeerInfo(
                identity=s.name,
                silent_s=now - s.heard_at,
                queued=len(s.queue),
                unsettled=s.handled - s.settled,
                requests=len(s.requests),
            )
            for s in self._sessions.values()
        }

    # --- internals

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _open(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        socket = self._socket(context, zmq.ROUTER)
        # An answer to somebody who is gone is an error, not silence; the same identity again takes over.
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 4 * self.settings.window)
        self._bind(socket, context)
        self._pump = _Pump(socket, self._on_frames)
        self._spawn(self._watch(), f"{self.name} watch")

    def _close_sockets(self) -> None:
        if self._pump is not None:
            self._pump.close()

    def _answer(self, session: _Session, kind: int, a: int, b: int, *frames: wire.Buffer) -> bool:
        """False if the peer is gone: it will ask again."""
        if self._pump is None or self._pump.closed:
            return False
        return self._pump.send((session.peer, _LINK.pack(_MAGIC, kind, session.nonce, a, b), *frames))

    def _bad(self, peer: bytes, fact: object) -> None:
        self.bad_messages += 1
        # All of the first ones, then every hundredth: a broken peer must not fill the disk.
        if self.bad_messages <= 20 or self.bad_messages % 100 == 0:
            log.warning("%s: bad message %d, from %s: %s", self.name, self.bad_messages, _name(peer), fact)

    def _on_frames(self, frames: list[bytes]) -> None:
        peer, *rest = frames
        try:
            magic, kind, nonce, a, b = _LINK.unpack(rest[0])
        except (struct.error, IndexError):
            return self._bad(peer, "no link frame")
        if magic != _MAGIC or kind not in (_SEND, _REQUEST, _PING):
            return self._bad(peer, f"link frame with magic {magic!r} and kind {kind}")
        session = self._session_of(peer, nonce)
        if session is None:
            return None
        session.heard_at = self._now()
        if kind == _SEND:
            return self._on_send(session, a, b, rest[1:])
        if kind == _REQUEST:
            return self._on_request(session, a, b, rest[1:])
        return self._on_ping(session, a, b, rest[1] if len(rest) > 1 else b"")

    def _session_of(self, peer: bytes, nonce: int) -> _Session | None:
        old = self._sessions.get(peer)
        if old is not None and old.nonce == nonce:
            return old
        session = _Session(peer, _name(peer), nonce, self._now())
        if nonce in self._replaced:
            # Its successor is there already: two live clients of one name would throw each other out for ever.
            self._answer(session, _REPLACED, 0, 0)
            return None
        if old is None and len(self._sessions) >= _MAX_PEERS:
            self._bad(peer, f"more than {_MAX_PEERS} peers")
            return None
        if old is not None:
            # What it sent and we took is still handled; its replies have nobody to go to.
            self._replaced[old.nonce] = None
            if len(self._replaced) > _MAX_PEERS:
                self._replaced.popitem(last=False)
            for working in old.requests.values():
                if working.task is not None:
                    working.task.cancel()
        self._sessions[peer] = session
        return session

    def _place(self, session: _Session, base: int) -> bool:
        """Take note of what the client knows to be handled.  False if that cannot be."""
        if session.expected is None:
            session.expected = session.handled = session.settled = session.base = base
        if base > session.settled:
            return False
        if base > session.base:
            session.base = base
            if session.refusals:
                session.refusals = {s: r for s, r in session.refusals.items() if s >= base}
        return True

    def _on_send(self, session: _Session, seq: int, base: int, frames: list[bytes]) -> None:
        if base > seq or not self._place(session, base):
            return self._bad(session.peer, f"send {seq} with base {base}, {session.settled} acknowledged")
        expected = session.expected
        if seq != expected:
            # Below: a repeat of what we have, its acknowledgement may be lost.  Above: something before it is lost.
            if seq < session.settled:
                self._ack_soon(session)
            return None
        if seq - session.settled >= 4 * self.settings.window:
            # Clients of our settings never come here; the others send it again after their next heartbeat.
            return None
        try:
            item: Any = wire.decode(frames, self._receives, limits=self._limits)
        except BadMessage as exc:
            self._bad(session.peer, exc)
            item = exc
        session.expected = seq + 1
        session.queue.append((item, frames))
        if session.worker is None:
            session.worker = self._spawn(self._work(session), f"{self.name} sends of {session.name}")
        return None

    async def _work(self, session: _Session) -> None:
        """Handle the sends of one client in order until there are none.  Waits for: the handler."""
        try:
            burst = 0
            while session.queue:
                item, frames = session.queue[0]
                reason = str(item) if isinstance(item, BadMessage) else await self._handle(session, item, frames)
                if reason is not None:
                    session.refusals[session.handled] = reason[:_MAX_REASON]
                # Ack after the handler: an ack before it loses the message if we crash here.  Out of the queue
                # only now: a handler that was cancelled has not taken its message.
                session.queue.popleft()
                session.handled += 1
                self._settle(session)
                burst += 1
                if burst % _BURST == 0:
                    await asyncio.sleep(0)
        finally:
            session.worker = None

    def _call(self, session: _Session, message: Any, frames: list[bytes]) -> Awaitable[Any]:
        return self._handler(session.name, message, *([frames] if self._with_frames else ()))

    async def _handle(self, session: _Session, message: Any, frames: list[bytes]) -> str | None:
        """Why the message is refused, or None."""
        working = session.working = _Working(type(message).__name__, self._now())
        try:
            for pause_s in (*_RETRY_PAUSES_S, None):
                try:
                    await self._call(session, message, frames)
                    return None
                except BadMessage as exc:
                    return str(exc)
                except Exception as exc:
                    log.exception("%s failed on %s from %s", self.name, working.what, session.name)
                    if pause_s is None:
                        return f"{self.name} failed on it {len(_RETRY_PAUSES_S) + 1} times: {_told(exc)}"
                    await asyncio.sleep(pause_s)
        finally:
            session.working = None
        return None

    def _settle(self, session: _Session) -> None:
        """Acknowledge what is handled, as soon as it may be."""
        if self._settled is None:
            session.settled = session.handled
            self._ack_soon(session)
            return
        self._unsettled.add(session)
        if self._settler is None:
            self._settler = self._spawn(self._settle_all(self._settled), f"{self.name} settles")

    async def _settle_all(self, settled: Callable[[], Awaitable[None]]) -> None:
        """Acknowledge what was handled before each call.  Waits for: ``settled``.  Ended by: nothing left to settle."""
        pauses = iter(_RETRY_PAUSES_S)
        try:
            while self._unsettled:
                marks = [(session, session.handled) for session in self._unsettled]
                self._unsettled.clear()
                self._settling = _Working(f"settling sends of {len(marks)} peers", self._now())
                try:
                    await settled()
                except Exception:
                    log.exception(
                        "%s could not settle what %d peers sent; nothing is acknowledged", self.name, len(marks)
                    )
                    self._unsettled.update(session for session, _ in marks)
                    await asyncio.sleep(next(pauses, _RETRY_PAUSES_S[-1]))
                    continue
                pauses = iter(_RETRY_PAUSES_S)
                for session, handled in marks:
                    session.settled = handled
                    self._ack_soon(session)
        finally:
            self._settling = None
            self._settler = None

    def _ack_soon(self, session: _Session) -> None:
        """One acknowledgement for all that is handled in this turn of the loop."""
        if session.ack_due:
            return
        session.ack_due = True
        self._acks_due.append(session)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            asyncio.get_running_loop().call_soon(self._flush_acks)

    def _flush_acks(self) -> None:
        self._flush_scheduled = False
        sessions, self._acks_due = self._acks_due, []
        for session in sessions:
            session.ack_due = False
            self._ack(session)

    def _ack(self, session: _Session) -> None:
        # Refusals go first and again until the client moves past them: it must not take a refusal for an ack.
        for seq, reason in session.refusals.items():
            if seq < session.settled and not self._answer(session, _REFUSE, seq, 0, reason.encode()):
                return
        self._answer(session, _ACK, session.settled, 0)

    def _on_ping(self, session: _Session, cursor: int, base: int, ids: bytes) -> None:
        if cursor < base or len(ids) % 8 or not self._place(session, base):
            return self._bad(session.peer, f"ping with base {base}, cursor {cursor}, {session.settled} acknowledged")
        self._ack(session)
        again = [i for (i,) in struct.iter_unpack("<Q", ids) if i not in session.requests]
        self._answer(session, _PONG, cursor, session.expected or 0, struct.pack(f"<{len(again)}Q", *again))
        return None

    def _on_request(self, session: _Session, request_id: int, floor: int, frames: list[bytes]) -> None:
        # The client has the replies below floor.
        while session.replies and next(iter(session.replies)) < floor:
            session.reply_bytes -= sum(map(len, session.replies.popitem(last=False)[1]))
        if request_id in session.requests:
            return
        if (reply := session.replies.get(request_id)) is not None:
            self._answer(session, _REPLY, request_id, 0, *reply)
            return
        if len(session.requests) >= self.settings.window:
            # Clients of our settings never come here; the others ask again after their next heartbeat.
            return
        try:
            message = wire.decode(frames, self._receives, limits=self._limits)
        except BadMessage as exc:
            self._bad(session.peer, exc)
            self._reply(session, request_id, Refused(reason=str(exc)[:_MAX_REASON]))
            return
        working = session.requests[request_id] = _Working(type(message).__name__, self._now())
        working.task = self._spawn(
            self._serve(session, request_id, message, frames), f"{self.name} {working.what} of {session.name}"
        )

    async def _serve(self, session: _Session, request_id: int, message: Any, frames: list[bytes]) -> None:
        """Answer one request.  Waits for: the handler, at most ``give_up_s``."""
        what = type(message).__name__
        try:
            async with asyncio.timeout(self.settings.give_up_s):
                reply = await self._call(session, message, frames)
            if reply is None:
                reply = Refused(reason=f"{self.name} has no answer to {what}")
            self._reply(session, request_id, reply)
        except BadMessage as exc:
            self._reply(session, request_id, Refused(reason=str(exc)[:_MAX_REASON]))
        except Exception as exc:
            log.exception("%s failed on %s from %s", self.name, what, session.name)
            self._reply(
                session, request_id, Refused(reason=f"{self.name} failed on {what}: {_told(exc)}"[:_MAX_REASON])
            )
        finally:
            session.requests.pop(request_id, None)

    def _reply(self, session: _Session, request_id: int, message: Any) -> None:
        frames = _encode(message, self._limits)
        session.replies[request_id] = frames
        session.reply_bytes += sum(map(len, frames))
        while len(session.replies) > self.settings.window or (
            len(session.replies) > 1 and session.reply_bytes > self.settings.max_message_bytes
        ):
            session.reply_bytes -= sum(map(len, session.replies.popitem(last=False)[1]))
        self._answer(session, _REPLY, request_id, 0, *frames)

    async def _watch(self) -> None:
        """Report handlers that take long, forget clients that are gone.  Waits for: the clock.  Ended by: close()."""
        while True:
            await asyncio.sleep(self.settings.heartbeat_s)
            now = self._now()
            if (settling := self._settling) and now - settling.since - settling.reported_s > self.settings.deadline_s:
                settling.reported_s = now - settling.since
                log.warning(
                    "%s has been %s for %.1f s; nothing is acknowledged", self.name, settling.what, settling.reported_s
                )
            for session in list(self._sessions.values()):
                for working in (session.working, *session.requests.values()):
                    if working is None or now - working.since - working.reported_s <= self.settings.deadline_s:
                        continue
                    working.reported_s = now - working.since
                    log.warning(
                        "%s has worked for %.1f s on %s of %s, which waits for it",
                        self.name,
                        working.reported_s,
                        working.what,
                        session.name,
                    )
                idle = session.worker is None and session.settled == session.handled and not session.requests
                if idle and now - session.heard_at > self.settings.give_up_s:
                    log.info("%s forgets %s, silent for %.0f s", self.name, session.name, now - session.heard_at)
                    del self._sessions[session.peer]


def _name(peer: bytes) -> str:
    try:
        name = peer.decode()
    except UnicodeDecodeError:
        return peer.hex()
    return name if name.isprintable() else peer.hex()


def _told(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}"


# --- announcements ---------------------------------------------------------------------------------------------


class Announcer(_Link):
    """PUB: tells whoever listens now.  Nothing may depend on an announcement being heard."""

    def __init__(self, endpoint: str, *, settings: LinkSettings) -> None:
        super().__init__(endpoint, settings)
        self._pub: zmq.Socket[bytes] | None = None

    def _open(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._pub = self._socket(context, zmq.PUB)
        self._bind(self._pub, context)

    def _close_sockets(self) -> None:
        if self._pub is not None:
            self._pub.close(0)

    async def publish(self, message: Any) -> None:
        """Tell those who are connected now.  Raises BadMessage if the message is none or too large."""
        if self._pub is not None and not self._pub.closed:
            self._pub.send_multipart(_encode(message, self._limits), zmq.NOBLOCK)


class Listener(_Connecting):
    """SUB: announcements, oldest first; past 256 unread ones the oldest are dropped."""

    def __init__(self, endpoint: str, *, receives: Any, settings: LinkSettings) -> None:
        super().__init__(endpoint, settings)
        self.bad_messages = 0
        self._receives = receives
        self._pump: _Pump | None = None
        self._unread: deque[Any] = deque(maxlen=256)
        self._arrived = asyncio.Event()

    def _open(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        socket = self._socket(context, zmq.SUB)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._connect(socket)
        self._pump = _Pump(socket, self._on_frames)

    def _close_sockets(self) -> None:
        super()._close_sockets()
        if self._pump is not None:
            self._pump.close()

    def _on_frames(self, frames: list[bytes]) -> None:
        try:
            message = wire.decode(frames, self._receives, limits=self._limits)
        except BadMessage as exc:
            self.bad_messages += 1
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
