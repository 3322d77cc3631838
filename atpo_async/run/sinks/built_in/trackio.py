"""Metrics in trackio: a local dashboard (``trackio show``), or one in a Hugging Face Space."""

from __future__ import annotations

from typing import Any

from atpo_async.core.doors import Option
from atpo_async.run.metrics import Record
from atpo_async.run.sinks.base import RunFacts, library
from atpo_async.run.sinks.built_in._tracker import TrackerSink

LIBRARY = "trackio"
"""Looked for before a run begins."""


class TrackioSink(TrackerSink):
    """A trackio run by the id of ours: trackio knows runs by name, and two of one name are to stay two."""

    def begin(self) -> Any:
        settings = {
            "project": "atpo-async",
            "name": self.facts.run_id,
            "resume": "allow",
            "config": dict(self.facts.config),
            "embed": False,
            # Not of the machine that this process happens to run on.
            "auto_log_gpu": False,
            "auto_log_cpu": False,
        }
        return self.library.init(**{**settings, **self.options})

    def log(self, run: Any, record: Record) -> None:
        run.log({**record.metrics, "version": record.version}, step=record.step)

    def finish(self, run: Any, outcome: str) -> None:
        run.finish()


def open_sink(run: RunFacts, **options: Option) -> TrackioSink:
    """``options``: of ``trackio.init``, such as ``project``, ``group``, ``space_id``."""
    return TrackioSink(library(LIBRARY, sink="trackio"), run, options)
