"""Answers that are decided and not sent yet, because their commit is not on disk.

A request waits for the disk only for a limited time.  Its answer then stays here with its commit, and a repeated
request waits on for the same commit.  So no answer is sent uncommitted, however slow the disk is, and answers are sent
at last even where a commit takes longer than any request waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Generic, TypeVar

Answer = TypeVar("Answer")

SETTLE_WAIT_S = 5.0
"""How long a request waits for the disk; it is then answered that its answer waits for the disk."""


class PendingAnswer(Generic[Answer]):
    """One answer.

    Args:
        answer: as it will be sent.
        settling: returns once all that was decided by now is committed; begun at once.
    """

    def __init__(self, answer: Answer, settling: Awaitable[None]) -> None:
        self.answer = answer
        self._settling = asyncio.ensure_future(settling)
        self._asked = 0

    def ask(self) -> int:
        """Number this request; ``is_latest`` tells whether a later one has come since."""
        self._asked += 1
        return self._asked

    def is_latest(self, asked: int) -> bool:
        return asked == self._asked

    async def committed(self) -> bool:
        """Whether it may be sent now.  Waits for: the commit, up to ``SETTLE_WAIT_S``.  Unblocked by: the disk."""
        done, _ = await asyncio.wait((self._settling,), timeout=SETTLE_WAIT_S)
        if done:
            self._settling.result()
        return bool(done)

    def drop(self) -> None:
        """Drop the answer: no request needs it any more."""
        self._settling.cancel()
