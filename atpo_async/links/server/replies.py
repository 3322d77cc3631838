"""Replies of a server: kept until the client has them, and sent as far as there is room for them on the way out."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence

from atpo_async.config import LinksConfig
from atpo_async.links.frames import LINK, MAGIC, REPLY
from atpo_async.links.server.outbox import Outbox, Sent
from atpo_async.links.server.sessions import Session
from atpo_async.wire import codec

_LOOK_EVERY_S = 0.01
"""Between two looks whether what waits for room on the way out has it; nothing tells."""

Send = Callable[[Sequence[codec.Buffer]], Sequence[Sent] | None]


class Replies:
    """The replies to all clients of a server.

    Args:
        settings: of the link.
        send: hands frames to the socket and returns who tells that they are sent; None where the peer is gone.
        on_room: called with a client whose replies have left, so that further requests of it can be worked on.
    """

    def __init__(self, settings: LinksConfig, *, send: Send, on_room: Callable[[Session], None]) -> None:
        self.outbox = Outbox(settings.max_message_bytes)
        self.held_back = 0
        """Replies that had to wait for room on the way out."""
        self.kept_bytes = 0
        """Of all clients: who lost a reply asks again."""
        self._settings = settings
        self._send = send
        self._on_room = on_room
        self._kept: OrderedDict[tuple[Session, int], None] = OrderedDict()
        self._blocked: set[Session] = set()
        self._timer: asyncio.TimerHandle | None = None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def add(self, session: Session, request_id: int, frames: list[codec.Buffer]) -> None:
        """Keep a reply, and send it as soon as there is room."""
        nbytes = sum(map(len, frames))
        session.largest_reply = max(nbytes, session.largest_reply // 2)
        session.replies[request_id] = frames
        session.reply_bytes += nbytes
        self._kept[session, request_id] = None
        self.kept_bytes += nbytes
        while len(session.replies) > self._settings.window or (
            len(session.replies) > 1 and session.reply_bytes > self._settings.max_message_bytes
        ):
            self.drop(session, next(iter(session.replies)))
        # Of all together, too: each has the last ones kept for as long as it says nothing further.
        while self.kept_bytes > self.outbox.all_bytes and len(self._kept) > 1:
            self.drop(*next(iter(self._kept)))
        self.hand_over(session, request_id)

    def drop(self, session: Session, request_id: int) -> None:
        """Keep a reply no longer."""
        self._kept.pop((session, request_id), None)
        frames = session.replies.pop(request_id, None)
        if frames is not None:
            nbytes = sum(map(len, frames))
            session.reply_bytes -= nbytes
            self.kept_bytes -= nbytes

    def drop_below(self, session: Session, floor: int) -> None:
        """The client has the replies to the requests below ``floor``."""
        while session.replies and (first := next(iter(session.replies))) < floor:
            self.drop(session, first)

    def forget(self, session: Session) -> None:
        session.held.clear()
        self._blocked.discard(session)
        for request_id in list(session.replies):
            self.drop(session, request_id)

    def hand_over(self, session: Session, request_id: int) -> None:
        """Send a reply that is kept as soon as there is room for it."""
        session.held.append(request_id)
        if not self._send_held(session):
            self.held_back += 1

    def fits(self, session: Session, running: int) -> bool:
        """Whether there will be room for the reply to one more request, beside ``running`` others."""
        if session.held:
            return False
        unsent = self.outbox.unsent(session.routing_id)
        if not running and not unsent:
            return True
        return unsent + (running + 1) * session.largest_reply <= self.outbox.peer_bytes

    def call_again(self, session: Session) -> None:
        """Call ``on_room`` with a client before long."""
        self._blocked.add(session)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_EVERY_S, self._look)

    def _look(self) -> None:
        self._timer = None
        blocked, self._blocked = self._blocked, set()
        for session in blocked:
            if self._send_held(session):
                self._on_room(session)

    def _send_held(self, session: Session) -> bool:
        """Send, oldest first, the replies that there is room for; whether that was all of them."""
        while session.held:
            request_id = session.held[0]
            # One that was dropped meanwhile is asked for again.
            frames = session.replies.get(request_id)
            if frames is not None:
                nbytes = sum(map(len, frames))
                if not self.outbox.has_room(session.routing_id, nbytes):
                    self.call_again(session)
                    return False
                trackers = self._send(
                    (session.routing_id, LINK.pack(MAGIC, REPLY, session.nonce, request_id, 0), *frames)
                )
                # To a peer that is gone nothing is sent: it will ask again.
                if trackers:
                    self.outbox.add(session.routing_id, trackers, nbytes)
            session.held.popleft()
        return True
