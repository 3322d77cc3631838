"""Work on many blocks in a few threads, with the results in order and only a few of them in memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

NUM_THREADS = min(4, os.cpu_count() or 1)
"""That encode or decode at once: numpy and zstd need no lock of Python's.  Other cores are training's and engines'."""

AHEAD = 4
"""Results a thread that may wait for their turn."""


def in_order(do: Callable[[T], R], items: Iterable[T], *, should_stop: Callable[[], bool]) -> Iterator[R]:
    """``do`` of each item, in order.  Ends early, without a word, once ``should_stop``."""
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="delta") as pool:
        try:
            for item in items:
                if should_stop():
                    return
                waiting.append(pool.submit(do, item))
                if len(waiting) >= AHEAD * NUM_THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
