"""Chunks of records: those not committed yet, and how much of each chunk on disk is still needed.

A chunk holds the records of one group of messages, up to ``CHUNK_BYTES``; it is freed as a whole, with the last record
of it that is needed.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from buffer.trees.index import Place, Rows, TurnEntry, pack_entry

CHUNK_BYTES = 1 << 18
"""A chunk is closed once it has as many; it is freed as a whole, so a few trees would keep a large one alive."""
SPARE_BYTES = 64 << 20
"""Bytes of unneeded records, up to which the other records of their chunks are not moved."""


@dataclass(slots=True)
class Chunk:
    """Records not committed yet, or being committed."""

    number: int
    records: list[bytes] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    rows: list[bytes] = field(default_factory=list)
    nbytes: int = 0

    def read(self, place: Place) -> bytes:
        return self.records[bisect.bisect_left(self.offsets, place.offset)]


@dataclass(slots=True)
class _Live:
    """A chunk on disk: how much of it is still needed."""

    records: int
    nbytes: int
    size: int


@dataclass(frozen=True, slots=True)
class Group:
    """One commit."""

    chunks: Sequence[Chunk]
    freed: Sequence[int]
    cut_out: Mapping[int, set[int]]
    """Chunk -> offsets of the rows to be taken out."""
    writes: Mapping[bytes, bytes | None]

    def __bool__(self) -> bool:
        return bool(self.chunks or self.freed or self.cut_out or self.writes)


class ChunkLog:
    """The chunks of one journal."""

    def __init__(self) -> None:
        self._open = Chunk(1)
        self._closed: list[Chunk] = []
        self._in_flight: list[Chunk] = []
        self._uncommitted: dict[int, Chunk] = {1: self._open}
        self._freed: list[int] = []
        self._cut_out: dict[int, set[int]] = {}
        self._live: dict[int, _Live] = {}
        self.nbytes = 0
        """Bytes of the records that are needed."""
        self.chunk_bytes = 0
        """Bytes of the chunks that hold them, including records that are not needed any more."""

    def __len__(self) -> int:
        """Closed chunks of which something is needed."""
        return len(self._live)

    @property
    def last_chunk(self) -> int:
        """The greatest number that a chunk has, empty or not."""
        return self._open.number

    @property
    def num_uncommitted(self) -> int:
        """Records."""
        return sum(len(chunk.records) for chunk in self._uncommitted.values())

    def restore(self, rows: Rows, *, last: int) -> None:
        """As an earlier process left them.

        Args:
            rows: ROW[R].
            last: number of the newest chunk on disk.
        """
        chunks, at, counts = np.unique(rows["chunk"], return_inverse=True, return_counts=True)
        sizes = np.bincount(at, weights=rows["nbytes"].astype(np.float64), minlength=len(chunks)).astype(np.int64)
        for chunk, count, size in zip(chunks.tolist(), counts.tolist(), sizes.tolist(), strict=True):
            self._live[chunk] = _Live(count, size, size)
        self.nbytes = self.chunk_bytes = int(sizes.sum())
        self._open = Chunk(last + 1)
        self._uncommitted = {self._open.number: self._open}

    def add(self, record: bytes) -> Place:
        """Add a record; its entry has to follow (``note``)."""
        chunk = self._open
        place = Place(chunk.number, chunk.nbytes, len(record))
        chunk.records.append(record)
        chunk.offsets.append(chunk.nbytes)
        chunk.nbytes += len(record)
        self.nbytes += len(record)
        return place

    def note(self, entry: TurnEntry) -> None:
        """The entry of a record just added."""
        chunk = self._open
        chunk.rows.append(pack_entry(entry))
        if chunk.nbytes >= CHUNK_BYTES:
            self._close()

    def _close(self) -> None:
        chunk = self._open
        if chunk.records:
            self._closed.append(chunk)
            self._live[chunk.number] = _Live(len(chunk.records), chunk.nbytes, chunk.nbytes)
            self.chunk_bytes += chunk.nbytes
            self._open = Chunk(chunk.number + 1)
            self._uncommitted[self._open.number] = self._open

    def find(self, place: Place) -> bytes | None:
        """A record that is not committed yet; None of one that is."""
        chunk = self._uncommitted.get(place.chunk)
        return None if chunk is None else chunk.read(place)

    def release(self, rows: Rows, *, gone: bool) -> None:
        """These records are needed no more; their chunk goes with the last of them.

        Args:
            rows: ROW[R].
            gone: whether their trees are gone too, by which a recovery skips them.  Otherwise their rows are cut out.
        """
        if not len(rows):
            return
        if not gone:
            for chunk, offset in zip(rows["chunk"].tolist(), rows["offset"].tolist(), strict=True):
                self._cut_out.setdefault(chunk, set()).add(offset)
        chunks, at, counts = np.unique(rows["chunk"], return_inverse=True, return_counts=True)
        sizes = np.bincount(at, weights=rows["nbytes"].astype(np.float64))
        for chunk, count, nbytes in zip(chunks.tolist(), counts.tolist(), sizes.tolist(), strict=True):
            if chunk == self._open.number:
                self._close()
            live = self._live[chunk]
            live.records -= count
            live.nbytes -= int(nbytes)
            self.nbytes -= int(nbytes)
            if live.records <= 0:
                del self._live[chunk]
                self.chunk_bytes -= live.size
                self._freed.append(chunk)

    def seal(self, writes: Mapping[bytes, bytes | None]) -> Group:
        """Everything added since the last call, as one commit; call ``committed`` after it."""
        self._close()
        group = Group(self._closed, self._freed, self._cut_out, writes)
        self._in_flight = self._closed
        self._closed, self._freed, self._cut_out = [], [], {}
        return group

    def committed(self) -> None:
        """The group that was sealed last is on disk."""
        for chunk in self._in_flight:
            self._uncommitted.pop(chunk.number, None)
        self._in_flight = []

    def sparse(self, limit: int) -> list[int]:
        """Up to ``limit`` chunks to empty, oldest first; none while few bytes are unneeded."""
        if self.chunk_bytes - self.nbytes < max(SPARE_BYTES, self.nbytes):
            return []
        sparse = (c for c, live in self._live.items() if 2 * live.nbytes < live.size and c not in self._uncommitted)
        return sorted(sparse)[:limit]
