"""Records a batch: its metrics, a few of its trees, and log lines about trees that were left out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from atpo_async.config import Config
from atpo_async.models.sources import model_folder
from atpo_async.run.metrics import MetricsWriter
from atpo_async.run.rundir import RunDir
from atpo_async.wire.messages import Batch
from learner.batches.buffer_peer import now_s
from learner.batches.fruitless import num_trained
from learner.batches.tree_samples import Readable, is_sampled, write_sample
from learner.training.report import StepReport

MAX_WARNINGS = 5
"""Lines about trees left out that one batch may write to the log."""


@dataclass(kw_only=True)
class Recording:
    """Writes the metrics, tree samples and log lines of training."""

    config: Config
    rundir: RunDir
    metrics: MetricsWriter | None
    """Rank 0's; None on the others, which only log what they leave out."""
    log: logging.Logger
    _stepped_at_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._readable: Readable | None = None
        if self.metrics is not None and self.config.metrics.trees:
            renderer = self.config.environment.options.get("renderer")
            folder = model_folder(self.config.model.path)
            self._readable = Readable(folder, renderer=renderer if isinstance(renderer, str) else "auto")

    def first_weights(self, *, step: int, version: int, publish_s: float) -> None:
        """Write how long the first publication took, seconds."""
        if self.metrics is not None:
            self.metrics.write(step=step, version=version, metrics={"weights/publish_s": publish_s})

    def training_begins(self) -> None:
        """From now on the time between two steps counts."""
        self._stepped_at_s = now_s()

    def log_problems(self, batch: Batch, report: StepReport) -> None:
        """To the log: trees that were left out, a skipped update."""
        for line in report.warnings[:MAX_WARNINGS]:
            self.log.warning("batch %d: %s", batch.step, line)
        if len(report.warnings) > MAX_WARNINGS:
            self.log.warning("batch %d: and %d more trees left out", batch.step, len(report.warnings) - MAX_WARNINGS)
        if report.fault is not None:
            self.log.warning("batch %d: update skipped, %s", batch.step, report.fault)

    def step(
        self,
        batch: Batch,
        report: StepReport,
        *,
        step: int,
        version: int,
        waited_s: float,
        step_s: float,
        publish_s: float | None,
        sent: Mapping[str, float],
    ) -> None:
        """Write the metrics of a batch.

        Args:
            step, version: after it.
            waited_s: for the batch.
            step_s: in the trainer.
            publish_s: that publishing its version held training up; None if it was not due.
            sent: counters of what was sent to actors.
        """
        now = now_s()
        between_s, self._stepped_at_s = now - self._stepped_at_s, now
        if self.metrics is None:
            return
        found: dict[str, float] = {**batch.metrics, **report.metrics, **sent}
        found["time/learner_wait_s"] = waited_s
        found["time/step_s"] = step_s
        found["time/between_steps_s"] = between_s
        found["tokens/trained_per_s"] = found.get("tokens/trained", 0.0) / max(between_s, 1e-9)
        found["batch/trees"] = batch.num_trees
        found["batch/leaves"] = batch.num_leaves
        found["batch/trained"] = num_trained(batch, report)
        if publish_s is not None:
            found["weights/publish_s"] = publish_s
        if is_sampled(step, num_steps=self.config.run.steps, wanted=self.config.metrics.trees):
            self._write_sample(batch, report, step=step, version=version)
        self.write(step, version, found)
        self.log.info(
            "step %d: reward %s, lag %s, waited %.2f s, step %.2f s",
            step, _shown(found.get("train/reward"), 3), _shown(found.get("lag/mean"), 2), waited_s, step_s,
        )  # fmt: skip

    def _write_sample(self, batch: Batch, report: StepReport, *, step: int, version: int) -> None:
        if self._readable is None:
            return
        try:
            write_sample(
                self.rundir.trees_path,
                # Only trees that were trained on: credit is not defined on a tree that was refused.
                msgspec.structs.replace(batch, trees=tuple(t for t in batch.trees if t.tree_id in report.trained)),
                step=step,
                version=version,
                settings=self.config.credit,
                readable=self._readable,
            )
        # Only for the report: a failure costs one of its drawings.
        except OSError as exc:
            self.log.warning("step %d: no tree is recorded for the report: %s", step, exc)

    def write(self, step: int, version: int, found: Mapping[str, float]) -> None:
        """One line of metrics; nothing on ranks other than 0."""
        if self.metrics is not None:
            self.metrics.write(step=step, version=version, metrics=found)


def _shown(value: float | None, digits: int) -> str:
    """For the log: a step may have nothing new."""
    return "–" if value is None else f"{value:.{digits}f}"
