"""Folders for files that mean nothing without the process that made them: they outlive it only until somebody looks.

In shared memory what a killed process leaves behind is memory that nobody gives back: an actor killed while its engine
reads new weights would leave a whole model there.  So each such folder is locked by its owner; the lock goes with the
process, however that ends, and a folder without one may be removed by whoever comes by.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
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


class Scratch:
    """A new folder ``parent/prefix…`` of this process.

    Raises OSError where none can be made.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        self._lock: int | None = None
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            if fcntl is None:
                return
            with contextlib.suppress(FileNotFoundError):
                self._lock = os.open(self.path, os.O_RDONLY)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
                if self.path.is_dir():
                    return
            # Swept between its making and its locking: make another.
            self._unlock()

    def remove(self) -> None:
        """Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def sweep(parent: Path, prefix: str) -> list[Path]:
    """Remove the folders ``parent/prefix…`` whose owners are dead.  Returns them."""
    swept: list[Path] = []
    if fcntl is None or not parent.is_dir():
        return swept
    for folder in parent.iterdir():
        if not folder.name.startswith(prefix) or not folder.is_dir():
            continue
        with contextlib.suppress(OSError):  # locked, gone, or another user's
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                swept.append(folder)
            finally:
                os.close(lock)
    return swept
