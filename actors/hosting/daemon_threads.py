"""The threads of an environment's ``asyncio.to_thread``: as many as are busy, none of which keeps the process alive."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

MAX_POOL_THREADS = 1024
"""Of one loop.  Further calls wait; idle threads are used again."""


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
        me = threading.get_ident()
        while True:
            future, work = self._todo.get()
            if future.set_running_or_notify_cancel():
                self._since[me] = time.monotonic()
                try:
                    result = work()
                except BaseException as exc:  # exit() in a thread ends nothing
                    future.set_exception(exc)
                else:
                    future.set_result(result)
                self._since.pop(me, None)
            del future, work
            with self._guard:
                self._pending -= 1

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing is waited for: the threads end with the process."""

    def busy_over(self, seconds: float) -> int:
        """How many threads have been at the same work for longer."""
        now = time.monotonic()
        return sum(now - since > seconds for since in list(self._since.values()))
