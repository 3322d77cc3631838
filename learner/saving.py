"""Which steps a checkpoint holds, and when the buffer hears of it; the trained policy at the end.

``learner.checkpoint`` writes and reads a checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from atpo_async.config import Config
from atpo_async.errors import PeerLost
from atpo_async.messages import Checkpointed
from atpo_async.models import model_folder
from atpo_async.rundir import RunDir
from learner import checkpoint
from learner.buffer_peer import BufferPeer
from learner.checkpoint import Progress
from learner.model import export_model
from learner.ranks import Ranks
from learner.step import Trainer
from learner.torch_thread import TorchThread


class Saving:
    """The state on disk.  Every rank calls ``resume``, ``save`` and ``export``, in the same order.

    Args:
        config, rundir: of the run.
        trainer: what is saved; touched in the torch thread only.
        torch_thread: where that is.
        ranks, buffer: rank 0 tells the buffer.
    """

    def __init__(
        self,
        config: Config,
        rundir: RunDir,
        *,
        trainer: Trainer,
        torch_thread: TorchThread,
        ranks: Ranks,
        buffer: BufferPeer,
        log: logging.Logger,
    ) -> None:
        self._config = config
        self._rundir = rundir
        self._trainer = trainer
        self._torch_thread = torch_thread
        self._ranks = ranks
        self._buffer = buffer
        self._log = log
        self._saved_step: int | None = None

    def is_saved(self, step: int) -> bool:
        """Whether a checkpoint of ``step`` would add nothing: it is there, or nothing was trained yet."""
        return step in (0, self._saved_step)

    @property
    def newest(self) -> Path | None:
        """The last good checkpoint on disk."""
        kept = checkpoint.list_checkpoints(self._rundir.checkpoints)
        return kept[-1] if kept else None

    def resume(self) -> Progress | None:
        """In the torch thread: put the last checkpoint's state into the trainer; None if there is none.

        Raises:
            SetupError: it is damaged or of another model.
        """
        path = self.newest
        if path is None:
            return None
        progress = checkpoint.load(path, self._trainer)
        self._saved_step = progress.step
        if self._ranks.is_first and (twice := self._rundir.skip_versions(progress.version)):
            self._log.warning(
                "the run's count of versions stood %d behind its checkpoint's; it goes on above version %d",
                twice,
                progress.version,
            )
        self._log.info(
            "resumed from %s: %d batches trained, weights of version %d", path, progress.step, progress.version
        )
        return progress

    async def save(self, *, step: int, version: int) -> None:
        """Write a checkpoint and tell the buffer, unless this step is saved already."""
        if self.is_saved(step):
            return
        self._saved_step = step
        path = await self._torch_thread(
            checkpoint.save,
            self._rundir.checkpoints,
            self._trainer,
            Progress(step=step, version=version),
            keep=self._config.learner.keep_checkpoints,
        )
        if self._ranks.is_first:
            self._log.info("checkpoint %s", path)
        await self.tell_buffer(version=version)

    async def tell_buffer(self, *, version: int) -> None:
        """The buffer may let go what was used up before: no batch below the saved step is asked for again."""
        if self._ranks.is_first and self._saved_step is not None:
            with contextlib.suppress(PeerLost):  # said again when the learner starts again
                await self._buffer.send(Checkpointed(run=self._buffer.run_id, step=self._saved_step, version=version))

    def export(self) -> None:
        """In the torch thread: write the trained policy as a Hugging Face folder."""
        tensors = self._trainer.tensors()
        if self._trainer.accelerator.is_main_process:
            target = self._rundir.path / "model"
            export_model(self._trainer.policy, tensors, model_folder(self._config.model.path), target)
            self._log.info("the trained policy is in %s", target)
