"""Which requests of an engine run and which wait: first come, first served, up to a number at once."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator


class Queue:
    """Which requests run: the first ``at_once`` in order of arrival, as the engines admit them.  The others wait."""

    def __init__(self, at_once: int) -> None:
        self._free = at_once
        self._waiting: OrderedDict[object, Callable[[], None]] = OrderedDict()

    @contextlib.contextmanager
    def entered(self, on_running: Callable[[], None]) -> Iterator[None]:
        """While a request is in the engine; ``on_running`` is called once it runs."""
        key = object()
        self._waiting[key] = on_running
        self._admit()
        try:
            yield
        finally:
            if self._waiting.pop(key, None) is None:
                self._free += 1
                self._admit()

    def _admit(self) -> None:
        while self._free and self._waiting:
            self._free -= 1
            _, on_running = self._waiting.popitem(last=False)
            on_running()
