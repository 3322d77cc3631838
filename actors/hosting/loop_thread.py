"""An event loop in a thread of its own for code that may block it, with a measure of which call blocks for how long.

Everything that a call does, in the tasks that it starts as well, is timed slice by slice: while one call holds the loop
up, the others' time stands still.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import ctypes
import itertools
import logging
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

from actors.hosting.calls import Call, Interrupted, LoopLost
from actors.hosting.mailbox import Mailbox, MailboxLoop
from atpo_async.core.texts import of_error
from atpo_async.environments.daemon_threads import MAX_POOL_THREADS, DaemonThreads

log = logging.getLogger("atpo.actor.environment")

T = TypeVar("T")

HELD_UP_S = 1.0
"""A slice that holds the loop up for longer is logged."""

FAREWELL_S = 1.0
"""How long tasks that still run on a loop that ends have after they are cancelled."""


class LoopThread:
    """One event loop in a daemon thread.

    Args:
        name: of the thread, for stacks.
        note: called in this thread with what begins and, with an empty text, when no call is in progress.
        held_up: called in this thread with the call that held the loop up for over ``HELD_UP_S`` and for how many
            seconds; of many such calls not for all.
    """

    def __init__(
        self,
        name: str,
        note: Callable[[str], None] = lambda what: None,
        held_up: Callable[[str, float], None] = lambda what, took_s: None,
    ) -> None:
        self.name = name
        self._note = note
        self._report_held_up = held_up
        self._guard = threading.Lock()
        self._slice: tuple[Call[Any], float] | None = None
        self._busy_s = 0.0
        self._held_up = 0
        self._open: dict[Call[Any], None] = {}
        """Calls that were submitted and are not settled; used by the waiting loop only."""
        self._begun: dict[Call[Any], None] = {}
        """Calls in progress; used by this thread only."""
        self._ending = False
        self.abandoned = False
        self.pool = DaemonThreads(MAX_POOL_THREADS, f"{name}-pool")
        # Not made by the event loop policy, which an environment may have changed.
        self.loop = MailboxLoop()
        self.loop.set_default_executor(self.pool)
        self.loop.set_exception_handler(self._on_loop_error)
        self.loop.set_task_factory(self._task)
        self._answers: Mailbox | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    # --- for the waiting loop ------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def open_calls(self) -> list[Call[Any]]:
        return list(self._open)

    def submit(
        self,
        what: str,
        work: Callable[[], Awaitable[T]],
        discard: Callable[[T], Awaitable[None]] | None = None,
        *,
        closes: bool = False,
    ) -> Call[T]:
        """Begin a call as soon as the loop is free.  Raises LoopLost where it will never be."""
        if self.abandoned:
            raise LoopLost(f"{self.name} is held up for good")
        call = Call(what, work, discard, self._answers_to(asyncio.get_running_loop()))
        call.closes = closes
        call.loop_busy_before_s = self.busy_s()
        self._open[call] = None
        call.answer.add_done_callback(_retrieved)
        call.ended.add_done_callback(lambda _: self._open.pop(call, None))
        self._soon(self._begin, call)
        return call

    def busy_s(self) -> float:
        """Seconds for which calls have held the loop so far."""
        held = self._slice
        return self._busy_s + (0.0 if held is None else time.monotonic() - held[1])

    def used_s(self, call: Call[Any]) -> float:
        """Seconds since it was submitted, less those for which other calls have held the loop meanwhile."""
        held = self._slice
        own_s = call.busy_s + (time.monotonic() - held[1] if held is not None and held[0] is call else 0.0)
        others_s = self.busy_s() - call.loop_busy_before_s - own_s
        return time.monotonic() - call.submitted - max(0.0, others_s)

    def holder(self) -> tuple[Call[Any], float] | None:
        """(the call that holds the loop now, for how many seconds)."""
        held = self._slice
        return None if held is None else (held[0], time.monotonic() - held[1])

    def held_up(self, for_s: float) -> bool:
        """Whether one call has held the loop for longer."""
        held = self._slice
        return held is not None and time.monotonic() - held[1] > for_s

    def drop(self, call: Call[Any]) -> None:
        """Give up waiting for the call: it is cancelled, or interrupted where it holds the loop."""
        call.dropped = True
        call.leave_alone()
        call.answer.cancel()
        self._soon(self._cancel, call)

    def interrupt(self, call: Call[Any] | None = None) -> None:
        """Raise ``Interrupted`` in a call, in any where None, if it holds the loop now.

        Code that waits inside C notices it only when it returns.
        """
        with self._guard:  # so that its slice cannot end meanwhile
            held = self._slice
            if held is not None and call in (None, held[0]) and self._thread.ident is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self._thread.ident), ctypes.py_object(Interrupted)
                )

    async def responds(self, within_s: float) -> bool:
        """Whether the loop still turns.  Waits for: its next turn, at most ``within_s``."""
        waiting_loop = asyncio.get_running_loop()
        turned = asyncio.Event()

        def report() -> None:
            with contextlib.suppress(RuntimeError):
                waiting_loop.call_soon_threadsafe(turned.set)

        self._soon(report)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(turned.wait(), timeout=within_s)
        return turned.is_set()

    def stack(self) -> str:
        """Where the thread is now, the innermost call first."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        found = traceback.extract_stack(frame) if frame is not None else []
        own = [f for f in found if f.filename != __file__ and "/asyncio/" not in f.filename]
        return " < ".join(f"{f.filename}:{f.lineno} {f.name}" for f in reversed(own[-3:]))

    def abandon(self) -> None:
        """Give the loop up: every waiting call raises ``LoopLost``; the thread ends when the loop turns again."""
        self.abandoned = True
        for call in list(self._open):
            call.dropped = True
            if not call.answer.done():
                call.answer.set_exception(LoopLost(f"{self.name} is held up for good"))
            if not call.ended.done():
                call.ended.set_result(None)
        self.stop()

    def stop(self) -> None:
        """End the thread as soon as its loop turns."""
        self._ending = True
        self._soon(self.loop.stop)

    def _answers_to(self, loop: asyncio.AbstractEventLoop) -> Mailbox:
        if self._answers is None or self._answers.loop is not loop:
            self._answers = Mailbox(loop)
        return self._answers

    def _soon(self, call: Callable[..., object], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            self.loop.call_soon_threadsafe(call, *args)

    # --- in the thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Waits for: ``stop``.  A task of the environment that calls exit() ends neither the thread nor the actor."""
        with contextlib.suppress(Exception):
            asyncio.set_event_loop(self.loop)
        while not self._ending and not self.loop.is_closed():
            try:
                self.loop.run_forever()
            except BaseException as exc:
                if not self._ending:
                    log.warning("%s: %s left the event loop, which goes on", self.name, of_error(exc))
        with contextlib.suppress(BaseException):
            if left := asyncio.all_tasks(self.loop):
                for task in left:
                    task.cancel()
                self.loop.run_until_complete(asyncio.wait(left, timeout=FAREWELL_S))
            self.loop.close()

    def _begin(self, call: Call[Any]) -> None:
        if not call.dropped:
            _calling.set(call)
            call.task = self.loop.create_task(self._drive(call), name=call.what)
            _calling.set(None)

    def _cancel(self, call: Call[Any]) -> None:
        if call.task is not None:
            call.task.cancel()
        else:
            self._answer(call, None, None)

    async def _drive(self, call: Call[T]) -> None:
        self._begun[call] = None
        self._note(call.what)
        result: T | None = None
        error: BaseException | None = None
        try:
            result = await _made(call.work)
            if call.dropped and call.discard is not None:
                await call.discard(result)
        # Whatever it is, exit() and a cancellation that leaked from a tool included, belongs to this call alone.
        except BaseException as exc:
            error = exc
        del self._begun[call]
        self._note(next(reversed(self._begun)).what if self._begun else "")
        self._answer(call, result, error)

    def _answer(self, call: Call[T], result: T | None, error: BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the waiting loop has been closed
            call.answers.put(call.settle, result, error)

    def _task(
        self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, T] | Generator[Any, None, T], **more: Any
    ) -> asyncio.Future[T]:
        """The loop's task factory: tasks that a call starts are timed as parts of the call."""
        call = _calling.get()
        if call is None or not asyncio.iscoroutine(coro):
            return asyncio.Task(coro, loop=loop, **more)
        return asyncio.Task(_awaited(_Timed(coro, self, call)), loop=loop, **more)

    def _enter(self, call: Call[Any]) -> None:
        self._slice = (call, time.monotonic())

    def _leave(self) -> None:
        with self._guard:
            held, self._slice = self._slice, None
            if held is None:
                return
            call, since = held
            took_s = time.monotonic() - since
            call.busy_s += took_s
            self._busy_s += took_s
        if took_s <= HELD_UP_S or self.abandoned:
            return
        self._held_up += 1
        if self._held_up & (self._held_up - 1) == 0:  # of many such slices not all are logged
            self._report_held_up(call.what, took_s)

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if self._ending:
            return
        error = context.get("exception")
        text = "" if error is None else f": {of_error(error)}"
        log.warning("%s: %s%s", self.name, context.get("message", "an error in its event loop"), text)


def _retrieved(answer: asyncio.Future[Any]) -> None:
    """Mark an error as seen: its caller may have gone, and asyncio would complain of an error that was never read."""
    if not answer.cancelled():
        answer.exception()


_calling: contextvars.ContextVar[Call[Any] | None] = contextvars.ContextVar("atpo_environment_call", default=None)


def current_call() -> Call[Any] | None:
    """The call that the code which asks is part of, in a thread or a task that it has started as well."""
    return _calling.get()


async def _made(work: Callable[[], Awaitable[T]]) -> T:
    return await work()


async def _awaited(awaitable: Awaitable[T]) -> T:
    return await awaitable


class _Timed(Generic[T]):
    """Awaits a coroutine and reports to its loop's thread when it runs."""

    def __init__(self, coro: Coroutine[Any, Any, T], thread: LoopThread, call: Call[Any]) -> None:
        self._coro = coro
        self._thread = thread
        self._call = call

    def __await__(self) -> Generator[Any, Any, T]:
        go_on: Callable[[Any], Any] = self._coro.send
        value: Any = None
        while True:
            self._thread._enter(self._call)
            try:
                waited_for = go_on(value)
            except StopIteration as stop:
                result: T = stop.value
                return result
            finally:
                self._thread._leave()
            try:
                value = yield waited_for
                go_on = self._coro.send
            except GeneratorExit:
                self._close()
                raise
            except BaseException as exc:
                value, go_on = exc, self._coro.throw

    def _close(self) -> None:
        """Where both are garbage the coroutine may have been closed first: closing it again does nothing."""
        self._thread._enter(self._call)
        try:
            self._coro.close()
        finally:
            self._thread._leave()


_counter = itertools.count()


def next_name(label: str) -> str:
    """A thread's name that no other has."""
    return f"{label}-{next(_counter)}"
