"""Reading and writing files: atomic writes that survive a crash of the machine, lines at the end, the end of a log."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write aside, sync, rename: the file has its old content or the new one, never a part."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with aside.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


class Appended:
    """Bytes for the end of a file.  What the disk has taken is not written again by a second try."""

    def __init__(self, data: bytes) -> None:
        self._rest = data

    def write_to(self, path: Path) -> None:
        """Write what is left, in one write where the file system takes it so.  Raises OSError where it refuses."""
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            while self._rest:
                self._rest = self._rest[os.write(fd, self._rest) :]
        finally:
            os.close(fd)


def sync(path: Path) -> None:
    """Make what is in a file, or the names in a folder, durable.  Raises OSError where the file system cannot."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the file system can."""
    with contextlib.suppress(OSError):  # not every file system lets a folder be synced
        sync(folder)


LINE_CHARACTERS = 1000


def last_lines(path: Path, count: int) -> list[str]:
    """The last ``count`` lines of a text file, each cut; of a huge one no more than its end is read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 64 * 1024))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [
        line if len(line) <= LINE_CHARACTERS else f"{line[:LINE_CHARACTERS]}…" for line in text.splitlines()[-count:]
    ]
