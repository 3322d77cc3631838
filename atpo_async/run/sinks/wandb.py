"""Metrics in Weights & Biases: one W&B run a run, which goes on when the run does."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from atpo_async.core.doors import Option
from atpo_async.run.metrics import Record
from atpo_async.run.sink import RunFacts, library

LIBRARY = "wandb"
"""Looked for before a run begins."""


class WandbRun:
    """Begins the W&B run with the first record: without a network that fails, and the next record tries again."""

    def __init__(self, wandb: ModuleType, run: RunFacts, options: dict[str, Option]) -> None:
        self._wandb, self._facts, self._options = wandb, run, options
        self._run: Any = None

    def write(self, record: Record) -> None:
        if self._run is None:
            self._run = self._begin()
        # W&B's own step never goes back, and drops what does: the roles' records come with steps of their own, and
        # those after a checkpoint are done again when a learner falls back to it.  So the step is a metric, the axis.
        self._run.log({**record.metrics, "step": record.step, "version": record.version, "_timestamp": record.time})

    def _begin(self) -> Any:
        run = self._wandb.init(
            **{
                "project": "atpo-async",
                "name": self._facts.name,
                "id": self._facts.run_id,
                "resume": "allow",
                "dir": str(self._facts.folder),
                "config": dict(self._facts.config),
                # This process is not the training's: what it prints and uses says nothing of the run.
                "settings": self._wandb.Settings(console="off", x_disable_stats=True),
                **self._options,
            }
        )
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        return run

    def close(self, outcome: str) -> None:
        if self._run is not None:
            self._run.summary["outcome"] = outcome
            self._run.finish(exit_code=1 if outcome == "failed" else 0)


def open_sink(run: RunFacts, **options: Option) -> WandbRun:
    """``options``: of ``wandb.init``, such as ``project``, ``entity``, ``group``, ``mode``."""
    return WandbRun(library(LIBRARY, sink="wandb"), run, options)
