"""Threads for code that blocks, of tools and of ``asyncio.to_thread``: as many as are busy, none of which keeps the
process alive."""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

MAX_POOL_THREADS = 1024
"""Of one loop.  Further calls wait; idle threads are used again."""


class Interrupted(BaseException):
    """Raised inside work that was given up."""


class DaemonThreads(ThreadPoolExecutor):
    """A thread more whenever all are busy, up to a limit; none keeps the process alive.

    A ``ThreadPoolExecutor`` by name only: a loop accepts no other, and its own threads are joined at exit, so that one
    hanging tool would keep a finished role from ending.
    """

    def __init__(self, max_threads: int, name: str) -> None:
        super().__init__(max_workers=1)
        self._max_threads = max_threads
        self._name = name
        self._todo: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._guard = threading.Lock()
        self._started = self._pending = 0
        self._since: dict[int, float] = {}
        """Busy thread -> since when."""
        self._at: dict[Future[Any], int] = {}
        """Work in progress -> its thread."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        with self._guard:
            if self._started < min(self._pending + 1, self._max_threads):
                threading.Thread(target=self._work, name=f"{self._name}-{self._started}", daemon=True).start()
                self._started += 1
            self._pending += 1
        self._todo.put((future, lambda: fn(*args, **kwargs)))
        return future

    def _work(self) -> None:
        while True:
            try:
                self._one(*self._todo.get())
            except Interrupted:  # it came when its work had just ended
                continue

    def _one(self, future: Future[Any], work: Callable[[], Any]) -> None:
        me = threading.get_ident()
        try:
            if not future.set_running_or_notify_cancel():
                return
            self._since[me] = time.monotonic()
            self._at[future] = me
            try:
                result = work()
            except BaseException as exc:  # exit() in a thread ends nothing
                self._over(future)
                future.set_exception(exc)
            else:
                self._over(future)
                future.set_result(result)
        finally:
            self._since.pop(me, None)
            with self._guard:
                self._pending -= 1

    def _over(self, future: Future[Any]) -> None:
        with self._guard:  # from here on it is not interrupted
            self._at.pop(future, None)

    def interrupt(self, future: Future[Any]) -> None:
        """Raise ``Interrupted`` in work that is in progress; code that waits inside C notices it when it returns."""
        with self._guard:
            if (ident := self._at.get(future)) is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(Interrupted))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing is waited for: the threads end with the process."""

    def busy_over(self, seconds: float) -> int:
        """How many threads have been at the same work for longer."""
        now = time.monotonic()
        return sum(now - since > seconds for since in list(self._since.values()))
