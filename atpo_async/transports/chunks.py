"""Weights in chunks over the learner's ROUTER: as differences to a version that the actor has, or whole."""

from __future__ import annotations

import os
from pathlib import Path

from atpo_async.core.errors import WeightsRejected
from atpo_async.run.host import host_id
from atpo_async.transports.base import (
    OfferedVersion,
    Receiver,
    ReceiverContext,
    Sender,
    SenderContext,
    WantedVersion,
)
from atpo_async.transports.deltas.rebuilding import Rebuilding
from atpo_async.transports.pulling import ChunkRefused, Pulled, chunk_length, num_chunks, pull
from atpo_async.wire.messages import Chunk, ChunkRequest, LearnerToActor, Refused


class ChunkTransport:
    """Works wherever an actor reaches the learner at all.

    Args:
        rarely: another transport brings most versions: only those that came in chunks are kept for differences.
    """

    def __init__(self, *, rarely: bool = False) -> None:
        self._rarely = rarely

    def sender(self, context: SenderContext) -> Sender:
        return _ChunkSender()

    def receiver(self, context: ReceiverContext) -> Receiver:
        return _ChunkReceiver(context, rarely=self._rarely)


class _ChunkSender(Sender):
    """Of whole payloads; the store answers for differences (``learner.weights.differences``)."""

    def offer(self, version: OfferedVersion) -> None:
        """Chunks are read from the version's file when they are asked for."""

    def answer(self, request: ChunkRequest, version: OfferedVersion) -> LearnerToActor:
        size, chunk_bytes = version.manifest.total_bytes, version.manifest.chunk_bytes
        count = num_chunks(size, chunk_bytes)
        if not 0 <= request.index < count:
            return Refused(
                reason=f"version {request.version} has chunks 0 to {count - 1} of {chunk_bytes} bytes, not "
                f"{request.index}"
            )
        data = version.payload.read(request.index * chunk_bytes, chunk_length(size, chunk_bytes, request.index))
        return Chunk(version=request.version, index=request.index, data=data)


class _ChunkReceiver(Receiver):
    def __init__(self, context: ReceiverContext, *, rarely: bool) -> None:
        self._context = context
        self._shares = context.settings.shared_memory and not rarely
        self._rebuilding = Rebuilding(context)
        self._brought = -1
        """The version that came this way last."""

    async def fetch(self, wanted: WantedVersion, target: Path) -> None:
        """Raises PeerLost if not all chunks have arrived within ``weights.fetch_timeout_s``."""
        if not await self._rebuilding.fetch(wanted, target):
            await self._whole(wanted, target)
        self._brought = wanted.manifest.version

    async def _whole(self, wanted: WantedVersion, target: Path) -> None:
        manifest = wanted.manifest
        file = os.open(target, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        try:
            await pull(self._context, [Pulled(manifest.version, -1, manifest.total_bytes, manifest.chunk_bytes, file)])
        except ChunkRefused as exc:
            raise WeightsRejected(str(exc)) from exc
        finally:
            os.close(file)

    @property
    def base(self) -> int:
        return self._rebuilding.base

    def verified(self, wanted: WantedVersion, path: Path) -> None:
        """Keeps it for differences: where it came this way, and where it came over the network at all and actors of a
        host share it, for then it lies in this host's memory anyway, and another actor fetches next time."""
        announced = wanted.announced
        is_learners = announced.host_id == host_id() and announced.shm_path is not None
        if self._brought == wanted.manifest.version or (self._shares and not is_learners):
            self._rebuilding.keep(wanted, path)
        else:
            self._rebuilding.drop()

    def refused(self, wanted: WantedVersion) -> bool:
        return self._rebuilding.refused(wanted)

    @property
    def counters(self) -> dict[str, float]:
        return self._rebuilding.counters

    def close(self) -> None:
        self._rebuilding.drop()
