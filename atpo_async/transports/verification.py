"""Verifies what a transport has brought: every tensor's digest, once a host, before an engine sees a byte of it.

Actors on the learner's host link one and the same file.  The first of them hashes it under a lock, and leaves a note
beside the file; the others wait for the lock and find the note, which holds for this very file: its place on the disk,
its size, when it was last written, and the digest of the version.  The learner leaves no note: its digests are of what
it meant to write, and the first actor's are what proves that the file has it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from atpo_async.core.errors import WeightsRejected
from atpo_async.run.scratch import is_private
from atpo_async.wire.digests import file_digests, root_of
from atpo_async.wire.messages import WeightsManifest

NOTE, LOCK = ".verified", ".verifying"
"""Suffixes of what lies beside a version's file, which the learner removes with it."""

LOCK_S = 60.0
"""How long another actor may take to hash it: then this one does so too."""


class Note(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which file was found to be which version."""

    digest: str
    device: int
    inode: int
    size: int
    written_ns: int

    @classmethod
    def of(cls, manifest: WeightsManifest, path: Path) -> Note:
        """Raises OSError."""
        found = path.stat()
        return cls(
            digest=root_of(manifest.tensors, manifest.total_bytes), device=found.st_dev, inode=found.st_ino,
            size=found.st_size, written_ns=found.st_mtime_ns,
        )  # fmt: skip


def verify(manifest: WeightsManifest, path: Path, *, shared: Path | None = None, again: bool = False) -> bool:
    """Whether it was hashed here; False where another actor of this host had already found it to be right.

    Args:
        manifest: of the version.
        path: what was brought; removed if it is wrong.
        shared: the learner's own file; notes count only where ``path`` is a link to it.
        again: hash it whatever a note says: an engine has refused these weights.

    Raises:
        WeightsRejected: naming a tensor, if its bytes are not those of the manifest.
    """
    try:
        if shared is None or not is_private(shared.parent) or not _is_same(path, shared):
            check(manifest, path)
            return True
        return _verify_shared(manifest, path, shared, again=again)
    except WeightsRejected:
        path.unlink(missing_ok=True)
        raise


def _verify_shared(manifest: WeightsManifest, path: Path, shared: Path, *, again: bool) -> bool:
    note = shared.with_suffix(NOTE)
    with _lock(shared.with_suffix(LOCK)):
        if not again and read_note(note) == Note.of(manifest, path):
            return False
        before = Note.of(manifest, path)
        check(manifest, path)
        if Note.of(manifest, path) == before:
            write_note(note, before)
        return True


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one actor of this host; without it where none can be had, which costs no more than another hash."""
    lock = FileLock(path, timeout=LOCK_S, mode=0o600)
    with contextlib.suppress(Timeout, OSError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def read_note(note: Path) -> Note | None:
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode(note.read_bytes(), type=Note)
    return None


def write_note(note: Path, content: Note) -> None:
    """Whole or not at all."""
    aside = note.with_name(f".{note.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        aside.write_bytes(msgspec.json.encode(content))
        aside.replace(note)


def _is_same(path: Path, shared: Path) -> bool:
    try:
        return path.samefile(shared)
    except OSError:  # the learner has removed its own name of it meanwhile
        return False


def check(manifest: WeightsManifest, path: Path) -> None:
    """Hash every tensor of a version.  Raises WeightsRejected, naming a tensor, if its bytes are not those of the
    manifest."""
    label = f"version {manifest.version}"
    file = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(file).st_size
        if size != manifest.total_bytes:
            raise WeightsRejected(
                f"{label}: the payload has {size} bytes, the manifest says {manifest.total_bytes}; it was not applied"
            )
        # Tied tensors lie at one place, which is hashed once.
        places = list(dict.fromkeys((spec.offset, spec.nbytes) for spec in manifest.tensors))
        found = dict(zip(places, file_digests(file, places), strict=True))
    finally:
        os.close(file)
    wrong = [spec for spec in manifest.tensors if found[spec.offset, spec.nbytes] != spec.digest]
    if wrong:
        first = wrong[0]
        raise WeightsRejected(
            f"{label}: tensor {first.name} is not what the learner published: its digest is "
            f"{found[first.offset, first.nbytes]}, the manifest says {first.digest} ({len(wrong)} of "
            f"{len(manifest.tensors)} tensors differ); it was not applied"
        )
