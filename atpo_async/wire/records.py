"""Turns as bytes of the wire: packed once, stored and passed on as they are, decoded on the first access.

One record is one message of two frames::

    u32 header bytes, u32 payload bytes   little-endian
    header frame, zeros up to 8 bytes
    payload frame, zeros up to 8 bytes

Its length is a multiple of 8, so records can be put one after another and the arrays inside stay aligned.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import overload

from atpo_async.core.errors import BadMessage
from atpo_async.core.tree import Turn

Buffer = bytes | bytearray | memoryview

_SIZES = struct.Struct("<II")
_ALIGN = 8
_PADDING = tuple(bytes(n) for n in range(_ALIGN))
_MAX_FRAME_BYTES = 2**32 - 1

MIN_RECORD_BYTES = _SIZES.size + _ALIGN
"""A message has a header of at least one byte."""


def pack(*messages: Sequence[Buffer]) -> bytes:
    """The records of messages, each given as its two wire frames, one after another.

    Raises BadMessage for another number of frames, or over 4 GB.
    """
    parts: list[Buffer] = []
    for frames in messages:
        if len(frames) != 2:
            raise BadMessage(f"a record holds the 2 frames of one message, got {len(frames)}")
        header, payload = frames
        header_bytes, payload_bytes = len(header), len(payload)
        if not 0 < header_bytes <= _MAX_FRAME_BYTES or payload_bytes > _MAX_FRAME_BYTES:
            raise BadMessage(
                f"frames of {header_bytes} and {payload_bytes} bytes are no record; expected 1 to 2**32 - 1"
            )
        parts += (
            _SIZES.pack(header_bytes, payload_bytes),
            header,
            _PADDING[-header_bytes % _ALIGN],
            payload,
            _PADDING[-payload_bytes % _ALIGN],
        )
    return b"".join(parts)


def unpack(record: Buffer) -> tuple[memoryview, memoryview]:
    """Header and payload of one record, as read-only views.  Raises BadMessage if it is none."""
    found = frames_in(record, 1)
    if not found:
        raise BadMessage("a record of no bytes; expected the frames of one message")
    return found[0]


def frames_in(records: Buffer, most: int) -> list[tuple[memoryview, memoryview]]:
    """Header and payload of each of up to ``most`` records, as read-only views.  Raises BadMessage if they are none."""
    view = _read_only(records)
    return [
        (view[start : start + header_bytes], view[middle : middle + payload_bytes])
        for start, middle, payload_bytes, header_bytes in _layout(view, most)
    ]


def _read_only(buffer: Buffer) -> memoryview:
    view = memoryview(buffer).toreadonly()
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def _layout(part: memoryview, most: int) -> list[tuple[int, int, int, int]]:
    """Where the records of ``part`` lie: (header start, payload start, payload bytes, header bytes) each."""
    found: list[tuple[int, int, int, int]] = []
    at, size = 0, len(part)
    sizes_of, sizes_bytes = _SIZES.unpack_from, _SIZES.size
    while at < size:
        if len(found) == most:
            raise BadMessage(f"{size - at} bytes follow the last of {most} records; expected none")
        if size - at < MIN_RECORD_BYTES:
            raise BadMessage(
                f"record at byte {at} is cut off: {size - at} bytes are left of at least {MIN_RECORD_BYTES}"
            )
        header_bytes, payload_bytes = sizes_of(part, at)
        start = at + sizes_bytes
        middle = start + header_bytes + -header_bytes % _ALIGN
        at = middle + payload_bytes + -payload_bytes % _ALIGN
        if at > size or not header_bytes:
            raise BadMessage(
                f"record with {header_bytes} header and {payload_bytes} payload bytes is not in {size} bytes at {start}"
            )
        found.append((start, middle, payload_bytes, header_bytes))
    return found


class _Codec:
    """How turns become frames and come back.  ``atpo_async.wire.codec`` knows, and it imports this module."""

    def __init__(self) -> None:
        self._encode: Callable[[Turn], Sequence[Buffer]] | None = None
        self.decode: Callable[[memoryview, memoryview], Turn] = self._missing

    def set(self, encode: Callable[[Turn], Sequence[Buffer]], decode: Callable[[memoryview, memoryview], Turn]) -> None:
        self._encode, self.decode = encode, decode

    def encode(self, turn: Turn) -> Sequence[Buffer]:
        if self._encode is None:
            raise self._no_wire()
        return self._encode(turn)

    def _missing(self, header: memoryview, payload: memoryview) -> Turn:
        raise self._no_wire()

    @staticmethod
    def _no_wire() -> RuntimeError:
        return RuntimeError("turns can be packed and looked at only once atpo_async.wire.codec has been imported")


codec = _Codec()


class TurnRecords(Sequence[Turn]):
    """Turns as the wire carries them, each decoded and checked in full the first time it is read.

    Reading a turn raises BadMessage if it is bad, or if the bytes do not hold ``len()`` records.  Decoded turns
    are views of the records; these must not change.
    """

    __slots__ = ("_count", "_index", "_turns", "nbytes", "parts")

    parts: tuple[Buffer, ...]
    """Whole records, one after another; where one part ends and the next begins means nothing."""
    nbytes: int

    def __init__(self, parts: Sequence[Buffer], count: int) -> None:
        self.parts = tuple(parts)
        self.nbytes = sum(part.nbytes if isinstance(part, memoryview) else len(part) for part in self.parts)
        self._count = count
        self._index: list[tuple[memoryview, int, int, int, int]] | None = None
        self._turns: list[Turn | None] = []

    @classmethod
    def of(cls, turns: Iterable[Turn]) -> TurnRecords:
        """Encode ``turns``; what is encoded already is taken as it is.  Raises BadMessage for what cannot be sent."""
        if isinstance(turns, TurnRecords):
            return turns
        parts = [pack(codec.encode(turn)) for turn in turns]
        return cls(parts, len(parts))

    @classmethod
    def raw(cls, parts: Sequence[Buffer], count: int) -> TurnRecords:
        """``count`` records that are there already; nothing is copied or decoded."""
        return cls(parts, count)

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"TurnRecords({self._count} turns, {self.nbytes} bytes)"

    @overload
    def __getitem__(self, index: int) -> Turn: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Turn, ...]: ...
    def __getitem__(self, index: int | slice) -> Turn | tuple[Turn, ...]:
        if isinstance(index, slice):
            return tuple(self._look(i) for i in range(*index.indices(self._count)))
        at = index + self._count if index < 0 else index
        if not 0 <= at < self._count:
            raise IndexError(f"turn {index} of {self._count}")
        return self._look(at)

    def __iter__(self) -> Iterator[Turn]:
        for at in range(self._count):
            yield self._look(at)

    def _look(self, at: int) -> Turn:
        index = self._index
        if index is None:
            index = self._read_index()
        turn = self._turns[at]
        if turn is None:
            part, start, middle, payload_bytes, header_bytes = index[at]
            turn = codec.decode(part[start : start + header_bytes], part[middle : middle + payload_bytes])
            self._turns[at] = turn
        return turn

    def _read_index(self) -> list[tuple[memoryview, int, int, int, int]]:
        index: list[tuple[memoryview, int, int, int, int]] = []
        for part in self.parts:
            view = _read_only(part)
            index += [(view, *where) for where in _layout(view, self._count - len(index))]
        if len(index) != self._count:
            raise BadMessage(f"{len(index)} records in {self.nbytes} bytes; {self._count} turns were announced")
        self._turns = [None] * self._count
        self._index = index
        return index
