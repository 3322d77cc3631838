"""One call into an environment, and the ways in which it may end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from atpo_async.core.texts import of_error

T = TypeVar("T")


class Interrupted(BaseException):
    """Raised inside a call that has held its loop up for longer than it may."""


class LoopLost(Exception):
    """The loop is held up for good by another call: this one has to be made again on another loop."""


class EnvironmentFault(Exception):
    """What an environment raised that must not be raised elsewhere: exit(), a cancellation, an interrupt."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(of_error(error))
        self.error = error


class EnvironmentTimeout(Exception):
    """A call took longer than it may."""


class Call(Generic[T]):
    """One call into an environment.  Made by, and answered in, the loop that waits for it."""

    def __init__(
        self, what: str, work: Callable[[], Awaitable[T]], discard: Callable[[T], Awaitable[None]] | None
    ) -> None:
        self.what = what
        self.work = work
        self.discard = discard
        """Ends a result that comes after nobody waits for it any more."""
        self.waiting_loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[T] = self.waiting_loop.create_future()
        self.ended: asyncio.Future[None] = self.waiting_loop.create_future()
        """Done once nothing of it runs any more."""
        self.closes = False
        """It ends an episode: it goes on when nobody waits for it."""
        self.dropped = False
        """Nobody waits for its answer."""
        self.unattended_since: float | None = None
        """Since it was answered or dropped; tasks of it may go on."""
        self.task: asyncio.Task[None] | None = None
        self.submitted = time.monotonic()
        self.busy_s = 0.0
        """For how long it has held the loop, in finished slices."""
        self.loop_busy_before_s = 0.0

    def leave_alone(self) -> None:
        """Nobody waits for it any more."""
        if self.unattended_since is None:
            self.unattended_since = time.monotonic()

    def settle(self, result: T | None, error: BaseException | None) -> None:
        """In the waiting loop."""
        self.leave_alone()
        if not self.ended.done():
            self.ended.set_result(None)
        if self.answer.done():
            return
        if error is None:
            self.answer.set_result(result)  # type: ignore[arg-type]
        elif isinstance(error, Exception):
            self.answer.set_exception(error)
        else:
            self.answer.set_exception(EnvironmentFault(error))
