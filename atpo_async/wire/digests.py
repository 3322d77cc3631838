"""Digests of a version of the weights: one of each tensor's bytes, and one of the layout, which binds them.

BLAKE3 hashes as fast as memory is read, on several cores or one, so that a digest by tensor costs no time that a copy
of the bytes would not; and it cannot be forged, so that a transport may bring the bytes from a place that neither the
learner nor the actor controls.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
from blake3 import blake3

from atpo_async.wire.messages import TensorSpec

TENSOR_DIGEST_BYTES = 16
"""So that a manifest of thousands of tensors stays small: two tensors of one digest are not found by trying."""

NUM_THREADS = min(4, os.cpu_count() or 1)
"""That hash at once.  Four read as fast as most memory; the other cores belong to training and to the engine."""

READ_BYTES = 1 << 20
"""Read from a file at a time: stays in a core's own cache until it is hashed."""


def digest_of(data: memoryview | bytes) -> str:
    """Of one tensor's bytes, hex."""
    return str(blake3(data).hexdigest(length=TENSOR_DIGEST_BYTES))


def digests_of(parts: Sequence[memoryview | bytes]) -> list[str]:
    """Of each part, hex; several threads hash at once, and none of them holds Python's lock."""
    return _side_by_side(lambda index: digest_of(parts[index]), [memoryview(part).nbytes for part in parts])


def file_digests(file: int, places: Sequence[tuple[int, int]]) -> list[str]:
    """Of each (offset, length) in an open file, hex, hashed as ``digests_of`` does.

    Read rather than mapped: a file that is cut short meanwhile, or lies on a failing disk, is an OSError and no signal
    that ends the process.
    """

    def of_place(index: int) -> str:
        (at, left), hasher = places[index], blake3()
        buffer = memoryview(bytearray(min(READ_BYTES, max(1, left))))
        while left > 0:
            count = os.preadv(file, [buffer[: min(len(buffer), left)]], at)
            if count == 0:
                raise OSError(f"the file ends at {at}, {left} bytes early")
            hasher.update(buffer[:count])
            at, left = at + count, left - count
        return str(hasher.hexdigest(length=TENSOR_DIGEST_BYTES))

    return _side_by_side(of_place, [length for _, length in places])


def root_of(tensors: Iterable[TensorSpec], total_bytes: int) -> str:
    """Of a version as a whole, hex: over where each tensor lies, what it is, and its own digest."""
    said = [(s.name, s.dtype, s.shape, s.offset, s.nbytes, s.digest) for s in tensors]
    return str(blake3(msgspec.msgpack.encode((total_bytes, said))).hexdigest())


def _side_by_side(digest: Callable[[int], str], sizes: Sequence[int]) -> list[str]:
    """``digest`` of every index, the largest first, so that no thread ends long after the others."""
    found = [""] * len(sizes)
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="digest") as pool:
        for index, value in zip(order, pool.map(digest, order), strict=True):
            found[index] = value
    return found
