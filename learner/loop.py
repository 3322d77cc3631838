"""The learner's loop: the order in which a rank waits for a batch, trains on it, publishes weights and confirms it.

One batch is one version, also when nothing was learned from it (no trees, or the update was skipped): lag then keeps
its meaning, batches since the tokens were sampled.  Rank 0 counts versions, publishes and evaluates; every rank asks
for its own share of a batch and confirms it.

The buffer retains trees that were trained on until a checkpoint covers them (``Checkpointed``): a restarted learner
requests the batch after its checkpoint, and gets the trees of the batches that it has lost again.

Two threads: torch runs in one, the event loop in the other, so that heartbeats and weights flow during a step.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from dataclasses import dataclass

from atpo_async.core.errors import PeerLost, WaitTimeout
from atpo_async.links.client import Client
from atpo_async.ops.role import RoleContext
from atpo_async.run.metrics import MetricsWriter
from atpo_async.run.rundir import RunDir
from atpo_async.status import waits
from atpo_async.status.facts import publish_facts
from atpo_async.wire.messages import Batch, RunFinished, Trained
from learner.batches.buffer_peer import BufferPeer, now_s
from learner.batches.fruitless import Fruitless, NothingToTrainOn
from learner.batches.lineage import LINEAGE_FILE, write_lineage, write_start
from learner.batches.recording import Recording
from learner.batches.skipped import keep_skipped
from learner.checkpoints.saving import Saving
from learner.evaluation import Evaluations
from learner.ranks import Ranks, Wanted
from learner.torch_thread import TorchThread
from learner.training.report import Abandoned, StepReport
from learner.training.trainer import Trainer
from learner.weights.publication import Prepared, Publication
from learner.weights.publisher import Publisher

FINISH_S, FAREWELL_S = 10.0, 2.0
"""For the last messages of a run to be acknowledged, and for those of a learner that is stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Learned:
    """The torch thread's results of a batch."""

    report: StepReport
    version: int
    step_s: float
    publish_s: float
    """That the torch thread was held up."""
    prepared: Prepared | None
    checkpoint_wanted: bool


