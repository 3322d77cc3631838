"""Calls into an environment under a time limit: past it a call is cancelled, then interrupted, then abandoned."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

from actors.hosting.calls import Call, EnvironmentFault, EnvironmentTimeout, LoopLost
from actors.hosting.collected import Collected
from actors.hosting.loop_thread import LoopThread, next_name
from actors.hosting.loops import Loops
from actors.hosting.mailbox import Pace
from actors.hosting.order import CallOrder
from actors.hosting.reporting import MAKE, Reporting
from atpo_async.core.errors import EnvironmentBroken, SetupError
from atpo_async.core.vocabulary import Split
from atpo_async.environments.base import Environment, Episode
from atpo_async.environments.daemon_threads import MAX_POOL_THREADS
from atpo_async.run import processes
from atpo_async.status import waits

T = TypeVar("T")

INTERRUPTS = 5
"""Of a call past its limit, within the grace."""


class _Read(NamedTuple):
    """What is read of an environment when it is made."""

    stop_token_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    num_tasks: dict[Split, int | Exception | None]


class Caller:
    """Runs the code of one environment on its loops.

    Args:
        make: makes the environment; called on the loop that will run it, again for every loop that was lost.
        name: ``environment.name``, for errors.
        step_timeout_s: of one call.
        grace_s: how long a call past its limit has to end after it was cancelled, before its loop counts as lost.
        held_up_s: as of ``Loops``.
        loops: of the environment.
        reporting: of the environment.
    """

    def __init__(
        self,
        make: Callable[[], Environment],
        *,
        name: str,
        step_timeout_s: float,
        grace_s: float,
        held_up_s: float,
        loops: Loops,
        reporting: Reporting,
    ) -> None:
        self._make, self.name = make, name
        self.step_timeout_s, self._grace_s, self._held_up_s = step_timeout_s, grace_s, held_up_s
        self._loops, self.reporting = loops, reporting
        self._making = asyncio.Lock()
        self._pace = Pace()
        self.order: CallOrder | None = None
        """Of the answers, where they must not come as the threads have them."""
        self._background: set[asyncio.Task[None]] = set()
        self.stop_token_ids: tuple[int, ...] = ()
        self.stop_strings: tuple[str, ...] = ()
        self.num_tasks: dict[Split, int | Exception | None] = {}
        """Split -> its number of tasks when the environment was first made, or the error that it raised."""
        self.collected = Collected(name)
        self.given_up = 0
        """Calls past their limit."""

    async def call(
        self,
        what: str,
        work: Callable[[Environment], Awaitable[T]],
        *,
        limit_s: float,
        discard: Callable[[T], Awaitable[None]] | None = None,
    ) -> tuple[LoopThread, T]:
        """A call that may begin anew: on the loop in use, and on the next one where that is lost meanwhile."""
        while True:
            thread, made = await self.current()
            with contextlib.suppress(LoopLost):
                answer = await self.answer(
                    thread, what, functools.partial(work, made), limit_s=limit_s, discard=discard
                )
                return thread, answer

    async def answer(
        self,
        thread: LoopThread,
        what: str,
        work: Callable[[], Awaitable[T]],
        *,
        limit_s: float | None,
        discard: Callable[[T], Awaitable[None]] | None = None,
    ) -> T:
        """The result of a call on this loop and no other.

        Waits for: the call.  Unblocked by: its answer; its limit, for which the time that others hold the loop up does
        not count; the loss of its loop (LoopLost).
        """

        async def answered() -> T:
            await self._pace.passed()
            return await self._answer_to(thread, thread.submit(what, work, discard), limit_s=limit_s)

        return await (answered() if self.order is None else self.order.kept(answered()))

    async def _answer_to(self, thread: LoopThread, call: Call[T], *, limit_s: float | None) -> T:
        """As ``answer``."""
        try:
            while not call.answer.done():
                if self._loops.moves(thread, call) and not call.closes:
                    raise LoopLost(f"{thread.name} is held up")
                left_s = None if limit_s is None else limit_s - thread.used_s(call)
                if left_s is not None and left_s <= 0:
                    self._past_its_limit(thread, call)
                    raise EnvironmentTimeout(f"{call.what} took over {limit_s:g} s (search.step_timeout_s)")
                if left_s is not None and self._loops.any_blocked:
                    left_s = min(left_s, self._held_up_s)
                await asyncio.wait((call.answer,), timeout=None if left_s is None else max(left_s, 0.05))
                self._look_at_holder(thread)
            return call.answer.result()
        finally:
            waits.progress("environment calls")
            if not call.ended.done() and not call.closes:
                thread.drop(call)

    async def close(self, thread: LoopThread, what: str, episode: Episode) -> None:
        """Close an episode, and read what the environment has counted.  Never raises what its close() does: no chain's
        result depends on it."""

        async def work() -> None:
            try:
                await episode.close()
            finally:
                for made in self._loops.made:
                    if made[0] is thread:
                        self.collected.read(made[1])

        with contextlib.suppress(LoopLost):
            closed = self._closed(thread, thread.submit(what, work, closes=True))
            await (closed if self.order is None else self.order.kept(closed))

    def close_later(self, thread: LoopThread, what: str, episode: Episode) -> None:
        """The same, and nothing waits for it."""
        with contextlib.suppress(LoopLost):
            call = thread.submit(what, episode.close, closes=True)
            self._in_background(self._closed(thread, call), what)

    async def _closed(self, thread: LoopThread, call: Call[None]) -> None:
        try:
            await self._answer_to(thread, call, limit_s=self.step_timeout_s)
        except LoopLost:
            pass
        except Exception as exc:
            self.reporting.failed_close(call.what, exc)

    def _in_background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def cancel(self) -> None:
        """Stop waiting for the ends of calls that were cancelled, and of what is closed in the background."""
        for task in self._background:
            task.cancel()

    async def current(self) -> tuple[LoopThread, Environment]:
        """The loop in use and what was made on it.  Waits for: the environment, where it is made anew."""
        if self._loops.broken is None and (found := self._loops.free()) is not None:
            return found
        async with self._making:
            if self._loops.broken is not None:
                raise self._loops.broken
            if (found := self._loops.free()) is None:
                found = await self._make_on_a_new_loop()
            return found

    async def _make_on_a_new_loop(self) -> tuple[LoopThread, Environment]:
        thread = LoopThread(next_name(f"environment {self.name!r}"), self.reporting.begins, self.reporting.held_up)

        async def work() -> tuple[Environment, _Read]:
            made = self._make()
            # Properties are code as well: nothing of an environment is read anywhere else.
            tasks: dict[Split, int | Exception | None] = {
                "train": _asked(made, "train"),
                "eval": _asked(made, "eval"),
            }
            return made, _Read(made.stop_token_ids, getattr(made, "stop_strings", ()), tasks)

        before_mb = processes.memory_mb((os.getpid(),))
        try:
            made, read = await self.answer(thread, MAKE, work, limit_s=None)
        except EnvironmentFault as exc:
            thread.stop()
            raise SetupError(f"environment {self.name!r} could not be made: {exc}") from exc
        except BaseException as exc:
            thread.stop()
            if self._loops.num_lost and isinstance(exc, Exception):
                self._loops.broken = EnvironmentBroken(f"environment {self.name!r} could not be made anew: {exc}")
                raise self._loops.broken from exc
            raise
        self._loops.add(thread, made, size_mb=processes.memory_mb((os.getpid(),)) - before_mb)
        if not self.num_tasks:
            self.stop_token_ids, self.stop_strings, self.num_tasks = read
        return thread, made

    def _look_at_holder(self, thread: LoopThread) -> None:
        """A call whose wait was given up, or a task that it has left running, may hold the loop up as well."""
        if thread.abandoned or (held := thread.holder()) is None or (since := held[0].unattended_since) is None:
            return
        call, held_s = held
        if min(held_s, time.monotonic() - since) > self.step_timeout_s + self._grace_s:
            self._loops.leave_behind(thread, call, limit_s=self.step_timeout_s)

    def _past_its_limit(self, thread: LoopThread, call: Call[T]) -> None:
        """Raises LoopLost for a call that never began."""
        if call.task is None:
            self._loops.leave_behind(thread, call, limit_s=self.step_timeout_s)
            raise LoopLost(f"{thread.name} does not turn")
        self.given_up += 1
        if (held := thread.holder()) is not None and held[0] is call:
            self._loops.count_blocked()
        thread.drop(call)
        self._in_background(self._see_it_end(thread, call), f"end of {call.what}")
        hanging = thread.pool.busy_over(self.step_timeout_s)
        if hanging >= MAX_POOL_THREADS:
            self._loops.broken = EnvironmentBroken(
                f"environment {self.name!r}: {hanging} threads that it started with asyncio.to_thread have been at it "
                f"for more than {self.step_timeout_s:g} s (search.step_timeout_s), the latest in {call.what}: give the "
                "tool a time limit of its own"
            )

    async def _see_it_end(self, thread: LoopThread, call: Call[T]) -> None:
        """Waits for: a call that was cancelled.  Unblocked by: its end.  After the grace its loop is abandoned if the
        call holds it up; a call that merely ignores its cancellation does no harm."""
        for _ in range(INTERRUPTS):  # a tool may catch the first
            thread.interrupt(call)
            await asyncio.wait((call.ended,), timeout=self._grace_s / INTERRUPTS)
            if call.ended.done():
                break
        if call.ended.done() or thread.abandoned:
            return
        held = thread.holder()
        if held is None:
            if await thread.responds(self._grace_s) or thread.holder() is not None:
                return
        elif held[0] is not call:
            return
        self._loops.leave_behind(thread, call, limit_s=self.step_timeout_s)


def _asked(environment: Environment, split: Split) -> int | Exception | None:
    try:
        return environment.num_tasks(split)
    except Exception as exc:  # an environment may have one split only: raised when the other is asked for
        return exc
