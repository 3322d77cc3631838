"""Differences between versions of a policy trained for real steps: how large they are, how fast made and put on."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from atpo_async.core.vocabulary import Precision
from atpo_async.run.scratch import SHARED_MEMORY
from atpo_async.transports.base import Payload
from atpo_async.transports.deltas.decoding import rebuild
from atpo_async.transports.deltas.encoding import encode
from atpo_async.transports.deltas.threads import NUM_THREADS
from atpo_async.wire.messages import TensorSpec
from benchmarks.learner_parts.sides import Times
from benchmarks.weights_parts.trained import PRECISIONS, Versions

COPIED_BYTES = 1 << 28
"""Of the copy's buffers: a whole version, piece by piece."""


class Pair:
    """A version and an older one, in shared memory where there is any.

    Args:
        folder: for their files.
        versions: where they come from.
        precision: of them.
        steps: between them.
    """

    def __init__(self, folder: Path, versions: Versions, precision: Precision, steps: int) -> None:
        self.folder = folder
        self.tensors: tuple[TensorSpec, ...] = versions.layout(precision)
        for name, number in (("base", 0), ("new", steps)):
            shutil.copyfile(versions.path(precision, number), folder / name)
        self.base, self.new = Payload(folder / "base"), Payload(folder / "new")
        self.total_bytes = self.new.size
        self.bytes = 0
        """Of the difference."""
        self._from = np.zeros(min(COPIED_BYTES, self.total_bytes), np.uint8)
        self._to = self._from.copy()

    def copied(self) -> Times:
        """As many bytes from memory to memory that is used again."""
        began, left = time.perf_counter(), self.total_bytes
        while left > 0:
            count = min(left, len(self._from))
            np.copyto(self._to[:count], self._from[:count])
            left -= count
        return {"s": time.perf_counter() - began}

    def encoded(self) -> Times:
        path = self.folder / "difference"
        with path.open("w+b") as file:
            began = time.perf_counter()
            self.bytes = encode(self.base, self.new, self.tensors, file, max_bytes=self.total_bytes).nbytes
            return {"s": time.perf_counter() - began}

    def decoded(self) -> Times:
        """Into a new file.  Raises AssertionError if it is not the new version."""
        if not self.bytes:
            self.encoded()
        target = self.folder / "rebuilt"
        began = time.perf_counter()
        rebuild(self.base, [Payload(self.folder / "difference")], self.tensors, self.total_bytes, target)
        took = time.perf_counter() - began
        if Payload(target).digest != self.new.digest:
            raise AssertionError("what was rebuilt is another version")
        target.unlink()
        return {"s": took}

    @property
    def sides(self) -> dict[str, Callable[[], Times]]:
        return {"copy": self.copied, "encode": self.encoded, "decode": self.decoded}

    @property
    def about(self) -> str:
        return (
            f"{self.bytes / 1e6:.1f} MB of {self.total_bytes / 1e6:.0f} MB: "
            f"{100 * self.bytes / self.total_bytes:.2f} %; {NUM_THREADS} threads"
        )


@contextmanager
def pair_of(versions: Versions, precision: Precision, steps: int) -> Iterator[Pair]:
    """In a folder that goes with the block."""
    parent = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="atpo-bench-", dir=parent) as folder:
        yield Pair(Path(folder), versions, precision, steps)


def cases(versions: Versions) -> Iterator[tuple[str, Any]]:
    """What is called how, and the pair as a context."""
    for precision in PRECISIONS:
        for steps in (1, 8):
            label = f"{precision}, {steps} step{'s' if steps > 1 else ''}"
            yield label, pair_of(versions, precision, steps)
