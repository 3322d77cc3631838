"""Where a checkpoint has to be before the run counts on it: on this disk, or at ``learner.checkpoint_url``.

The buffer forgets the trees of earlier steps once it is told of a checkpoint.  So it is told when the checkpoint is
where a learner finds it that starts on another machine, if there is such a place.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from atpo_async.config import Config
from atpo_async.core.errors import PeerLost, SetupError
from atpo_async.models.checkpoint_store import CheckpointStore, Stored, StoreFault, parsed
from atpo_async.run.replica.elsewhere import elsewhere
from atpo_async.run.rundir import RunDir
from learner.checkpoints import checkpoint
from learner.checkpoints.uploading import Uploads, fetch, try_store
from learner.ranks import Ranks

NONE, FAILED = -1, -2
"""In place of a step: there is no checkpoint; rank 0 could not find out."""


class Durable:
    """The checkpoints that a run counts on.

    Args:
        config, rundir: of the run.
        ranks: all of them resume from the checkpoint that rank 0 chooses.
        tell: reports a durable checkpoint to the buffer, given its step, version and place; on the event loop.
    """

    def __init__(
        self,
        config: Config,
        rundir: RunDir,
        *,
        ranks: Ranks,
        tell: Callable[[int, int, str], Awaitable[None]],
        log: logging.Logger,
    ) -> None:
        self.newest: Stored | None = None
        """The newest checkpoint that is durable."""
        self._folder = rundir.checkpoints
        self._rundir = rundir
        self._ranks = ranks
        self._tell = tell
        self._log = log
        self._give_up_s = config.links.give_up_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._store: CheckpointStore | None = None
        self._uploads: Uploads | None = None
        if config.learner.checkpoint_url is not None:
            self._store = CheckpointStore(config.learner.checkpoint_url, run_id=rundir.run_id)
            if ranks.is_first:
                keep = config.learner.keep_checkpoints
                self._uploads = Uploads(self._store, keep=keep, durable=self._arrived, log=log)

    # --- in the torch thread, on every rank

    def choose(self) -> Path | None:
        """The checkpoint to resume from, which is here then; None where there is none.  Every rank calls it.

        Raises:
            SetupError: there is no way to get it, or the run counts on a newer one.
        """
        if self._store is None and several_machines(self._ranks.num_ranks):
            raise SetupError(
                "the ranks of this learner are on several machines, which share no folder: set learner.checkpoint_url, "
                "where each of them finds the checkpoint to go on from"
            )
        chosen: Stored | None = None
        fault: SetupError | None = None
        if self._ranks.is_first:
            try:
                chosen = self._chosen()
            except SetupError as exc:
                # The other ranks wait for this rank's choice.
                fault = exc
        step, version = NONE if chosen is None else chosen.step, NONE if chosen is None else chosen.version
        step, version = self._ranks.same_numbers([FAILED if fault else step, version])
        if fault is not None:
            raise fault
        if step == FAILED:
            raise SetupError("rank 0 found no checkpoint to go on from: its log says why")
        if step == NONE:
            return None
        return self._here(checkpoint.name_of(step, version))

    def _chosen(self) -> Stored | None:
        """On rank 0."""
        here = checkpoint.list_checkpoints(self._folder)
        chosen = parsed(here[-1].name) if here else None
        if self._store is not None:
            try_store(self._store, give_up_s=self._give_up_s, log=self._log)
            try:
                there = self._store.stored()
                self.newest = there[-1] if there else None
                if self.newest is not None and (chosen is None or self.newest.key() >= chosen.key()):
                    chosen = self.newest
                elif chosen is not None and several_machines(self._ranks.num_ranks):
                    # The other machines get it from there.
                    self._store.put(here[-1])
                    self.newest = chosen
            except (StoreFault, OSError) as exc:
                raise SetupError(f"learner.checkpoint_url: {exc}") from exc
        else:
            self.newest = chosen
        counted_on = elsewhere(self._rundir.path)
        if counted_on is not None and counted_on.step > (0 if chosen is None else chosen.step):
            found = "none" if chosen is None else f"none newer than step {chosen.step}"
            raise SetupError(
                f"run {self._rundir.run_id} counts on a checkpoint of step {counted_on.step} ({counted_on.where}), and "
                f"there is {found} here{'' if self._store is None else f' or at {self._store.shown()}'}: start the "
                "learner where that checkpoint is; if it is lost, begin another run (--run.name)"
            )
        return chosen

    def _here(self, name: str) -> Path:
        path = self._folder / name
        if path.is_dir() or self._store is None:
            return path
        return fetch(self._store, name, self._folder, log=self._log)

    # --- on the event loop

    def begin(self) -> None:
        """Put a checkpoint to the URL that is here and not there."""
        self._loop = asyncio.get_running_loop()
        here = checkpoint.list_checkpoints(self._folder)
        newest = parsed(here[-1].name) if here else None
        if self._uploads is not None and newest is not None and (not self.newest or newest.key() > self.newest.key()):
            self._uploads.begin(here[-1])

    async def saved(self, path: Path) -> None:
        """A checkpoint is on this disk.  Rank 0 reports it as soon as it is durable.  Raises PeerLost."""
        if self._uploads is not None:
            self._loop = asyncio.get_running_loop()
            self._uploads.begin(path)
        elif self._store is None:
            self.newest = parsed(path.name)
            await self.report()

    def exported(self, folder: Path) -> None:
        """The trained policy is in a folder of this machine: put that to the URL too."""
        if self._uploads is not None:
            self._uploads.begin_folder(folder)

    @property
    def spared(self) -> Path | None:
        """A checkpoint here that is still being read."""
        return None if self._uploads is None else self._uploads.in_hand

    @property
    def trouble(self) -> str:
        """What keeps the newest checkpoint from being durable; empty where it is."""
        if self._uploads is None or not self._uploads.busy:
            return ""
        return self._uploads.trouble or "it is on its way"

    async def settled(self) -> None:
        """Waits for: the newest checkpoint to be durable, and reported.  Unblocked by: the store."""
        if self._uploads is not None:
            await self._uploads.settled()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def report(self) -> None:
        """Report the newest durable checkpoint, on rank 0.  Raises PeerLost."""
        if self._ranks.is_first and self.newest is not None:
            place = self._rundir.checkpoints_place if self._store is None else self._store.shown()
            await self._tell(self.newest.step, self.newest.version, place)

    def close(self) -> None:
        """What is on its way is given up."""
        if self._uploads is not None:
            self._uploads.close()
        for task in self._tasks:
            task.cancel()

    def _arrived(self, path: Path) -> None:
        """In the thread of the uploads."""
        self.newest = parsed(path.name)
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._report_aside(), self._loop)

    async def _report_aside(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self.report()
        except PeerLost as exc:  # reported again when the learner starts again
            self._log.warning("%s", exc)
        except Exception as exc:  # nothing waits for this task: without a line it would end in silence
            self._log.error("a checkpoint could not be reported to the buffer: %s: %s", type(exc).__name__, exc)
        finally:
            self._tasks.discard(task)


def several_machines(num_ranks: int) -> bool:
    """Whether torch's launcher says that some ranks are on other machines."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return local.isdecimal() and 0 < int(local) < num_ranks
