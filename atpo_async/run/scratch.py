"""Scratch folders: their files mean nothing without the process that made them, and are removed once it has gone.

The system does not free what a killed process leaves in shared memory: a learner that is killed with its run leaves
two versions of the weights there, an actor that is killed while its engine reads new ones a whole model.  So
each scratch folder is locked by its owner.  The system releases the lock when the process ends, however it ends, and
the next run on the machine removes every folder that bears our mark and that no process has locked.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # no POSIX locks here: then nothing tells a dead owner, and nothing is swept
    fcntl = None  # type: ignore[assignment]


SHARED_MEMORY = Path("/dev/shm")


def weights_folder(run: str, parent: Path = SHARED_MEMORY) -> Path:
    """Where a run's learner puts its weights for actors on its host; theirs lie beside it, as ``<its name>.…``."""
    return parent / f"atpo-{run}"


def clear(run: str, parent: Path = SHARED_MEMORY) -> None:
    """Remove what a run has in shared memory, once its learner has ended; folders of actors that live stay."""
    folder = weights_folder(run, parent)
    shutil.rmtree(folder, ignore_errors=True)
    sweep(parent, f"{folder.name}.")


MARK = ".atpo-scratch"
"""An empty file: the process that made this folder has locked it for as long as it lives."""

PREFIX = "atpo-"


class Scratch:
    """A new folder of this process: ``parent/prefix…``, or ``parent/prefix`` itself with ``exactly``, in place of
    whatever lies there.

    Raises OSError where none can be made.
    """

    def __init__(self, parent: Path, prefix: str, *, exactly: bool = False) -> None:
        self._lock: int | None = None
        while True:
            if exactly:
                self.path = parent / prefix
                shutil.rmtree(self.path, ignore_errors=True)
                self.path.mkdir(mode=0o700, parents=True)
            else:
                self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            # Swept between its making and its marking: make another.
            with contextlib.suppress(FileNotFoundError):
                self._lock = hold(self.path)
                (self.path / MARK).touch()
                return
            self._unlock()

    @property
    def exists(self) -> bool:
        """False once it has been removed, or another one put in its place."""
        return _is_still(self.path, self._lock)

    def remove(self) -> None:
        """Idempotent."""
        if self.exists:
            shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class CommonScratch:
    """A folder that several processes of this user use together: made by the first of them, and removed, as scratch
    folders are, once none of them lives.

    Raises OSError where it can neither be made nor used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None
        while True:
            # Removed by another process between its making and its locking: make it again.
            with contextlib.suppress(FileNotFoundError):
                path.mkdir(mode=0o700, exist_ok=True)
                if not is_private(path):
                    raise PermissionError(f"{path} belongs to another user, is a link, or others may write to it")
                self._lock = hold(path, together=True)
                (path / MARK).touch()
                return
            self.release()

    @property
    def exists(self) -> bool:
        """False once it has been removed, or another one put in its place."""
        return _is_still(self.path, self._lock)

    def release(self) -> None:
        """This process uses it no longer; the last one removes it.  Idempotent."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
            with contextlib.suppress(OSError):
                _remove_unheld(self.path)


def _is_still(folder: Path, lock: int | None) -> bool:
    """Whether a folder is the one that ``lock`` was opened on; without a lock, whether there is one."""
    if lock is None:
        return folder.is_dir()
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(lock), folder.stat())
    return False


def is_private(folder: Path) -> bool:
    """Whether it is a folder itself, no link to one, and this user alone writes there."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o022


def hold(folder: Path, *, together: bool = False) -> int | None:
    """Lock a folder for as long as the descriptor is open and this process lives; None where there are no locks.

    Args:
        folder: that is there.
        together: other processes may lock it so as well: it stays until the last of them has ended.

    Raises FileNotFoundError if the folder is gone by then.
    """
    if fcntl is None:
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH if together else fcntl.LOCK_EX)
        if not os.path.samestat(os.fstat(lock), folder.stat()):
            raise FileNotFoundError(folder)
    except BaseException:
        os.close(lock)
        raise
    return lock


def sweep(parent: Path, prefix: str) -> list[Path]:
    """Remove the folders ``parent/prefix…`` whose owners are dead.  Returns them."""
    return sweep_unheld(parent, lambda folder: folder.name.startswith(prefix))


def sweep_dead(*parents: Path) -> list[Path]:
    """Remove what killed processes of any run of this user left in ``parents`` (by default shared memory and the folder
    for temporary files).  Returns the folders.

    Only folders that bear our mark and that no process has locked: never one of a process that lives.
    """
    swept: list[Path] = []
    for parent in parents or (SHARED_MEMORY, Path(tempfile.gettempdir())):
        swept += sweep_unheld(parent, lambda folder: folder.name.startswith(PREFIX) and (folder / MARK).is_file())
    return swept


def sweep_unheld(parent: Path, is_ours: Callable[[Path], bool]) -> list[Path]:
    """Remove this user's folders in ``parent`` that ``is_ours`` accepts and no process holds.  Returns them."""
    swept: list[Path] = []
    for folder in _own_folders(parent):
        with contextlib.suppress(OSError):  # gone, or not to be read
            if is_ours(folder) and _remove_unheld(folder):
                swept.append(folder)
    return swept


def _own_folders(parent: Path) -> Iterator[Path]:
    """Real folders of this user in ``parent``."""
    if fcntl is None or not parent.is_dir():
        return
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.getuid():
                    yield Path(entry.path)


def _remove_unheld(folder: Path) -> bool:
    """False if a process holds it, or if another folder has taken its place meanwhile.  Raises OSError."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), folder.stat()):
            return False
        shutil.rmtree(folder)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
