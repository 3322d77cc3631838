"""The server of a link, to which many clients connect; see ``atpo_async.links``."""

from __future__ import annotations

import asyncio
import inspect
import logging
import struct
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import zmq

from atpo_async.config import LinksConfig
from atpo_async.links.binding import BindingLink
from atpo_async.links.frames import DENIED, LINK, MAGIC, PING, PONG, REQUEST, SEND, SENDS
from atpo_async.links.pump import Context, Pump
from atpo_async.links.server.acknowledgements import Acknowledgements
from atpo_async.links.server.descriptors import raise_limit
from atpo_async.links.server.handling import Handler, Handling
from atpo_async.links.server.requests import RequestHandler
from atpo_async.links.server.sends import SendHandler, note_base
from atpo_async.links.server.sessions import MAX_PEERS, PeerInfo, Session, SessionTable, client_name
from atpo_async.wire import codec

log = logging.getLogger("atpo.links")

_KINDS = (SEND, SENDS, REQUEST, PING)
"""What clients send."""
_MAX_PING_BYTES = 8 << 12
"""Of the ids of open requests in a ping."""


class Server(BindingLink):
    """The end that many clients connect to.

    Args:
        endpoint: ``tcp://host:port`` to bind; port 0 takes a free one, ``server.endpoint`` then has it.
        name: what this server is called in logs and errors.
        receives: the message types it takes.
        handler: called with the client's name and the message.  For a send, returning acknowledges it; raising
            BadMessage refuses it for good; any other exception is logged, the handler is run again after a pause,
            and after the last attempt the message is refused, so that one message cannot hold up those behind it.
            For a request, what it returns is the reply; any exception becomes ``Refused``.  Sends of one peer are
            handled one after another in order; requests run beside them as tasks of their own.  Where it returns
            an awaitable that is awaited; a plain function, or one that returns an awaitable only where it has to
            wait, is faster: no task is needed for what it does at once.  Of a send it may return a ``Parcel``: those
            behind it are handled, and it is acknowledged or refused once the parcel has arrived (not with ``settled``).
            Of a request it may raise ``NoAnswer``: no reply is sent, and a client that still waits asks again.
        settings: window, heartbeats, deadlines, keys.
        settled: if given, what the handlers of sends have taken is acknowledged, or refused, only once a call of this
            that began after they returned has returned too: where they only note, this makes durable.  Handlers of
            further sends run meanwhile, and one call serves all that was handled before it began.  While it hangs
            nothing is acknowledged; if it raises, neither, and it is called again after a pause.
        with_frames: the handler gets a third argument, the two frames of the message as they came.
        read: as of ``Handling``: reads a message in place of the codec.
        only, former_port, setting: as of ``BindingLink``.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        name: str,
        receives: Any,
        handler: Handler,
        settings: LinksConfig,
        settled: Callable[[], Awaitable[None]] | None = None,
        with_frames: bool = False,
        read: Callable[[Sequence[codec.Buffer]], Any] | None = None,
        only: str = "",
        former_port: int = 0,
        setting: str = "the port in [links]",
    ) -> None:
        super().__init__(endpoint, settings, only=only, former_port=former_port, setting=setting)
        self.name = name
        handling = Handling(
            name,
            receives=receives,
            handler=handler,
            with_frames=with_frames,
            settings=settings,
            spawn=self._spawn,
            read=read,
        )
        self._bad = handling.bad
        self._acknowledgements = Acknowledgements(name, settled, answer=self._answer, spawn=self._spawn)
        self._sends = SendHandler(handling, self._acknowledgements)
        self._requests = RequestHandler(handling, send=self._send_tracked)
        self._replies = self._requests.replies
        self.sessions = SessionTable(
            name, settings, answer=self._answer, on_gone=self._replies.forget, bad=handling.bad
        )
        """Clients heard of within ``give_up_s``."""
        self._pump: Pump | None = None

    @property
    def bad_messages(self) -> int:
        return self._bad.count

    def is_relay(self, peer: str) -> bool:
        """Whether a client may pass on messages of others: with keys, the name of its key says so."""
        return self._keys is None or peer.partition("/")[0] in self._keys.relays

    @property
    def counters(self) -> dict[str, float]:
        """Counters for metrics; the names lack the server's."""
        return {
            "unsent_bytes": self._replies.outbox.look(),
            "most_unsent_bytes": self._replies.outbox.most_unsent_bytes,
            "kept_reply_bytes": self._replies.kept_bytes,
            "held_back": self._replies.held_back,
            "refused_peers": self.sessions.refused,
        }

    @property
    def peers(self) -> dict[str, PeerInfo]:
        """Clients heard of within ``give_up_s``, by name."""
        now = time.monotonic()
        return {session.name: PeerInfo.of(session, now) for session in self.sessions}

    def silences(self) -> Iterator[tuple[str, float]]:
        """Name of each of them, oldest first, and for how many seconds it has given no sign of life.

        A server that is behind with what has come cannot tell who is silent: their signs may be among it.  So only the
        time until the socket was last empty counts.
        """
        until = time.monotonic() if self._pump is None else self._pump.emptied_at
        for session in self.sessions:
            yield session.name, max(until - session.heard_at, 0.0)

    @property
    def title(self) -> str:
        return f"{self.name} at {self.endpoint}"

    def link_status(self) -> dict[str, Any]:
        now = time.monotonic()
        settling = self._acknowledgements.settling
        return {
            "kind": "server",
            "name": self.name,
            "endpoint": self.endpoint,
            "keys": self._keys is not None,
            "window": self.settings.window,
            "peers": [self._peer_status(session, now) for session in self.sessions],
            "settling_s": None if settling is None else now - settling.since,
            "bad": self.bad_messages,
            "refused_connections": dict(self._refused.counts),
            **self.counters,
        }

    def _peer_status(self, session: Session, now: float) -> dict[str, Any]:
        sends, work = session.sends, session.sends.work
        return {
            "peer": session.name,
            "silent_s": now - session.heard_at,
            "queued": len(sends.queue),
            "queued_bytes": sends.queued_bytes,
            "unsettled": sends.handled - sends.settled,
            "handled": sends.handled,
            "unsent_bytes": self._replies.outbox.unsent(session.routing_id),
            "handling": None if work is None else {"what": work.what, "since_s": now - work.since},
            "requests": [{"what": w.what, "since_s": now - w.since} for w in list(session.requests.work.values())],
        }

    # --- opening and closing

    def _open(self, context: Context) -> None:
        socket = self._socket(context, zmq.ROUTER)
        # An answer to a client that is gone is an error, not silence; a client that connects again takes over from the
        # connection that it lost, perhaps without our noticing.  No other client knows its routing id.
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        # A peer that does not read is sent nothing more, and asks again when it reads.
        socket.setsockopt(zmq.SNDHWM, 8 * self.settings.window)
        socket.setsockopt(zmq.RCVHWM, 4 * self.settings.window)
        # After a restart all clients connect at once; the system drops those that find the queue full, for seconds.
        socket.setsockopt(zmq.BACKLOG, MAX_PEERS)
        self.sessions.most = raise_limit(MAX_PEERS)
        self._bind(socket, context)
        self._pump = Pump(socket, self._on_frames, users=self._keys is not None)
        self._spawn(self._watch(), f"{self.name} watch")

    def _close_sockets(self) -> None:
        super()._close_sockets()
        self._replies.close()
        self._acknowledgements.close()
        if self._pump is not None:
            self._pump.close()

    async def close(self) -> None:
        try:
            await super().close()
        finally:
            for session in self.sessions:
                # A worker that never came to run has not awaited it.
                if inspect.iscoroutine(session.sends.begun):
                    session.sends.begun.close()

    # --- what goes out

    def _answer(self, session: Session, kind: int, a: int = 0, b: int = 0, *frames: codec.Buffer) -> bool:
        """False if the peer is gone, or does not read: it will ask again."""
        if self._pump is None or self._pump.closed:
            return False
        return self._pump.send((session.routing_id, LINK.pack(MAGIC, kind, session.nonce, a, b), *frames))

    def _send_tracked(self, frames: Sequence[codec.Buffer]) -> Sequence[zmq.MessageTracker] | None:
        return None if self._pump is None or self._pump.closed else self._pump.send_tracked(frames)

    # --- what comes in

    def _on_frames(self, frames: list[codec.Buffer], user: str) -> int | None:
        """How many messages those were, where it is not one."""
        routing_id, *rest = frames
        assert isinstance(routing_id, bytes)
        owner = ""
        if self._keys is not None:
            known = self._keys.names.get(user)
            if known is None:
                self._deny(routing_id, user, rest)
                return None
            owner = known
        try:
            magic, kind, nonce, a, b = LINK.unpack(rest[0])
        except (struct.error, IndexError):
            self._bad.note(client_name(owner, routing_id), "no link frame")
            return None
        if magic != MAGIC or kind not in _KINDS:
            self._bad.note(client_name(owner, routing_id), f"link frame with magic {magic!r} and kind {kind}")
            return None
        session = self.sessions.of(routing_id, owner, nonce)
        if session is None:
            return None
        session.heard_at = time.monotonic()
        if kind == SENDS:
            return self._sends.take_together(session, a, b, rest[1:])
        if kind == SEND:
            self._sends.take(session, a, b, [rest[1:]])
        elif kind == REQUEST:
            self._requests.take(session, a, b, rest[1:])
        else:
            self._on_ping(session, a, b, rest[1] if len(rest) > 1 else b"")
        return None

    def _deny(self, routing_id: bytes, user: str, rest: list[codec.Buffer]) -> None:
        """A client whose key was removed after it had connected."""
        peer = client_name("", routing_id)
        self._refused.note(self.endpoint, peer, "its key was taken away", f", public key {user}")
        if rest and len(rest[0]) == LINK.size and self._pump is not None:
            nonce = LINK.unpack(rest[0])[2]
            self._pump.send((routing_id, LINK.pack(MAGIC, DENIED, nonce, 0, 0)))

    def _on_ping(self, session: Session, cursor: int, base: int, ids: codec.Buffer) -> None:
        sends = session.sends
        # No client has more requests open than its window; the answer to what claims so would be as long.
        if cursor < base or len(ids) % 8 or len(ids) > _MAX_PING_BYTES or not note_base(session, base):
            self._bad.note(session.name, f"ping with base {base}, cursor {cursor}, {sends.settled} acknowledged")
            return
        self._acknowledgements.acknowledge(session)
        again = self._requests.unknown(session, [request_id for (request_id,) in struct.iter_unpack("<Q", ids)])
        self._answer(session, PONG, cursor, sends.expected or 0, struct.pack(f"<{len(again)}Q", *again))

    # --- the clock

    async def _watch(self) -> None:
        """Report handlers that take long, forget clients that are gone, shut out those whose key was taken away.

        Waits for: the clock.  Ended by: close().
        """
        while True:
            await asyncio.sleep(self.settings.heartbeat_s)
            now = time.monotonic()
            if self._keys is not None and self._keys.look():
                self._shut_out(set(self._keys.names.values()))
            self._report(now)
            for session in self.sessions:
                if session.idle and now - session.heard_at > self.settings.give_up_s:
                    log.info("%s forgets %s, silent for %.0f s", self.name, session.name, now - session.heard_at)
                    self.sessions.forget(session)

    def _shut_out(self, owners: set[str]) -> None:
        for session in self.sessions:
            if session.owner not in owners:
                log.warning("%s shuts out %s: its key was taken away", self.name, session.name)
                self._answer(session, DENIED)
                self.sessions.forget(session)

    def _report(self, now: float) -> None:
        deadline_s = self.settings.deadline_s
        settling = self._acknowledgements.settling
        if settling is not None and now - settling.since - settling.reported_s > deadline_s:
            settling.reported_s = now - settling.since
            log.warning(
                "%s has been %s for %.1f s; nothing is acknowledged", self.name, settling.what, settling.reported_s
            )
        for session in self.sessions:
            for work in session.all_work:
                if now - work.since - work.reported_s <= deadline_s:
                    continue
                work.reported_s = now - work.since
                log.warning(
                    "%s has worked for %.1f s on %s of %s, which waits for it",
                    self.name,
                    work.reported_s,
                    work.what,
                    session.name,
                )
