"""Requests for leases that wait at the front, in the order in which they came."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from atpo_async.wire.messages import LeaseRequest, Leases
from buffer.handlers.lease_queue import LEASE_WAIT_S, WAITING_AT_ONCE
from buffer.state import RETRY_S

AGAIN_S = 0.05
"""A request that the shards gave nothing, though it seemed that they could, is asked for again after this, later in
proportion to the requests that wait."""

Ask = Callable[[str, LeaseRequest], Leases | Awaitable[Leases]]


@dataclass(slots=True, eq=False)
class _Waiting:
    request: LeaseRequest
    answer: asyncio.Future[Leases]
    last: Leases
    asked: asyncio.Task[None] | None = None
    not_before: float = 0.0
    """Seconds of the loop: until then it is not asked for again."""


class FrontQueue:
    """The requests that wait.

    Args:
        ask: decides about a request of an actor now: leases that are being asked for, or that there are none.
        most_wait_s: no request waits for longer, however many there are.
    """

    def __init__(self, ask: Ask, *, most_wait_s: float) -> None:
        self._ask = ask
        self._most_wait_s = max(most_wait_s, LEASE_WAIT_S)
        self._waiting: dict[str, _Waiting] = {}
        self._due = False
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def wait_s(self) -> float:
        """How long a request waits at most, with as many as there are now."""
        return min(LEASE_WAIT_S * max(1.0, len(self._waiting) / WAITING_AT_ONCE), self._most_wait_s)

    def close(self) -> None:
        """Ask for nothing further."""
        for task in list(self._tasks):
            task.cancel()

    def changed(self) -> None:
        """What the shards have has changed."""
        if self._waiting and not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._serve)

    async def answer(self, actor: str, request: LeaseRequest) -> Leases:
        """The leases of a request; none after ``wait_s``.

        Waits for: admission.  Unblocked by: ``changed``.  A later request of the same actor takes its place.
        """
        loop = asyncio.get_running_loop()
        none = Leases(leases=(), closed_because="other requests come first", retry_after_s=RETRY_S, finished=False)
        waiting = _Waiting(request, loop.create_future(), none)
        former = self._waiting.pop(actor, None)
        if former is not None and former.asked is None and not former.answer.done():
            former.answer.set_result(former.last)
        self._waiting[actor] = waiting
        self._serve()
        await asyncio.wait((waiting.answer,), timeout=self.wait_s)
        if self._waiting.get(actor) is waiting:
            del self._waiting[actor]
        if waiting.asked is not None:
            await asyncio.wait((waiting.answer,))  # what the shards grant must reach the actor
        return waiting.answer.result() if waiting.answer.done() else waiting.last

    def drop(self, actor: str) -> None:
        """An actor takes no more leases: a request of it that waits is answered with none."""
        waiting = self._waiting.pop(actor, None)
        if waiting is not None and waiting.asked is None and not waiting.answer.done():
            waiting.answer.set_result(waiting.last)

    def _serve(self) -> None:
        """Ask for the first ones, until one finds that there is nothing."""
        self._due = False
        now = asyncio.get_running_loop().time()
        for actor, waiting in list(self._waiting.items()):
            if waiting.answer.done() or waiting.asked is not None or waiting.not_before > now:
                continue
            found = self._ask(actor, waiting.request)
            if isinstance(found, Leases):
                waiting.last = found
                if not found.finished:
                    return
                waiting.answer.set_result(found)
                continue
            waiting.asked = task = asyncio.ensure_future(self._granted(waiting, found))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _granted(self, waiting: _Waiting, found: Awaitable[Leases]) -> None:
        leases = await found
        waiting.asked, waiting.last = None, leases
        if waiting.answer.done():
            return
        if leases.leases or leases.finished or waiting not in self._waiting.values():
            waiting.answer.set_result(leases)
        else:
            loop, pause_s = asyncio.get_running_loop(), AGAIN_S * max(1.0, len(self._waiting) / WAITING_AT_ONCE)
            waiting.not_before = loop.time() + pause_s
            loop.call_later(pause_s, self.changed)
