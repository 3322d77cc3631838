"""Places an actor's copy of a version: in shared memory, beside the learner's, or on disk where that is full.

If the folder is removed, the version is fetched once more, into a new folder.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from atpo_async.core.errors import AtpoError, SetupError
from atpo_async.run.scratch import SHARED_MEMORY, Scratch, sweep, sweep_dead, weights_folder
from atpo_async.wire.messages import WeightsManifest

log = logging.getLogger("atpo.actor.weights")

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class NoSpace(AtpoError):
    """Neither shared memory nor the disk takes a version; both may later."""


class Copies:
    """The files of one actor, one a version, in a folder of its own.

    Args:
        run: identity of the run.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._scratch: Scratch | None = None
        self._on_disk = False
        """Shared memory was full the last time."""

    async def make(
        self, manifest: WeightsManifest, fetch: Callable[[Path], Awaitable[None]], *, beside: Path | None
    ) -> Path:
        """The file of a version, once ``fetch`` has brought it to the path that it is called with.

        Args:
            manifest: of the version.
            fetch: called again with another path where the folder is removed meanwhile, or is full.
            beside: the folder in which this actor's is best made.

        Raises:
            NoSpace: it fits nowhere.
        """
        problem: OSError | None = None
        if self._on_disk:  # there may be space in memory again, and then it need not even be copied
            self.close()
            self._on_disk = False
        # Once more in a new folder where the folder was removed, and once on the disk.
        for _ in range(3):
            try:
                target = self._target(manifest.version, beside)
                await fetch(target)
                return target
            except FileNotFoundError as exc:
                problem = exc
                log.warning("version %d: the folder for it was removed (%s); fetching again", manifest.version, exc)
            except OSError as exc:
                problem = exc
                if exc.errno not in FULL or self._on_disk:
                    break
                self._on_disk = True
                log.warning("version %d does not fit into shared memory (%s); taking it to disk", manifest.version, exc)
            self.close()
        where = "" if self._scratch is None else f" in {self._scratch.path}"
        self.close()
        raise NoSpace(
            f"version {manifest.version}: its {manifest.total_bytes} bytes cannot be written{where}: {problem}; free "
            "some space"
        ) from problem

    def remove(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove all of them.  The next version gets a new folder."""
        if self._scratch is not None:
            self._scratch.remove()
            self._scratch = None

    def _target(self, version: int, beside: Path | None) -> Path:
        """A path at which nothing lies.  Raises OSError where this actor's folder cannot be made."""
        if self._scratch is None or not self._scratch.exists:
            self.close()
            self._scratch = scratch_for(self._run, beside, on_disk=self._on_disk)
        target = self._scratch.path / f"v{version}.bin"
        target.unlink(missing_ok=True)
        return target


def scratch_for(run: str, beside: Path | None, *, on_disk: bool = False) -> Scratch:
    """A private folder for this actor's copies.

    What killed actors of this run left there goes, and what killed runs left in shared memory.

    Args:
        run: identity of the run.
        beside: the folder in which it is best made, where there is one: the learner's files can be linked there.
        on_disk: in the folder for temporary files instead.

    Raises:
        SetupError: this user may write to none of the folders.
        OSError: there is no space left.
    """
    prefix = f"{weights_folder(run).name}."
    places = [] if on_disk else [beside, SHARED_MEMORY]
    problems = []
    for parent in [place for place in places if place is not None] + [Path(tempfile.gettempdir())]:
        if not parent.is_dir():
            continue
        if swept := [*sweep(parent, prefix), *sweep_dead()]:
            log.info("removed what killed processes left: %s", ", ".join(map(str, swept)))
        try:
            return Scratch(parent, prefix)
        except OSError as exc:
            if exc.errno in FULL:
                raise  # there may be space later
            problems.append(f"{parent}: {exc.strerror or exc}")
    raise SetupError(f"no folder for the weights that are fetched can be made ({'; '.join(problems)}); set TMPDIR")
