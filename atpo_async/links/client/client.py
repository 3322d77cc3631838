"""A client of a link: a window of sends that are not lost, requests with one reply each; see ``atpo_async.links``."""

from __future__ import annotations

import asyncio
import logging
import secrets
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import zmq

from atpo_async.config import LinksConfig
from atpo_async.core.errors import AtpoError, BadMessage, PeerLost, SetupError
from atpo_async.links.frames import (
    ACK,
    DENIED,
    FULL,
    ID_SEPARATOR,
    LINK,
    MAGIC,
    MAX_NAME_BYTES,
    MAX_SENDS,
    PING,
    PONG,
    REFUSE,
    REPLACED,
    REPLY,
    REQUEST,
    SEND,
    SENDS,
    SENDS_BYTES,
    encode_within,
    worth_a_line,
)
from atpo_async.links.sockets import ConnectingLink, Context, Pump
from atpo_async.wire import codec
from atpo_async.wire.messages import Refused
from atpo_async.wire.records import pack

log = logging.getLogger("atpo.links")

_OURS = (SEND, SENDS, REQUEST, PING)
"""Kinds of frames that no server sends."""


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
    what: str
    since: float
    frames: list[codec.Buffer]
    answer: asyncio.Future[Any]
    transmitted: bool = False


class Client(ConnectingLink):
    """One peer's end of a link to a server.

    Args:
        endpoint: ``tcp://host:port`` of the server; empty where only ``locate`` will know.
        peer: what the server is called in logs and errors.
        identity: this client's name, unique among the server's clients; a newer client of the same name replaces it.
        receives: the message types that replies may have; ``Refused`` is always one of them.
        settings: window, heartbeats, deadlines, keys.
        on_refused: called with a sent message that the server refused for good, and its reason.
        locate: where the server is now, as of ``ConnectingLink``.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        peer: str,
        identity: str,
        receives: Any,
        settings: LinksConfig,
        on_refused: Callable[[Any, str], None] | None = None,
        locate: Callable[[], str] | None = None,
    ) -> None:
        super().__init__(endpoint, settings, locate=locate)
        if not identity or len(identity.encode()) > MAX_NAME_BYTES or "\0" in identity:
            raise SetupError(f"a link's identity must have 1 to {MAX_NAME_BYTES} bytes, got {identity!r}")
        self.peer = peer
        self.identity = identity
        self.on_refused = on_refused
        self.on_acked: Callable[[int], None] | None = None
        """Called with how many sends are done with, acknowledged or refused, whenever there are more."""
        self._receives = receives | Refused
        self._session = secrets.randbits(64)
        self._pump: Pump | None = None
        self._heard_at = self._now()
        self._owed_since = 0.0
        self._failure: AtpoError | None = None
        self._waits: set[_Wait] = set()
        # Sends.  base <= cursor <= next; those from base on are kept, those from cursor on are not on the wire.
        self._kept: dict[int, tuple[Any, list[codec.Buffer]]] = {}
        self._base = self._cursor = self._next = 0
        self._furthest = 0
        self._fresh_bytes = 0
        """Of messages sent since some were put on the wire."""
        self._transmitting = False
        """Whether that is about to happen."""
        self._refusals: dict[int, str] = {}
        self._room = asyncio.Semaphore(settings.window)
        self._all_acked = asyncio.Event()
        self._all_acked.set()
        # Requests.
        self._pending: dict[int, _Pending] = {}
        self._next_request = 0
        self._request_room = asyncio.Semaphore(settings.window)
        self._waited_s = 0.0
        self._acked = self._resent = self._refused = self._bad = 0
        self._is_full = False
        """The server has no room for us."""
        self._full_count = 0

    @property
    def stats(self) -> LinkStats:
        now = self._now()
        return LinkStats(
            waited_s=self._waited_s + sum(now - w.since for w in self._waits.copy() if w.for_room),
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

    @property
    def title(self) -> str:
        return f"{self.identity} to {self.peer}"

    def link_status(self) -> dict[str, Any]:
        now = self._now()
        stats = self.stats
        return {
            "kind": "client",
            "name": self.identity,
            "peer": self.peer,
            "endpoint": self.endpoint,
            "keys": self.settings.keys_dir is not None,
            "connected": self._connected,
            "trouble": self._trouble,
            "failure": "" if self._failure is None else str(self._failure),
            "silent_s": now - self._heard_at,
            "window": self.settings.window,
            "unacked": stats.unacked,
            "sent": stats.sent,
            "acked": stats.acked,
            "resent": stats.resent,
            "refused": stats.refused,
            "bad": self._bad,
            "waited_s": stats.waited_s,
            "requests": [{"what": p.what, "since_s": now - p.since} for p in list(self._pending.values())],
            "waits": [{"what": w.what, "since_s": now - w.since} for w in self._waits.copy()],
        }

    async def send(self, message: Any) -> None:
        """Send at least once.  Waits for: room in the window.  Unblocked by: the server's acknowledgements.

        Returns when the message is kept and on its way, not when it is acknowledged; see ``drain``.

        Raises:
            PeerLost: there was no room for ``give_up_s``, or the server is silent for that long.
            BadMessage: the message is none or too large.
        """
        frames = encode_within(message, self._limits)
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
        # What is sent before the loop goes round travels together, unless that is as much as travels together.
        self._fresh_bytes += len(frames[0]) + len(frames[1])
        if self._fresh_bytes >= SENDS_BYTES or self._next - self._cursor >= MAX_SENDS:
            self._transmit()
        else:
            self._transmit_soon()

    async def request(self, message: Any, *, timeout_s: float) -> Any:
        """The server's reply, which may be ``Refused``.  Waits for: its handler.  Unblocked by: the reply.

        Raises:
            PeerLost: no reply within ``timeout_s``.
            BadMessage: the message or its reply is none or too large.
        """
        frames = encode_within(message, self._limits)
        if self._failure is not None:
            raise self._failure
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        return await self._wait(
            self._exchange(_Pending(type(message).__name__, self._now(), frames, answer)),
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

    def _open(self, context: Context) -> None:
        socket = self._socket(context, zmq.DEALER)
        # Whoever connects with a routing id gets what is for it.  So it cannot be guessed, and stays for reconnections.
        socket.setsockopt(zmq.ROUTING_ID, self.identity.encode() + ID_SEPARATOR + secrets.token_bytes(16))
        # Only onto a live connection: libzmq would keep messages for the next one, behind our back and out of order.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        # The window bounds what is in flight.
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        self._heard_at = self._now()
        self._connect(socket)
        self._pump = Pump(socket, self._on_frames, self._transmit)
        self._spawn(self._beat(), f"{self.identity}->{self.peer} heartbeat")

    def _close_sockets(self) -> None:
        if self._kept:
            log.warning("%s closes with %d messages unacknowledged by %s", self.identity, len(self._kept), self._peer())
        super()._close_sockets()
        if self._pump is not None:
            self._pump.close()
        self._fail(PeerLost(f"the link of {self.identity} to {self._peer()} is closed"))

    def _peer(self) -> str:
        return f"{self.peer} at {self.endpoint}" if self.endpoint else f"{self.peer}, which has not said where it is"

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
                # With the sends before it, which it must not overtake.
                self._transmit()
                return await pending.answer
            finally:
                del self._pending[request_id]

    def _link(self, kind: int, a: int = 0, b: int = 0) -> bytes:
        return LINK.pack(MAGIC, kind, self._session, a, b)

    def _transmit_soon(self) -> None:
        if not self._transmitting:
            self._transmitting = True
            asyncio.get_running_loop().call_soon(self._transmit)

    def _transmit(self) -> None:
        """Put on the wire, in order, what is not there; stops when the socket takes no more (no connection)."""
        self._transmitting = False
        self._fresh_bytes = 0
        pump = self._pump
        if pump is None or pump.closed:
            return
        while self._cursor < self._next:
            together = self._next_together()
            kind, frames = (SEND, together[0]) if len(together) == 1 else (SENDS, [pack(*together)])
            if not pump.send((self._link(kind, self._cursor, self._base), *frames)):
                return
            self._cursor += len(together)
            self._resent += min(len(together), max(0, self._furthest - self._cursor + len(together)))
            self._furthest = max(self._furthest, self._cursor)
        for request_id, pending in self._pending.items():
            if not pending.transmitted and not self._transmit_request(request_id, pending):
                return

    def _next_together(self) -> list[list[codec.Buffer]]:
        """Frames of the messages from the cursor on that go into one."""
        found: list[list[codec.Buffer]] = []
        room = SENDS_BYTES
        for seq in range(self._cursor, min(self._next, self._cursor + MAX_SENDS)):
            frames = self._kept[seq][1]
            room -= len(frames[0]) + len(frames[1])
            if room < 0 and found:
                break
            found.append(frames)
        return found

    def _transmit_request(self, request_id: int, pending: _Pending) -> bool:
        floor = next(iter(self._pending))
        if self._pump is None or self._pump.closed:
            return False
        pending.transmitted = self._pump.send((self._link(REQUEST, request_id, floor), *pending.frames))
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
            self._pump.send((self._link(PING, self._cursor, self._base), struct.pack(f"<{len(ids)}Q", *ids)))

    async def _beat(self) -> None:
        """Ping, and look at who has waited too long.  Waits for: the clock.  Ended by: close()."""
        while True:
            await asyncio.sleep(self.settings.heartbeat_s)
            self._ping()
            self._report_waits()
            self._renew(f"{self.identity}'s to {self._peer()}")

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

    def _on_frames(self, frames: list[codec.Buffer], _: str) -> None:
        try:
            magic, kind, session, a, b = LINK.unpack(frames[0])
        except struct.error:
            magic = b""
        if magic != MAGIC or kind in _OURS:
            # What only clients say comes back where a connection leads to itself, as TCP lets it when nobody listens.
            self._bad += 1
            if worth_a_line(self._bad):
                log.warning("%s got a frame from %s that is no server's; dropped", self.identity, self._peer())
            return
        self._silent_beats = 0
        if kind == FULL and session == self._session:
            self._on_full(bytes(frames[1]).decode(errors="replace") if len(frames) > 1 else "")
            return
        self._heard_at = self._now()
        if session != self._session:
            return
        if self._is_full:
            self._is_full, self._trouble = False, ""
        if kind == ACK:
            self._on_ack(a)
        elif kind == REPLY:
            self._on_reply(a, frames[1:])
        elif kind == REFUSE:
            if self._base <= a < self._next and len(frames) > 1:
                self._refusals[a] = bytes(frames[1]).decode(errors="replace")
        elif kind == PONG:
            self._on_pong(a, b, frames[1] if len(frames) > 1 else b"")
        elif kind == DENIED:
            self._on_denied()
        elif kind == REPLACED:
            self._fail(
                PeerLost(f"{self._peer()} has dropped {self.identity}: another process has taken that name since")
            )
            # Connected on, we would throw our successor out with every reconnection, and it us.
            self._close_sockets()

    def _on_full(self, reason: str) -> None:
        """The server has no room for us: no sign of life, and we go on asking with every heartbeat."""
        self._is_full, self._trouble = True, f"it takes no further clients: {reason}"
        self._full_count += 1
        if worth_a_line(self._full_count):
            log.warning("%s: %s: %s", self.identity, self._peer(), self._trouble)

    def _on_denied(self) -> None:
        """Our key was taken away while we were connected: come back as a stranger, now and then."""
        if self._connected:
            self._connected = False
            self._trouble = "it let our key in once and no longer does: it was taken out of its links.keys_dir"
            log.warning("%s: %s: %s", self.identity, self._peer(), self._trouble)
            self._try_later()

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

    def _on_reply(self, request_id: int, frames: list[codec.Buffer]) -> None:
        pending = self._pending.get(request_id)
        if pending is None or pending.answer.done():
            return
        try:
            pending.answer.set_result(codec.decode(frames, self._receives, limits=self._limits))
        except BadMessage as exc:
            self._bad += 1
            pending.answer.set_exception(BadMessage(f"reply of {self._peer()}: {exc}"))

    def _on_pong(self, cursor: int, expected: int, again: codec.Buffer) -> None:
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
