"""A whole payload from an older one and the differences between them, written to a file block by block."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from atpo_async.core.errors import AtpoError
from atpo_async.transports.base import Payload
from atpo_async.transports.deltas.blocks import BLOCK_BYTES, Block, blocks_of
from atpo_async.transports.deltas.codec import HEADER, BadDifference, BlockDecoder, Head, head_of
from atpo_async.transports.deltas.threads import in_order
from atpo_async.wire.messages import TensorSpec


class RebuildingStopped(AtpoError):
    """The role ends."""


class Record(NamedTuple):
    """Where a record of a difference lies."""

    head: Head
    at: int
    """Of its body, in the difference."""


def rebuild(
    base: Payload,
    differences: Sequence[Payload],
    tensors: Sequence[TensorSpec],
    total_bytes: int,
    target: Path,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Write the payload that the differences lead to, one after another, from ``base``.

    Args:
        base: of the same layout.
        differences: in the order in which they are put on the base.
        tensors: the layout.
        total_bytes: of the payload.
        target: file to write; its digests are checked afterwards, as of one that came whole.
        should_stop: asked before each block.

    Raises:
        BadDifference: one is damaged, or is none of this layout.
        RebuildingStopped: it had to stop.
        OSError: the target cannot be written.
    """
    if base.size != total_bytes:
        raise BadDifference(f"its base has {base.size} bytes, the version {total_bytes}")
    blocks = list(blocks_of(tensors))
    records = [records_of(difference, blocks) for difference in differences]
    local = threading.local()
    file = os.open(target, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    try:
        os.ftruncate(file, total_bytes)  # what lies between tensors is zero

        def write(index: int) -> None:
            if not hasattr(local, "decoder"):
                local.decoder, local.space = BlockDecoder(), np.empty(BLOCK_BYTES, dtype=np.uint8)
            block = blocks[index]
            data = local.space[: block.nbytes]
            _read(base, block.offset, data)
            for difference, found in zip(differences, records, strict=True):
                _apply(local.decoder, difference, found[index], data, block.width)
            _write(file, block.offset, data)

        written = sum(1 for _ in in_order(write, range(len(blocks)), should_stop=should_stop))
    finally:
        os.close(file)
    if written < len(blocks):
        raise RebuildingStopped(f"{written} of {len(blocks)} blocks were rebuilt")


def records_of(difference: Payload, blocks: Sequence[Block]) -> list[Record]:
    """Where each block's record lies.  Raises BadDifference unless there is one of each, and nothing else."""
    found, at, end = [], 0, difference.size
    for block in blocks:
        head = head_of(difference.read(at, HEADER.size).tobytes(), block.nbytes)
        found.append(Record(head, at + HEADER.size))
        at += HEADER.size + head.body_bytes
        if at > end:
            raise BadDifference(f"it has {end} bytes, and a block that ends at {at}")
    if at != end:
        raise BadDifference(f"it has {end} bytes, {at} of them for the {len(blocks)} blocks of the version")
    return found


def _apply(decoder: BlockDecoder, difference: Payload, record: Record, data: np.ndarray, width: int) -> None:
    body = difference.read(record.at, record.head.body_bytes)
    if len(body) != record.head.body_bytes:
        raise BadDifference("it was cut short while it was read")
    decoder.decode(record.head, body.data, data, width)


def _read(base: Payload, offset: int, data: np.ndarray) -> None:
    """Raises BadDifference where the base cannot be read: another copy of the version is to be had."""
    try:
        base.read_into(offset, data)
    except OSError as exc:
        raise BadDifference(f"its base cannot be read: {exc}") from exc


def _write(file: int, offset: int, data: np.ndarray) -> None:
    view = data.data
    while len(view):
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count
