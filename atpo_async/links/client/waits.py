"""The waits of a client for its server: logged when they are overdue, and all ended early when the server is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True, eq=False)
class Wait:
    """One caller's wait."""

    what: str
    since: float
    timeout: asyncio.Timeout
    for_window: bool
    """For the server to acknowledge something, so that more may be sent."""
    reported_s: float = 0.0


class Waits:
    """All waits of a client that are open now."""

    def __init__(self) -> None:
        self._waits: set[Wait] = set()
        self._for_window_s = 0.0

    def __iter__(self) -> Iterator[Wait]:
        """Those of this moment; from any thread."""
        return iter(self._waits.copy())

    @property
    def for_window_s(self) -> float:
        """Seconds, summed over senders, that they have waited for the window."""
        now = time.monotonic()
        return self._for_window_s + sum(now - wait.since for wait in self if wait.for_window)

    def begin(self, what: str, timeout_s: float, *, for_window: bool = False) -> Wait:
        return Wait(what, time.monotonic(), asyncio.timeout(timeout_s), for_window)

    async def run(self, wait: Wait, awaitable: Awaitable[Any]) -> Any:
        """What the awaitable returns.  Raises TimeoutError when the wait's time is over, or when all are ended."""
        self._waits.add(wait)
        try:
            async with wait.timeout:
                return await awaitable
        finally:
            self._waits.discard(wait)
            if wait.for_window:
                self._for_window_s += time.monotonic() - wait.since

    def end(self) -> None:
        """End every wait: none can be fulfilled any more."""
        for wait in self:
            if not wait.timeout.expired():  # one whose own time is over ends by itself, and refuses another one
                wait.timeout.reschedule(time.monotonic())

    def overdue(self, deadline_s: float) -> list[Wait]:
        """Those that have waited for ``deadline_s`` since they were last reported; they count as reported now."""
        now = time.monotonic()
        found = [wait for wait in self if now - wait.since - wait.reported_s > deadline_s]
        for wait in found:
            wait.reported_s = now - wait.since
        return found
