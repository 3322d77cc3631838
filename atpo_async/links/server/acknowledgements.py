"""Acknowledgements: a handled send is acknowledged, and where the server has to settle it, only once it is settled."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from atpo_async.links.frames import ACK, MAX_REASON, REFUSE, worth_a_line
from atpo_async.links.parcels import Parcel
from atpo_async.links.server.handling import Outcome, Spawn
from atpo_async.links.server.sessions import ReceivedSends, Session, Work

log = logging.getLogger("atpo.links")

SETTLE_PAUSES_S = (0.05, 0.5, 2.0)
"""A settling that failed is tried again after these, the last one over and over."""


class Acknowledgements:
    """Acknowledges to clients the sends that are handled and settled, and reports those that were refused.

    Args:
        title: the server's name, for the log.
        settled: makes durable what handlers took; None where acknowledgements need not wait.  As of ``Server``.
        answer: sends a client a link frame of a kind, with two numbers and further frames; False if it is gone.
        spawn: starts a task of the link.
    """

    def __init__(
        self,
        title: str,
        settled: Callable[[], Awaitable[None]] | None,
        *,
        answer: Callable[..., bool],
        spawn: Spawn,
    ) -> None:
        self.settling: Work | None = None
        """The settling under way, from the first attempt on."""
        self._title = title
        self._settled = settled
        self._answer = answer
        self._spawn = spawn
        self._due: list[Session] = []
        self._flush_scheduled = False
        self._unsettled: set[Session] = set()
        self._settler: asyncio.Task[None] | None = None
        self._closed = False

    def close(self) -> None:
        """Settle nothing further."""
        self._closed = True

    def handled(self, session: Session, outcome: Outcome) -> None:
        """The next send of a client has been handled, is refused for a reason, or is passed on."""
        sends = session.sends
        if isinstance(outcome, str):
            sends.refusals[sends.handled] = outcome[:MAX_REASON]
        else:
            session.useful = True
        if isinstance(outcome, Parcel):
            sends.passed_on.append((sends.handled, outcome))
            sends.handled += 1
            outcome.then(lambda: self.answer_soon(session))
            return
        sends.handled += 1
        if not sends.due:
            self.answer_soon(session)

    def answer_soon(self, session: Session) -> None:
        """Send one acknowledgement for all that is handled in this turn of the loop."""
        if session.sends.due:
            return
        session.sends.due = True
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
            sends = session.sends
            sends.due = False
            if self._settled is not None and sends.handled > sends.settled:
                self._unsettled.add(session)
                continue
            sends.settled = _arrived(sends)
            at_once.append(session)
        if self._unsettled and self._settled is not None and self._settler is None and not self._closed:
            self._settler = self._spawn(self._settle(self._settled), f"{self._title} settles")
        # Last: should one of these fail, no client waits for ever.
        for session in at_once:
            self.acknowledge(session)

    async def _settle(self, settled: Callable[[], Awaitable[None]]) -> None:
        """Acknowledge what was handled before each call.  Waits for: ``settled``.  Ended by: nothing left to settle."""
        failures = 0
        try:
            while self._unsettled:
                marks = [(session, session.sends.handled) for session in self._unsettled]
                self._unsettled.clear()
                if self.settling is None:
                    # Goes on counting over failures: nothing was acknowledged since.
                    self.settling = Work(f"settling sends of {len(marks)} peers", time.monotonic())
                try:
                    await settled()
                except Exception:
                    failures += 1
                    self._unsettled.update(session for session, _ in marks)
                    if worth_a_line(failures):
                        log.exception(
                            "%s could not settle what %d peers sent (%d times); nothing is acknowledged",
                            self._title,
                            len(marks),
                            failures,
                        )
                    await asyncio.sleep(SETTLE_PAUSES_S[min(failures, len(SETTLE_PAUSES_S)) - 1])
                    continue
                if failures:
                    log.warning("%s settles again, after %d failures", self._title, failures)
                failures = 0
                self.settling = None
                for session, handled in marks:
                    session.sends.settled = handled
                    self.acknowledge(session)
        finally:
            self.settling = None
            self._settler = None

    def acknowledge(self, session: Session) -> None:
        """Acknowledge now what is settled."""
        sends = session.sends
        # Refusals go first and again until the client moves past them: it must not take a refusal for an ack.
        for seq, reason in sends.refusals.items():
            if seq < sends.settled and not self._answer(session, REFUSE, seq, 0, reason.encode(errors="replace")):
                return
        self._answer(session, ACK, sends.settled)


def _arrived(sends: ReceivedSends) -> int:
    """Up to where everything is handled, and what was passed on has arrived."""
    while sends.passed_on:
        number, parcel = sends.passed_on[0]
        if not parcel.arrived:
            return number
        sends.passed_on.popleft()
        if parcel.refusal is not None:
            sends.refusals[number] = parcel.refusal[:MAX_REASON]
    return sends.handled
