"""A client of a link: a window of sends that are not lost, requests with one reply each; see ``atpo_async.links``."""

from __future__ import annotations

import asyncio
import logging
import secrets
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import zmq

from atpo_async.config import LinksConfig
from atpo_async.core.errors import AtpoError, BadMessage, PeerLost, SetupError
from atpo_async.links.client.requests import PendingRequest, PendingRequests
from atpo_async.links.client.waits import Wait, Waits
from atpo_async.links.client.window import SendWindow
from atpo_async.links.connecting import ConnectingLink
from atpo_async.links.frames import (
    ACK,
    DENIED,
    FULL,
    ID_SEPARATOR,
    LINK,
    MAGIC,
    MAX_NAME_BYTES,
    PING,
    PONG,
    REFUSE,
    REPLACED,
    REPLY,
    REQUEST,
    SEND,
    SENDS,
    encode_within,
    worth_a_line,
)
from atpo_async.links.pump import Context, Pump
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
    """Summed over senders: time that send() waited for the window."""
    sent: int
    acked: int
    resent: int
    unacked: int
    refused: int


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
        """Called with the number of sends that are acknowledged or refused, whenever there are more."""
        self._receives = receives | Refused
        self._session = secrets.randbits(64)
        self._pump: Pump | None = None
        self._window = SendWindow(settings.window)
        self._requests = PendingRequests(settings.window)
        self._waits = Waits()
        self._heard_at = time.monotonic()
        self._owed_since = 0.0
        """Since when a sign of life of the server has been due."""
        self._failure: AtpoError | None = None
        self._transmitting = False
        """Whether a transmission of what is not on the wire yet is scheduled."""
        self._bad = 0
        self._is_full = False
        """The server takes no further clients."""
        self._full_count = 0

    @property
    def stats(self) -> LinkStats:
        window = self._window
        return LinkStats(
            waited_s=self._waits.for_window_s,
            sent=window.end,
            acked=window.acked,
            resent=window.resent,
            unacked=len(window),
            refused=window.refused,
        )

    @property
    def failure(self) -> AtpoError | None:
        """Why every further call fails; None while the link goes on."""
        return self._failure

    @property
    def silent_s(self) -> float:
        """Since the server's last sign of life."""
        return time.monotonic() - self._heard_at

    @property
    def title(self) -> str:
        return f"{self.identity} to {self.peer}"

    def link_status(self) -> dict[str, Any]:
        now = time.monotonic()
        stats = self.stats
        return {
            "kind": "client",
            "name": self.identity,
            "peer": self.peer,
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
            "requests": [{"what": p.what, "since_s": now - p.since} for p in self._requests],
            "waits": [{"what": w.what, "since_s": now - w.since} for w in self._waits],
            **self.connection_status(),
        }

    # --- for the owner

    async def send(self, message: Any) -> None:
        """Send at least once.  Waits for: a place in the window.  Unblocked by: the server's acknowledgements.

        Returns when the message is kept and on its way, not when it is acknowledged; see ``drain``.

        Raises:
            PeerLost: there was no place for ``give_up_s``, or the server is silent for that long.
            BadMessage: the message is none or too large.
        """
        await self._put(message, encode_within(message, self._limits))

    async def _put(self, message: Any, frames: Sequence[codec.Buffer]) -> None:
        if self._failure is not None:
            raise self._failure
        places = self._window.places
        if places.locked():
            await self._wait(
                places.acquire(),
                what=f"{type(message).__name__} waits for space in a window of {self.settings.window}",
                timeout_s=self.settings.give_up_s,
                for_window=True,
            )
        else:
            # Does not suspend: the semaphore is free.
            await places.acquire()
        self._expect_a_sign()
        # What is sent before the loop goes round travels together, unless that is as much as travels together.
        if self._window.add(message, frames):
            self._transmit()
        elif not self._transmitting:
            self._transmitting = True
            asyncio.get_running_loop().call_soon(self._transmit)

    async def request(self, message: Any, *, timeout_s: float) -> Any:
        """The server's reply, which may be ``Refused``.  Waits for: its handler.  Unblocked by: the reply.

        Raises:
            PeerLost: no reply within ``timeout_s``.
            BadMessage: the message or its reply is none or too large.
        """
        frames = encode_within(message, self._limits)
        if self._failure is not None:
            raise self._failure
        what = type(message).__name__
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        return await self._wait(
            self._exchange(PendingRequest(what, time.monotonic(), frames, answer)),
            what=f"{what} waits for its reply",
            timeout_s=timeout_s,
        )

    async def drain(self, *, timeout_s: float) -> None:
        """Wait until everything sent is acknowledged or refused.  Raises PeerLost after ``timeout_s``."""
        if self._failure is not None:
            raise self._failure
        if len(self._window):
            await self._wait(self._window.all_done.wait(), what="drain waits for acknowledgements", timeout_s=timeout_s)

    async def _exchange(self, pending: PendingRequest) -> Any:
        async with self._requests.places:
            self._expect_a_sign()
            request_id = self._requests.add(pending)
            try:
                # With the sends before it, which it must not overtake.
                self._transmit()
                return await pending.answer
            finally:
                self._requests.remove(request_id)

    # --- opening and closing

    def _open(self, context: Context) -> None:
        socket = self._socket(context, zmq.DEALER)
        # A peer gets what is addressed to its routing id.  So the id cannot be guessed, and stays for reconnections.
        socket.setsockopt(zmq.ROUTING_ID, self.identity.encode() + ID_SEPARATOR + secrets.token_bytes(16))
        # Only onto a live connection: libzmq would hold messages for the next one, unknown to us and out of order.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        # The window bounds what is in flight.
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        self._heard_at = time.monotonic()
        self._connect(socket)
        self._pump = Pump(socket, self._on_frames, self._transmit)
        self._spawn(self._beat(), f"{self.identity}->{self.peer} heartbeat")

    def _close_sockets(self) -> None:
        if len(self._window):
            log.warning(
                "%s closes with %d messages unacknowledged by %s", self.identity, len(self._window), self._peer()
            )
        super()._close_sockets()
        if self._pump is not None:
            self._pump.close()
        self._fail(PeerLost(f"the link of {self.identity} to {self._peer()} is closed"))

    def _peer(self) -> str:
        return f"{self.peer} at {self.endpoint}" if self.endpoint else f"{self.peer}, which has not said where it is"

    # --- waits and what ends them

    async def _wait(self, awaitable: Awaitable[Any], *, what: str, timeout_s: float, for_window: bool = False) -> Any:
        wait = self._waits.begin(what, timeout_s, for_window=for_window)
        try:
            return await self._waits.run(wait, awaitable)
        except TimeoutError:
            raise self._failure or PeerLost(self._explain(wait)) from None

    def _explain(self, wait: Wait) -> str:
        now = time.monotonic()
        state = "connected" if self._connected else "not connected"
        trouble = f", {self._trouble}" if self._trouble else ""
        return (
            f"{self.identity} has waited {now - wait.since:.1f} s for {self._peer()}: {wait.what} "
            f"({state}, last sign of life {now - self._heard_at:.1f} s ago{trouble})"
        )

    def _expect_a_sign(self) -> None:
        """From now on a sign of life of the server is due; before, its silence did not matter."""
        if not len(self._window) and not len(self._requests):
            self._owed_since = time.monotonic()

    def _fail(self, failure: AtpoError) -> None:
        """For good: every open wait and every later call raises ``failure``."""
        self._failure = self._failure or failure
        self._waits.end()

    async def _beat(self) -> None:
        """Ping, and report waits that last too long.  Waits for: the clock.  Ended by: close()."""
        while True:
            await asyncio.sleep(self.settings.heartbeat_s)
            self._ping()
            for wait in self._waits.overdue(self.settings.deadline_s):
                log.warning("%s", self._explain(wait))
            self._give_up_in_time()
            self._renew(f"{self.identity}'s to {self._peer()}")

    def _give_up_in_time(self) -> None:
        unacked, requests = len(self._window), len(self._requests)
        silent_s = time.monotonic() - max(self._heard_at, self._owed_since)
        if not (unacked or requests) or silent_s <= self.settings.give_up_s or self._failure is not None:
            return
        trouble = f" ({self._trouble})" if self._trouble else ""
        self._fail(
            PeerLost(
                f"{self.identity} gives up on {self._peer()}: no sign of life for {silent_s:.1f} s with "
                f"{unacked} messages unacknowledged and {requests} requests open{trouble}"
            )
        )
        log.error("%s", self._failure)

    # --- what goes out

    def _link(self, kind: int, a: int = 0, b: int = 0) -> bytes:
        return LINK.pack(MAGIC, kind, self._session, a, b)

    def _transmit(self) -> None:
        """Put on the wire, in order, what is not there; stops when the socket takes no more (no connection)."""
        self._transmitting = False
        window, pump = self._window, self._pump
        window.begin_transmission()
        if pump is None or pump.closed:
            return
        while together := window.next_together():
            kind, frames = (SEND, together[0]) if len(together) == 1 else (SENDS, [pack(*together)])
            if not pump.send((self._link(kind, window.cursor, window.base), *frames)):
                return
            window.advance(len(together))
        for request_id, pending in self._requests.untransmitted():
            pending.transmitted = pump.send((self._link(REQUEST, request_id, self._requests.floor), *pending.frames))
            if not pending.transmitted:
                return

    def _ping(self) -> None:
        if self._pump is not None and not self._pump.closed:
            ids = self._requests.on_the_wire()
            link = self._link(PING, self._window.cursor, self._window.base)
            self._pump.send((link, struct.pack(f"<{len(ids)}Q", *ids)))

    def _on_connected(self) -> None:
        # Everything that is not acknowledged or answered goes out again.
        self._window.start_over()
        self._requests.start_over()
        self._transmit()

    def _on_lost(self) -> None:
        log.info("%s lost its connection to %s; it goes on trying", self.identity, self._peer())

    # --- what comes in

    def _on_frames(self, frames: list[codec.Buffer], _: str) -> None:
        try:
            magic, kind, session, a, b = LINK.unpack(frames[0])
        except struct.error:
            magic = b""
        if magic != MAGIC or kind in _OURS:
            # A connection may lead to itself, which TCP allows if nothing listens: our own frames come back then.
            self._bad += 1
            if worth_a_line(self._bad):
                log.warning("%s got a frame from %s that is no server's; dropped", self.identity, self._peer())
            return
        self._silent_beats = 0
        if kind == FULL and session == self._session:
            self._on_full(_text(frames))
            return
        self._heard_at = time.monotonic()
        if session != self._session:
            return
        if self._is_full:
            self._is_full, self._trouble = False, ""
        if kind == ACK:
            self._on_ack(a)
        elif kind == REPLY:
            self._on_reply(a, frames[1:])
        elif kind == REFUSE:
            if len(frames) > 1:
                self._window.note_refusal(a, _text(frames))
        elif kind == PONG:
            self._on_pong(a, b, frames[1] if len(frames) > 1 else b"")
        elif kind == DENIED:
            self._on_denied()
        elif kind == REPLACED:
            self._fail(
                PeerLost(f"{self._peer()} has dropped {self.identity}: another process has taken that name since")
            )
            # If we stayed connected, we and our successor would replace each other with every reconnection.
            self._close_sockets()

    def _on_full(self, reason: str) -> None:
        """The server takes no further clients: that is no sign of life, and we go on asking with every heartbeat."""
        self._is_full, self._trouble = True, f"it takes no further clients: {reason}"
        self._full_count += 1
        if worth_a_line(self._full_count):
            log.warning("%s: %s: %s", self.identity, self._peer(), self._trouble)

    def _on_denied(self) -> None:
        """Our key was removed while we were connected: try a new connection from time to time."""
        if self._connected:
            self._connected = False
            self._trouble = "it let our key in once and no longer does: it was taken out of its links.keys_dir"
            log.warning("%s: %s: %s", self.identity, self._peer(), self._trouble)
            self._try_later()

    def _on_ack(self, handled: int) -> None:
        """Everything below ``handled`` has been handled."""
        done = self._window.acknowledge(handled)
        for message, reason in done:
            try:
                self._on_done(message, reason)
            # The rest of this acknowledgement must be processed even if the owner's callback fails.
            except Exception:
                log.exception("on_refused of %s failed", self.identity)
        if done and self.on_acked is not None:
            self.on_acked(handled)

    def _on_done(self, message: Any, refusal: str | None) -> None:
        """The server has taken a send, or refused it for a reason."""
        if refusal is None:
            return
        log.warning("%s refused %s of %s: %s", self._peer(), type(message).__name__, self.identity, refusal)
        if self.on_refused is not None:
            self.on_refused(message, refusal)

    def _on_reply(self, request_id: int, frames: list[codec.Buffer]) -> None:
        pending = self._requests.waiting_for(request_id)
        if pending is None:
            return
        try:
            pending.answer.set_result(codec.decode(frames, self._receives, limits=self._limits))
        except BadMessage as exc:
            self._bad += 1
            pending.answer.set_exception(BadMessage(f"reply of {self._peer()}: {exc}"))

    def _on_pong(self, cursor: int, expected: int, again: codec.Buffer) -> None:
        """When our ping came, the server had taken the sends below ``expected``, and did not know ``again``."""
        self._window.go_back(expected, cursor)
        if len(again) % 8 == 0:
            self._requests.repeat(request_id for (request_id,) in struct.iter_unpack("<Q", again))
        self._transmit()


def _text(frames: list[codec.Buffer]) -> str:
    """The text in the second frame."""
    return bytes(frames[1]).decode(errors="replace") if len(frames) > 1 else ""
