"""The file of a version: raw tensors at 64-byte boundaries, in shared memory or, where that is full, on the disk."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from atpo_async.core.errors import SetupError
from atpo_async.run.scratch import SHARED_MEMORY, Scratch, sweep, sweep_dead, weights_folder
from atpo_async.wire.digests import NUM_THREADS, digest_of
from atpo_async.wire.messages import TensorSpec
from learner.weights.staging import Staged

log = logging.getLogger("atpo.learner.publisher")


class WrittenFile(NamedTuple):
    """A version's whole payload, and where each tensor lies in it, with its digest."""

    path: Path
    total_bytes: int
    tensors: tuple[TensorSpec, ...]


class VersionFiles:
    """The folders of one run's versions, and what is written there.

    Args:
        run: identity of the run.
        fallback: folder to use where there is no shared memory, or not enough.
    """

    def __init__(self, *, run: str, fallback: Path) -> None:
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

    def write(self, version: int, staged: Staged) -> WrittenFile:
        """In shared memory, or in the run's folder where there is none, or not enough.  Raises SetupError."""
        if SHARED_MEMORY.is_dir():
            try:
                return self._write_to(self._in_memory, version, staged)
            except OSError as exc:  # full, or not ours to write
                if version != self._warned_of:
                    self._warned_of = version
                    log.warning(
                        "version %d does not go into %s (%s); using %s", version, self._memory, exc, self._fallback
                    )
        try:
            return self._write_to(self._on_disk, version, staged)
        except OSError as exc:
            raise SetupError(
                f"weights of version {version} ({staged.total_bytes} bytes) cannot be written to {self._fallback}: "
                f"{exc}; free some space"
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

    def _write_to(self, where: Callable[[], Path], version: int, staged: Staged) -> WrittenFile:
        """Raises OSError, with nothing left of the file."""
        for last_try in (False, True):
            folder = where()
            aside, path = folder / f".v{version}.writing", folder / f"v{version}.bin"
            try:
                written = self._write_payload(aside, staged)
                aside.replace(path)
                return written._replace(path=path)
            except BaseException as exc:
                with contextlib.suppress(OSError):
                    aside.unlink(missing_ok=True)
                # The folder was removed while it was written to: once more, in a new one.
                if last_try or not isinstance(exc, FileNotFoundError):
                    raise
        raise AssertionError("unreachable")

    def _write_payload(self, path: Path, staged: Staged) -> WrittenFile:
        digests: dict[tuple[int, int], Future[str]] = {}
        end = 0
        # Hashing needs no lock of Python's and is faster than writing: it costs no time of its own.
        with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="digest") as aside, path.open("wb") as file:
            for spec, data in staged.parts():
                digests[spec.offset, spec.nbytes] = aside.submit(digest_of, data)
                write_part(file, spec.offset - end, data)
                end = spec.offset + spec.nbytes
            # Nothing changes it any more, and no process that maps it can.
            os.fchmod(file.fileno(), 0o400)
        if end != staged.total_bytes:
            raise AssertionError(f"wrote {end} of {staged.total_bytes} bytes")
        hashed = tuple(
            msgspec.structs.replace(spec, digest=digests[spec.offset, spec.nbytes].result()) for spec in staged.specs
        )
        return WrittenFile(path=path, total_bytes=end, tensors=hashed)


def free_beside(path: Path) -> int:
    """Bytes that are free where a file lies; 0 where its folder is gone."""
    try:
        return shutil.disk_usage(path.parent).free
    except OSError:
        return 0


def remove(path: Path) -> None:
    """A version's file, and what actors of this host have noted beside it."""
    path.unlink(missing_ok=True)
    for note in path.parent.glob(f"{path.stem}.*"):
        note.unlink(missing_ok=True)


def write_part(file: BinaryIO, gap: int, data: memoryview) -> None:
    """``gap`` zeros and then ``data``.  Raises OSError."""
    file.write(bytes(gap))
    file.write(data)
