"""The newest commits of a journal, kept for followers: which ones a follower lacks, and how far behind it is.

Bounded in bytes: a follower that lacks an older commit gets a copy of the journal again.  Pure; the clock is passed in.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

from buffer.journal.changes import Change, encode
from buffer.journal.marks import MOST_STREAMS, Mark, Stream, dump

KEEP_BYTES = 64 << 20
"""Of commits, in memory."""
GROUP_BYTES = 8 << 20
"""Commits that a follower takes as one have no more bytes, unless a single one has."""

Standing = Literal["here", "behind", "ahead", "unknown"]
"""Of a copy against this journal: its next commit is kept; it lacks more; it has commits that this journal has not; it
is no copy of this journal."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """One commit."""

    number: int
    pieces: Sequence[bytes]
    total_bytes: int
    """Of all commits up to this one."""
    at: float


class Lag(NamedTuple):
    """How far behind a copy is."""

    commits: int
    nbytes: int
    seconds: float
    """Since the first commit that it lacks."""


class Commits:
    """The commits of one process.

    Args:
        earlier: mark of the journal as it was found; None for a new one, or one that nothing followed.
        streams: earlier streams, oldest first.
        clock: seconds, monotonic.
        name: of the present stream, never given before.
    """

    def __init__(
        self,
        earlier: Mark | None,
        streams: Sequence[Stream],
        *,
        clock: Callable[[], float],
        name: str | None = None,
    ) -> None:
        self.stream = name or secrets.token_hex(8)
        self.number = 0
        """Of the last commit."""
        self.on_commit: Callable[[], None] = lambda: None
        """Called after each."""
        self._clock = clock
        ended = () if earlier is None else (Stream(name=earlier.stream, end=earlier.number),)
        # Without a mark commits were made that no stream counts: copies of before are copies of something else.
        self._ended = (*streams, *ended)[-MOST_STREAMS:] if earlier is not None else ()
        self._kept: deque[_Kept] = deque()
        self._kept_bytes = self._total_bytes = 0

    @property
    def streams(self) -> bytes:
        """The entry of earlier streams, for the journal."""
        return dump(self._ended)

    def next_mark(self, last_chunk: int) -> bytes:
        """The mark that belongs into the next commit."""
        return dump(Mark(stream=self.stream, number=self.number + 1, last_chunk=last_chunk))

    def append(self, changes: Sequence[Change]) -> None:
        """The next commit is on disk."""
        pieces = [piece for change in changes for piece in encode(change)]
        nbytes = sum(map(len, pieces))
        self.number += 1
        self._total_bytes += nbytes
        self._kept_bytes += nbytes
        self._kept.append(_Kept(self.number, pieces, self._total_bytes, self._clock()))
        while self._kept_bytes > KEEP_BYTES:
            self._kept_bytes -= sum(map(len, self._kept.popleft().pieces))
        self.on_commit()

    def position_of(self, stream: str, number: int) -> int | None:
        """Commits of the present stream that a copy at ``number`` of ``stream`` has; None where it is none of it, or
        stood elsewhere when the present stream began."""
        if stream == self.stream:
            return number
        last = self._ended[-1] if self._ended else None
        return 0 if last is not None and (stream, number) == (last.name, last.end) else None

    def standing(self, stream: str, number: int) -> Standing:
        """Where a copy stands that has ``number`` commits of ``stream``."""
        position = self.position_of(stream, number)
        if position is not None:
            if position > self.number:
                return "ahead"
            return "here" if self.holds(position) else "behind"
        end = next((ended.end for ended in self._ended if ended.name == stream), None)
        if end is None:
            return "unknown"
        return "ahead" if number > end else "behind"

    def holds(self, position: int) -> bool:
        """Whether every commit after ``position`` is kept."""
        return position == self.number or (bool(self._kept) and self._kept[0].number <= position + 1)

    def after(self, position: int) -> tuple[list[bytes], int]:
        """(the pieces of the commits after ``position``, up to ``GROUP_BYTES``; number of the last of them)."""
        pieces: list[bytes] = []
        nbytes, last = 0, position
        for kept in self._from(position + 1):
            size = sum(map(len, kept.pieces))
            if nbytes and nbytes + size > GROUP_BYTES:
                break
            pieces += kept.pieces
            nbytes += size
            last = kept.number
        return pieces, last

    def _from(self, number: int) -> Iterator[_Kept]:
        """Kept commits from ``number`` on."""
        first = self._kept[0].number if self._kept else self.number + 1
        return islice(self._kept, max(0, number - first), None)

    def bytes_up_to(self, position: int) -> int:
        """Bytes of all commits up to ``position``; of one that is kept no more, those up to the first that is."""
        if position >= self.number or not self._kept:
            return self._total_bytes
        first = next(self._from(position + 1))
        return first.total_bytes - sum(map(len, first.pieces))

    def since(self, position: int) -> float | None:
        """When the first commit after ``position`` was made, as far as it is kept; None where there is none."""
        first = next(self._from(position + 1), None) if position < self.number else None
        return None if first is None else first.at
