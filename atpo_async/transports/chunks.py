"""Weights in chunks over the learner's ROUTER: an actor asks for one after another, a few requests ahead."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from atpo_async.core.errors import PeerLost, WeightsRejected
from atpo_async.transports.base import (
    OfferedVersion,
    Receiver,
    ReceiverContext,
    Sender,
    SenderContext,
    VersionWithdrawn,
    WantedVersion,
)
from atpo_async.wire.messages import Chunk, ChunkRequest, LearnerToActor, Refused, VersionGone, WeightsManifest

CHUNKS_IN_FLIGHT = 4
"""Enough to hide a round trip, few enough that heartbeats are never stuck behind megabytes."""


class ChunkTransport:
    """Works wherever an actor reaches the learner at all."""

    def sender(self, context: SenderContext) -> Sender:
        return _ChunkSender()

    def receiver(self, context: ReceiverContext) -> Receiver:
        return _ChunkReceiver(context)


def num_chunks(manifest: WeightsManifest) -> int:
    return -(-manifest.total_bytes // manifest.chunk_bytes)


def chunk_length(manifest: WeightsManifest, index: int) -> int:
    """Bytes; the last chunk may be shorter than the others."""
    return min(manifest.chunk_bytes, manifest.total_bytes - index * manifest.chunk_bytes)


class _ChunkSender(Sender):
    def offer(self, version: OfferedVersion) -> None:
        """Chunks are read from the version's file when they are asked for."""

    def answer(self, request: ChunkRequest, version: OfferedVersion) -> LearnerToActor:
        manifest = version.manifest
        count = num_chunks(manifest)
        if not 0 <= request.index < count:
            return Refused(
                reason=f"version {request.version} has chunks 0 to {count - 1} of {manifest.chunk_bytes} bytes, not "
                f"{request.index}"
            )
        data = version.payload.read(request.index * manifest.chunk_bytes, chunk_length(manifest, request.index))
        return Chunk(version=request.version, index=request.index, data=data)


class _ChunkReceiver(Receiver):
    def __init__(self, context: ReceiverContext) -> None:
        self._context = context

    async def fetch(self, wanted: WantedVersion, target: Path) -> None:
        """Raises PeerLost if not all chunks have arrived within ``weights.fetch_timeout_s``."""
        manifest, limit_s = wanted.manifest, self._context.settings.fetch_timeout_s
        count = num_chunks(manifest)
        credit = asyncio.Semaphore(CHUNKS_IN_FLIGHT)
        file = os.open(target, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        try:
            async with asyncio.timeout(limit_s), asyncio.TaskGroup() as pulls:
                for index in range(count):
                    name = f"chunk-{manifest.version}-{index}"
                    pulls.create_task(self._pull(manifest, index, file, credit), name=name)
        except TimeoutError:
            raise PeerLost(
                f"weights version {manifest.version}: not all of {count} chunks came within {limit_s} s "
                "(weights.fetch_timeout_s)"
            ) from None
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            os.close(file)

    async def _pull(self, manifest: WeightsManifest, index: int, file: int, credit: asyncio.Semaphore) -> None:
        request = ChunkRequest(run=self._context.run, version=manifest.version, index=index)
        async with credit:
            answer = await self._context.ask(request)
        label = f"version {manifest.version}: chunk {index}"
        if isinstance(answer, VersionGone):
            raise VersionWithdrawn(f"version {manifest.version} was replaced by {answer.newest}")
        if isinstance(answer, Refused):
            raise WeightsRejected(f"{label} is refused by the learner: {answer.reason}")
        length = chunk_length(manifest, index)
        if not isinstance(answer, Chunk) or answer.index != index or len(answer.data) != length:
            raise WeightsRejected(f"{label} came wrong or short")
        os.pwrite(file, answer.data.data, index * manifest.chunk_bytes)
