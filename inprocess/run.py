"""A run in one process: batch by batch, its trees are grown, it is trained on, and the engine takes the new weights.

The parts are those of the roles: the buffer's state with its ledger and its delay line, in memory; the search of trees;
the trainer.  Generation and training take turns, as they do with ``staleness.exact_lag`` in a run of several processes,
so that a batch holds the trees that it would hold there.  The run folder has the files that any run has, but neither
checkpoints nor a journal nor the trained policy: a run that was interrupted begins anew.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState

from actors.environments import Environments
from actors.factory import engine_settings
from actors.hosting.order import CallOrder
from atpo_async.config import Config
from atpo_async.core.errors import ProbeMismatch
from atpo_async.models.sources import model_folder
from atpo_async.run.metrics import MetricsWriter
from atpo_async.run.rundir import RunDir
from atpo_async.wire.messages import (
    Batch,
    Checkpointed,
    EvalRequest,
    Exhausted,
    SampleRequest,
    Trained,
    VersionPublished,
)
from buffer.state import BufferState
from inprocess.environments import make_environments
from inprocess.generation.engine import BatchEngine
from inprocess.growth import ACTOR, Growth
from inprocess.idle import IdleSelector
from learner.batches.fruitless import Fruitless
from learner.batches.lineage import LINEAGE_FILE, write_lineage, write_start
from learner.batches.recording import Recording
from learner.batches.skipped import keep_skipped
from learner.evaluation import is_due, outcome
from learner.policy.accelerator import make_accelerator
from learner.policy.model import load_policy
from learner.training.report import StepReport
from learner.training.trainer import Trainer

log = logging.getLogger("inprocess")

OnStep = Callable[[int, float | None], None]
"""Called after each batch: (batches trained, sampled success of its trees)."""

BUFFER = "buffer"
"""The source of the buffer's own metrics."""

LARGEST_ERROR = {"float32": 1e-3, "float16": 0.3, "bfloat16": 0.3}
"""Nats by which the engine's log-probs may differ from the learner's, by the engine's precision; seen: 1e-5."""


def load_trainer(config: Config) -> Trainer:
    """A trainer as a learner makes it, whatever this process has trained before."""
    torch.set_num_threads(config.learner.num_threads or 1)
    # Accelerate holds a process to the device and the precision that it first had.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.manual_seed(config.run.seed)
    trainer = Trainer(config, accelerator=make_accelerator(config), policy=load_policy(config))
    trainer.warm_up()
    return trainer


@contextlib.asynccontextmanager
async def opened(config: Config, rundir: RunDir, selector: IdleSelector, on_step: OnStep) -> AsyncIterator[OneProcess]:
    """A run with its model, its engine and its environments; what only the user can mend is raised here.

    Args:
        config: as ``settings.in_one_process`` returns it.
        selector: of the running loop.
    """
    folder, order = model_folder(config.model.path), CallOrder()
    async with make_environments(config, folder, order) as environments:
        if config.eval.at_start or config.eval.at_end or config.eval.every_steps:
            environments.check_eval_tasks(config.eval.num_tasks)
        trainer = load_trainer(config)
        engine = BatchEngine(engine_settings(config, folder, actor=ACTOR, stop_strings=bool(environments.stop_strings)))
        await engine.start()

        def go_on() -> bool:
            """Whether anything can: answers of environments first, and no action before all of them are there."""
            return order.release() if order.under_way else engine.advance()

        selector.on_idle = go_on
        # Libraries and models are a million objects that stay: they are left out of every search for garbage.
        gc.freeze()
        try:
            with MetricsWriter(rundir.metrics_path, source="learner") as metrics:
                yield OneProcess(
                    config, rundir, trainer=trainer, engine=engine, environments=environments, metrics=metrics,
                    on_step=on_step,
                )  # fmt: skip
        finally:
            gc.unfreeze()
            await engine.close()


