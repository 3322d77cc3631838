"""Answers that are decided and may not leave yet: the commit that holds them is still on its way.

A request waits only so long for the disk.  Its answer stays here then, with the commit that it waits for: asked again,
the same answer waits on for the same commit.  So nothing leaves uncommitted however slow the disk is, and a disk that
takes longer than any request waits still gets its answers out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Generic, TypeVar

Answer = TypeVar("Answer")

SETTLE_WAIT_S = 5.0
"""An answer waits no longer for the disk; it then says that the disk is what is waited for."""


class PendingAnswer(Generic[Answer]):
    """One answer.

    Args:
        answer: as it will leave.
        settling: returns once all that was decided by now is committed; begun at once.
    """

    def __init__(self, answer: Answer, settling: Awaitable[None]) -> None:
        self.answer = answer
        self._settling = asyncio.ensure_future(settling)
        self._asked = 0

    def ask(self) -> int:
        """A number for this request; ``is_latest`` says whether another one has come since."""
        self._asked += 1
        return self._asked

    def is_latest(self, asked: int) -> bool:
        return asked == self._asked

    async def committed(self) -> bool:
        """Whether it may leave now.  Waits for: the commit, up to ``SETTLE_WAIT_S``.  Unblocked by: the disk."""
        done, _ = await asyncio.wait((self._settling,), timeout=SETTLE_WAIT_S)
        if done:
            self._settling.result()
        return bool(done)

    def drop(self) -> None:
        """It is wanted no more."""
        self._settling.cancel()
