"""In which order answers reach those who asked: that of the calls, so that no thread's timing decides what is next."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class CallOrder:
    """Keeps answers back until every call has its own, and lets them go in the order in which the calls were made.

    It is for a loop that says when nothing else can go on (``release``): what begins between two such moments follows
    from what was let go at the first of them, and from nothing else.
    """

    def __init__(self) -> None:
        self._calls: dict[int, asyncio.Future[None] | None] = {}
        """Calls by number; of those answered, what lets the answer go."""
        self._number = 0

    async def kept(self, call: Coroutine[Any, Any, T]) -> T:
        """What the call returns or raises.  Waits for: it.  Unblocked by: ``release``, once it has ended."""
        self._number += 1
        number, error = self._number, None
        self._calls[number] = None
        try:
            try:
                result = await call
            except Exception as exc:
                error = exc
            self._calls[number] = let_go = asyncio.get_running_loop().create_future()
            await let_go
            if error is not None:
                raise error
            return result
        finally:
            del self._calls[number]

    @property
    def under_way(self) -> bool:
        """Whether any call has not come back."""
        return bool(self._calls)

    def release(self) -> bool:
        """Let the answers go if every call has one; whether any went."""
        answered = [let_go for let_go in self._calls.values() if let_go is not None]
        if len(answered) < len(self._calls):
            return False
        for let_go in answered:
            if not let_go.done():
                let_go.set_result(None)
        return bool(answered)
