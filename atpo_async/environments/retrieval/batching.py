"""Gathers what many callers ask at the same time into batches, and lets a limited number of batches run at once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """Belongs to the loop that it is used on.  An item waits for the next batch, and a batch for one of those running.

    Args:
        handle: takes one batch; returns a result, or the error of that item alone, for every item in their order.  What
            it raises is the error of each.
        max_items: of a batch.
        max_running: batches at once.  While so many run, items gather.
        gather_s: how long the first item of a batch waits for others while a batch could run.
        name: of the tasks.
    """

    def __init__(
        self,
        handle: Callable[[list[T]], Awaitable[Sequence[R | Exception]]],
        *,
        max_items: int,
        max_running: int,
        gather_s: float = 0.0,
        name: str = "batch",
    ) -> None:
        self._handle = handle
        self._max_items, self._max_running, self._gather_s = max_items, max_running, gather_s
        self._name = name
        self._waiting: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._timer: asyncio.Handle | None = None
        self._closing: Exception | None = None

    @property
    def num_waiting(self) -> int:
        """Items that no batch has taken yet."""
        return len(self._waiting)

    def submit(self, item: T) -> asyncio.Future[R]:
        """The item's result, once its batch has run.  Cancelling the future takes an item back that still waits."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()
        self._waiting.append((item, future))
        if len(self._running) < self._max_running:
            if len(self._waiting) >= self._max_items:
                self._start()
            elif self._timer is None:
                wait = self._gather_s > 0
                self._timer = loop.call_later(self._gather_s, self._start) if wait else loop.call_soon(self._start)
        return future

    async def close(self, error: Exception) -> None:
        """End what runs and what waits: ``error`` is what each item gets."""
        self._closing = error
        if self._timer is not None:
            self._timer.cancel()
        for _, future in self._waiting:
            if not future.done():
                future.set_exception(error)
        self._waiting.clear()
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _start(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting and len(self._running) < self._max_running:
            batch: list[tuple[T, asyncio.Future[R]]] = []
            while self._waiting and len(batch) < self._max_items:
                item, future = self._waiting.popleft()
                if not future.cancelled():
                    batch.append((item, future))
            if batch:
                task = asyncio.get_running_loop().create_task(self._run(batch), name=self._name)
                self._running.add(task)
                task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._start()

    async def _run(self, batch: list[tuple[T, asyncio.Future[R]]]) -> None:
        try:
            results = await self._handle([item for item, _ in batch])
            for (_, future), result in zip(batch, results, strict=True):
                if future.done():
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)
        except Exception as exc:
            for _, future in batch:
                if not future.done():
                    future.set_exception(exc)
        finally:
            # Cancelled: by ``close``, or from outside.  The callers are not: theirs is an error.
            for _, future in batch:
                if not future.done():
                    future.set_exception(self._closing or RuntimeError(f"the {self._name} batch was cancelled"))
