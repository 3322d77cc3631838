"""The difference between two whole payloads, written to a file block by block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
from blake3 import blake3

from atpo_async.core.errors import AtpoError
from atpo_async.transports.base import Payload
from atpo_async.transports.deltas.blocks import BLOCK_BYTES, Block, blocks_of
from atpo_async.transports.deltas.codec import BlockEncoder
from atpo_async.transports.deltas.threads import in_order
from atpo_async.wire.digests import TENSOR_DIGEST_BYTES
from atpo_async.wire.messages import TensorSpec


class EncodingStopped(AtpoError):
    """The role ends, or the difference is no longer worth its bytes."""


class Encoded(NamedTuple):
    """What has been written."""

    nbytes: int
    digest: str
    """BLAKE3, hex, as of ``Payload.digest``."""


def encode(
    base: Payload,
    new: Payload,
    tensors: Sequence[TensorSpec],
    file: BinaryIO,
    *,
    max_bytes: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Encoded:
    """Write the difference that leads from ``base`` to ``new``.

    Args:
        base, new: payloads of one layout.
        tensors: that layout.
        file: to write to.
        max_bytes: it is given up as soon as it is larger.
        should_stop: asked before each block.

    Raises:
        EncodingStopped: it grew too large, or had to stop.
        OSError: a payload cannot be read, or the file not be written.
    """
    local, digest, nbytes = threading.local(), blake3(), 0
    stopped = False

    def stop() -> bool:
        nonlocal stopped
        stopped = stopped or should_stop()
        return stopped

    def record(block: Block) -> bytes:
        if not hasattr(local, "encoder"):
            local.encoder, local.space = BlockEncoder(), np.empty((2, BLOCK_BYTES), dtype=np.uint8)
        old, now = local.space[:, : block.nbytes]
        base.read_into(block.offset, old)
        new.read_into(block.offset, now)
        found: bytes = local.encoder.encode(old, now, block.width)
        return found

    for data in in_order(record, blocks_of(tensors), should_stop=stop):
        nbytes += len(data)
        if nbytes > max_bytes:
            raise EncodingStopped(f"it is larger than {max_bytes} bytes")
        file.write(data)
        digest.update(data)
    if stopped:
        raise EncodingStopped("it had to stop")
    file.flush()
    return Encoded(nbytes, digest.hexdigest(length=TENSOR_DIGEST_BYTES))
