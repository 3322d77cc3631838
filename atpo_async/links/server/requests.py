"""Incoming requests: each is worked on once, by a task of its own, when there will be space for its reply."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from typing import Any

from atpo_async.core.errors import BadMessage
from atpo_async.links.frames import MAX_REASON, encode_within
from atpo_async.links.parcels import NoAnswer
from atpo_async.links.server.handling import Frames, Handling
from atpo_async.links.server.replies import Replies, Send
from atpo_async.links.server.sessions import Session, Work
from atpo_async.wire import codec
from atpo_async.wire.messages import Refused

log = logging.getLogger("atpo.links")

_MAX_RUNNING = 16
"""Requests of one peer that are worked on at a time; the others wait for their turn."""


class RequestHandler:
    """Runs the server's handler on requests, and answers them.

    Args:
        handling: reads a message and runs the handler on it.
        send: hands frames to the socket, as of ``Replies``.
    """

    def __init__(self, handling: Handling, *, send: Send) -> None:
        self.replies = Replies(handling.settings, send=send, on_space=self._begin_waiting)
        self._handling = handling
        self._settings = handling.settings

    def take(self, session: Session, request_id: int, floor: int, frames: list[codec.Buffer]) -> None:
        """A request, perhaps a repeated one; the client has the replies to those below ``floor``."""
        requests, handling = session.requests, self._handling
        self.replies.drop_below(session, floor)
        if request_id in requests.work or request_id in session.replies.unsent:
            return
        if request_id in session.replies.frames:
            self.replies.hand_over(session, request_id)
            return
        if len(requests.work) >= self._settings.window or requests.waiting_bytes > handling.max_queued_bytes:
            # Clients of our settings never come here; the others ask again after their next heartbeat.
            return
        try:
            message = handling.read(frames)
        except BadMessage as exc:
            handling.bad.note(session.name, exc)
            self.replies.add(session, request_id, self._refusal(str(exc)))
            return
        requests.work[request_id] = Work(type(message).__name__, time.monotonic())
        requests.waiting.append((request_id, message, frames))
        requests.waiting_bytes += sum(map(len, frames))
        self._begin_waiting(session)

    def unknown(self, session: Session, request_ids: list[int]) -> list[int]:
        """Those of a client's open requests that never came, or whose replies have left: to be sent once more."""
        under_way = session.requests.work.keys() | set(session.replies.unsent)
        return [request_id for request_id in request_ids if request_id not in under_way]

    def _begin_waiting(self, session: Session) -> None:
        """Begin with the requests whose replies there will be space for.

        No request is worked on for a client that does not read its replies: they would take memory.
        """
        requests = session.requests
        while requests.waiting and self._may_begin(session):
            request_id, message, frames = requests.waiting.popleft()
            requests.waiting_bytes -= sum(map(len, frames))
            work = requests.work[request_id]
            work.task = self._handling.spawn(
                self._serve(session, request_id, message, frames),
                f"{self._handling.title} {work.what} of {session.name}",
            )
        if requests.waiting:
            self.replies.call_again(session)

    def _may_begin(self, session: Session) -> bool:
        running = len(session.requests.work) - len(session.requests.waiting)
        return running < _MAX_RUNNING and self.replies.fits(session, running)

    async def _serve(self, session: Session, request_id: int, message: Any, frames: Frames) -> None:
        """Answer one request.  Waits for: the handler, at most ``give_up_s``."""
        what, handling = type(message).__name__, self._handling
        try:
            async with asyncio.timeout(self._settings.give_up_s):
                reply = handling.run(session.name, message, frames)
                if inspect.isawaitable(reply):
                    reply = await reply
            if reply is None:
                reply = Refused(reason=f"{handling.title} has no answer to {what}")
            answer = encode_within(reply, handling.limits)
            session.useful = session.useful or not isinstance(reply, Refused)
        except NoAnswer:
            # Among the unknown ones of the client's next ping, if it still waits.
            answer = None
        except BadMessage as exc:
            answer = self._refusal(str(exc))
        except Exception as exc:
            log.exception("%s failed on %s from %s", handling.title, what, session.name)
            answer = self._refusal(handling.failure(what, exc))
        finally:
            # Cancelled, too: the session is forgotten, and has neither replies nor requests left.
            session.requests.work.pop(request_id, None)
        if answer is not None:
            self.replies.add(session, request_id, answer)
        self._begin_waiting(session)

    def _refusal(self, reason: str) -> list[codec.Buffer]:
        return encode_within(Refused(reason=reason[:MAX_REASON]), self._handling.limits)
