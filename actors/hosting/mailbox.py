"""Calls from one thread into the event loop of another: one wake-up for many, and few at a time."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVarTuple

Ts = TypeVarTuple("Ts")

MOST_AT_ONCE = 16
"""Calls that run in one turn of the loop; between two turns everything else on the loop has its own."""


class Mailbox:
    """Calls that other threads hand to ``loop``, in order.

    ``call_soon_threadsafe`` writes to a socket each time, and gives the interpreter's lock away for it: a thousand
    answers that come together would cost as many changes of thread, and hold the loop up until all are handled.

    Args:
        loop: runs the calls.
        wake: takes a function that ``loop`` is to call soon, from any thread; the loop's own, unless given.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, wake: Callable[[Callable[[], None]], object] | None = None):
        self.loop = loop
        self._wake = wake or loop.call_soon_threadsafe
        self._calls: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._awake = False
        """The loop will look into the mailbox again."""

    def put(self, call: Callable[..., object], *args: Any) -> None:
        """Called in any thread.  Raises RuntimeError where the loop is closed."""
        if self.loop.is_closed():
            raise RuntimeError("Event loop is closed")
        self._calls.append((call, args))
        if not self._awake:
            self._awake = True
            self._wake(self._open)

    def _open(self) -> None:
        # Before the calls are taken: what is put in from now on wakes the loop again.
        self._awake = False
        try:
            for _ in range(min(MOST_AT_ONCE, len(self._calls))):
                call, args = self._calls.popleft()
                call(*args)
        finally:
            if self._calls and not self._awake:
                self._awake = True
                self.loop.call_soon(self._open)


class MailboxLoop(asyncio.SelectorEventLoop):
    """An event loop that takes the calls of other threads from a mailbox, those of ``asyncio.to_thread`` above all."""

    def __init__(self) -> None:
        super().__init__()
        self._mailbox = Mailbox(self, super().call_soon_threadsafe)

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """As of every loop."""
        handle = asyncio.Handle(callback, args, self, context)
        self._mailbox.put(self._begin, handle, callback, args, context or contextvars.copy_context())
        return handle

    def _begin(
        self, handle: asyncio.Handle, callback: Callable[..., object], args: Any, context: contextvars.Context
    ) -> None:
        if not handle.cancelled():
            self.call_soon(callback, *args, context=context)


class Pace:
    """Lets ``MOST_AT_ONCE`` calls pass in one turn of the loop: a thousand episodes that begin together, in a thousand
    tasks, would hold it up until the last one has begun."""

    def __init__(self) -> None:
        self._left = MOST_AT_ONCE
        self._next_turn = False
        """The loop will count anew."""
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def passed(self) -> None:
        """Waits for: turns of the loop, as many as calls are ahead over ``MOST_AT_ONCE``."""
        loop = asyncio.get_running_loop()
        if not self._next_turn:
            self._next_turn = True
            loop.call_soon(self._count_anew, loop)
        if self._left and not self._waiting:
            self._left -= 1
            return
        mine: asyncio.Future[None] = loop.create_future()
        self._waiting.append(mine)
        await mine

    def _count_anew(self, loop: asyncio.AbstractEventLoop) -> None:
        self._left = MOST_AT_ONCE
        while self._waiting and self._left:
            first = self._waiting.popleft()
            if not first.done():  # cancelled meanwhile
                first.set_result(None)
                self._left -= 1
        self._next_turn = self._left < MOST_AT_ONCE
        if self._next_turn:
            loop.call_soon(self._count_anew, loop)
