"""When a checkpoint is written, read and reported to the buffer, and the trained policy's folder at the end.

``learner.checkpoints.checkpoint`` is the format.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import shutil
from dataclasses import dataclass, field
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
from learner.checkpoints.durable import Durable
from learner.policy.export import export_adapter, export_model, precision, write_model
from learner.ranks import Ranks
from learner.torch_thread import TorchThread
from learner.training.trainer import Trainer


@dataclass(kw_only=True)
class Saving:
    """The state on disk.  Every rank calls ``resume``, ``save`` and ``export``, in the same order."""

    config: Config
    rundir: RunDir
    trainer: Trainer
    """Its state is saved; used in the torch thread only."""
    torch_thread: TorchThread
    ranks: Ranks
    buffer: BufferPeer
    """Rank 0 reports to it."""
    log: logging.Logger
    _saved_step: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.durable = Durable(self.config, self.rundir, ranks=self.ranks, tell=self._tell, log=self.log)
        self._source = model_folder(self.config.model.path)
        self._target = self.rundir.path / "model"

    def is_saved(self, step: int) -> bool:
        """Whether a checkpoint of ``step`` would add nothing: it is there, or nothing was trained yet."""
        return step in (0, self._saved_step)

    @property
    def newest(self) -> Path | None:
        """The last good checkpoint on disk."""
        found = checkpoint.list_checkpoints(self.rundir.checkpoints)
        return found[-1] if found else None

    def resume(self) -> Progress | None:
        """In the torch thread: put the last checkpoint's state into the trainer; None if there is none.

        Raises:
            SetupError: it is damaged or of another model.
        """
        path = self.durable.choose()
        if path is None:
            return None
        progress = checkpoint.load(path, self.trainer)
        self._saved_step = progress.step
        if self.ranks.is_first and (twice := self.rundir.skip_versions(progress.version)):
            self.log.warning(
                "the run's count of versions stood %d behind its checkpoint's; it goes on above version %d",
                twice,
                progress.version,
            )
        self.log.info(
            "resumed from %s: %d batches trained, weights of version %d", path, progress.step, progress.version
        )
        return progress

    async def save(self, *, step: int, version: int) -> None:
        """Write a checkpoint and report it to the buffer, unless this step is saved already."""
        if self.is_saved(step):
            return
        path = await self.torch_thread(self._save_checkpoint, Progress(step=step, version=version))
        self._saved_step = step
        if self.ranks.is_first:
            self.log.info("checkpoint %s", path)
        with contextlib.suppress(PeerLost):  # reported again when the learner starts again
            await self.durable.saved(path)

    def _save_checkpoint(self, progress: Progress) -> Path:
        """In the torch thread, on every rank: all ranks write it in the same attempt, or none does."""
        return until_written(
            f"the checkpoint of step {progress.step} in {self.rundir.checkpoints}",
            lambda: checkpoint.save(
                self.rundir.checkpoints,
                self.trainer,
                progress,
                keep=self.config.learner.keep_checkpoints,
                spared=lambda: self.durable.spared,
            ),
            log=self.log,
        )

    async def begin(self) -> None:
        """After ``resume``: report the checkpoint that the run can count on, and put a newer one to the URL."""
        self.durable.begin()
        with contextlib.suppress(PeerLost):  # reported again when the learner starts again
            await self.durable.report()

    async def _tell(self, step: int, version: int, where: str) -> None:
        """Report a durable checkpoint to the buffer, which may drop the trees used up in batches below its step."""
        # Those trees can never be trained on again: their lineage is in the run's folder first.
        await asyncio.to_thread(self.rundir.pass_on)
        await self.buffer.send(Checkpointed(run=self.buffer.run_id, step=step, version=version, where=where))

    def export(self) -> None:
        """In the torch thread, on every rank: write the trained policy as a Hugging Face folder."""
        tensors, lora = self.trainer.whole.tensors(), self.trainer.policy.lora
        pairs = None if lora is None else self.trainer.whole.adapters()
        if not self.trainer.accelerator.is_main_process:
            return
        form = precision(self._source, self.config.learner.export_dtype)
        if lora is not None and pairs is not None:
            folder, base = self.rundir.path / "adapter", self.config.model.path
            until_written(
                f"the adapters in {folder}", lambda: export_adapter(lora, pairs, folder, base=base), log=self.log
            )
            self.durable.exported(folder)
            self.log.info("the trained adapters are in %s, over %s; what follows has them merged in", folder, base)
        until_written(
            f"the trained policy in {self._target}",
            lambda: export_model(self.trainer.policy, tensors, self._source, self._target, form),
            log=self.log,
        )
        self.log.info("the trained policy is in %s, %s (%s)", self._target, form.name, form.why)
        self.durable.exported(self._target)

    def try_export(self) -> None:
        """In the torch thread, on every rank, before the first step: do what ``export`` will do, and remove it again.

        Raises:
            SetupError: it cannot be done.
        """
        tensors = self.trainer.whole.tensors()
        if not self.trainer.accelerator.is_main_process:
            return
        aside = self.rundir.scratch / "export-trial"
        try:
            self.rundir.checkpoints.mkdir(exist_ok=True)
            form = precision(self._source, self.config.learner.export_dtype)
            write_model(self.trainer.policy, tensors, self._source, aside, form)
            if not os.access(self.rundir.checkpoints, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.rundir.checkpoints))
        # Whatever prevents it now would prevent it at the end as well, when there is much to lose.
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
        self.log.info("at the end the policy will be written to %s as %s (%s)", self._target, form.name, form.why)
