"""The server of a link, many clients' other end; see ``atpo_async.links``."""

from __future__ import annotations

import asyncio
import inspect
import logging
import struct
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import zmq

from atpo_async.config import LinksConfig
from atpo_async.core.errors import BadMessage
from atpo_async.links.frames import (
    ACK,
    DENIED,
    FULL,
    ID_SEPARATOR,
    LINK,
    MAGIC,
    MAX_REASON,
    MAX_SENDS,
    PING,
    PONG,
    REFUSE,
    REPLACED,
    REQUEST,
    SEND,
    SENDS,
    encode_within,
    worth_a_line,
)
from atpo_async.links.server.replies import Replies
from atpo_async.links.server.sessions import MAX_PEERS, Frames, PeerInfo, Session, Working, find_room
from atpo_async.links.sockets import BURST, BindingLink, Context, Pump
from atpo_async.wire import codec
from atpo_async.wire.messages import Refused
from atpo_async.wire.records import frames_in

log = logging.getLogger("atpo.links")

Handler = Callable[..., Any]
"""``handler(peer, message)``, with ``with_frames`` ``handler(peer, message, frames)``; a coroutine function or not."""

MAX_SEQ = 2**63 - 1
"""Of a send: no client gets that far, and whatever follows from it still fits into a link frame."""
RETRY_PAUSES_S = (0.05, 0.5, 2.0)
"""A handler that fails on a send is run again after these; then the message is refused."""
_MAX_PING_BYTES = 8 << 12
"""Of the ids of open requests in a ping."""
_MAX_RUNNING = 16
"""Requests of one peer that are worked on at a time; the others wait for their turn."""
_QUEUED_MESSAGES = 4
"""Times ``max_message_bytes``: what the sends of one peer that wait for the handler may hold."""


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
            wait, is faster: no task is needed for what it does at once.
        settings: window, heartbeats, deadlines, keys.
        settled: if given, what the handlers of sends have taken is acknowledged, or refused, only once a call of this
            that began after they returned has returned too: where they only note, this makes durable.  Handlers of
            further sends run meanwhile, and one call serves all that was handled before it began.  While it hangs
            nothing is acknowledged; if it raises, neither, and it is called again after a pause.
        with_frames: the handler gets a third argument, the two frames of the message as they came.
        learners_only, former_port, setting: as of ``BindingLink``.
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
        learners_only: bool = False,
        former_port: int = 0,
        setting: str = "the port in [links]",
    ) -> None:
        super().__init__(endpoint, settings, learners_only=learners_only, former_port=former_port, setting=setting)
        self.name = name
        self.bad_messages = 0
        self._receives = receives
        self._handler = handler
        self._always_waits = inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(
            getattr(handler, "__call__", None)  # noqa: B004  (objects may be handlers; theirs is a method)
        )
        self._with_frames = with_frames
        self._settled = settled
        self._unsettled: set[Session] = set()
        self._settler: asyncio.Task[None] | None = None
        self._settling: Working | None = None
        self._pump: Pump | None = None
        self._max_ahead = 4 * settings.window
        self._max_queued_bytes = _QUEUED_MESSAGES * settings.max_message_bytes
        self._sessions: dict[bytes, Session] = {}
        self._by_name: dict[str, Session] = {}
        self._replaced: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._replies = Replies(settings, send=self._send_tracked, on_room=self._serve_next)
        self.refused_peers = 0
        """Clients that the table had no room for, and those that had to make way."""
        self._due: list[Session] = []
        self._flush_scheduled = False

    @property
    def counters(self) -> dict[str, float]:
        """What leaves, for metrics: names without the server's."""
        return {
            "unsent_bytes": self._replies.outbox.look(),
            "most_unsent_bytes": self._replies.outbox.most_unsent_bytes,
            "kept_reply_bytes": self._replies.kept_bytes,
            "held_back": self._replies.held_back,
            "refused_peers": self.refused_peers,
        }

    @property
    def peers(self) -> dict[str, PeerInfo]:
        """Clients heard of within ``give_up_s``, by name."""
        now = self._now()
        return {
            s.name: PeerInfo(
                identity=s.name,
                silent_s=now - s.heard_at,
                queued=len(s.queue),
                unsettled=s.handled - s.settled,
                requests=len(s.requests),
            )
            for s in list(self._sessions.values())
        }

    @property
    def title(self) -> str:
        return f"{self.name} at {self.endpoint}"

    def link_status(self) -> dict[str, Any]:
        now = self._now()
        settling = self._settling
        return {
            "kind": "server",
            "name": self.name,
            "endpoint": self.endpoint,
            "keys": self._keys is not None,
            "window": self.settings.window,
            "peers": [self._peer_status(session, now) for session in list(self._sessions.values())],
            "settling_s": None if settling is None else now - settling.since,
            "bad": self.bad_messages,
            "refused_connections": dict(self._refusals.counts),
            **self.counters,
        }

    def _peer_status(self, session: Session, now: float) -> dict[str, Any]:
        working = session.working
        return {
            "peer": session.name,
            "silent_s": now - session.heard_at,
            "queued": len(session.queue),
            "queued_bytes": session.queued_bytes,
            "unsettled": session.handled - session.settled,
            "handled": session.handled,
            "unsent_bytes": self._replies.outbox.unsent(session.routing_id),
            "handling": None if working is None else {"what": working.what, "since_s": now - working.since},
            "requests": [{"what": w.what, "since_s": now - w.since} for w in list(session.requests.values())],
        }

    # --- opening and closing

    def _open(self, context: Context) -> None:
        socket = self._socket(context, zmq.ROUTER)
        # An answer to somebody who is gone is an error, not silence; a client that connects again takes over from the
        # connection that it lost, perhaps without our noticing.  Nobody else knows its routing id.
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        # A peer that does not read gets nothing more, and asks again when it does.
        socket.setsockopt(zmq.SNDHWM, 8 * self.settings.window)
        socket.setsockopt(zmq.RCVHWM, 4 * self.settings.window)
        self._bind(socket, context)
        self._pump = Pump(socket, self._on_frames, users=self._keys is not None)
        self._spawn(self._watch(), f"{self.name} watch")

    def _close_sockets(self) -> None:
        super()._close_sockets()
        self._replies.close()
        if self._pump is not None:
            self._pump.close()

    async def close(self) -> None:
        try:
            await super().close()
        finally:
            for session in self._sessions.values():
                # A worker that never came to run has not awaited it.
                if inspect.iscoroutine(session.begun):
                    session.begun.close()

    # --- what comes in

    def _answer(self, session: Session, kind: int, a: int, b: int, *frames: codec.Buffer) -> bool:
        """False if the peer is gone, or does not read: it will ask again."""
        if self._pump is None or self._pump.closed:
            return False
        return self._pump.send((session.routing_id, LINK.pack(MAGIC, kind, session.nonce, a, b), *frames))

    def _bad(self, peer: str, fact: object) -> None:
        self.bad_messages += 1
        # All of the first ones, then every hundredth: a broken peer must not fill the disk.
        if self.bad_messages <= 20 or self.bad_messages % 100 == 0:
            log.warning("%s: bad message %d, from %s: %s", self.name, self.bad_messages, peer, fact)

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
            self._bad(_name(owner, routing_id), "no link frame")
            return None
        if magic != MAGIC or kind not in (SEND, SENDS, REQUEST, PING):
            self._bad(_name(owner, routing_id), f"link frame with magic {magic!r} and kind {kind}")
            return None
        session = self._sessions.get(routing_id)
        if session is None or session.nonce != nonce or session.owner != owner:
            session = self._session_of(routing_id, owner, nonce)
            if session is None:
                return None
        session.heard_at = self._now()
        if kind == SENDS:
            return self._on_sends(session, a, b, rest[1:])
        if kind == SEND:
            self._on_send(session, a, b, [rest[1:]])
        elif kind == REQUEST:
            self._on_request(session, a, b, rest[1:])
        else:
            self._on_ping(session, a, b, rest[1] if len(rest) > 1 else b"")
        return None

    # --- who is who

    def _session_of(self, routing_id: bytes, owner: str, nonce: int) -> Session | None:
        """A new session for this life of a client, in place of its last one; None if it may have none."""
        name = _name(owner, routing_id)
        session = Session(routing_id, owner, name, nonce, self._now())
        if (owner, nonce) in self._replaced:
            # Its successor is there already: two live clients of one name would throw each other out for ever.
            self._answer(session, REPLACED, 0, 0)
            return None
        if (other := self._sessions.get(routing_id)) is not None and other.name != name:
            # libzmq has cut the other one's connection; it will come back, and its session waits for it.
            self._bad(name, f"claims the routing id of {other.name}")
            return None
        old = self._by_name.get(name)
        if old is None:
            if not self._make_room(session):
                return None
        else:
            # What it sent and we took is still handled; its replies have nobody to go to.
            self._forget(old)
            self._replaced[old.owner, old.nonce] = None
            if len(self._replaced) > MAX_PEERS:
                self._replaced.popitem(last=False)
            if old.routing_id != routing_id:
                self._answer(old, REPLACED, 0, 0)
        self._sessions[routing_id] = self._by_name[name] = session
        return session

    def _make_room(self, newcomer: Session) -> bool:
        """Whether there is room for one more client, perhaps because another made way; who is refused hears why."""
        victim, full = find_room(self._sessions.values(), newcomer.owner, newcomer.heard_at, self.settings.heartbeat_s)
        if victim is None and not full:
            return True
        self.refused_peers += 1
        if worth_a_line(self.refused_peers):
            what = f"refuses {newcomer.name}: {full}" if victim is None else f"drops {victim.name} for {newcomer.name}"
            log.warning("%s %s (%d refused or dropped by now)", self.name, what, self.refused_peers)
        gone = newcomer if victim is None else victim
        self._answer(gone, FULL, 0, 0, (full or "the table of peers is full, and nothing of use came").encode())
        if victim is not None:
            self._forget(victim)
        return victim is not None

    def _forget(self, session: Session) -> None:
        for working in session.requests.values():
            if working.task is not None:
                working.task.cancel()
        session.waiting.clear()
        self._replies.forget(session)
        if self._sessions.get(session.routing_id) is session:
            del self._sessions[session.routing_id]
        if self._by_name.get(session.name) is session:
            del self._by_name[session.name]

    def _deny(self, routing_id: bytes, user: str, rest: list[codec.Buffer]) -> None:
        """Somebody whose key was taken away since it connected."""
        peer = _name("", routing_id)
        self._refusals.note(self.endpoint, peer, "its key was taken away", f", public key {user}")
        if rest and len(rest[0]) == LINK.size and self._pump is not None:
            nonce = LINK.unpack(rest[0])[2]
            self._pump.send((routing_id, LINK.pack(MAGIC, DENIED, nonce, 0, 0)))

    # --- sends

    def _place(self, session: Session, base: int) -> bool:
        """Take note of what the client knows to be handled.  False if that cannot be."""
        if base > MAX_SEQ:
            return False
        if session.expected is None:
            session.expected = session.handled = session.settled = session.base = base
        if base > session.settled:
            return False
        if base > session.base:
            session.base = base
            if session.refusals:
                session.refusals = {s: r for s, r in session.refusals.items() if s >= base}
        return True

    def _on_sends(self, session: Session, seq: int, base: int, frames: Frames) -> int:
        try:
            if len(frames) != 1:
                raise BadMessage(f"sends in {len(frames)} frames; expected 1")
            found = frames_in(frames[0], MAX_SENDS)
        except BadMessage as exc:
            # Dropped, not refused: who can tell which message is damaged?  A sound client sends all of them again.
            self._bad(session.name, f"sends from {seq} on: {exc}")
            return 1
        self._on_send(session, seq, base, found)
        return len(found)

    def _on_send(self, session: Session, seq: int, base: int, messages: Sequence[Frames]) -> None:
        """One send or several in a row, each given as its frames."""
        if base > seq or not self._place(session, base):
            self._bad(session.name, f"send {seq} with base {base}, {session.settled} acknowledged")
            return
        for number, frames in enumerate(messages, seq):
            if number != session.expected:
                # Below: a repeat of what we have, its acknowledgement may be lost.  Above: something before it is lost.
                if number < session.settled:
                    self._answer_soon(session)
                continue
            # Counted from what the client says it has got: refusals are kept until then.
            if number - session.base >= self._max_ahead or session.queued_bytes > self._max_queued_bytes:
                # Clients of our settings hardly come here; whoever does sends it again after its next heartbeat.
                return
            item: Any
            try:
                item = codec.decode(frames, self._receives, limits=self._limits)
            except BadMessage as exc:
                self._bad(session.name, exc)
                # Another one, which has never been raised: the first one's traceback, or that of its cause, leads here,
                # to a ring that only the garbage collector would find, with all that came in this message.
                item = BadMessage(str(exc))
            session.expected = number + 1
            if session.worker is None and self._handled_at_once(session, item, frames):
                continue
            session.queue.append((item, frames))
            session.queued_bytes += sum(map(len, frames))
            if session.worker is None:
                session.worker = self._spawn(self._work(session), f"{self.name} sends of {session.name}")

    def _call(self, session: Session, message: Any, frames: Frames) -> Any:
        if self._with_frames:
            return self._handler(session.name, message, frames)
        return self._handler(session.name, message)

    def _handled_at_once(self, session: Session, item: Any, frames: Frames) -> bool:
        """Handle a send to which nothing has to wait; False if it does, or if the handler failed."""
        if isinstance(item, BadMessage):
            self._handled(session, str(item))
            return True
        if self._always_waits:
            return False
        try:
            result = self._call(session, item, frames)
        except BadMessage as exc:
            self._handled(session, str(exc))
            return True
        except Exception as exc:
            session.begun = exc
            return False
        if result is not None and inspect.isawaitable(result):
            session.begun = result
            return False
        self._handled(session, None)
        return True

    async def _work(self, session: Session) -> None:
        """Handle the sends of one client in order until there are none.  Waits for: the handler."""
        try:
            burst = 0
            while session.queue:
                item, frames = session.queue[0]
                reason = str(item) if isinstance(item, BadMessage) else await self._handle(session, item, frames)
                # Ack after the handler: an ack before it loses the message if we crash here.  Out of the queue
                # only now: a handler that was cancelled has not taken its message.
                session.queue.popleft()
                session.queued_bytes -= sum(map(len, frames))
                self._handled(session, reason)
                burst += 1
                if burst % BURST == 0:
                    await asyncio.sleep(0)
        finally:
            session.worker = None

    async def _handle(self, session: Session, message: Any, frames: Frames) -> str | None:
        """Why the message is refused, or None."""
        working = session.working = Working(type(message).__name__, self._now())
        try:
            for pause_s in (*RETRY_PAUSES_S, None):
                begun, session.begun = session.begun, None
                try:
                    if isinstance(begun, Exception):
                        raise begun
                    result = self._call(session, message, frames) if begun is None else begun
                    if result is not None and inspect.isawaitable(result):
                        await result
                    return None
                except BadMessage as exc:
                    return str(exc)
                except Exception as exc:
                    log.exception("%s failed on %s from %s", self.name, working.what, session.name)
                    if pause_s is None:
                        return f"{self.name} failed on it {len(RETRY_PAUSES_S) + 1} times: {_told(exc)}"
                    await asyncio.sleep(pause_s)
        finally:
            session.working = None
        return None

    # --- acknowledgements

    def _handled(self, session: Session, reason: str | None) -> None:
        if reason is not None:
            session.refusals[session.handled] = reason[:MAX_REASON]
        else:
            session.useful = True
        session.handled += 1
        if not session.due:
            self._answer_soon(session)

    def _answer_soon(self, session: Session) -> None:
        """One acknowledgement for all that is handled in this turn of the loop."""
        if session.due:
            return
        session.due = True
        self._due.append(session)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """Acknowledge what is handled, or have it settled first."""
        self._flush_scheduled = False
        sessions, self._due = self._due, []
        at_once = []
        for session in sessions:
            session.due = False
            if self._settled is not None and session.handled > session.settled:
                self._unsettled.add(session)
                continue
            session.settled = session.handled
            at_once.append(session)
        if self._unsettled and self._settled is not None and self._settler is None and not self._closed:
            self._settler = self._spawn(self._settle(self._settled), f"{self.name} settles")
        # Last: should one of these fail, nobody waits for ever.
        for session in at_once:
            self._ack(session)

    @property
    def _closed(self) -> bool:
        return self._pump is None or self._pump.closed

    async def _settle(self, settled: Callable[[], Awaitable[None]]) -> None:
        """Acknowledge what was handled before each call.  Waits for: ``settled``.  Ended by: nothing left to settle."""
        failures = 0
        try:
            while self._unsettled:
                marks = [(session, session.handled) for session in self._unsettled]
                self._unsettled.clear()
                if self._settling is None:
                    # Goes on counting over failures: nothing was acknowledged since.
                    self._settling = Working(f"settling sends of {len(marks)} peers", self._now())
                try:
                    await settled()
                except Exception:
                    failures += 1
                    self._unsettled.update(session for session, _ in marks)
                    if worth_a_line(failures):
                        log.exception(
                            "%s could not settle what %d peers sent (%d times); nothing is acknowledged",
                            self.name,
                            len(marks),
                            failures,
                        )
                    await asyncio.sleep(RETRY_PAUSES_S[min(failures, len(RETRY_PAUSES_S)) - 1])
                    continue
                if failures:
                    log.warning("%s settles again, after %d failures", self.name, failures)
                failures = 0
                self._settling = None
                for session, handled in marks:
                    session.settled = handled
                    self._ack(session)
        finally:
            self._settling = None
            self._settler = None

    def _ack(self, session: Session) -> None:
        # Refusals go first and again until the client moves past them: it must not take a refusal for an ack.
        for seq, reason in session.refusals.items():
            if seq < session.settled and not self._answer(session, REFUSE, seq, 0, reason.encode(errors="replace")):
                return
        self._answer(session, ACK, session.settled, 0)

    def _on_ping(self, session: Session, cursor: int, base: int, ids: codec.Buffer) -> None:
        # No client has more requests open than its window; the answer to what claims so would be as long.
        if cursor < base or len(ids) % 8 or len(ids) > _MAX_PING_BYTES or not self._place(session, base):
            self._bad(session.name, f"ping with base {base}, cursor {cursor}, {session.settled} acknowledged")
            return
        self._ack(session)
        under_way = session.requests.keys() | set(session.held)
        again = [i for (i,) in struct.iter_unpack("<Q", ids) if i not in under_way]
        self._answer(session, PONG, cursor, session.expected or 0, struct.pack(f"<{len(again)}Q", *again))

    # --- requests

    def _on_request(self, session: Session, request_id: int, floor: int, frames: list[codec.Buffer]) -> None:
        self._replies.drop_below(session, floor)
        if request_id in session.requests or request_id in session.held:
            return
        if request_id in session.replies:
            self._replies.hand_over(session, request_id)
            return
        if len(session.requests) >= self.settings.window or session.waiting_bytes > self._max_queued_bytes:
            # Clients of our settings never come here; the others ask again after their next heartbeat.
            return
        try:
            message = codec.decode(frames, self._receives, limits=self._limits)
        except BadMessage as exc:
            self._bad(session.name, exc)
            self._replies.add(session, request_id, self._refusal(str(exc)))
            return
        session.requests[request_id] = Working(type(message).__name__, self._now())
        session.waiting.append((request_id, message, frames))
        session.waiting_bytes += sum(map(len, frames))
        self._serve_next(session)

    def _serve_next(self, session: Session) -> None:
        """Begin with the requests whose replies there will be room for.

        No request is worked on for somebody who does not take the replies: what is not made needs no memory.
        """
        while session.waiting and self._may_serve(session):
            request_id, message, frames = session.waiting.popleft()
            session.waiting_bytes -= sum(map(len, frames))
            working = session.requests[request_id]
            working.task = self._spawn(
                self._serve(session, request_id, message, frames), f"{self.name} {working.what} of {session.name}"
            )
        if session.waiting:
            self._replies.call_again(session)

    def _may_serve(self, session: Session) -> bool:
        running = len(session.requests) - len(session.waiting)
        return running < _MAX_RUNNING and self._replies.fits(session, running)

    async def _serve(self, session: Session, request_id: int, message: Any, frames: Frames) -> None:
        """Answer one request.  Waits for: the handler, at most ``give_up_s``."""
        what = type(message).__name__
        try:
            async with asyncio.timeout(self.settings.give_up_s):
                reply = self._call(session, message, frames)
                if inspect.isawaitable(reply):
                    reply = await reply
            if reply is None:
                reply = Refused(reason=f"{self.name} has no answer to {what}")
            answer = encode_within(reply, self._limits)
            session.useful = session.useful or not isinstance(reply, Refused)
        except BadMessage as exc:
            answer = self._refusal(str(exc))
        except Exception as exc:
            log.exception("%s failed on %s from %s", self.name, what, session.name)
            answer = self._refusal(f"{self.name} failed on {what}: {_told(exc)}")
        finally:
            # Cancelled, too: the session is forgotten, and has neither replies nor requests left.
            session.requests.pop(request_id, None)
        self._replies.add(session, request_id, answer)
        self._serve_next(session)

    def _refusal(self, reason: str) -> list[codec.Buffer]:
        return encode_within(Refused(reason=reason[:MAX_REASON]), self._limits)

    def _send_tracked(self, frames: Sequence[codec.Buffer]) -> Sequence[zmq.MessageTracker] | None:
        return None if self._pump is None or self._pump.closed else self._pump.send_tracked(frames)

    # --- the clock

    async def _watch(self) -> None:
        """Report handlers that take long, forget clients that are gone, shut out those whose key was taken away.

        Waits for: the clock.  Ended by: close().
        """
        while True:
            await asyncio.sleep(self.settings.heartbeat_s)
            now = self._now()
            if self._keys is not None and self._keys.look():
                self._shut_out(set(self._keys.names.values()))
            self._report(now)
            for session in list(self._sessions.values()):
                if session.idle and now - session.heard_at > self.settings.give_up_s:
                    log.info("%s forgets %s, silent for %.0f s", self.name, session.name, now - session.heard_at)
                    self._forget(session)

    def _shut_out(self, owners: set[str]) -> None:
        for session in list(self._sessions.values()):
            if session.owner not in owners:
                log.warning("%s shuts out %s: its key was taken away", self.name, session.name)
                self._answer(session, DENIED, 0, 0)
                self._forget(session)

    def _report(self, now: float) -> None:
        deadline_s = self.settings.deadline_s
        settling = self._settling
        if settling is not None and now - settling.since - settling.reported_s > deadline_s:
            settling.reported_s = now - settling.since
            log.warning(
                "%s has been %s for %.1f s; nothing is acknowledged", self.name, settling.what, settling.reported_s
            )
        for session in self._sessions.values():
            for working in (session.working, *session.requests.values()):
                if working is None or now - working.since - working.reported_s <= deadline_s:
                    continue
                working.reported_s = now - working.since
                log.warning(
                    "%s has worked for %.1f s on %s of %s, which waits for it",
                    self.name,
                    working.reported_s,
                    working.what,
                    session.name,
                )


def _name(owner: str, routing_id: bytes) -> str:
    """What a client is called: what it says, after the name of its key if there are keys."""
    said = routing_id.partition(ID_SEPARATOR)[0]
    try:
        name = said.decode()
    except UnicodeDecodeError:
        name = ""
    if not name or not name.isprintable():
        name = routing_id.hex()
    return f"{owner}/{name}" if owner else name


def _told(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}"
