"""Requests under way: each is repeated until its one reply arrives."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from atpo_async.wire import codec


@dataclass(slots=True)
class PendingRequest:
    """A request without a reply."""

    what: str
    """The message's type, for the log."""
    since: float
    frames: list[codec.Buffer]
    answer: asyncio.Future[Any]
    transmitted: bool = False


class PendingRequests:
    """All requests of a client that have no reply yet, by number, oldest first.

    Args:
        size: how many there may be; a caller takes one of ``places`` before ``add``.
    """

    def __init__(self, size: int) -> None:
        self.places = asyncio.Semaphore(size)
        self._by_id: dict[int, PendingRequest] = {}
        self._next_id = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[PendingRequest]:
        """Those of this moment; from any thread."""
        return iter(list(self._by_id.values()))

    def add(self, request: PendingRequest) -> int:
        """Returns its number."""
        request_id = self._next_id
        self._next_id += 1
        self._by_id[request_id] = request
        return request_id

    def remove(self, request_id: int) -> None:
        del self._by_id[request_id]

    def waiting_for(self, request_id: int) -> PendingRequest | None:
        """The request whose reply came; None if it was answered already or was given up."""
        pending = self._by_id.get(request_id)
        return None if pending is None or pending.answer.done() else pending

    @property
    def floor(self) -> int:
        """The oldest one's number: below it every reply is there."""
        return next(iter(self._by_id))

    def untransmitted(self) -> list[tuple[int, PendingRequest]]:
        return [(request_id, pending) for request_id, pending in self._by_id.items() if not pending.transmitted]

    def on_the_wire(self) -> list[int]:
        """Numbers of those that the server should know."""
        return [request_id for request_id, pending in self._by_id.items() if pending.transmitted]

    def start_over(self) -> None:
        """The connection is a new one: all of them go out again."""
        self.repeat(self._by_id)

    def repeat(self, request_ids: Iterable[int]) -> None:
        """These have to be sent again: the server does not know them."""
        for request_id in request_ids:
            pending = self._by_id.get(request_id)
            if pending is not None:
                pending.transmitted = False
