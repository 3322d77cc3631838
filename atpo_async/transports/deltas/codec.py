"""One block of a tensor as its difference to the same block of the base, and back.

A record is a header and up to two zstd frames.  Elements are taken as unsigned integers, bit by bit: NaN payloads and
the sign of zero are differences like any other.  What has changed is stored as the step from the old integer to the new
one, modulo its width, with the sign in the lowest bit: weights move by few units in the last place, whose steps are
small numbers where their XOR is any number.  Everything is in byte planes: the lowest bytes of all, then the next ones.

  SAME   nothing: all elements are those of the base.
  GAPS   how many unchanged elements lie before each changed one, and the steps of the changed ones.
  MASK   which elements have changed, one bit each, and their steps.
  STEPS  the steps of all elements.
  XOR    the XOR of all elements.
  WHOLE  the elements themselves.
  RAW    the elements themselves, as they are.

Records come from a peer.  Nothing is unpacked before the size that it would take is known to be the block's.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

import numpy as np
import zstandard

from atpo_async.core.errors import AtpoError

CODEC = "zstd-blocks-1"
"""Named in manifests: an actor that does not know it takes the version whole."""

LEVEL = 1
"""Of zstd.  Higher ones take two to five times as long for less than 2 % of the bytes; negative ones leave out the
entropy coding, which is what shrinks masks and planes."""

SPARSE, DENSE, SURELY_DENSE = 1 / 8, 3 / 4, 0.95
"""Shares of changed elements: GAPS below the first one, MASK from there to the last one, and STEPS or XOR from the
second one on.  Measured on normally distributed weights and steps of several sizes, the others are larger there."""

UNLIKE = 0.75
"""Of the block's bytes: a difference that is not smaller than this is compared with the elements themselves."""

SAMPLE = 1 << 15
"""Elements that decide between STEPS and XOR."""

HEADER = struct.Struct("<BIII")
"""Kind, number of changed elements, bytes of the first frame, bytes of the second one."""

WIDEST_WINDOW = 1 << 23
"""Of a zstd frame, in bytes: what a decoder may have to keep."""


class BadDifference(AtpoError):
    """A difference that is damaged, or that no encoder of ours has made."""


class Kind(enum.IntEnum):
    SAME = 0
    GAPS = 1
    MASK = 2
    STEPS = 3
    XOR = 4
    WHOLE = 5
    RAW = 6


SPARSE_KINDS = frozenset({Kind.GAPS, Kind.MASK})
"""Those that say which elements have changed."""


class Head(NamedTuple):
    """A record's header."""

    kind: Kind
    changed: int
    places_bytes: int
    """Of the frame that says which elements have changed."""
    values_bytes: int

    @property
    def body_bytes(self) -> int:
        return self.places_bytes + self.values_bytes


