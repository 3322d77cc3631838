"""Requests for leases that wait for admission, in the order in which they came: who is asked again after which change.

A tree's end makes space for one tree.  With a thousand actors waiting, asking for each of them again would cost the
buffer more than the tree did; so they are asked in their order until one finds admission closed for everyone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from atpo_async.wire.messages import LeaseRequest, Leases
from buffer.leases.admission import Admitted

LEASE_WAIT_S = 0.5
"""A request for leases waits this long for admission before it is answered with none."""
WAITING_AT_ONCE = 50
"""With more requests than this waiting, each waits longer in proportion, so that they do not come more often."""
MOST_LEASE_WAIT_S = 8.0


@dataclass(slots=True, eq=False)
class _Waiting:
    request: LeaseRequest
    answer: asyncio.Future[Leases]
    last: Admitted


class LeaseQueue:
    """The requests of one buffer that wait.

    Args:
        ask: decides about a request of an actor now.
        most_wait_s: no request waits for longer, however many there are.
    """

    def __init__(self, ask: Callable[[str, LeaseRequest], Admitted], *, most_wait_s: float = MOST_LEASE_WAIT_S) -> None:
        self._ask = ask
        self._most_wait_s = most_wait_s
        self._waiting: dict[str, _Waiting] = {}
        self._freed: set[str] = set()
        self._all = False
        """Something has changed that may let every request be answered."""
        self._due = False

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def wait_s(self) -> float:
        """How long a request waits at most, with as many as there are now."""
        return min(LEASE_WAIT_S * max(1.0, len(self._waiting) / WAITING_AT_ONCE), max(self._most_wait_s, LEASE_WAIT_S))

    def changed(self, freed: str = "") -> None:
        """The buffer's state has changed.  ``freed``: only in that a tree of this actor has ended."""
        if freed:
            self._freed.add(freed)
        else:
            self._all = True
        if self._waiting and not self._due:
            self._due = True
            # Changes of one turn of the loop, many trees' ends, are looked at together.
            asyncio.get_running_loop().call_soon(self._serve)

    def drop(self, actor: str) -> None:
        """A request of this actor that waits is answered with none: it asks no more, or anew."""
        if (waiting := self._waiting.pop(actor, None)) is not None and not waiting.answer.done():
            waiting.answer.set_result(waiting.last.leases)

    async def answer(self, actor: str, request: LeaseRequest) -> Leases:
        """The leases of a request; none after ``wait_s``.

        Waits for: admission.  Unblocked by: ``changed``.  A later request of the same actor takes its place.
        """
        found = self._ask(actor, request)
        if _is_final(found.leases):
            return found.leases
        waiting = _Waiting(request, asyncio.get_running_loop().create_future(), found)
        self.drop(actor)
        self._waiting[actor] = waiting
        try:
            await asyncio.wait((waiting.answer,), timeout=self.wait_s)
        finally:
            if self._waiting.get(actor) is waiting:
                del self._waiting[actor]
        return waiting.answer.result() if waiting.answer.done() else waiting.last.leases

    def _serve(self) -> None:
        self._due = False
        freed, self._freed = self._freed, set()
        everyone, self._all = self._all, False
        for actor, waiting in list(self._waiting.items()):
            if waiting.answer.done() or (waiting.last.only_here and not everyone and actor not in freed):
                continue
            found = waiting.last = self._ask(actor, waiting.request)
            if _is_final(found.leases):
                waiting.answer.set_result(found.leases)
            elif not found.only_here:
                return


def _is_final(leases: Leases) -> bool:
    return bool(leases.leases) or leases.finished
