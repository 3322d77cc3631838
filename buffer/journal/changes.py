"""Changes of the journal's tables as bytes: what a commit puts and deletes, encoded, cut into parts, decoded.

One change is a head (the table's number with a bit for a deletion, the key's length, the value's length), the key and
the value.  Parts are cut anywhere, so that a value of any size travels.  Pure.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from atpo_async.core.errors import BadMessage

CHUNKS, ROWS, STATE = range(3)
"""Tables, by number."""
TABLE_NAMES = ("chunks", "rows", "state")
MAX_KEY_BYTES = 511
"""LMDB's limit."""
_HEAD = struct.Struct("<BHI")
_DELETES = 0x80


class Change(NamedTuple):
    """One entry put or deleted."""

    table: int
    key: bytes
    value: bytes | None
    """None: deleted."""


def encode(change: Change) -> list[bytes]:
    """The bytes of one change, its value uncopied."""
    table, key, value = change
    if value is None:
        return [_HEAD.pack(table | _DELETES, len(key), 0) + key]
    return [_HEAD.pack(table, len(key), len(value)) + key, value]


def cut(pieces: Iterable[bytes], size: int) -> Iterator[tuple[bytes, bool]]:
    """``pieces`` one after another as parts of ``size`` bytes, the last one with True.  There is at least one part."""
    held: list[bytes] = []
    nbytes = 0
    for piece in pieces:
        while nbytes + len(piece) > size:
            space = size - nbytes
            yield b"".join((*held, piece[:space])), False
            held, nbytes, piece = [], 0, piece[space:]
        held.append(piece)
        nbytes += len(piece)
    yield b"".join(held), True


class Decoder:
    """Reads changes out of parts; what was cut is kept until the rest comes.

    Args:
        value_bytes: no value is larger.
    """

    def __init__(self, value_bytes: int) -> None:
        self._value_bytes = value_bytes
        self._held = bytearray()

    def feed(self, data: bytes | memoryview) -> Iterator[Change]:
        """The changes that are whole with this part.

        Raises:
            BadMessage: another table, or a key or value out of its limits.
        """
        self._held += data
        at = 0
        try:
            while len(self._held) - at >= _HEAD.size:
                kind, key_bytes, value_bytes = _HEAD.unpack_from(self._held, at)
                self._check(kind, key_bytes, value_bytes)
                start = at + _HEAD.size
                end = start + key_bytes + value_bytes
                if len(self._held) < end:
                    return
                key = bytes(self._held[start : start + key_bytes])
                at = end
                if kind & _DELETES:
                    yield Change(kind ^ _DELETES, key, None)
                else:
                    yield Change(kind, key, bytes(memoryview(self._held)[start + key_bytes : end]))
        finally:
            del self._held[:at]

    def _check(self, kind: int, key_bytes: int, value_bytes: int) -> None:
        if kind & ~_DELETES >= len(TABLE_NAMES) or (kind & _DELETES and value_bytes):
            raise BadMessage(f"a change of kind {kind} with a value of {value_bytes} bytes is none of a journal's")
        if not 1 <= key_bytes <= MAX_KEY_BYTES or value_bytes > self._value_bytes:
            raise BadMessage(
                f"a change of table {TABLE_NAMES[kind & ~_DELETES]} has a key of {key_bytes} bytes and a value of "
                f"{value_bytes}; expected 1 to {MAX_KEY_BYTES} and at most {self._value_bytes}"
            )

    @property
    def pending_bytes(self) -> int:
        """Bytes of a change that is not whole yet."""
        return len(self._held)
