"""The loops of one environment: which one takes the next call, and which are held up for good."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from actors.hosting.calls import Call
from actors.hosting.loop_thread import LoopThread
from atpo_async.core.errors import EnvironmentBroken
from atpo_async.environments.base import Environment

log = logging.getLogger("atpo.actor.environment")

MAX_LOST_LOOPS = 128
"""Threads that calls hold for good at the same time, each with an environment and three open files of its own."""

MAX_LOST_MB = 4096.0
"""Memory of the environments of such threads, estimated from what making the first one took."""

MAX_LOOPS = 8
"""Loops at the same time, of an environment that blocks past its limit: other calls go to those that are free."""


class Loops:
    """Each loop with the environment that was made on it.

    Args:
        name: ``environment.name``, for errors.
        grace_s: between two interrupts of a loop that is lost.
        held_up_s: a loop that one call holds for longer is held up; then the others begin elsewhere, if there is or
            may be another.
        max_lost: as ``MAX_LOST_LOOPS``.
    """

    def __init__(self, *, name: str, grace_s: float, held_up_s: float, max_lost: int) -> None:
        self._name = name
        self._grace_s = grace_s
        self._held_up_s = held_up_s
        self._max_lost = max_lost
        self.made: list[tuple[LoopThread, Environment]] = []
        """One, but for environments that block past their limit."""
        self.lost: list[LoopThread] = []
        """Abandoned loops: calls hold them for good."""
        self.num_lost = 0
        """Loops lost so far."""
        self.broken: EnvironmentBroken | None = None
        """Why no further call begins."""
        self._num_blocked = 0
        """Calls that held their loop past their limit."""
        self._size_mb = 0.0
        """The most memory that making the environment once has added to the process."""
        self._interrupter: asyncio.Task[None] | None = None

    def free(self) -> tuple[LoopThread, Environment] | None:
        """A loop that turns; else any, or None where another one is to be made."""
        free = (made for made in self.made if not made[0].held_up(self._held_up_s))
        found = next(free, None)
        if found is not None or not self.made or self._may_grow:
            return found
        return min(self.made, key=lambda made: len(made[0].open_calls))

    def add(self, thread: LoopThread, environment: Environment, *, size_mb: float) -> None:
        self.made.append((thread, environment))
        self._size_mb = max(self._size_mb, size_mb)

    def moves(self, thread: LoopThread, call: Call[Any]) -> bool:
        """Whether a call that has not begun should begin on another loop."""
        if call.task is not None or not self.any_blocked or not thread.held_up(self._held_up_s):
            return False
        return self._may_grow or any(not made[0].held_up(self._held_up_s) for made in self.made)

    @property
    def any_blocked(self) -> bool:
        """Whether any call ever held its loop past its limit."""
        return self._num_blocked > 0

    def count_blocked(self) -> None:
        self._num_blocked += 1

    def leave_behind(self, thread: LoopThread, call: Call[Any], *, limit_s: float) -> None:
        """Abandon the loop of ``call``, which holds it for good, past ``limit_s``; its other calls raise LoopLost."""
        if thread.abandoned:
            return
        where = thread.stack()
        self.num_lost += 1
        self.lost = [lost for lost in self.lost if lost.alive] + [thread]
        self.made = [made for made in self.made if made[0] is not thread]
        said = (
            f"environment {self._name!r}: {call.what} blocks its thread for more than {limit_s:g} s "
            f"(search.step_timeout_s) and cannot be ended{f', in {where}' if where else ''}"
        )
        log.warning("%s; it is left behind, and the environment is made anew", said)
        if len(self.lost) >= self._max_lost or len(self.lost) * self._size_mb > MAX_LOST_MB:
            self.broken = EnvironmentBroken(
                f"{said}; {len(self.lost)} threads hang like this: give the tool a time limit of its own, or await it"
            )
        thread.abandon()
        if self._interrupter is None or self._interrupter.done():
            self._interrupter = asyncio.create_task(self._interrupt_lost(), name="interrupt lost loops")

    def stop(self) -> None:
        """End every thread as soon as its loop turns."""
        if self._interrupter is not None:
            self._interrupter.cancel()
        for thread, _ in self.made:
            thread.stop()

    @property
    def _may_grow(self) -> bool:
        """Whether another loop may be made; not while no call blocked past its limit: environments may be large."""
        return self.any_blocked and len(self.made) < MAX_LOOPS

    async def _interrupt_lost(self) -> None:
        """Interrupt lost loops again and again: Python code that catches every exception takes processor time for ever.

        Waits for: the clock.  Unblocked by: the ends of all threads that were left behind.
        """
        while any(thread.alive for thread in self.lost):
            for thread in self.lost:
                thread.interrupt()
            await asyncio.sleep(self._grace_s)