class Learner:
    """One rank of the learner: it counts steps and decides what is done next.

    Args:
        ctx: configuration, identity and folder of the run; signals when the role has to end.
        rundir: the run's folder.
        trainer: policy and optimizer; used in the torch thread only.
        buffer: link to the buffer.
        publisher: rank 0's; None on the others.
        metrics: rank 0's; None on the others.
        torch_thread: where the trainer lives.
    """

    def __init__(
        self, ctx: RoleContext, rundir: RunDir, *, trainer: Trainer, buffer: Client, publisher: Publisher | None,
        metrics: MetricsWriter | None, torch_thread: TorchThread,
    ) -> None:  # fmt: skip
        config, run, log = ctx.config, ctx.run_id, ctx.log
        self.config, self.run_id, self.log, self.stopping = config, run, log, ctx.stopping
        self.rundir, self.trainer, self.torch_thread = rundir, trainer, torch_thread
        self.step = 0
        """Batches trained."""
        self.version = 0
        """Of the weights now."""
        self.ranks = Ranks(trainer, rundir)
        self.buffer = BufferPeer(
            buffer, run=run, ranks=self.ranks, settings=config.links, stopping=ctx.stopping, log=log
        )
        self.recording = Recording(config=config, rundir=rundir, metrics=metrics, log=log)
        self.publication = Publication(
            config, trainer=trainer, publisher=publisher, buffer=self.buffer, written=self._record_written
        )
        self.saving = Saving(
            config=config,
            rundir=rundir,
            trainer=trainer,
            torch_thread=torch_thread,
            ranks=self.ranks,
            buffer=self.buffer,
            log=log,
        )
        self.evaluations = Evaluations(config, rundir, buffer=self.buffer, write=self.recording.write, log=log)
        self._stop_torch = threading.Event()
        self._in_hand: Batch | None = None
        """A batch that has to wait until all ranks have saved a checkpoint."""
        self._exhausted = False
        """There is no further batch, even below run.steps."""
        self._fruitless = Fruitless(config.learner.max_skipped_updates)
        self._failure: WaitTimeout | PeerLost | NothingToTrainOn | None = None
        """Why this rank stops; the others learn of it at the next batch."""

        publish_facts("learner", self._facts)

    def _facts(self) -> dict[str, object]:
        """For the learner's status."""
        return {
            "step": f"{self.step} of {self.config.run.steps}",
            "version": self.version,
            "published": self.publication.published,
        }

    async def run(self) -> None:
        """Train to the last step, or until asked to stop, or until the buffer is lost; the state is on disk afterwards.

        Waits for: batches.  Unblocked by: the buffer.

        Raises:
            WaitTimeout: nothing came within ``links.give_up_s``.
            PeerLost: the buffer did not take a message in that time.
            NothingToTrainOn: batch after batch held no tree that can be trained on, or none of the run's did.
        """
        watcher = asyncio.create_task(self._tell_torch_to_stop(), name="stop torch")
        try:
            await self._begin()
            while self.step < self.config.run.steps and await self._one_batch():
                pass
            if (self._exhausted or self.step >= self.config.run.steps) and not self.stopping.is_set():
                await self._finish()
            else:
                # Without an update there is nothing to save: the run begins once more at its first step.
                if self.trainer.history.updates:
                    await self._save()
                    await self.saving.durable.settled()
                    with contextlib.suppress(PeerLost):  # reported again at the next start
                        await self.buffer.link.drain(timeout_s=FAREWELL_S)
                if self._failure is not None:
                    raise self._failure
        finally:
            tasks = (watcher, *self.evaluations.under_way)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.saving.durable.close()
            await self.publication.close()

    async def _tell_torch_to_stop(self) -> None:
        await self.stopping.wait()
        self._stop_torch.set()
        # The supervisor gives a role in this phase the time that it needs (``ops.stopping``).
        waits.phase(waits.SAVING)

    # --- the beginning and the end

    async def _begin(self) -> None:
        """Resume, publish the first weights, and evaluate them before anything is learned."""
        resumed = await self.torch_thread(self.saving.resume)
        if resumed is not None:
            self.step = resumed.step
        await self.torch_thread(self.saving.try_export)
        self.version = await self.torch_thread(self.ranks.next_version)
        if self.config.learner.lineage:
            write_start(self.rundir.path / LINEAGE_FILE, step=self.step, version=self.version, rank=self.ranks.rank)
        began_s = now_s()
        prepared = await self.torch_thread(self.publication.prepare, self.version)
        announcement = await self.buffer.unless_stopping(self.publication.write(prepared))
        evaluate = self.config.eval.at_start and resumed is None and self.ranks.is_first
        if evaluate:
            # Before the version is known: no training lease may slip in ahead of the evaluation.
            await self.evaluations.request(self.step, self.version, blocking=True)
        await self.publication.announce(announcement)
        await self.saving.begin()
        self.recording.first_weights(step=self.step, version=self.version, publish_s=now_s() - began_s)
        if evaluate:
            waits.phase("waiting for the first evaluation", starting=True)
            await self.evaluations.finish(self.step, self.version, blocking=True)
        elif resumed is not None and self.ranks.is_first:
            await self._make_up_for_a_lost_evaluation()
        self.recording.training_begins()
        waits.phase("waiting for its first batch", starting=True)

    async def _make_up_for_a_lost_evaluation(self) -> None:
        if await asyncio.to_thread(self.evaluations.is_missing, self.step):
            self.log.info("an evaluation due by step %d has no result; asking for it with the weights now", self.step)
            await self.evaluations.begin(self.step, self.publication.published)

    async def _finish(self) -> None:
        """Evaluate and save the policy, and report to the buffer that the run is over."""
        if not self.trainer.history.updates:
            raise self._fruitless.at_the_end(step=self.step, because=self.buffer.exhausted_because)
        await self._save()
        await self.torch_thread(self.saving.export)
        if self.ranks.is_first:
            await self.buffer.unless_stopping(self.publication.settled())
            await self.evaluations.wait_for_those_under_way()
            if self.config.eval.at_end:
                published = self.publication.published
                await self.evaluations.request(self.step, published, blocking=True)
                await self.evaluations.finish(self.step, published, blocking=True)
        await self.buffer.unless_stopping(self.saving.durable.settled())
        # The buffer may end once the run is over: whatever was written is in the run's folder first.
        await self.buffer.unless_stopping(asyncio.to_thread(self.rundir.pass_on))
        if self.ranks.is_first and not self.stopping.is_set():
            await self.buffer.send(RunFinished(run=self.run_id))
        with contextlib.suppress(PeerLost):  # the buffer may end first: it knows that the run is over
            await self.buffer.link.drain(timeout_s=FINISH_S)

    async def _save(self) -> None:
        await self.saving.save(step=self.step, version=self.version)

    # --- one batch

    async def _one_batch(self) -> bool:
        """Wait, learn, publish, confirm.  False when the role has to stop.

        Waits for: the buffer's next batch, the other ranks, then the torch thread.  Ranks stay in step: if one has no
        batch, none trains.
        """
        asked_at_s = now_s()
        batch, own = await self._next_batch()
        wanted = await self.torch_thread(self.ranks.agree, own, 0 if batch is None else batch.batch_id, step=self.step)
        waited_s = now_s() - asked_at_s
        if wanted == Wanted.CHECKPOINT:
            self._in_hand = batch
            await self._save()
            return True
        self._in_hand = None
        self._exhausted = wanted == Wanted.END
        if wanted != Wanted.TRAIN or batch is None:
            return False
        try:
            learned = await self.torch_thread(self._learn, batch)
        except Abandoned:
            return False
        self.step += 1
        self.version = learned.version
        if not self.stopping.is_set():
            # From the second batch on: what is compiled for the first one takes longer than any later one.
            waits.phase("training")
        waits.progress("batches")
        try:
            await self._tell(batch, learned, waited_s=waited_s)
        except PeerLost as exc:
            # The other ranks are on their way to the next batch, where they learn that this rank has failed.
            self._failure = exc
        fruitless = self._fruitless.after(batch, learned.report)
        if fruitless is not None:
            self._failure = fruitless
            return False
        if learned.report.fault is not None:
            self._keep(batch, learned.report.fault)
        due = self.step % self.config.learner.checkpoint_every == 0 and self.trainer.history.updates
        if due or learned.checkpoint_wanted:
            await self._save()
        return True

    async def _next_batch(self) -> tuple[Batch | None, Wanted]:
        """A batch, the pending one first, and what this rank would do; a failed wait is raised at the end."""
        found: Batch | Wanted | None = self._in_hand
        try:
            if found is None and self._failure is None:
                found = await self.buffer.next_batch(
                    step=self.step,
                    version=self.version,
                    num_trees=self.config.staleness.trees_per_batch,
                    is_saved=self.saving.is_saved(self.step),
                    saving=lambda: self.saving.durable.trouble,
                    repeat=self.publication.tell_buffer,
                )
        except (WaitTimeout, PeerLost) as exc:
            self._failure = exc
        if isinstance(found, Batch):
            return found, Wanted.TRAIN
        return None, Wanted.STOP if found is None else found

    def _learn(self, batch: Batch) -> _Learned:
        """In the torch thread: train, count the version, copy its weights aside if they are due."""
        clock = time.monotonic
        began = clock()
        report = self.trainer.train(batch, version=self.version, should_stop=self._stop_torch.is_set)
        if self.config.learner.lineage:
            write_lineage(self.rundir.path / LINEAGE_FILE, batch, version=self.version, rank=self.ranks.rank)
        self.recording.log_problems(batch, report)
        trained = clock()
        version, checkpoint_wanted = self.ranks.next_version(), self.ranks.first_says(batch.checkpoint_wanted)
        prepared = None
        if self.publication.is_due(self.step + 1):
            prepared = self.publication.prepare(version, should_stop=self._stop_torch.is_set)
        return _Learned(
            report=report,
            version=version,
            step_s=trained - began,
            publish_s=clock() - trained,
            prepared=prepared,
            checkpoint_wanted=checkpoint_wanted,
        )

    async def _tell(self, batch: Batch, learned: _Learned, *, waited_s: float) -> None:
        """After a batch: publish the version, confirm the batch, write metrics, request an evaluation.

        Raises:
            PeerLost: the buffer takes nothing any more.
            SetupError: an earlier version could not be written.
        """
        self.publication.begin(learned.prepared)
        await self.buffer.send(
            Trained(
                run=self.run_id,
                batch_id=batch.batch_id,
                version=self.version,
                priorities=learned.report.priorities,
                rank=self.ranks.rank,
            )
        )
        self.recording.step(
            batch,
            learned.report,
            step=self.step,
            version=self.version,
            waited_s=waited_s,
            step_s=learned.step_s,
            publish_s=None if learned.prepared is None else learned.publish_s,
            sent=self.publication.counters,
        )
        if self.ranks.is_first and self.evaluations.is_due(self.step):
            await self.evaluations.begin(self.step, self.publication.newest, after=self.publication.settled)

    def _record_written(self, version: int, write_s: float) -> None:
        self.recording.write(self.step, version, {"weights/write_s": write_s})

    def _keep(self, batch: Batch, reason: str) -> None:
        """Save a batch whose update was skipped; stop the run after too many."""
        folder = self.rundir.path / "skipped"
        try:
            keep_skipped(folder, batch, step=self.step, rank=self.ranks.rank)
        except OSError as exc:
            self.log.warning("the batch of step %d could not be saved in %s: %s", self.step, folder, exc)
        newest = self.saving.newest
        self.trainer.history.skips.check(
            reason,
            limit=self.config.learner.max_skipped_updates,
            kept_in=str(folder),
            checkpoint=None if newest is None else str(newest),
        )
