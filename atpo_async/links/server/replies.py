"""Replies of a server: held until the client confirms them, and sent when the outbox has space for them."""

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
"""Between two looks whether there is space for a reply that waits; libzmq does not say when it has sent something."""

Send = Callable[[Sequence[codec.Buffer]], Sequence[Sent] | None]


class Replies:
    """The replies to all clients of a server.

    Args:
        settings: of the link.
        send: hands frames to the socket and returns the trackers of their sending; None where the peer is gone.
        on_space: called with a client whose replies have left, so that further requests of it can be worked on.
    """

    def __init__(self, settings: LinksConfig, *, send: Send, on_space: Callable[[Session], None]) -> None:
        self.outbox = Outbox(settings.max_message_bytes)
        self.held_back = 0
        """Replies that had to wait for space on the way out."""
        self.kept_bytes = 0
        """Of all clients, forgotten ones included; a client that lost a reply asks again."""
        self._settings = settings
        self._send = send
        self._on_space = on_space
        self._order: OrderedDict[tuple[Session, int], None] = OrderedDict()
        """All replies that are held, oldest first."""
        self._blocked: set[Session] = set()
        self._timer: asyncio.TimerHandle | None = None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def add(self, session: Session, request_id: int, frames: list[codec.Buffer]) -> None:
        """Hold a reply, and send it as soon as there is space."""
        replies, nbytes = session.replies, sum(map(len, frames))
        replies.largest = max(nbytes, replies.largest // 2)
        replies.frames[request_id] = frames
        replies.nbytes += nbytes
        self._order[session, request_id] = None
        self.kept_bytes += nbytes
        while len(replies.frames) > self._settings.window or (
            len(replies.frames) > 1 and replies.nbytes > self._settings.max_message_bytes
        ):
            self._drop(session, next(iter(replies.frames)))
        # Of all together, too: a client's last replies are held until it confirms them.
        while self.kept_bytes > self.outbox.all_bytes and len(self._order) > 1:
            self._drop(*next(iter(self._order)))
        self.hand_over(session, request_id)

    def _drop(self, session: Session, request_id: int) -> None:
        self._order.pop((session, request_id), None)
        frames = session.replies.frames.pop(request_id, None)
        if frames is not None:
            nbytes = sum(map(len, frames))
            session.replies.nbytes -= nbytes
            self.kept_bytes -= nbytes

    def drop_below(self, session: Session, floor: int) -> None:
        """The client has the replies to the requests below ``floor``."""
        frames = session.replies.frames
        while frames and (first := next(iter(frames))) < floor:
            self._drop(session, first)

    def forget(self, session: Session) -> None:
        """The client has gone: drop its replies."""
        session.replies.unsent.clear()
        self._blocked.discard(session)
        for request_id in list(session.replies.frames):
            self._drop(session, request_id)

    def hand_over(self, session: Session, request_id: int) -> None:
        """Send a reply that is held as soon as there is space for it."""
        session.replies.unsent.append(request_id)
        if not self._send_waiting(session):
            self.held_back += 1

    def fits(self, session: Session, running: int) -> bool:
        """Whether there will be space for the reply to one more request, beside ``running`` others."""
        if session.replies.unsent:
            return False
        unsent = self.outbox.unsent(session.routing_id)
        if not running and not unsent:
            return True
        return unsent + (running + 1) * session.replies.largest <= self.outbox.peer_bytes

    def call_again(self, session: Session) -> None:
        """Schedule a call of ``on_space`` with a client."""
        self._blocked.add(session)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_EVERY_S, self._look)

    def _look(self) -> None:
        self._timer = None
        blocked, self._blocked = self._blocked, set()
        for session in blocked:
            if self._send_waiting(session):
                self._on_space(session)

    def _send_waiting(self, session: Session) -> bool:
        """Send, oldest first, the replies that there is space for; whether that was all of them."""
        replies = session.replies
        while replies.unsent:
            request_id = replies.unsent[0]
            # One that was dropped meanwhile is asked for again.
            frames = replies.frames.get(request_id)
            if frames is not None:
                nbytes = sum(map(len, frames))
                if not self.outbox.has_space(session.routing_id, nbytes):
                    self.call_again(session)
                    return False
                trackers = self._send(
                    (session.routing_id, LINK.pack(MAGIC, REPLY, session.nonce, request_id, 0), *frames)
                )
                # To a peer that is gone nothing is sent: it will ask again.
                if trackers:
                    self.outbox.add(session.routing_id, trackers, nbytes)
            replies.unsent.popleft()
        return True
