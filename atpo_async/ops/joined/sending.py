"""Passes on what a learner writes in its replica: lines as they are added, files and folders once they are whole."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from atpo_async.core.errors import BadMessage
from atpo_async.ops.joined.asking import Asker
from atpo_async.run.replica import names
from atpo_async.run.replica.folder import Replica
from atpo_async.wire import joined as j
from atpo_async.wire.digests import digest_of, file_digests

log = logging.getLogger("atpo.joined")

LINES_BYTES = 256 << 10
"""Of lines in one message."""
PART_BYTES = 4 << 20
"""Of a file in one message."""
ATTEMPTS = 3
"""At a file that changes, or that arrives with other bytes, before it is left until it changes."""


class Sender:
    """Passes on the files of one replica.  Its rounds come one after another.

    Args:
        replica: whose files.
        asker: speaks to the buffer.
        taken: file -> bytes that have arrived.
        max_message_bytes: of the link.
    """

    def __init__(self, replica: Replica, asker: Asker, *, taken: dict[str, int], max_message_bytes: int) -> None:
        self._replica = replica
        self._asker = asker
        self._taken = dict(taken)
        self._part_bytes = min(PART_BYTES, max_message_bytes // 2)
        self._line_bytes = min(names.MAX_LINE_BYTES, max_message_bytes // 2)
        self._sent: dict[str, str] = {}
        """File -> what tells the state of it that was passed on last from another."""
        self._refused: set[str] = set()
        """Files that the buffer does not take."""

    @property
    def behind_bytes(self) -> int:
        """Bytes of lines that have not arrived yet."""
        return sum(max(0, _size(self._replica.path / f) - self._taken.get(f, 0)) for f in names.LINES)

    async def round(self, *, status: bool = True) -> bool:
        """Pass on a part of whatever is new.  Returns whether there was anything.

        Args:
            status: the status file too, which changes every second.

        Raises PeerLost where another learner has taken this one's place.
        """
        rank, path = self._asker.rank, self._replica.path
        moved = False
        for file in names.LINES:
            if names.may_add_lines(file, rank):
                moved |= await self._unless_refused(file, self._lines)
        skipped = sorted(path.glob(names.skipped_pattern(rank)))
        for file in [f"skipped/{found.name}" for found in skipped]:
            moved |= await self._unless_refused(file, self._whole)
        if status:
            moved |= await self._unless_refused(names.status_file(rank), self._whole)
        for folder in names.FOLDERS if rank == 0 else ():
            moved |= await self._unless_refused(folder, self._folder)
        return moved

    async def _unless_refused(self, file: str, send: Callable[[str], Awaitable[bool]]) -> bool:
        if file in self._refused:
            return False
        try:
            return await send(file)
        except BadMessage as exc:
            self._refused.add(file)
            log.error("%s of this learner is not taken into the run's folder: %s", file, exc)
        except OSError as exc:
            # Removed meanwhile, or the replica's own disk: the next round looks again.
            log.debug("%s cannot be read: %s", file, exc)
        return False

    def _ours(self) -> dict[str, Any]:
        return {"run": self._asker.run, "rank": self._asker.rank, "life": self._asker.life}

    # --- lines

    async def _lines(self, file: str) -> bool:
        offset = self._taken.get(file, 0)
        data, left_out = await asyncio.to_thread(
            read_lines, self._replica.path / file, offset, usual=LINES_BYTES, most=self._line_bytes
        )
        if not data and not left_out:
            return False
        message = j.LinesWritten(**self._ours(), file=file, offset=offset, data=_array(data), left_out=left_out)
        answer = await self._asker.ask(message)
        if left_out:
            log.warning("a line of %d bytes in %s is too long and stays here alone", left_out, file)
        self._taken[file] = answer.offset
        return True

    # --- files and folders

    async def _whole(self, file: str) -> bool:
        path = self._replica.path / file
        state = _state(path)
        if not state or self._sent.get(file) == state:
            return False
        for _ in range(ATTEMPTS):
            if await self._parts(file, path):
                break
        else:
            log.warning("%s arrives with other bytes each time; it is left until it changes", file)
        self._sent[file] = state
        return True

    async def _parts(self, file: str, path: Path) -> bool:
        """Pass a file on.  False where it arrived with other bytes, or has changed."""
        with path.open("rb") as opened:
            total = os.fstat(opened.fileno()).st_size
            if total <= self._part_bytes:
                data = opened.read()
                about = {**self._ours(), "file": file, "total": len(data), "digest": digest_of(data)}
                answer = await self._asker.ask(j.FilePart(**about, offset=0, data=_array(data)))
                return bool(answer.offset == len(data))
            digest = (await asyncio.to_thread(file_digests, opened.fileno(), [(0, total)]))[0]
            about = {**self._ours(), "file": file, "total": total, "digest": digest}
            # Some of it may be there, from before the buffer was started anew.
            at = (await self._asker.ask(j.FilePart(**about, offset=0, data=_array(b"")))).offset
            while at < total:
                data = await asyncio.to_thread(os.pread, opened.fileno(), self._part_bytes, at)
                if not data:
                    return False
                before, at = at, (await self._asker.ask(j.FilePart(**about, offset=at, data=_array(data)))).offset
                if at == 0 and before:
                    return False
            return True

    async def _folder(self, folder: str) -> bool:
        path = self._replica.path / folder
        state = _folder_state(path)
        if not state or self._replica.known.folders.get(folder) == state:
            return False
        files = {entry.name: entry.stat().st_size for entry in path.iterdir() if entry.is_file()}
        for name in sorted(files):
            await self._whole(f"{folder}/{name}")
        await self._asker.ask(j.FolderWritten(**self._ours(), folder=folder, files=files))
        await asyncio.to_thread(self._replica.note_folder, folder, state)
        log.info("%s/ is in the run's folder now", folder)
        return True


def read_lines(path: Path, offset: int, *, usual: int, most: int) -> tuple[bytes, int]:
    """Whole lines from ``offset`` on: about ``usual`` bytes of them, more where one line is longer.

    Returns the lines; and the length of the line that follows them where it is longer than ``most`` and they are none.
    Raises OSError.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(usual)
            end = data.rfind(b"\n") + 1
            if end or len(data) < usual:
                return data[:end], 0
            data += file.readline()
            if not data.endswith(b"\n"):
                return b"", 0
            return (data, 0) if len(data) <= most else (b"", len(data))
    except FileNotFoundError:
        return b"", 0


def _state(path: Path) -> str:
    """Tells one state of a file from another; empty where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return ""
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns}"


def _folder_state(path: Path) -> str:
    if not path.is_dir():
        return ""
    states = [f"{entry.name} {_state(entry)}" for entry in sorted(path.iterdir()) if entry.is_file()]
    return hashlib.blake2b("\n".join(states).encode(), digest_size=16).hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _array(data: bytes) -> np.ndarray[Any, Any]:
    return np.frombuffer(data, dtype=np.uint8)
