"""One call into an environment, and the ways in which it may end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from actors.hosting.mailbox import Mailbox
from atpo_async.core.texts import of_error

T = TypeVar("T")


class Interrupted(BaseException):
    """Raised inside a call that has held its loop for longer than its limit."""


class LoopLost(Exception):
    """Another call holds the loop for good: this call has to be made again on another loop."""


class EnvironmentFault(Exception):
    """Wraps what an environment raised and the actor must not raise: exit(), a cancellation, an interrupt."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(of_error(error))
        self.error = error


class EnvironmentTimeout(Exception):
    """A call took longer than it may."""


class Call(Generic[T]):
    """One call into an environment.  It is made and answered in the loop that waits for it."""

    def __init__(
        self,
        what: str,
        work: Callable[[], Awaitable[T]],
        discard: Callable[[T], Awaitable[None]] | None,
        answers: Mailbox,
    ) -> None:
        self.what = what
        self.work = work
        self.discard = discard
        """Called with a result that comes after the wait for it was given up."""
        self.answers = answers
        """Of the loop that waits for it."""
        self.answer: asyncio.Future[T] = answers.loop.create_future()
        self.ended: asyncio.Future[None] = answers.loop.create_future()
        """Done when the call no longer runs."""
        self.closes = False
        """The call closes an episode: it goes on when the wait for it is given up."""
        self.dropped = False
        """The wait for its answer was given up."""
        self.unattended_since: float | None = None
        """When it was answered or dropped; tasks that it has started may go on."""
        self.task: asyncio.Task[None] | None = None
        self.printed = 0
        """Characters that it has written to the process's streams."""
        self.submitted = time.monotonic()
        self.busy_s = 0.0
        """Seconds for which it has held the loop, in finished slices."""
        self.loop_busy_before_s = 0.0

    def leave_alone(self) -> None:
        """The wait for it is given up."""
        if self.unattended_since is None:
            self.unattended_since = time.monotonic()

    def settle(self, result: T | None, error: BaseException | None) -> None:
        """Called in the waiting loop with the outcome."""
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
