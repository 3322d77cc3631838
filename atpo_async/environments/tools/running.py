"""Runs functions of a user, plain or async, each under a time limit, whatever they raise; plain ones in threads."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from atpo_async.core.errors import EnvironmentBroken
from atpo_async.environments.daemon_threads import DaemonThreads

MAX_THREADS = 2048
"""Calls of plain functions at once; further ones wait, which takes nothing from their time limits."""

MAX_HANGING = 512
"""Threads that do not return from calls that were given up; with more the run ends, before none is left."""

INTERRUPTS, INTERRUPT_EVERY_S = 5, 0.2
"""Of a call that was given up: a tool may catch the first."""


LATE_S = 1.0
"""An async function that ends so much after its limit has kept the loop from stopping it; less is a busy machine."""


class TookTooLong(Exception):
    """A call did not end within its limit, in seconds: ``args[0]``.

    Attributes:
        advice: what to do, for a function that could not be stopped at its limit; empty otherwise.
    """

    advice = ""


class HeldTheLoop(TookTooLong):
    """An async function ended after its limit, which could not stop it: it did not await anything meanwhile."""

    advice = (
        "; it held the event loop meanwhile: make it a plain function (def), or put what blocks into "
        "await asyncio.to_thread(…)"
    )


class Threads:
    """The threads of plain functions.  Calls that were given up and have not ended are counted."""

    def __init__(self, max_threads: int = MAX_THREADS, max_hanging: int = MAX_HANGING) -> None:
        self._pool = DaemonThreads(max_threads, "tool")
        self._max_hanging = max_hanging
        self._hanging: set[Future[Any]] = set()

    def begin(self, work: Callable[[], Any], what: str) -> Future[Any]:
        """Raises EnvironmentBroken where too many hang."""
        self._hanging = {future for future in self._hanging if not future.done()}
        if len(self._hanging) >= self._max_hanging:
            raise EnvironmentBroken(
                f"{len(self._hanging)} threads hang in tools or rewards past their time limits, the latest wanted for "
                f"{what}: give every request in them a time limit of its own, or make them async"
            )
        return self._pool.submit(contextvars.copy_context().run, work)

    async def give_up(self, future: Future[Any]) -> None:
        """Interrupts a call until it ends, or does not.  Waits for: its end, for a second at most."""
        if future.cancel():
            return
        self._hanging.add(future)
        for _ in range(INTERRUPTS):
            self._pool.interrupt(future)
            await asyncio.sleep(INTERRUPT_EVERY_S)
            if future.done():
                break


_threads: Threads | None = None
_ending: set[asyncio.Task[Any]] = set()


def threads() -> Threads:
    """Those of this process."""
    global _threads
    if _threads is None:
        _threads = Threads()
    return _threads


async def run(
    function: Callable[..., Any], arguments: Mapping[str, Any], *, is_async: bool, limit_s: float, what: str
) -> Any:
    """What ``function(**arguments)`` returns.

    Args:
        limit_s: of the call, from when a thread takes it.
        what: names the call in messages.

    Raises:
        TookTooLong: it did not end in time; it is cancelled, or interrupted, and not waited for.
        EnvironmentBroken: too many threads hang.
        Exception: whatever it raises; what is no Exception (exit(), a leaked cancellation) as a RuntimeError.
    """
    call = functools.partial(function, **arguments)
    if is_async:
        return await _awaited(call, limit_s, what)
    return await _in_a_thread(call, limit_s, what)


async def _awaited(call: Callable[[], Any], limit_s: float, what: str) -> Any:
    async def guarded() -> tuple[Any, BaseException | None]:
        try:
            return await call(), None
        except BaseException as exc:  # also exit(), which must not leave the loop
            return None, exc

    task = asyncio.create_task(guarded(), name=what)
    began = time.monotonic()
    try:
        # asyncio.timeout would wait for ever for a call that swallows its cancellation.
        done, _ = await asyncio.wait((task,), timeout=limit_s)
    except BaseException:
        task.cancel()
        _keep(task)
        raise
    if not done:
        task.cancel()
        _keep(task)
        raise TookTooLong(limit_s)
    if time.monotonic() - began > limit_s + LATE_S:
        raise HeldTheLoop(limit_s)
    return _result(*task.result())


async def _in_a_thread(call: Callable[[], Any], limit_s: float, what: str) -> Any:
    began: list[float] = []

    def work() -> tuple[Any, BaseException | None]:
        began.append(time.monotonic())
        try:
            return call(), None
        except BaseException as exc:  # also exit()
            return None, exc

    # Not asyncio.wait on a wrapped future: a thousand calls at once would hold the loop up three times as long.
    loop = asyncio.get_running_loop()
    in_time: asyncio.Future[bool] = loop.create_future()

    def settle(ended: bool) -> None:
        if not in_time.done():
            in_time.set_result(ended)

    def look() -> None:
        left_s = limit_s - (time.monotonic() - began[0]) if began else limit_s
        if left_s <= 0:
            settle(False)
        elif not in_time.done():
            timer[0] = loop.call_later(left_s, look)

    def over(_: Future[Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(settle, True)

    future = threads().begin(work, what)
    timer = [loop.call_later(limit_s, look)]
    future.add_done_callback(over)
    try:
        if not await in_time:
            raise TookTooLong(limit_s)
        return _result(*future.result())
    finally:
        timer[0].cancel()
        if not future.done():
            _keep(asyncio.create_task(threads().give_up(future), name=f"end of {what}"))


def _keep(task: asyncio.Task[Any]) -> None:
    """Until it has ended: a loop alone does not keep its tasks."""
    _ending.add(task)
    task.add_done_callback(_ending.discard)


def _result(value: Any, error: BaseException | None) -> Any:
    if error is None:
        return value
    if isinstance(error, Exception):
        raise error
    raise RuntimeError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error
