"""Pulls payloads and differences from the learner's weights port: one chunk after another, a few requests ahead."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Sequence
from typing import NamedTuple

from atpo_async.core.dtypes import PRECISION_BYTES
from atpo_async.core.errors import AtpoError, PeerLost, WeightsRejected
from atpo_async.transports.base import ReceiverContext, VersionWithdrawn
from atpo_async.wire.messages import (
    Chunk,
    ChunkRequest,
    ManifestRequest,
    Refused,
    VersionGone,
    WeightsManifest,
)

CHUNKS_IN_FLIGHT = 4
"""Enough to hide a round trip, few enough that heartbeats are never stuck behind megabytes."""

PENDING_PAUSE_S = 0.05
"""Between two requests for a manifest whose differences are still being made."""


class ChunkRefused(AtpoError):
    """The learner does not serve what was asked for, or what came is no part of it."""


class Pulled(NamedTuple):
    """What is asked for, and where it goes."""

    version: int
    base: int
    """-1 for the payload, else of the difference from there."""
    nbytes: int
    chunk_bytes: int
    file: int
    """Open for writing."""

    @property
    def chunks(self) -> int:
        """How many."""
        return num_chunks(self.nbytes, self.chunk_bytes)

    def __str__(self) -> str:
        return f"version {self.version}" + (f" as a difference to {self.base}" if self.base >= 0 else "")


def num_chunks(nbytes: int, chunk_bytes: int) -> int:
    return -(-nbytes // chunk_bytes)


def chunk_length(nbytes: int, chunk_bytes: int, index: int) -> int:
    """Bytes; the last chunk may be shorter than the others."""
    return min(chunk_bytes, nbytes - index * chunk_bytes)


async def pull(context: ReceiverContext, wanted: Sequence[Pulled]) -> None:
    """Bring all of it.

    Raises:
        ChunkRefused: see there.
        VersionWithdrawn: the learner no longer has a version.
        PeerLost: it has not all arrived within ``weights.fetch_timeout_s``.
        OSError: a file takes no more.
    """
    limit_s = context.settings.fetch_timeout_s
    parts = ((each, index) for each in wanted for index in range(each.chunks))

    async def pull_on() -> None:
        for each, index in parts:
            await _pull(context, each, index)

    try:
        async with asyncio.timeout(limit_s), asyncio.TaskGroup() as pulls:
            # Not a task for each chunk: how many there are is what a peer says.
            for number in range(CHUNKS_IN_FLIGHT):
                pulls.create_task(pull_on(), name=f"chunks-{wanted[-1].version}-{number}" if wanted else "chunks")
    except TimeoutError:
        count = sum(each.chunks for each in wanted)
        raise PeerLost(
            f"weights {wanted[-1]}: not all of {count} chunks came within {limit_s} s (weights.fetch_timeout_s)"
        ) from None
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def _pull(context: ReceiverContext, wanted: Pulled, index: int) -> None:
    request = ChunkRequest(run=context.run, version=wanted.version, index=index, base=wanted.base)
    answer = await context.ask(request)
    label = f"{wanted}: chunk {index}"
    if isinstance(answer, VersionGone):
        raise VersionWithdrawn(f"{wanted} was replaced by {answer.newest}")
    if isinstance(answer, Refused):
        raise ChunkRefused(f"{label} is refused by the learner: {answer.reason}")
    length = chunk_length(wanted.nbytes, wanted.chunk_bytes, index)
    if (
        not isinstance(answer, Chunk)
        or (answer.version, answer.index, answer.base) != (wanted.version, index, wanted.base)
        or len(answer.data) != length
    ):
        raise ChunkRefused(f"{label} came wrong or short")
    os.pwrite(wanted.file, answer.data.data, index * wanted.chunk_bytes)


async def manifest_of(context: ReceiverContext, version: int, *, base: int) -> WeightsManifest | None:
    """The manifest of a version, with the differences that lead to it from ``base``; None if a newer one has replaced
    it.

    Waits for: those differences.  Unblocked by: the learner having made them, or giving up.

    Raises:
        WeightsRejected: the answer is none.
        PeerLost: the learner did not answer in time.
    """
    request = ManifestRequest(run=context.run, version=version, base=base)
    answer, asked = await context.ask(request), time.monotonic()
    while isinstance(answer, WeightsManifest) and answer.differences_pending:
        if time.monotonic() - asked > context.settings.fetch_timeout_s:
            break  # what there is of them does not lead here: it comes whole
        # A learner holds the request while it makes them: this is the least pause between two.
        await asyncio.sleep(PENDING_PAUSE_S)
        answer = await context.ask(request)
    if isinstance(answer, VersionGone):
        return None
    if not isinstance(answer, WeightsManifest) or answer.version != version or answer.run != context.run:
        raise WeightsRejected(f"version {version}: the learner answered {type(answer).__name__}, not its manifest")
    _require_sound(answer)
    return answer


def _require_sound(manifest: WeightsManifest) -> None:
    """Raises WeightsRejected where a payload cannot be as the manifest says, whatever its bytes are."""
    label, total = f"version {manifest.version}", manifest.total_bytes
    if manifest.chunk_bytes == 0:
        raise WeightsRejected(f"{label}: its manifest has chunks of 0 bytes")
    for spec in manifest.tensors:
        if spec.offset + spec.nbytes > total or spec.nbytes != math.prod(spec.shape) * PRECISION_BYTES[spec.dtype]:
            raise WeightsRejected(
                f"{label}: tensor {spec.name}, {spec.dtype} of shape {list(spec.shape)}, cannot have {spec.nbytes} "
                f"bytes at {spec.offset} of {total}"
            )
