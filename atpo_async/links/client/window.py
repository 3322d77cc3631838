"""The window of sends: unacknowledged messages by number, sent again from the first one that is missing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

from atpo_async.links.frames import MAX_SENDS, SENDS_BYTES
from atpo_async.wire import codec

Frames = Sequence[codec.Buffer]
"""Of one message."""


class Done(NamedTuple):
    """A send that the server is done with."""

    message: Any
    refusal: str | None
    """The server's reason; None where it took the message."""


class SendWindow:
    """Sends by number: ``base <= cursor <= end``.  From ``base`` on they are kept, from ``cursor`` on not on the wire.

    Args:
        size: how many may be unacknowledged; a sender takes one of ``places`` before ``add``.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.places = asyncio.Semaphore(size)
        self.all_done = asyncio.Event()
        self.all_done.set()
        self.base = self.cursor = self.end = 0
        self.acked = self.refused = self.resent = 0
        self._unacked: dict[int, tuple[Any, Frames]] = {}
        self._refusals: dict[int, str] = {}
        self._furthest = 0
        """Below it everything was on the wire at least once."""
        self._fresh_bytes = 0
        """Of messages added since some were put on the wire."""

    def __len__(self) -> int:
        """Unacknowledged sends."""
        return len(self._unacked)

    def add(self, message: Any, frames: Frames) -> bool:
        """Add a message.  Returns whether as much as travels together now waits to be put on the wire."""
        self._unacked[self.end] = (message, frames)
        self.end += 1
        self.all_done.clear()
        self._fresh_bytes += len(frames[0]) + len(frames[1])
        return self._fresh_bytes >= SENDS_BYTES or self.end - self.cursor >= MAX_SENDS

    def begin_transmission(self) -> None:
        """What was added until now is about to be put on the wire."""
        self._fresh_bytes = 0

    def next_together(self) -> list[Frames]:
        """Frames of the messages from the cursor on that go into one; none where everything is on the wire."""
        found: list[Frames] = []
        left = SENDS_BYTES
        for seq in range(self.cursor, min(self.end, self.cursor + MAX_SENDS)):
            frames = self._unacked[seq][1]
            left -= len(frames[0]) + len(frames[1])
            if left < 0 and found:
                break
            found.append(frames)
        return found

    def advance(self, count: int) -> None:
        """The next ``count`` are on the wire."""
        self.cursor += count
        self.resent += min(count, max(0, self._furthest - self.cursor + count))
        self._furthest = max(self._furthest, self.cursor)

    def start_over(self) -> None:
        """The connection is a new one: what is not acknowledged goes out again."""
        self.cursor = self.base

    def go_back(self, expected: int, pinged: int) -> None:
        """A ping that left after the sends below ``pinged`` found the server waiting for ``expected``.

        Messages of one connection keep their order, so what is missing was lost.
        """
        if self.base <= expected < pinged <= self.cursor:
            self.cursor = expected

    def note_refusal(self, seq: int, reason: str) -> None:
        """The server refuses a send; it counts once it is acknowledged."""
        if self.base <= seq < self.end:
            self._refusals[seq] = reason

    def acknowledge(self, handled: int) -> list[Done]:
        """Everything below ``handled`` has been handled: what is new of it."""
        if not self.base < handled <= self.end:
            return []
        done = []
        for seq in range(self.base, handled):
            message, _ = self._unacked.pop(seq)
            self.places.release()
            reason = self._refusals.pop(seq, None)
            if reason is None:
                self.acked += 1
            else:
                self.refused += 1
            done.append(Done(message, reason))
        self.base = handled
        self.cursor = max(self.cursor, handled)
        if not self._unacked:
            self.all_done.set()
        return done
