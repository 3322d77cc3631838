"""Lets requests wait for a change of the buffer's state, and notifies them of one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


class Changes:
    """Changes that a message or a lapsed lease brings about.

    Args:
        stopping: once set, every wait ends.
    """

    def __init__(self, stopping: asyncio.Event) -> None:
        self._stopping = stopping
        self._changed = asyncio.Event()
        self.count = 0
        """Changes so far."""
        self.on_change: Callable[[str], None] = lambda freed: None
        """Called at every change, with what ``notify`` was given."""

    def notify(self, freed: str = "") -> None:
        """Have every wait check its condition again.  ``freed``: the change is that a tree of this actor has ended."""
        self.count += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        self.on_change(freed)

    async def until(self, found: Callable[[], Found | None], *, timeout_s: float | None) -> Found | None:
        """``found()`` as soon as it is not None; None after ``timeout_s`` or once stopping.

        Waits for: a change.  Unblocked by: ``notify``.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._stopping.is_set():
                    changed = self._changed
                    result = found()
                    if result is not None:
                        return result
                    await changed.wait()
        return None
