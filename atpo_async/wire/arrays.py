"""Arrays of a message and the bytes of its second frame: gathered when it is sent, views of it when it comes.

In the header an array is a descriptor ``[dtype code, offset, length]``, and turns that are passed on as records
``[dtype code, offset, length, count]``.  Arrays lie one after another, little-endian, each on an 8-byte boundary.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from atpo_async.core.dtypes import WIRE_DTYPES
from atpo_async.core.errors import BadMessage
from atpo_async.wire.records import MIN_RECORD_BYTES, TurnRecords

Buffer = bytes | memoryview

INT32_CODE, FLOAT32_CODE, UINT8_CODE = range(len(WIRE_DTYPES))
NO_ITEMS = tuple(np.frombuffer(bytes(dtype.itemsize), dtype)[:0] for dtype in WIRE_DTYPES)
"""An empty array of each dtype, by its code."""

_ALIGN = 8
_PADDING = tuple(bytes(n) for n in range(_ALIGN))
_CODES = {dtype: code for code, dtype in enumerate(WIRE_DTYPES)}
_LITTLE = sys.byteorder == "little"


class Payload:
    """Gathers the arrays of one message in the order in which the header names them."""

    __slots__ = ("parts", "size")

    def __init__(self) -> None:
        self.parts: list[Any] = []
        self.size = 0

    def describe(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            code = _CODES.get(value.dtype)
            if code is None or value.ndim != 1:
                raise BadMessage(
                    f"an array of {value.dtype}{list(value.shape)} cannot be sent; "
                    "arrays have one dimension and are int32, float32 or uint8"
                )
            data = value.tobytes() if _LITTLE else value.astype(WIRE_DTYPES[code]).tobytes()
            return code, self._add((data,), len(data)), len(value)
        if isinstance(value, TurnRecords):
            return UINT8_CODE, self._add(value.parts, value.nbytes), value.nbytes, len(value)
        if isinstance(value, np.generic):
            return value.item()
        raise BadMessage(f"a {type(value).__name__} cannot be sent")

    def _add(self, parts: Sequence[Any], nbytes: int) -> int:
        offset = self.size
        padding = -offset % _ALIGN
        if padding:
            self.parts.append(_PADDING[padding])
            offset += padding
        self.parts += parts
        self.size = offset + nbytes
        return offset


class Arrays:
    """Turns descriptors into views of the payload and remembers which bytes they took."""

    __slots__ = ("payload", "size", "taken")

    def __init__(self, payload: Buffer) -> None:
        self.payload = payload
        self.size = len(payload)
        self.taken: list[tuple[int, int]] = []

    def view(self, descriptor: tuple[int, int, int]) -> np.ndarray:
        code, offset, length = descriptor
        self._take(code, offset, length)
        if not length:
            return NO_ITEMS[code]
        return np.frombuffer(self.payload, WIRE_DTYPES[code], length, offset)

    def records(self, descriptor: tuple[int, int, int, int]) -> TurnRecords:
        code, offset, length, count = descriptor
        self._take(code, offset, length)
        if code != UINT8_CODE:
            raise BadMessage(f"records are {WIRE_DTYPES[code]}; expected uint8")
        if not 0 <= count <= length // MIN_RECORD_BYTES or (length and not count):
            raise BadMessage(f"{count} turns cannot be in {length} bytes of records")
        return TurnRecords.raw((memoryview(self.payload)[offset : offset + length],) if length else (), count)

    def _take(self, code: int, offset: int, length: int) -> None:
        if not 0 <= code < len(WIRE_DTYPES):
            raise BadMessage(f"array dtype code {code} is unknown; codes are 0 to {len(WIRE_DTYPES) - 1}")
        dtype = WIRE_DTYPES[code]
        end = offset + length * dtype.itemsize
        if offset < 0 or length < 0 or offset % _ALIGN or end > self.size:
            raise BadMessage(
                f"array at offset {offset} with {length} {dtype} items is not in {self.size} payload bytes"
            )
        self.taken.append((offset, end))

    def check_layout(self) -> None:
        """The arrays lie side by side from 0 to the end: none overlap, no byte is unaccounted for."""
        end = 0
        for start, stop in sorted(self.taken):
            if start != end + -end % _ALIGN:
                raise BadMessage(f"array at offset {start} overlaps another or leaves a gap after byte {end}")
            end = stop
        if end != self.size:
            raise BadMessage(f"arrays end at byte {end} of {self.size} payload bytes")
