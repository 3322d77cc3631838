"""Weights out: one file per version, a manifest with a probe, chunks for whoever asks, an announcement for all.

A version's payload is the raw concatenation of its tensors at 64-byte boundaries.  It lies in shared memory, where an
actor on the same host maps it; others pull it in chunks.  The newest version and the one before are kept, open: who
removes their files takes no version from anybody.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from atpo_async.config import WeightsConfig
from atpo_async.core.dtypes import PRECISION_BYTES
from atpo_async.core.errors import SetupError
from atpo_async.core.vocabulary import Precision
from atpo_async.models.causal_lm import torch_dtype
from atpo_async.run.host import host_id
from atpo_async.run.scratch import SHARED_MEMORY, Scratch, sweep, sweep_dead, weights_folder
from atpo_async.wire.messages import (
    ActorToLearner,
    AnnouncementRequest,
    Chunk,
    ChunkRequest,
    LearnerToActor,
    ManifestRequest,
    Refused,
    TensorSpec,
    VersionGone,
    WeightsAnnounced,
    WeightsManifest,
)

log = logging.getLogger("atpo.learner.publisher")

ALIGNMENT = 64
KEPT_VERSIONS = 2


def layout(tensors: Mapping[str, Tensor], precision: Precision) -> tuple[tuple[TensorSpec, ...], int]:
    """Where each floating tensor lies in the payload once it has the engine's precision, and the payload's size."""
    specs: list[TensorSpec] = []
    end = 0
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        nbytes = tensor.numel() * PRECISION_BYTES[precision]
        specs.append(TensorSpec(name=name, dtype=precision, shape=tuple(tensor.shape), offset=offset, nbytes=nbytes))
        end = offset + nbytes
    return tuple(specs), end


def raw_bytes(tensor: Tensor, precision: Precision) -> memoryview:
    """The tensor's bytes at ``precision``, little-endian, row-major."""
    flat = tensor.detach().to(device="cpu", dtype=torch_dtype(precision)).contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class _Payload:
    """An open file: its bytes stay as long as this does, whoever removes its name."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)

    def read(self, start: int, length: int) -> np.ndarray:
        """uint8[length]."""
        return np.frombuffer(os.pread(self._fd, length, start), dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class _Version:
    manifest: WeightsManifest
    path: Path
    payload: _Payload


class WeightsStore:
    """Versions on local storage.  Knows no sockets.

    Args:
        run: identity of the run.
        fallback: folder to use where there is no shared memory, or not enough.
        settings: chunk size, probe tolerance.
        precision: that the engine holds the weights in.
    """

    def __init__(self, *, run: str, fallback: Path, settings: WeightsConfig, precision: Precision) -> None:
        self._run = run
        self._settings = settings
        self._precision = precision
        self._fallback = fallback / "weights"
        self._memory = weights_folder(run, SHARED_MEMORY)
        self._scratch: Scratch | None = None
        """The folder in shared memory, from the first version on."""
        self._said = -1
        """The last version that was said not to fit there."""
        # Replaced as a whole, never changed: one thread adds versions while another answers requests.
        self._versions: Mapping[int, _Version] = {}
        # What an earlier process of this run left when it was killed, and those of runs that nobody goes on with.
        for folder in (self._memory, self._fallback):
            shutil.rmtree(folder, ignore_errors=True)
        if swept := sweep_dead(SHARED_MEMORY):
            log.info("removed what killed runs left in shared memory: %s", ", ".join(map(str, swept)))

    @property
    def newest(self) -> int | None:
        return max(self._versions, default=None)

    def add(
        self, version: int, tensors: Mapping[str, Tensor], *, probe_tokens: np.ndarray, probe_logprobs: np.ndarray
    ) -> WeightsAnnounced:
        """Write a version, drop all but the newest two, and return what to announce.

        Args:
            version: number of it.
            tensors: whole.
            probe_tokens: int32[S, T].
            probe_logprobs: float[S * (T - 1)].

        Raises:
            SetupError: it cannot be written.
        """
        specs, total = layout(tensors, self._precision)
        path, sha256 = self._write(version, specs, total, tensors)
        manifest = WeightsManifest(
            run=self._run,
            version=version,
            total_bytes=total,
            chunk_bytes=self._settings.chunk_bytes,
            sha256=sha256,
            tensors=specs,
            probe_token_ids=probe_tokens.astype(np.int32).reshape(-1),
            probe_logprobs=probe_logprobs.astype(np.float32),
            probe_tolerance=self._settings.probe_tolerance,
            probe_sequences=len(probe_tokens),
        )
        every = {**self._versions, version: _Version(manifest, path, _Payload(path))}
        kept = sorted(every)[-KEPT_VERSIONS:]
        self._versions = {number: every[number] for number in kept}
        for number, old in every.items():
            if number not in kept:
                # Who has it mapped keeps it: the name goes, the pages stay.
                old.path.unlink(missing_ok=True)
        return self.announcement(version)

    def announcement(self, version: int) -> WeightsAnnounced:
        kept = self._versions[version]
        return WeightsAnnounced(
            run=self._run,
            version=version,
            total_bytes=kept.manifest.total_bytes,
            sha256=kept.manifest.sha256,
            host_id=host_id(),
            shm_path=str(kept.path.resolve()) if self._settings.shared_memory else None,
        )

    def answer(self, request: ActorToLearner) -> LearnerToActor:
        """The reply to an actor's request."""
        newest = self.newest
        if request.run != self._run:
            return Refused(reason=f"this learner serves run {self._run!r}, not {request.run!r}")
        if newest is None:
            return Refused(reason=f"run {self._run!r} has not published any weights yet")
        if isinstance(request, AnnouncementRequest):
            return self.announcement(newest)
        kept = self._versions.get(request.version)
        if kept is None:
            return VersionGone(version=request.version, newest=newest)
        if isinstance(request, ManifestRequest):
            return kept.manifest
        return self._chunk(request, kept)

    def _chunk(self, request: ChunkRequest, kept: _Version) -> LearnerToActor:
        size, total = kept.manifest.chunk_bytes, kept.manifest.total_bytes
        count = -(-total // size)
        if not 0 <= request.index < count:
            return Refused(
                reason=f"version {request.version} has chunks 0 to {count - 1} of {size} bytes, not {request.index}"
            )
        start = request.index * size
        length = min(size, total - start)
        return Chunk(version=request.version, index=request.index, data=kept.payload.read(start, length))

    def _write(
        self, version: int, specs: tuple[TensorSpec, ...], total: int, tensors: Mapping[str, Tensor]
    ) -> tuple[Path, str]:
        """Where it is, and its hash: in shared memory, or in the run's folder where there is none, or not enough.

        Raises SetupError.
        """
        if SHARED_MEMORY.is_dir():
            try:
                return self._write_to(self._in_memory, version, specs, total, tensors)
            except OSError as exc:  # full, or not ours to write
                if version != self._said:
                    self._said = version
                    log.warning(
                        "version %d does not go into %s (%s); using %s", version, self._memory, exc, self._fallback
                    )
        try:
            return self._write_to(self._on_disk, version, specs, total, tensors)
        except OSError as exc:
            raise SetupError(
                f"weights of version {version} ({total} bytes) cannot be written to {self._fallback}: {exc}; free some "
                "space"
            ) from exc

    def _in_memory(self) -> Path:
        """The run's folder in shared memory, made anew if somebody has removed it.  Raises OSError."""
        if self._scratch is None or not self._scratch.exists:
            self._scratch = Scratch(self._memory.parent, self._memory.name, exactly=True)
        return self._memory

    def _on_disk(self) -> Path:
        self._fallback.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self._fallback

    def _write_to(
        self,
        where: Callable[[], Path],
        version: int,
        specs: tuple[TensorSpec, ...],
        total: int,
        tensors: Mapping[str, Tensor],
    ) -> tuple[Path, str]:
        """Raises OSError, with nothing left of the file."""
        for last_try in (False, True):
            folder = where()
            aside, path = folder / f".v{version}.writing", folder / f"v{version}.bin"
            try:
                sha256 = self._write_payload(aside, specs, total, tensors)
                aside.replace(path)
                return path, sha256
            except BaseException as exc:
                with contextlib.suppress(OSError):
                    aside.unlink(missing_ok=True)
                # Somebody has removed the folder under our hands: once more, in a new one.
                if last_try or not isinstance(exc, FileNotFoundError):
                    raise
        raise AssertionError("unreachable")

    def _write_payload(
        self, path: Path, specs: tuple[TensorSpec, ...], total: int, tensors: Mapping[str, Tensor]
    ) -> str:
        digest = hashlib.sha256()
        written = 0
        with path.open("wb") as file:
            for spec in specs:
                gap = bytes(spec.offset - written)
                data = raw_bytes(tensors[spec.name], self._precision)
                for part in (gap, data):
                    file.write(part)
                    digest.update(part)
                written = spec.offset + spec.nbytes
        if written != total:
            raise AssertionError(f"wrote {written} of {total} bytes")
        return digest.hexdigest()

    def close(self) -> None:
        """Remove every file.  Idempotent."""
        self._versions = {}
        if self._scratch is not None:
            self._scratch.remove()
        for folder in (self._memory, self._fallback):
            shutil.rmtree(folder, ignore_errors=True)
        # Actors that were killed while they took up a version left a link to it beside ours.
        for folder in (self._memory, self._fallback):
            sweep(folder.parent, f"{self._memory.name}.")
