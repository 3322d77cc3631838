"""Shares one verified copy of a version among the processes of a host that get it over the network.

The first process that wants a version locks it, fetches it into a file of the run's common folder on this host, checks
its digests, and puts it under its name there with a note (``transports.verification``).  The others wait meanwhile and
then make hard links to it.  A process that dies while it fetches loses the lock, and the next one takes over.  One that
stands still, without a sign of progress for ``stall_s``, keeps its lock: the next one takes another lock of the same
version and fetches into a file of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from atpo_async.core.errors import WeightsRejected
from atpo_async.run import locks
from atpo_async.run.scratch import CommonScratch, weights_folder
from atpo_async.transports.verification import NOTE, Note, check, read_note, write_note
from atpo_async.wire.digests import root_of
from atpo_async.wire.messages import WeightsManifest

if TYPE_CHECKING:
    from filelock import BaseFileLock

log = logging.getLogger("atpo.weights")

_LOOK_EVERY_S = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Between two looks at a process that fetches; the last one over and over."""
_SIGN_EVERY_S = 0.5
_WHOLE, _PART, _LOCK = ".bin", ".part", ".lock"
_OURS = (_WHOLE, _PART, _LOCK, NOTE)

Fetch = Callable[[Path], Awaitable[None]]


class HostCopies:
    """One process's use of the common copies of a run on this host.

    Args:
        run: identity of the run.
        stall_s: a process that fetches is passed over once it has shown no progress for so long.
        clock: seconds, monotonic.
    """

    def __init__(self, run: str, *, stall_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.fetched = 0
        """Versions that this process fetched for the host."""
        self.shared = 0
        """Versions that it took of another process of the host."""
        self.check_s = 0.0
        """How long it hashed the last one; 0 where another process had."""
        self._run, self._stall_s, self._clock = run, stall_s, clock
        self._folder: CommonScratch | None = None
        self._held: Path | None = None
        """The lock of what is being fetched here."""
        self._signed_at = 0.0
        self._alone = False
        """The common folder cannot be used; said once."""

    async def bring(
        self,
        manifest: WeightsManifest,
        target: Path,
        fetch: Fetch,
        *,
        again: bool = False,
        refused: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Make a link at ``target`` to a verified copy of the version.

        Args:
            manifest: of the version.
            target: in this process's own folder; nothing lies there.
            fetch: brings the bytes to the path that it is called with, in a folder beside that of ``target``.
            again: whatever is here already is hashed once more: an engine has refused these weights.
            refused: told that what was fetched failed its check; true where another fetch is to follow at once.

        Waits for: another process of the host that fetches it.  Unblocked by: its end, or its standing still.

        Returns whether it was hashed here.

        Raises:
            WeightsRejected: what was fetched is not what the manifest says.
            FileNotFoundError: the folder was removed meanwhile.
            OSError: it cannot be written.
        """
        try:
            common = self._common(target.parent.parent)
        except PermissionError as exc:
            if not self._alone:
                log.warning("weights are not shared with other actors of this host: %s", exc)
            self._alone = True
            await fetch(target)
            await self._check(manifest, target)
            return True
        whole = common / f"{name_of(manifest)}{_WHOLE}"
        self.check_s = 0.0
        while True:
            taken = await self._take(whole, manifest, target, again=again)
            if taken is not None:
                self.shared += 1
                return taken
            lock, number = await self._turn(whole)
            if lock is None:
                continue
            try:
                if _is_there(whole):
                    continue
                await self._fetch(manifest, whole, number, fetch, refused)
                os.link(whole, target)
                self.fetched += 1
                return True
            finally:
                self._held = None
                lock.release()

    def progress(self) -> None:
        """A part of what is being fetched has arrived: others of the host go on waiting for it."""
        now = self._clock()
        if self._held is not None and now - self._signed_at > _SIGN_EVERY_S:
            self._signed_at = now
            with contextlib.suppress(OSError):
                os.utime(self._held)

    def close(self) -> None:
        """This process shares no longer; the last one of the host removes the copies.  Idempotent."""
        if self._folder is not None:
            self._folder.release()
            self._folder = None

    def _common(self, parent: Path) -> Path:
        """The run's common folder beside this process's own.  Raises OSError."""
        path = parent / f"{weights_folder(self._run).name}.host-{os.getuid()}"
        if self._folder is None or self._folder.path != path or not self._folder.exists:
            self.close()
            self._folder = CommonScratch(path)
        return path

    async def _take(self, whole: Path, manifest: WeightsManifest, target: Path, *, again: bool) -> bool | None:
        """Link what is there already: whether it was hashed here; None where it is not there, or is not what it should
        be."""
        try:
            os.link(whole, target)
        except FileNotFoundError:
            if not _is_there(whole.parent):
                raise
            return None
        if not again and read_note(whole.with_suffix(NOTE)) == Note.of(manifest, target):
            return False
        try:
            await self._check(manifest, target)
        except WeightsRejected as exc:
            log.warning("the copy of version %d on this host is wrong and is fetched again: %s", manifest.version, exc)
            _remove(target, whole)
            return None
        return True

    async def _turn(self, whole: Path) -> tuple[BaseFileLock | None, int]:
        """The lock under which this process fetches, with its number; None once another has brought it.

        Waits for: a process that fetches.  Unblocked by: its end, or its standing still.
        """
        number, looks, seen, seen_at = 0, 0, None, self._clock()
        while not _is_there(whole):
            path = whole.with_suffix(f"{_LOCK}{number}")
            lock = locks.take(path, f"{os.getpid()}\n")
            if lock is not None:
                self._held = path
                os.utime(path)
                return lock, number
            sign = _sign_of(path), _sign_of(whole.with_suffix(f"{_PART}{number}"))
            if sign != seen:
                seen, seen_at = sign, self._clock()
            elif self._clock() - seen_at > self._stall_s:
                log.warning(
                    "process %s has fetched %s for this host without progress for %.0f s; it is fetched once more",
                    locks.words_in(path), whole.stem, self._stall_s,
                )  # fmt: skip
                number, seen, seen_at = number + 1, None, self._clock()
                continue
            await asyncio.sleep(_LOOK_EVERY_S[min(looks, len(_LOOK_EVERY_S) - 1)])
            looks += 1
        return None, 0

    async def _fetch(
        self, manifest: WeightsManifest, whole: Path, number: int, fetch: Fetch, refused: Callable[[], bool]
    ) -> None:
        part = whole.with_suffix(f"{_PART}{number}")
        _remove(part)
        _tidy(whole.parent, keep=whole.stem)
        try:
            await fetch(part)
            try:
                await self._check(manifest, part)
            except WeightsRejected:
                if not refused():
                    raise
                await fetch(part)
                await self._check(manifest, part)
            note = Note.of(manifest, part)
            os.replace(part, whole)
            write_note(whole.with_suffix(NOTE), note)
        finally:
            _remove(part)

    async def _check(self, manifest: WeightsManifest, path: Path) -> None:
        began = self._clock()
        await asyncio.to_thread(check, manifest, path)
        self.check_s = self._clock() - began


def name_of(manifest: WeightsManifest) -> str:
    """Of a version's files: a learner that fell back may publish other weights under the same number."""
    return f"v{manifest.version}-{root_of(manifest.tensors, manifest.total_bytes)[:16]}"


def _sign_of(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_size, found.st_mtime_ns
    return None


def _is_there(path: Path) -> bool:
    return path.exists()


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _tidy(folder: Path, *, keep: str) -> None:
    """Remove earlier versions, and what processes that died left.  What another process fetches now stays, and so does
    the last of the later versions."""
    found = [path for path in folder.iterdir() if path.stem != keep and path.suffix.startswith(_OURS)]
    later = [path for path in found if path.suffix == _WHOLE and _number(path) > _number(Path(keep))]
    last = max(later, key=_sign_of_age, default=None)
    for path in found:
        lock_of = path.with_suffix(path.suffix.replace(_PART, _LOCK))
        if (last is not None and path.stem == last.stem) or (path.suffix.startswith((_PART, _LOCK)) and _held(lock_of)):
            continue
        with contextlib.suppress(OSError):
            path.unlink()


def _number(path: Path) -> int:
    """The version's; -1 for a file of another name."""
    text = path.name.removeprefix("v").partition("-")[0]
    return int(text) if text.isdecimal() else -1


def _sign_of_age(path: Path) -> int:
    return (_sign_of(path) or (0, 0))[1]


def _held(path: Path) -> bool:
    """Whether a process has this lock."""
    with contextlib.suppress(OSError):
        lock = locks.take(path, "")
        if lock is not None:
            lock.release()
            return False
    return True
