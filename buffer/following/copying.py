"""A copy of a journal as it is sent: one state of its tables, read while further commits are made.

LMDB keeps the pages of a state as long as it is read, so that the file grows meanwhile: a copy that takes longer than
``COPY_S`` is broken off, and the next one leaves out what has arrived.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from atpo_async.core.errors import BadMessage
from buffer.journal.changes import CHUNKS, ROWS, STATE, Change, encode
from buffer.journal.marks import MARK, Mark, read_mark
from buffer.journal.tables import Tables

COPY_S = 60.0
_U64 = struct.Struct(">Q")
_RANGE = np.dtype([("first", "<u8"), ("count", "<u8")])
MAX_RANGES = 4096
"""In a message; chunks beyond them are sent once more."""


def ranges_of(numbers: np.ndarray) -> np.ndarray:
    """Chunks as a message has them: uint8[16 R], the last ``MAX_RANGES`` ranges.

    Args:
        numbers: uint64[C], ascending.
    """
    if not len(numbers):
        return np.zeros(0, np.uint8)
    firsts = np.flatnonzero(np.diff(numbers.astype(np.int64), prepend=-2) != 1)
    found = np.zeros(len(firsts), _RANGE)
    found["first"] = numbers[firsts]
    found["count"] = np.diff(firsts, append=len(numbers))
    return np.frombuffer(found[-MAX_RANGES:].tobytes(), np.uint8)


class Has:
    """The chunks that a follower has.

    Args:
        data: as of ``ranges_of``.

    Raises:
        BadMessage: no ranges, or none that a follower sends.
    """

    def __init__(self, data: np.ndarray) -> None:
        if len(data) % _RANGE.itemsize or len(data) > MAX_RANGES * _RANGE.itemsize:
            raise BadMessage(f"{len(data)} bytes of chunk numbers are no ranges")
        ranges = np.frombuffer(data.tobytes(), _RANGE)
        self._firsts = ranges["first"]
        self._ends = ranges["first"] + ranges["count"]
        if len(ranges) and ((self._ends <= self._firsts).any() or (self._firsts[1:] <= self._ends[:-1]).any()):
            raise BadMessage("ranges of chunk numbers do not rise")

    def __contains__(self, number: int) -> bool:
        at = int(np.searchsorted(self._firsts, np.uint64(number), side="right")) - 1
        return at >= 0 and number < int(self._ends[at])


class JournalCopy:
    """One state of a journal's tables; ``close`` lets it go.

    Args:
        tables: of the journal.
        has: chunks that the follower has, with the same content.
    """

    def __init__(self, tables: Tables, has: Has) -> None:
        self._tables = tables
        self._has = has
        self._txn = tables.env.begin(buffers=True)

    def mark(self) -> Mark | None:
        """Of the state that is copied."""
        data = self._txn.get(MARK, db=self._tables.tables[STATE])
        return None if data is None else read_mark({MARK: bytes(data)})

    def chunks(self) -> Iterator[bytes]:
        """The encoded chunks that the follower lacks."""
        for key, value in self._txn.cursor(db=self._tables.tables[CHUNKS]):
            if _U64.unpack(key)[0] not in self._has:
                yield from encode(Change(CHUNKS, bytes(key), bytes(value)))

    def rest(self) -> Iterator[bytes]:
        """All else, encoded: the entries of records, and the state."""
        for table in (ROWS, STATE):
            for key, value in self._txn.cursor(db=self._tables.tables[table]):
                yield from encode(Change(table, bytes(key), bytes(value)))

    def close(self) -> None:
        self._txn.abort()
