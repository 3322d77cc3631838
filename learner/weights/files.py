"""The file of a version: raw tensors at 64-byte boundaries, in shared memory or, where that is full, on the disk."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from atpo_async.core.dtypes import PRECISION_BYTES
from atpo_async.core.errors import SetupError
from atpo_async.core.vocabulary import Precision
from atpo_async.models.causal_lm import torch_dtype
from atpo_async.run.scratch import SHARED_MEMORY, Scratch, sweep, sweep_dead, weights_folder
from atpo_async.wire.digests import digest_of
from atpo_async.wire.messages import TensorSpec

log = logging.getLogger("atpo.learner.publisher")

ALIGNMENT = 64


class WrittenFile(NamedTuple):
    """A version's whole payload, and where each tensor lies in it, with its digest."""

    path: Path
    total_bytes: int
    tensors: tuple[TensorSpec, ...]


def layout(tensors: Mapping[str, Tensor], precision: Precision) -> tuple[tuple[TensorSpec, ...], int]:
    """Where each floating tensor lies in the payload once it has the engine's precision, still without its digest, and
    the payload's size.  Tied tensors, which are one in memory, are one in the payload."""
    specs: list[TensorSpec] = []
    places: dict[object, int] = {}
    end = 0
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        nbytes = tensor.numel() * PRECISION_BYTES[precision]
        held = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        # Of one that has no memory of its own to be told by (empty, or on no device) nothing is known.
        offset = places.get(held) if tensor.data_ptr() else None
        if offset is None:
            offset = places[held] = -(-end // ALIGNMENT) * ALIGNMENT
            end = offset + nbytes
        specs.append(
            TensorSpec(name=name, dtype=precision, shape=tuple(tensor.shape), offset=offset, nbytes=nbytes, digest="")
        )
    return tuple(specs), end


def raw_bytes(tensor: Tensor, precision: Precision) -> memoryview:
    """The tensor's bytes at ``precision``, little-endian, row-major."""
    flat = tensor.detach().to(device="cpu", dtype=torch_dtype(precision)).contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class VersionFiles:
    """The folders of one run's versions, and what is written there.

    Args:
        run: identity of the run.
        fallback: folder to use where there is no shared memory, or not enough.
        precision: that the engine holds the weights in.
    """

    def __init__(self, *, run: str, fallback: Path, precision: Precision) -> None:
        self._precision = precision
        self._fallback = fallback / "weights"
        self._memory = weights_folder(run, SHARED_MEMORY)
        self._scratch: Scratch | None = None
        """The folder in shared memory, from the first version on."""
        self._warned_of = -1
        """The last version that a log line reported as too large for it."""
        # Folders left by a killed process of this run, and by runs that no process continues.
        for folder in (self._memory, self._fallback):
            shutil.rmtree(folder, ignore_errors=True)
        if swept := sweep_dead(SHARED_MEMORY):
            log.info("removed what killed runs left in shared memory: %s", ", ".join(map(str, swept)))

    def write(self, version: int, tensors: Mapping[str, Tensor]) -> WrittenFile:
        """In shared memory, or in the run's folder where there is none, or not enough.  Raises SetupError."""
        if SHARED_MEMORY.is_dir():
            try:
                return self._write_to(self._in_memory, version, tensors)
            except OSError as exc:  # full, or not ours to write
                if version != self._warned_of:
                    self._warned_of = version
                    log.warning(
                        "version %d does not go into %s (%s); using %s", version, self._memory, exc, self._fallback
                    )
        try:
            return self._write_to(self._on_disk, version, tensors)
        except OSError as exc:
            total = layout(tensors, self._precision)[1]
            raise SetupError(
                f"weights of version {version} ({total} bytes) cannot be written to {self._fallback}: {exc}; free some "
                "space"
            ) from exc

    def close(self) -> None:
        """Remove every file.  Idempotent."""
        if self._scratch is not None:
            self._scratch.remove()
        for folder in (self._memory, self._fallback):
            shutil.rmtree(folder, ignore_errors=True)
        # Actors that were killed while they took up a version left a link to it beside ours.
        for folder in (self._memory, self._fallback):
            sweep(folder.parent, f"{self._memory.name}.")

    def _in_memory(self) -> Path:
        """The run's folder in shared memory, made anew if it has been removed.  Raises OSError."""
        if self._scratch is None or not self._scratch.exists:
            self._scratch = Scratch(self._memory.parent, self._memory.name, exactly=True)
        return self._memory

    def _on_disk(self) -> Path:
        self._fallback.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self._fallback

    def _write_to(self, where: Callable[[], Path], version: int, tensors: Mapping[str, Tensor]) -> WrittenFile:
        """Raises OSError, with nothing left of the file."""
        for last_try in (False, True):
            folder = where()
            aside, path = folder / f".v{version}.writing", folder / f"v{version}.bin"
            try:
                written = self._write_payload(aside, tensors)
                aside.replace(path)
                return written._replace(path=path)
            except BaseException as exc:
                with contextlib.suppress(OSError):
                    aside.unlink(missing_ok=True)
                # The folder was removed while it was written to: once more, in a new one.
                if last_try or not isinstance(exc, FileNotFoundError):
                    raise
        raise AssertionError("unreachable")

    def _write_payload(self, path: Path, tensors: Mapping[str, Tensor]) -> WrittenFile:
        specs, total = layout(tensors, self._precision)
        digests: dict[tuple[int, int], str] = {}
        end = 0
        with path.open("wb") as file:
            for spec in specs:
                if (spec.offset, spec.nbytes) in digests:  # tied to one that is written
                    continue
                data = raw_bytes(tensors[spec.name], self._precision)
                file.write(bytes(spec.offset - end))
                file.write(data)
                digests[spec.offset, spec.nbytes] = digest_of(data)
                end = spec.offset + spec.nbytes
        if end != total:
            raise AssertionError(f"wrote {end} of {total} bytes")
        hashed = tuple(msgspec.structs.replace(spec, digest=digests[spec.offset, spec.nbytes]) for spec in specs)
        return WrittenFile(path=path, total_bytes=total, tensors=hashed)
