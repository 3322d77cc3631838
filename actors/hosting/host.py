"""Runs the code of an environment where it can harm neither the actor nor, for long, the environment's other calls.

All calls of one environment run on one event loop in a thread of its own, with threads of its own for
``asyncio.to_thread``; the actor awaits their answers under ``search.step_timeout_s``.  What a call raises, exit() and a
leaked cancellation included, is that call's answer.  A call past its limit is cancelled, or interrupted where it holds
the loop, and its branch goes on without it; where it does not come back, its loop is left to it, the environment is
made anew on another one, and the other episodes are brought there by replay.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import numpy as np

from actors.hosting import guard
from actors.hosting.episode import HostedEpisode
from actors.hosting.loop_thread import (
    MAX_POOL_THREADS,
    Call,
    EnvironmentFault,
    LoopLost,
    LoopThread,
    next_name,
)
from atpo_async.core.errors import EnvironmentBroken, SetupError
from atpo_async.core.texts import of_error
from atpo_async.environments.base import Environment, Split
from atpo_async.ops import notices
from atpo_async.run import processes
from atpo_async.status import waits
from atpo_async.status.facts import publish_facts
from atpo_async.status.wording import duration

log = logging.getLogger("atpo.actor.environment")

T = TypeVar("T")

GRACE_S = 1.0
"""For a call past its limit to end once it has been told to, before its loop counts as lost."""

INTERRUPTS = 5
"""Within the grace."""

MAX_LOST_LOOPS = 128
"""Threads held up for good at the same time, each with an environment and three open files of its own."""

MOVE_S = 0.25
"""A loop that one call holds for longer is held up; then the others begin elsewhere, if there is or may be another."""

MAX_LOST_MB = 4096.0
"""Taken by the environments of such threads, as far as it can be told."""

MAX_LOOPS = 8
"""At the same time, of an environment that blocks past its limit: while one is held up its other calls go elsewhere."""

MAKE = "make"
"""What making the environment is called: it may load for long, and holds up no other call."""

CLOSE_S = 2.0
"""For episodes to be closed when the actor ends."""


class EnvironmentTimeout(Exception):
    """A call took longer than it may."""


class HostedEnvironment:
    """An environment whose code runs on a loop of its own.  As ``Environment``, for the actor's loop.

    Args:
        make: makes the environment; called on the loop that will run it, again for every loop that was lost.
        name: ``environment.name``, for errors.
        step_timeout_s: of ``start``, ``step`` and ``close``; a replay of n actions may take n + 1 times as long.
        doing: a file that always says what runs here, for whoever finds the process dead.
        grace_s: as ``GRACE_S``.
        held_up_s: as ``MOVE_S``.
        max_lost_loops: as ``MAX_LOST_LOOPS``.
    """

    def __init__(
        self,
        make: Callable[[], Environment],
        *,
        name: str,
        step_timeout_s: float,
        doing: Path | None = None,
        grace_s: float = GRACE_S,
        held_up_s: float = MOVE_S,
        max_lost_loops: int = MAX_LOST_LOOPS,
    ) -> None:
        self._make = make
        self.name = name
        self.step_timeout_s = step_timeout_s
        self._grace_s = grace_s
        self._held_up_s = held_up_s
        self._max_lost_loops = max_lost_loops
        self._trace = os.open(doing, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600) if doing is not None else -1
        self._noting = threading.Lock()
        self._closed = False
        self._size_mb = 0.0
        """What making it once has added to the process at most."""
        self._blocked = 0
        """Calls that held their loop past their limit."""
        self._taken: dict[str, int] = {}
        self._made: list[tuple[LoopThread, Environment]] = []
        """One, but for environments that block past their limit."""
        self._making = asyncio.Lock()
        self._lost: list[LoopThread] = []
        self._broken: EnvironmentBroken | None = None
        self._pester: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._num_tasks: dict[Split, int | Exception | None] = {}
        self.stop_token_ids: tuple[int, ...] = ()
        self._held_up_told = False
        self.given_up = 0
        """Calls past their limit."""
        self.lost_loops = 0
        self.failed_closes = 0

    async def open(self) -> Self:
        """Make the environment.  Raises what ``make`` raises: ConfigError, SetupError."""
        being_made = waits.waiting(f"environment {self.name!r}", "its being made", on=waits.ENVIRONMENT)
        with being_made, guard.put_back():
            await self._current()
        publish_facts("environment", self._facts)
        return self

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Let episodes that are being closed come to their end, for ``CLOSE_S`` at most."""
        for task in (*self._background, *([self._pester] if self._pester else [])):
            task.cancel()
        if closing := [call.ended for thread, _ in self._made for call in thread.open_calls if call.closes]:
            await asyncio.wait(closing, timeout=CLOSE_S)
        for thread, _ in self._made:
            thread.stop()
        with self._noting:
            self._closed = True
            if self._trace >= 0:
                os.ftruncate(self._trace, 0)
                os.close(self._trace)
        self._broken = EnvironmentBroken(f"environment {self.name!r} is closed")

    def num_tasks(self, split: Split) -> int | None:
        """As it was when the environment was made.  Raises what the environment raises."""
        found = self._num_tasks[split]
        if isinstance(found, Exception):
            raise found
        return found

    async def start(self, split: Split, task_index: int) -> HostedEpisode:
        """Raises EnvironmentTimeout; EnvironmentBroken; whatever the environment raises, as an ``Exception``."""
        return await HostedEpisode(self, split, task_index).begin(())

    async def replay(self, split: Split, task_index: int, actions: tuple[np.ndarray, ...]) -> HostedEpisode:
        """As ``start``; start and each action may take ``step_timeout_s``."""
        return await HostedEpisode(self, split, task_index).begin(actions)

    def take_counts(self) -> dict[str, float]:
        """Metrics: what has happened since they were last taken."""
        now = {
            "environment/calls_given_up": self.given_up,
            "environment/threads_lost": self.lost_loops,
            "environment/closes_failed": self.failed_closes,
        }
        since = {name: float(count - self._taken.get(name, 0)) for name, count in now.items()}
        self._taken = now
        return {name: count for name, count in since.items() if count}

    def _facts(self) -> dict[str, object]:
        """For the actor's status."""
        facts: dict[str, object] = {"given_up": self.given_up, "lost_loops": self.lost_loops}
        facts["calls"] = sum(len(thread.open_calls) for thread, _ in self._made)
        facts["busy_threads"] = sum(thread.pool.busy_over(0.0) for thread, _ in self._made)
        for thread, _ in self._made:
            if (held := thread.holder()) is not None and held[1] > self._held_up_s:
                facts["held_up_by"] = f"{held[0].what} for {duration(held[1])}, in {thread.stack()}"
        return facts

    # --- the loop ----------------------------------------------------------------------------------------------

    async def _current(self) -> tuple[LoopThread, Environment]:
        """The loop in use and what was made on it.  Waits for: the environment, where it is made anew."""
        if self._broken is None and (found := self._free()) is not None:
            return found
        async with self._making:
            if self._broken is not None:
                raise self._broken
            if (found := self._free()) is None:
                found = await self._make_on_a_new_loop()
                self._made.append(found)
            return found

    def _free(self) -> tuple[LoopThread, Environment] | None:
        """A loop that turns; else any, or None where another one is to be made."""
        free = (made for made in self._made if not made[0].held_up(self._held_up_s))
        found = next(free, None)
        if found is not None or not self._made or self._may_grow:
            return found
        return min(self._made, key=lambda made: len(made[0].open_calls))

    @property
    def _may_grow(self) -> bool:
        """An environment that never blocked past its limit may be large: there is one of it, and its calls wait."""
        return self._blocked > 0 and len(self._made) < MAX_LOOPS

    def _moves(self, thread: LoopThread, call: Call[T]) -> bool:
        """Whether a call that has not begun had better begin elsewhere."""
        if call.task is not None or not self._blocked or not thread.held_up(self._held_up_s):
            return False
        return self._may_grow or any(not made[0].held_up(self._held_up_s) for made in self._made)

    async def _make_on_a_new_loop(self) -> tuple[LoopThread, Environment]:
        thread = LoopThread(next_name(f"environment {self.name!r}"), self._note, self._count_held_up)

        async def work() -> tuple[Environment, tuple[int, ...], dict[Split, int | Exception | None]]:
            made = self._make()
            # Properties are code as well: nothing of an environment is read anywhere else.
            return made, made.stop_token_ids, {"train": _asked(made, "train"), "eval": _asked(made, "eval")}

        before_mb = processes.memory_mb((os.getpid(),))
        try:
            made, stop_token_ids, num_tasks = await self.answer(thread, MAKE, work, limit_s=None)
        except EnvironmentFault as exc:
            thread.stop()
            raise SetupError(f"environment {self.name!r} could not be made: {exc}") from exc
        except BaseException as exc:
            thread.stop()
            if self.lost_loops and isinstance(exc, Exception):
                self._broken = EnvironmentBroken(f"environment {self.name!r} could not be made anew: {exc}")
                raise self._broken from exc
            raise
        self._size_mb = max(self._size_mb, processes.memory_mb((os.getpid(),)) - before_mb)
        if not self._num_tasks:
            self.stop_token_ids, self._num_tasks = stop_token_ids, num_tasks
        return thread, made

    def _note(self, what: str) -> None:
        """In the environment's thread, which may go on after ``close``."""
        with self._noting, contextlib.suppress(OSError):
            if self._trace >= 0 and not self._closed:
                os.pwrite(self._trace, what.encode()[:255].ljust(256), 0)

    # --- one call ----------------------------------------------------------------------------------------------

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
            thread, made = await self._current()
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
        closes: bool = False,
    ) -> T:
        """On this loop and no other.

        Waits for: the call.  Unblocked by: its answer; its limit, for which the time that others hold the loop up does
        not count; the loss of its loop (LoopLost).
        """
        call = thread.submit(what, work, discard, closes=closes)
        try:
            while not call.answer.done():
                if self._moves(thread, call) and not closes:
                    raise LoopLost(f"{thread.name} is held up")
                left_s = None if limit_s is None else limit_s - thread.used_s(call)
                if left_s is not None and left_s <= 0:
                    self._past_its_limit(thread, call)
                    raise EnvironmentTimeout(f"{what} took over {limit_s:g} s (search.step_timeout_s)")
                if left_s is not None and self._blocked:
                    left_s = min(left_s, self._held_up_s)
                await asyncio.wait((call.answer,), timeout=None if left_s is None else max(left_s, 0.05))
                self._look_at_holder(thread)
            return call.answer.result()
        finally:
            waits.progress("environment calls")
            if not call.ended.done() and not closes:
                thread.drop(call)

    def _look_at_holder(self, thread: LoopThread) -> None:
        """What nobody waits for, a task that a call has left running too, may hold the loop up as well."""
        if thread.abandoned or (held := thread.holder()) is None or (since := held[0].unattended_since) is None:
            return
        call, held_s = held
        if min(held_s, time.monotonic() - since) > self.step_timeout_s + self._grace_s:
            self._leave_behind(thread, call)

    def _past_its_limit(self, thread: LoopThread, call: Call[T]) -> None:
        """Raises LoopLost for a call that never began."""
        if call.task is None:
            self._leave_behind(thread, call)
            raise LoopLost(f"{thread.name} does not turn")
        self.given_up += 1
        if (held := thread.holder()) is not None and held[0] is call:
            self._blocked += 1
        thread.drop(call)
        task = asyncio.create_task(self._see_it_end(thread, call), name=f"end of {call.what}")
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        hanging = thread.pool.busy_over(self.step_timeout_s)
        if hanging >= MAX_POOL_THREADS:
            self._broken = EnvironmentBroken(
                f"environment {self.name!r}: {hanging} threads that it started with asyncio.to_thread have been at it "
                f"for more than {self.step_timeout_s:g} s (search.step_timeout_s), the latest in {call.what}: give the "
                "tool a time limit of its own"
            )

    async def _see_it_end(self, thread: LoopThread, call: Call[T]) -> None:
        """Waits for: a call that was told to end.  Unblocked by: its end; after the grace its loop is left to it if it
        holds that up; one that merely ignores its cancellation harms nobody."""
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
        self._leave_behind(thread, call)

    def _leave_behind(self, thread: LoopThread, call: Call[T]) -> None:
        if thread.abandoned:
            return
        where = thread.stack()
        self.lost_loops += 1
        self._lost = [lost for lost in self._lost if lost.alive] + [thread]
        self._made = [made for made in self._made if made[0] is not thread]
        said = (
            f"environment {self.name!r}: {call.what} blocks its thread for more than {self.step_timeout_s:g} s "
            f"(search.step_timeout_s) and cannot be ended{f', in {where}' if where else ''}"
        )
        log.warning("%s; it is left behind, and the environment is made anew", said)
        if len(self._lost) >= self._max_lost_loops or len(self._lost) * self._size_mb > MAX_LOST_MB:
            self._broken = EnvironmentBroken(
                f"{said}; {len(self._lost)} threads hang like this: give the tool a time limit of its own, or await it"
            )
        thread.abandon()
        if self._pester is None or self._pester.done():
            self._pester = asyncio.create_task(self._interrupt_lost_loops(), name="interrupt lost loops")

    async def _interrupt_lost_loops(self) -> None:
        """A loop in Python that catches everything takes processor time from the actor for ever.

        Waits for: the clock.  Unblocked by: the ends of all threads that were left behind.
        """
        while any(thread.alive for thread in self._lost):
            for thread in self._lost:
                thread.interrupt()
            await asyncio.sleep(self._grace_s)

    def _count_held_up(self, what: str, took_s: float) -> None:
        """In the environment's thread.  The first call that blocks is for the user's terminal, the others for the log:
        no limit is passed, so that nothing else would say why the run is slow."""
        said = (
            f"environment {self.name!r}: {what} held up its event loop for {took_s:.1f} s, and the environment's other "
            "calls with it; use await asyncio.to_thread(...) for what blocks"
        )
        if what == MAKE or self._held_up_told:
            log.warning("%s", said)
            return
        self._held_up_told = True
        notices.tell(said, f"{self.name} held up")

    def count_failed_close(self, what: str, error: Exception) -> None:
        """One more: the first for the user's terminal, of many others not all are logged."""
        self.failed_closes += 1
        said = f"environment {self.name!r}: {what} failed, the branch counts all the same"
        if self.failed_closes == 1:
            notices.tell(f"{said} (environment/closes_failed): {of_error(error)}", f"{self.name} close")
        elif self.failed_closes & (self.failed_closes - 1) == 0:
            log.warning("%s (%d so far): %s", said, self.failed_closes, of_error(error))


def _asked(environment: Environment, split: Split) -> int | Exception | None:
    try:
        return environment.num_tasks(split)
    except Exception as exc:  # the other split is not everybody's: raised to whoever asks for it
        return exc
