"""An event loop that calls a function whenever all of its coroutines wait.

A loop asks its selector for events without waiting while a callback is ready, and with a time to wait when none is.
The second is the moment when nothing can go on by itself; what the function sets free goes on at once.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable


class IdleSelector(selectors.DefaultSelector):
    """Calls ``on_idle`` in place of waiting; it waits where that returns False."""

    on_idle: Callable[[], bool] = staticmethod(lambda: False)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if (timeout is None or timeout > 0) and self.on_idle():
            timeout = 0
        return super().select(timeout)


def new_loop() -> tuple[asyncio.AbstractEventLoop, IdleSelector]:
    """A loop, and the selector whose ``on_idle`` is to be set."""
    selector = IdleSelector()
    return asyncio.SelectorEventLoop(selector), selector
