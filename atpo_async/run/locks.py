"""Locked files: one process holds each, and the system takes the lock back when that process ends, however it does.

filelock locks them as ``flock`` does, so programs that lock the same file without it are kept out too.  Two kinds of
locks in this project are not made with it: folders are locked as they are (``scratch``), since such a lock stays with a
folder that is renamed and filelock opens files only; and ``scripts/setup_env.py`` runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from atpo_async.core.errors import SetupError

if TYPE_CHECKING:
    from filelock import BaseFileLock

_LOOK_EVERY_S = 0.01
_MAX_WORDS = 256


def take(path: Path, words: str) -> BaseFileLock | None:
    """Lock a file and write ``words`` into it for processes that find it locked; None where another process has it.

    ``release`` gives the lock back, and so does dropping the last reference to it.  Raises OSError where it cannot be
    locked.
    """
    from filelock import FileLock, Timeout

    def leave_words(fd: int) -> None:
        with contextlib.suppress(OSError):  # a full disk: a process that finds the file locked then reads no name
            os.ftruncate(fd, 0)
            os.pwrite(fd, words.encode(), 0)

    lock = FileLock(path, timeout=0, mode=0o644, thread_local=False, fallback_to_soft=False, on_acquired=leave_words)
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock


def words_in(path: Path) -> str:
    """What the process that has a file locked left in it; empty where it left nothing."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(_MAX_WORDS).decode(errors="replace").strip()
    return ""


@contextlib.contextmanager
def held(path: Path, *, in_use: Callable[[str], str]) -> Iterator[None]:
    """Hold a file's lock inside the block, with the id of this process in the file.

    Args:
        path: of the file.
        in_use: the message where another process has it, given what that one left there, its process id.

    Raises:
        SetupError: another process has it, or the file system knows no locks.
    """
    try:
        lock = take(path, f"{os.getpid()}\n")
    except OSError as exc:
        raise SetupError(
            f"{path} cannot be locked: {exc.strerror or exc}; use a folder that this user may write"
        ) from exc
    if lock is None:
        raise SetupError(in_use(words_in(path) or "?"))
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a file's lock inside the block.  Waits for: another process in such a block, for moments."""
    from filelock import FileLock

    with FileLock(path, mode=0o644, fallback_to_soft=False, poll_interval=_LOOK_EVERY_S):
        yield