class BlockEncoder:
    """Makes records.  For one thread at a time."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdCompressor(level=LEVEL)

    def encode(self, base: np.ndarray, new: np.ndarray, width: int) -> bytes:
        """The record of a block.

        Args:
            base, new: uint8[N] of the block in either version; N is a multiple of ``width``.
            width: bytes of an element.
        """
        old, now = _elements(base, width), _elements(new, width)
        mask = old != now
        changed = int(np.count_nonzero(mask))
        if not changed:
            return _record(Kind.SAME)
        found = []
        if changed < SURELY_DENSE * len(now):
            found.append(self._sparse(old, now, mask, changed))
        if changed > DENSE * len(now):
            found.append(self._dense(old, now, changed))
        if min(map(len, found)) >= UNLIKE * len(new):
            found.append(_record(Kind.WHOLE, changed, values=self._packed(planes(now))))
            found.append(_record(Kind.RAW, changed, values=new.tobytes()))
        return min(found, key=len)

    def _sparse(self, old: np.ndarray, now: np.ndarray, mask: np.ndarray, changed: int) -> bytes:
        at = np.flatnonzero(mask)
        values = self._packed(planes(steps(old.take(at), now.take(at))))
        if changed <= SPARSE * len(now):
            return _record(Kind.GAPS, changed, self._packed(planes(gaps(at))), values)
        return _record(Kind.MASK, changed, self._packed(np.packbits(mask)), values)

    def _dense(self, old: np.ndarray, now: np.ndarray, changed: int) -> bytes:
        few, few_now = old[:SAMPLE], now[:SAMPLE]
        if len(self._packed(planes(few ^ few_now))) < len(self._packed(planes(steps(few, few_now)))):
            return _record(Kind.XOR, changed, values=self._packed(planes(old ^ now)))
        return _record(Kind.STEPS, changed, values=self._packed(planes(steps(old, now))))

    def _packed(self, data: np.ndarray) -> bytes:
        return self._zstd.compress(data.data)


class BlockDecoder:
    """Puts records on the base.  For one thread at a time."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor(max_window_size=WIDEST_WINDOW)

    def decode(self, head: Head, body: memoryview, block: np.ndarray, width: int) -> None:
        """Change ``block`` from the base's bytes into the newer ones.

        Args:
            head: of the record.
            body: its frames.
            block: uint8[N] of the base; changed in place.
            width: bytes of an element.

        Raises:
            BadDifference: whatever is wrong with the record; ``block`` is then worth nothing.
        """
        places, values = body[: head.places_bytes], body[head.places_bytes :]
        elements = _elements(block, width)
        count = len(elements)
        if head.changed > count:
            raise BadDifference(f"{head.changed} elements of {count} are said to have changed")
        if head.kind is Kind.SAME:
            return
        if head.kind in SPARSE_KINDS:
            read = self._from_gaps if head.kind is Kind.GAPS else self._from_mask
            at = read(places, count, head.changed)
            elements[at] = stepped(elements.take(at), self._values(values, head.changed, width))
        elif head.kind is Kind.STEPS:
            elements[:] = stepped(elements, self._values(values, count, width))
        elif head.kind is Kind.XOR:
            elements ^= self._values(values, count, width)
        elif head.kind is Kind.WHOLE:
            elements[:] = self._values(values, count, width)
        else:
            block[:] = np.frombuffer(values, dtype=np.uint8)

    def _from_gaps(self, frame: memoryview, count: int, changed: int) -> np.ndarray:
        """int64[changed], the places in order."""
        nbytes = self._size_of(frame)
        width = nbytes // max(1, changed)
        if width not in GAP_WIDTHS or nbytes != width * changed:
            raise BadDifference(f"{nbytes} bytes are no gaps between {changed} changed elements")
        at = np.cumsum(from_planes(self._unpacked(frame, nbytes), width), dtype=np.int64)
        at += np.arange(changed)
        if at[-1] >= count:
            raise BadDifference(f"a changed element is number {at[-1]} of {count}")
        return at

    def _from_mask(self, frame: memoryview, count: int, changed: int) -> np.ndarray:
        """int64[changed], the places in order."""
        bits = np.unpackbits(self._unpacked(frame, -(-count // 8)))
        at = np.flatnonzero(bits.view(np.bool_))
        if len(at) != changed or (changed and at[-1] >= count):
            raise BadDifference(f"the mask of {count} elements does not mark {changed} of them")
        return at

    def _values(self, frame: memoryview, count: int, width: int) -> np.ndarray:
        return from_planes(self._unpacked(frame, count * width), width)

    def _size_of(self, frame: memoryview) -> int:
        try:
            return int(zstandard.get_frame_parameters(frame).content_size)
        except zstandard.ZstdError as exc:
            raise BadDifference(f"a frame cannot be unpacked: {exc}") from None

    def _unpacked(self, frame: memoryview, nbytes: int) -> np.ndarray:
        """uint8[nbytes].  What a frame says of its own size is checked before memory is set aside for it."""
        said = self._size_of(frame)
        if said != nbytes:
            raise BadDifference(f"a frame unpacks into {said} bytes, expected {nbytes}")
        try:
            found = self._zstd.decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as exc:
            raise BadDifference(f"a frame cannot be unpacked: {exc}") from None
        if len(found) != nbytes:
            raise BadDifference(f"a frame unpacks into {len(found)} bytes, expected {nbytes}")
        return np.frombuffer(found, dtype=np.uint8)


def head_of(data: bytes, nbytes: int) -> Head:
    """The header of a record for a block of ``nbytes``.  Raises BadDifference."""
    if len(data) < HEADER.size:
        raise BadDifference("it ends within the header of a block")
    kind, changed, places_bytes, values_bytes = HEADER.unpack(data)
    if kind > max(Kind):
        raise BadDifference(f"a block is of kind {kind}, expected at most {max(Kind)}")
    head = Head(Kind(kind), changed, places_bytes, values_bytes)
    expected = (
        (head.kind in SPARSE_KINDS) == (places_bytes > 0)
        and (head.kind is Kind.SAME) == (values_bytes == 0) == (changed == 0)
        and (head.kind is not Kind.RAW or values_bytes == nbytes)
    )
    if not expected:
        raise BadDifference(
            f"a block of {nbytes} bytes is {head.kind.name} with {changed} changed elements in {places_bytes} and "
            f"{values_bytes} bytes"
        )
    return head


def steps(old: np.ndarray, now: np.ndarray) -> np.ndarray:
    """From each old unsigned integer to the new one, modulo their width: 0, -1, 1, -2, 2 … as 0, 1, 2, 3, 4 …"""
    signed = np.dtype(f"<i{old.itemsize}")
    step: np.ndarray = (now - old).view(signed)
    sign = step >> (8 * old.itemsize - 1)
    step <<= 1
    step ^= sign
    return step.view(old.dtype)


def stepped(old: np.ndarray, by: np.ndarray) -> np.ndarray:
    """The integers to which ``steps`` lead."""
    sign = by & 1
    step: np.ndarray = by >> 1
    step ^= np.negative(sign)
    step += old
    return step


GAP_WIDTHS = (1, 2, 4)
"""Bytes of a gap: the fewest that hold the largest one of a block."""


def gaps(at: np.ndarray) -> np.ndarray:
    """How many places lie before each of ``at`` (int64[N], in order, N > 0) and after the one before it."""
    found = np.diff(at, prepend=-1)
    found -= 1
    largest = int(found.max())
    return found.astype(np.uint8 if largest < 1 << 8 else "<u2" if largest < 1 << 16 else "<u4")


def planes(elements: np.ndarray) -> np.ndarray:
    """uint8[width * N] of N unsigned integers: their lowest bytes first."""
    width = elements.itemsize
    return np.ascontiguousarray(elements.view(np.uint8).reshape(-1, width).T).reshape(-1)


def from_planes(data: np.ndarray, width: int) -> np.ndarray:
    """The N unsigned integers whose ``planes`` these are."""
    count = len(data) // width
    found = np.empty((count, width), dtype=np.uint8)
    for place in range(width):
        found[:, place] = data[place * count : (place + 1) * count]
    return _elements(found.reshape(-1), width)


def _elements(data: np.ndarray, width: int) -> np.ndarray:
    return data.view(f"<u{width}")


def _record(kind: Kind, changed: int = 0, places: bytes = b"", values: bytes = b"") -> bytes:
    return b"".join((HEADER.pack(kind, changed, len(places), len(values)), places, values))
