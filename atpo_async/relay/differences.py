"""The differences that a relay has fetched for itself, kept for the actors that join through it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec

from atpo_async.transports.base import Payload
from atpo_async.transports.deltas.chains import steps_back
from atpo_async.transports.pulling import chunk_length, num_chunks
from atpo_async.wire.messages import Chunk, ChunkRequest, Difference, LearnerToActor, Refused, WeightsManifest

Step = tuple[int, int]
"""The version that a difference leads to, and the one that it is put on."""


class _Parts:
    """What has come of one difference."""

    def __init__(self, difference: Difference, chunk_bytes: int, folder: Path) -> None:
        self.difference = difference
        self.chunk_bytes = chunk_bytes
        self._indices: set[int] = set()
        # Without a name: nothing is left of it, however this process ends.
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed by close)
        self.payload = Payload(self._file.fileno())

    def add(self, index: int, data: bytes | memoryview) -> None:
        """Raises OSError."""
        self._file.seek(index * self.chunk_bytes)
        self._file.write(data)
        self._file.flush()
        self._indices.add(index)

    def is_right(self) -> bool:
        """Whether all of it has come, as the manifest has it.  Reads it.  Raises OSError."""
        if len(self._indices) < num_chunks(self.difference.nbytes, self.chunk_bytes):
            return False
        return self.payload.digest == self.difference.digest

    def close(self) -> None:
        self._file.close()


class KeptDifferences:
    """Differences, of which only those are served that have come whole and have their digest."""

    def __init__(self) -> None:
        self._coming: dict[Step, _Parts] = {}
        self._kept: dict[Step, _Parts] = {}

    @property
    def nbytes(self) -> int:
        """Of those that are served."""
        return sum(parts.difference.nbytes for parts in self._kept.values())

    def expect(self, manifest: WeightsManifest, folder: Path, *, most: int) -> None:
        """The differences that this manifest names may be fetched now, the last ``most`` of them.  Raises OSError."""
        for parts in self._coming.values():
            parts.close()
        self._coming = {}
        for each in steps_back(manifest.version, manifest.differences)[-most:] if most else ():
            if not self._has(each):
                self._coming[each.version, each.base] = _Parts(each, manifest.chunk_bytes, folder)

    def note(self, chunk: Chunk) -> None:
        """A part of one has come.  Raises OSError."""
        parts = self._coming.get((chunk.version, chunk.base))
        if parts is not None and chunk.index < num_chunks(parts.difference.nbytes, parts.chunk_bytes):
            parts.add(chunk.index, chunk.data.data)

    def keep(self, manifest: WeightsManifest) -> None:
        """The version of this manifest has been verified: keep what leads to it, and nothing else.

        Reads files.  Raises OSError.
        """
        right = {step: parts for step, parts in self._coming.items() if parts.is_right()}
        for step, parts in self._coming.items():
            if step not in right:
                parts.close()
        self._coming = {}
        found = [*self._kept.values(), *right.values()]
        self._kept = {}
        for parts in found:
            # As a whole: a learner that fell back makes others between versions of the same numbers.
            if parts.difference in manifest.differences:
                self._kept[parts.difference.version, parts.difference.base] = parts
            else:
                parts.close()

    def describe(self, manifest: WeightsManifest, base: int) -> WeightsManifest:
        """The manifest with what leads to its version from ``base`` on; -1: with nothing."""
        known = [parts.difference for parts in self._kept.values()] if base >= 0 else []
        return msgspec.structs.replace(
            manifest, differences=steps_back(manifest.version, known), differences_pending=False
        )

    def answer(self, request: ChunkRequest) -> LearnerToActor:
        """The reply to an actor that asks for a part of a difference."""
        parts = self._kept.get((request.version, request.base))
        if parts is None:
            return Refused(reason=f"this relay has no difference from version {request.base} to {request.version}")
        size = parts.difference.nbytes
        if request.index >= num_chunks(size, parts.chunk_bytes):
            return Refused(reason=f"that difference has {size} bytes: chunk {request.index} is none of it")
        start = request.index * parts.chunk_bytes
        data = parts.payload.read(start, chunk_length(size, parts.chunk_bytes, request.index))
        return Chunk(version=request.version, base=request.base, index=request.index, data=data)

    def _has(self, difference: Difference) -> bool:
        kept = self._kept.get((difference.version, difference.base))
        return kept is not None and kept.difference == difference

    def close(self) -> None:
        """Drop all of them.  Idempotent."""
        for parts in (*self._coming.values(), *self._kept.values()):
            parts.close()
        self._coming, self._kept = {}, {}
