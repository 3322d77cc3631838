"""Metrics in Weights & Biases: one W&B run a run, which goes on when the run does."""

from __future__ import annotations

from typing import Any

from atpo_async.core.doors import Option
from atpo_async.run.metrics import Record
from atpo_async.run.sinks.base import RunFacts, library
from atpo_async.run.sinks.built_in._tracker import TrackerSink

LIBRARY = "wandb"


class WandbSink(TrackerSink):
    """A W&B run by the id of ours."""

    def begin(self) -> Any:
        settings = self.settings(
            name=self.facts.name,
            id=self.facts.run_id,
            dir=str(self.facts.folder),
            # This process is not the training's: what it prints and uses says nothing of the run.
            settings=self.library.Settings(console="off", x_disable_stats=True),
        )
        run = self.library.init(**settings)
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        return run

    def log(self, run: Any, record: Record) -> None:
        # W&B's own step never goes back, and drops what does: the roles' records come with steps of their own, and
        # those after a checkpoint are done again when a learner falls back to it.  So the step is a metric, the axis.
        run.log({**record.metrics, "step": record.step, "version": record.version, "_timestamp": record.time})

    def finish(self, run: Any, outcome: str) -> None:
        run.summary["outcome"] = outcome
        run.finish(exit_code=1 if outcome == "failed" else 0)


def open_sink(run: RunFacts, **options: Option) -> WandbSink:
    """``options``: of ``wandb.init``, such as ``project``, ``entity``, ``group``, ``mode``."""
    return WandbSink(library(LIBRARY, sink="wandb"), run, options)
