"""When a checkpoint is written, read and reported to the buffer, and the trained policy's folder at the end.

``learner.checkpoints.checkpoint`` is the format.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from pathlib import Path

from atpo_async.config import Config
from atpo_async.core.errors import PeerLost, SetupError
from atpo_async.models.sources import model_folder
from atpo_async.ops.disk import error_number, until_written
from atpo_async.run.rundir import RunDir
from atpo_async.wire.messages import Checkpointed
from learner.batches.buffer_peer import BufferPeer
from learner.checkpoints import checkpoint
from learner.checkpoints.checkpoint import Progress
from learner.policy.export import export_model, precision, write_model
from learner.ranks import Ranks
from learner.torch_thread import TorchThread
from learner.training.trainer import Trainer


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
        self._source = model_folder(config.model.path)
        self._target = rundir.path / "model"
        self._saved_step: int | None = None

    def is_saved(self, step: int) -> bool:
        """Whether a checkpoint of ``step`` would add nothing: it is there, or nothing was trained yet."""
        return step in (0, self._saved_step)

    @property
    def newest(self) -> Path | None:
        """The last good checkpoint on disk."""
        found = checkpoint.list_checkpoints(self._rundir.checkpoints)
        return found[-1] if found else None

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
        path = await self._torch_thread(self._save_checkpoint, Progress(step=step, version=version))
        self._saved_step = step
        if self._ranks.is_first:
            self._log.info("checkpoint %s", path)
        await self.tell_buffer(version=version)

    def _save_checkpoint(self, progress: Progress) -> Path:
        """In the torch thread, on every rank: all of them find space on the disk in the same try, or none does."""
        return until_written(
            f"the checkpoint of step {progress.step} in {self._rundir.checkpoints}",
            lambda: checkpoint.save(
                self._rundir.checkpoints, self._trainer, progress, keep=self._config.learner.keep_checkpoints
            ),
            log=self._log,
        )

    async def tell_buffer(self, *, version: int) -> None:
        """Tell the buffer that it may drop what batches below the saved step have used up: none is asked for again."""
        if self._ranks.is_first and self._saved_step is not None:
            with contextlib.suppress(PeerLost):  # said again when the learner starts again
                await self._buffer.send(Checkpointed(run=self._buffer.run_id, step=self._saved_step, version=version))

    def export(self) -> None:
        """In the torch thread, on every rank: write the trained policy as a Hugging Face folder."""
        tensors = self._trainer.whole.tensors()
        if not self._trainer.accelerator.is_main_process:
            return
        form = precision(self._source, self._config.learner.export_dtype)
        until_written(
            f"the trained policy in {self._target}",
            lambda: export_model(self._trainer.policy, tensors, self._source, self._target, form),
            log=self._log,
        )
        self._log.info("the trained policy is in %s, %s (%s)", self._target, form.name, form.why)

    def try_export(self) -> None:
        """In the torch thread, on every rank, before the first step: do what ``export`` will do, and remove it again.

        Raises:
            SetupError: it cannot be done.
        """
        tensors = self._trainer.whole.tensors()
        if not self._trainer.accelerator.is_main_process:
            return
        aside = self._rundir.scratch / "export-trial"
        try:
            self._rundir.checkpoints.mkdir(exist_ok=True)
            form = precision(self._source, self._config.learner.export_dtype)
            write_model(self._trainer.policy, tensors, self._source, aside, form)
            if not os.access(self._rundir.checkpoints, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self._rundir.checkpoints))
        # Whatever hinders it would hinder it at the end as well, when there is much to lose.
        except Exception as exc:
            number = error_number(exc)
            reason = os.strerror(number) if number is not None else " ".join(str(exc).split()) or type(exc).__name__
            raise SetupError(
                f"the policy of model.path = {str(self._source)!r} could not be saved to {self._target} at the end "
                f"(it was tried before the first step): {reason}; mend that first, nothing has been trained by this "
                "start"
            ) from exc
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self._log.info("at the end the policy will be written to %s as %s (%s)", self._target, form.name, form.why)