class OneProcess:
    """The roles' parts of a run, which take turns.

    Args:
        config, rundir: of the run.
        trainer, engine, environments: made.
        metrics: writes the run's metrics file.
        on_step: is told of each batch.
    """

    def __init__(
        self,
        config: Config,
        rundir: RunDir,
        *,
        trainer: Trainer,
        engine: BatchEngine,
        environments: Environments,
        metrics: MetricsWriter,
        on_step: OnStep = lambda step, success: None,
    ) -> None:
        self._config, self._rundir, self._metrics, self._on_step = config, rundir, metrics, on_step
        self.trainer, self._engine = trainer, engine
        run = rundir.run_id
        self._state = BufferState(config, run=run, rng=np.random.default_rng(config.run.seed), now=0.0)
        self._state.restore(None)
        # As the buffer of a run draws: with a generator for each of its lives.
        self._state.rng = np.random.default_rng([config.run.seed, self._state.incarnation])
        self._growth = Growth(config, run=run, state=self._state, engine=engine, environments=environments)
        self._recording = Recording(config=config, rundir=rundir, metrics=metrics, log=log)
        self._fruitless = Fruitless(config.learner.max_skipped_updates)
        self.step = 0
        """Batches trained."""
        self.version = 0
        """Of the weights now."""
        self._success: float | None = None

    async def run(self) -> None:
        """Train to the last step.  Waits for: the environments.

        Raises:
            SetupError, ConfigError: only the user can mend it.
            NothingToTrainOn: batch after batch held no tree that can be trained on, or none of the run's did.
        """
        settings = self._config.eval
        if self._config.learner.lineage:
            write_start(self._rundir.path / LINEAGE_FILE, step=0, version=0, rank=0)
        self._publish()
        self._probe()
        if settings.at_start:
            await self._evaluate()
        self._recording.training_begins()
        while self.step < self._config.run.steps:
            await self._one_batch()
            if is_due(settings, self.step, num_steps=self._config.run.steps):
                await self._evaluate()
        if not self.trainer.history.updates:
            raise self._fruitless.at_the_end(step=self.step, because="")
        if settings.at_end:
            await self._evaluate()

    # --- one batch ---------------------------------------------------------------------------------------------

    async def _one_batch(self) -> None:
        began = time.monotonic()
        batch = await self._next_batch()
        waited_s = time.monotonic() - began
        report = self.trainer.train(batch, version=self.version)
        step_s = time.monotonic() - began - waited_s
        if self._config.learner.lineage:
            write_lineage(self._rundir.path / LINEAGE_FILE, batch, version=self.version, rank=0)
        self._recording.log_problems(batch, report)
        self.step, self.version = self.step + 1, self.version + 1
        published = time.monotonic()
        self._publish()
        self._confirm(batch, report)
        self._record(batch, report, waited_s=waited_s, step_s=step_s, publish_s=time.monotonic() - published)
        self._judge(batch, report)

    async def _next_batch(self) -> Batch:
        """The batch of this step.  Waits for: its trees to be grown."""
        state, config = self._state, self._config
        request = SampleRequest(
            run=state.run, rank=0, num_ranks=1, step=self.step, version=self.version,
            num_trees=config.staleness.trees_per_batch, wait_s=0.0,
        )  # fmt: skip
        while (share := state.draw(request, 0.0)) is None:
            before = state.counters.progress
            await self._growth.grow(self.version)
            if state.counters.progress == before:
                raise RuntimeError(f"no tree can be grown for batch {self.step}: {state.waiting_for(request, 0.0)}")
        assert not isinstance(share, Exhausted)  # no exact lag goes with run.max_tasks
        return share.batch([state.store.read(place) for place in share.places])

    def _publish(self) -> None:
        """The engine takes the weights as they are now."""
        self._engine.load(self.trainer.whole.tensors(), self.version)
        self._state.publish(
            VersionPublished(run=self._state.run, version=self.version, weights_endpoint="", announce_endpoint="")
        )

    def _confirm(self, batch: Batch, report: StepReport) -> None:
        state = self._state
        state.trained(
            Trained(run=state.run, batch_id=batch.batch_id, version=self.version, priorities=report.priorities)
        )
        # There is nothing that this learner could fall back to: trees used up are dropped at once.
        state.checkpointed(Checkpointed(run=state.run, step=self.step, version=self.version))

    def _record(self, batch: Batch, report: StepReport, *, waited_s: float, step_s: float, publish_s: float) -> None:
        self._recording.step(
            batch, report, step=self.step, version=self.version, waited_s=waited_s, step_s=step_s,
            publish_s=publish_s, sent={},
        )  # fmt: skip
        self._write(ACTOR, self._growth.take_metrics(waited_s))
        self._success = batch.metrics.get("train/success", self._success)
        self._on_step(self.step, self._success)

    def _judge(self, batch: Batch, report: StepReport) -> None:
        """Raises where the run should not go on after this batch."""
        if (fruitless := self._fruitless.after(batch, report)) is not None:
            raise fruitless
        if report.fault is not None:
            folder = self._rundir.path / "skipped"
            keep_skipped(folder, batch, step=self.step, rank=0)
            self.trainer.history.skips.check(
                report.fault, limit=self._config.learner.max_skipped_updates, kept_in=str(folder), checkpoint=None
            )

    # --- evaluations -------------------------------------------------------------------------------------------

    async def _evaluate(self) -> None:
        """Greedy success on the held-out tasks, of the weights as they are now."""
        state = self._state
        state.evaluate(
            EvalRequest(
                run=state.run, step=self.step, version=self.version, num_tasks=self._config.eval.num_tasks,
                blocking=True,
            )
        )  # fmt: skip
        await self._growth.grow(self.version)
        for step, version, metrics in state.drain_records():
            self._metrics.write(step=step, version=version, metrics=metrics, source=BUFFER)
        metrics, said = outcome(state.eval_result(self.step))
        if metrics:
            self._metrics.write(step=self.step, version=self.version, metrics=metrics)
            log.info("step %d: %s", self.step, said)
        else:
            log.error("evaluation of step %d has no result: %s", self.step, said)

    def _probe(self) -> None:
        """Raises ProbeMismatch where the engine computes other log-probs than the learner."""
        config = self._config
        length = min(config.model.max_context_tokens, 64)
        tokens = np.random.default_rng(config.run.seed).integers(0, self._engine.decoder.vocab_size, (1, length))
        ours = self._engine.decoder.score(tokens)[0]
        error = float(np.abs(ours - self.trainer.whole.probe(tokens)).max())
        self._write(ACTOR, {"engine/probe_error": error, "time/first_lease": time.time()})
        if not error <= LARGEST_ERROR[config.model.dtype]:
            raise ProbeMismatch(
                f"the engine's log-probs of the first weights differ from the learner's by up to {error:.2g} nats, "
                f"more than {LARGEST_ERROR[config.model.dtype]:g} (model.dtype = {config.model.dtype!r})"
            )

    def _write(self, source: str, metrics: dict[str, float]) -> None:
        self._metrics.write(step=self.step, version=self.version, metrics=metrics, source=source)


async def run_once(config: Config, selector: IdleSelector, on_step: OnStep = lambda step, success: None) -> Path:
    """Run a configuration to its end in a new folder; returns the folder.

    Args:
        config: as ``settings.in_one_process`` returns it.
        selector: of the running loop.
        on_step: is told of each batch.

    Raises as ``OneProcess.run``; RunMismatch where the folder is there.
    """
    with RunDir.held(config, resume=False) as rundir:
        async with opened(config, rundir, selector, on_step) as run:
            await run.run()
        return rundir.path
