"""Incoming sends: taken in order, handled one after another, each at least once."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Sequence
from typing import Any

from atpo_async.core.errors import BadMessage
from atpo_async.links.frames import MAX_SENDS
from atpo_async.links.parcels import Parcel
from atpo_async.links.pump import BURST
from atpo_async.links.server.acknowledgements import Acknowledgements
from atpo_async.links.server.handling import Frames, Handling, Outcome
from atpo_async.links.server.sessions import Session, Work
from atpo_async.wire.records import frames_in

log = logging.getLogger("atpo.links")

MAX_SEQ = 2**63 - 1
"""Of a send: no client gets that far, and whatever follows from it still fits into a link frame."""
RETRY_PAUSES_S = (0.05, 0.5, 2.0)
"""A handler that fails on a send is run again after these; then the message is refused."""


class SendHandler:
    """Takes the sends of every client in order and runs the server's handler on them.

    Args:
        handling: reads a message and runs the handler on it.
        acknowledgements: is called for every send that is handled.
    """

    def __init__(self, handling: Handling, acknowledgements: Acknowledgements) -> None:
        self._handling = handling
        self._acknowledgements = acknowledgements
        self.max_ahead = 4 * handling.settings.window
        """Sends of one client that are taken beyond those that it knows to be handled, with what waits of its earlier
        lives."""

    def take_together(self, session: Session, seq: int, base: int, frames: Frames) -> int:
        """Several sends in one frame.  Returns how many messages those were."""
        try:
            if len(frames) != 1:
                raise BadMessage(f"sends in {len(frames)} frames; expected 1")
            found = frames_in(frames[0], MAX_SENDS)
        except BadMessage as exc:
            # Dropped, not refused: it is unknown which message is damaged, and a sound client sends all of them again.
            self._handling.bad.note(session.name, f"sends from {seq} on: {exc}")
            return 1
        self.take(session, seq, base, found)
        return len(found)

    def take(self, session: Session, seq: int, base: int, messages: Sequence[Frames]) -> None:
        """One send or several in a row, each given as its frames; the client knows those below ``base`` handled."""
        sends, handling = session.sends, self._handling
        if base > seq or not note_base(session, base):
            handling.bad.note(session.name, f"send {seq} with base {base}, {sends.settled} acknowledged")
            return
        # Of a client's lives together: one that begins life after life, each with a full queue, would fill the memory.
        earlier, earlier_bytes = sends.earlier() if sends.before else (0, 0)
        for number, frames in enumerate(messages, seq):
            if number != sends.expected:
                # Below: a repeat of what we have, its acknowledgement may be lost.  Above: something before it is lost.
                if number < sends.settled:
                    self._acknowledgements.answer_soon(session)
                continue
            # Counted from what the client has confirmed: refusals are held until then.
            ahead = number - sends.base + earlier
            if ahead >= self.max_ahead or sends.queued_bytes + earlier_bytes > handling.max_queued_bytes:
                # Clients of our settings hardly get here; one that does sends it again after its next heartbeat.
                return
            item: Any
            try:
                item = handling.read(frames)
            except BadMessage as exc:
                handling.bad.note(session.name, exc)
                # Another one, which has never been raised: the first one's traceback, or that of its cause, leads here,
                # to a ring that only the garbage collector would find, with all that came in this message.
                item = BadMessage(str(exc))
            sends.expected = number + 1
            if sends.worker is None and self._handled_at_once(session, item, frames):
                continue
            sends.queue.append((item, frames))
            sends.queued_bytes += sum(map(len, frames))
            if sends.worker is None:
                sends.worker = handling.spawn(self._work(session), f"{handling.title} sends of {session.name}")

    def _handled_at_once(self, session: Session, item: Any, frames: Frames) -> bool:
        """Handle a send to which nothing has to wait; False if it does, or if the handler failed."""
        done = self._acknowledgements.handled
        if isinstance(item, BadMessage):
            done(session, str(item))
            return True
        if self._handling.always_waits:
            return False
        try:
            result = self._handling.run(session.name, item, frames)
        except BadMessage as exc:
            done(session, str(exc))
            return True
        except Exception as exc:
            session.sends.begun = exc
            return False
        if result is not None and inspect.isawaitable(result):
            session.sends.begun = result
            return False
        done(session, result if isinstance(result, Parcel) else None)
        return True

    async def _work(self, session: Session) -> None:
        """Handle the sends of one client in order until there are none.  Waits for: the handler."""
        sends = session.sends
        try:
            burst = 0
            while sends.queue:
                item, frames = sends.queue[0]
                outcome = str(item) if isinstance(item, BadMessage) else await self._handle(session, item, frames)
                # Ack after the handler: an ack before it loses the message if we crash here.  Out of the queue
                # only now: a handler that was cancelled has not taken its message.
                sends.queue.popleft()
                sends.queued_bytes -= sum(map(len, frames))
                self._acknowledgements.handled(session, outcome)
                burst += 1
                if burst % BURST == 0:
                    await asyncio.sleep(0)
        finally:
            sends.worker = None

    async def _handle(self, session: Session, message: Any, frames: Frames) -> Outcome:
        """Run the handler."""
        sends, title = session.sends, self._handling.title
        work = sends.work = Work(type(message).__name__, time.monotonic())
        try:
            for pause_s in (*RETRY_PAUSES_S, None):
                begun, sends.begun = sends.begun, None
                try:
                    if isinstance(begun, Exception):
                        raise begun
                    result = self._handling.run(session.name, message, frames) if begun is None else begun
                    if result is not None and inspect.isawaitable(result):
                        result = await result
                    return result if isinstance(result, Parcel) else None
                except BadMessage as exc:
                    return str(exc)
                except Exception as exc:
                    log.exception("%s failed on %s from %s", title, work.what, session.name)
                    if pause_s is None:
                        return self._handling.failure(f"it {len(RETRY_PAUSES_S) + 1} times", exc)
                    await asyncio.sleep(pause_s)
        finally:
            sends.work = None
        return None


def note_base(session: Session, base: int) -> bool:
    """Note that the client knows the sends below ``base`` to be handled.  False if ``base`` is impossible."""
    sends = session.sends
    if base > MAX_SEQ:
        return False
    if sends.expected is None:
        sends.expected = sends.handled = sends.settled = sends.base = base
    if base > sends.settled:
        return False
    if base > sends.base:
        sends.base = base
        if sends.refusals:
            sends.refusals = {s: r for s, r in sends.refusals.items() if s >= base}
    return True
