"""Batches whose update was skipped, on disk: the newest of each rank, in the form in which the wire carries them."""

from __future__ import annotations

import struct
from pathlib import Path

from atpo_async.run.files import write_atomic
from atpo_async.wire import codec
from atpo_async.wire.messages import Batch, BufferToLearner

KEPT_BATCHES = 5
"""Batches of skipped updates that stay on disk for each rank; the older ones are removed."""


def keep_skipped(folder: Path, batch: Batch, *, step: int, rank: int) -> None:
    """Write a batch whose update was skipped, and remove all but the newest of this rank."""
    folder.mkdir(exist_ok=True)
    save_batch(folder / f"step-{step:06d}-rank-{rank}.batch", batch)
    for old in sorted(folder.glob(f"step-*-rank-{rank}.batch"))[:-KEPT_BATCHES]:
        old.unlink()


def save_batch(path: Path, batch: Batch) -> None:
    """Write a batch as the wire carries it: length and bytes of each frame."""
    frames = [bytes(frame) for frame in codec.encode(batch)]
    write_atomic(path, b"".join(struct.pack("<Q", len(frame)) + frame for frame in frames))


def load_batch(path: Path) -> Batch:
    """Read what ``save_batch`` wrote.  Raises BadMessage if it is none."""
    data, frames, at = path.read_bytes(), [], 0
    while at + 8 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        frames.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    batch: Batch = codec.decode(frames, BufferToLearner)
    return batch
