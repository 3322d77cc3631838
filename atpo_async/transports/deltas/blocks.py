"""Where the blocks of a payload lie: every tensor is cut into pieces that one thread encodes or decodes at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from atpo_async.core.dtypes import PRECISION_BYTES
from atpo_async.wire.messages import TensorSpec

BLOCK_BYTES = 1 << 21
"""Stays in a core's own cache from the comparison to the last byte.  A part of the codec: both ends cut alike."""


class Block(NamedTuple):
    """A piece of one tensor."""

    offset: int
    """Of its first byte in the payload."""
    nbytes: int
    width: int
    """Bytes of one element."""


def blocks_of(tensors: Sequence[TensorSpec]) -> Iterator[Block]:
    """In the order of the payload.  Tied tensors lie at one place, which is cut once; what lies between tensors is
    padding, always zero, and belongs to no block."""
    places = {(spec.offset, spec.nbytes): PRECISION_BYTES[spec.dtype] for spec in tensors}
    for (offset, nbytes), width in sorted(places.items()):
        for begin in range(0, nbytes, BLOCK_BYTES):
            yield Block(offset + begin, min(BLOCK_BYTES, nbytes - begin), width)


def same_layout(one: Sequence[TensorSpec], other: Sequence[TensorSpec]) -> bool:
    """Whether the same tensors lie at the same places in two payloads, whatever their bytes are."""

    def place(spec: TensorSpec) -> tuple[object, ...]:
        return spec.name, spec.dtype, spec.shape, spec.offset, spec.nbytes

    return len(one) == len(other) and all(place(a) == place(b) for a, b in zip(one, other, strict=True))
