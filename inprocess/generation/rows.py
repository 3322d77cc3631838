"""Which row holds which tokens: a chain's next turn goes on in its row, a branch begins with a copy of another's.

Rows are known by a number of their own; their *places* in the table change, so that those of requests under way stand
side by side, and a forward pass reads them where they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Source(NamedTuple):
    """A row that holds the beginning of a context."""

    row: int
    held: int
    """Tokens of the context that it holds, from the first on."""


class Rows:
    """The content and the place of each row; the table is the caller's to change.

    Args:
        most: rows there can be.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.place: list[int] = []
        """Row -> its place in the table."""
        self._row_at: list[int] = []
        self.held: list[int] = []
        """Row -> tokens that it holds."""
        self._contexts: list[list[bytes]] = []
        """Row -> contexts that begin in it."""
        self._sources: dict[bytes, Source] = {}
        self._lengths: dict[int, int] = {}
        """Bytes of a context in ``_sources`` -> how many there are of that length."""
        self._ages: list[int] = []
        self._clock = 0

    def __len__(self) -> int:
        return len(self.place)

    # --- contexts ----------------------------------------------------------------------------------------------

    def remember(self, row: int, context: bytes, held: int) -> None:
        """A later context that begins with these bytes finds its first ``held`` tokens in ``row``."""
        if context in self._sources:
            return
        self._sources[context] = Source(row, held)
        self._contexts[row].append(context)
        if len(context) in self._lengths:
            self._lengths[len(context)] += 1
        else:
            self._lengths[len(context)] = 1
            # The longest first, as they are looked for.
            self._lengths = dict(sorted(self._lengths.items(), reverse=True))

    def longest(self, context: bytes) -> Source | None:
        """The row that holds most of the beginning of ``context``; None where none holds any."""
        size = len(context)
        for length in self._lengths:
            if length <= size and (found := self._sources.get(context[:length])) is not None:
                return found
        return None

    def forget_all(self) -> None:
        """What the rows hold is of other weights: none is in use any more."""
        self._sources.clear()
        self._lengths.clear()
        for each in (self.place, self._row_at, self.held, self._contexts, self._ages):
            each.clear()

    # --- rows --------------------------------------------------------------------------------------------------

    def take(self, keep: Collection[int]) -> int:
        """An empty row: a new one, or the one that was used least lately, but none of ``keep``."""
        if len(self) < self._most:
            row = len(self)
            self.place.append(row)
            self._row_at.append(row)
            self.held.append(0)
            self._contexts.append([])
            self._ages.append(0)
            return row
        row = min((row for row in range(len(self)) if row not in keep), key=self._ages.__getitem__)
        for context in self._contexts[row]:
            del self._sources[context]
            self._lengths[len(context)] -= 1
            if not self._lengths[len(context)]:
                del self._lengths[len(context)]
        self._contexts[row].clear()
        self.held[row] = 0
        return row

    def used_now(self, rows: Iterable[int]) -> None:
        """Requests use these rows."""
        self._clock += 1
        for row in rows:
            self._ages[row] = self._clock

    def row_at(self, place: int) -> int:
        return self._row_at[place]

    def best_begin(self, rows: Sequence[int], *, in_all: int) -> int:
        """The place from which on most of these rows stand already, among ``in_all`` places that are to be theirs and
        others'."""
        stands = np.zeros(len(self) + 1, dtype=np.int64)
        stands[[self.place[row] + 1 for row in rows]] = 1
        before = np.cumsum(stands)
        last = len(self) - in_all
        return int(np.argmax(before[len(rows) : len(rows) + last + 1] - before[: last + 1]))

    def gather(self, rows: Sequence[int], *, begin: int) -> tuple[list[int], list[int]]:
        """Put these rows side by side from the place ``begin`` on, in any order.

        Returns the places whose content is to be exchanged, pair by pair; no place is in two pairs.
        """
        end = begin + len(rows)
        wanted = set(rows)
        holes = [place for place in range(begin, end) if self._row_at[place] not in wanted]
        outside = [self.place[row] for row in rows if not begin <= self.place[row] < end]
        for one, other in zip(holes, outside, strict=True):
            first, second = self._row_at[one], self._row_at[other]
            self._row_at[one], self._row_at[other] = second, first
            self.place[first], self.place[second] = other, one
        return holes, outside


def bytes_of(tokens: np.ndarray) -> bytes:
    """Of tokens, as contexts are compared."""
    return np.ascontiguousarray(tokens, dtype=np.int32).tobytes()
