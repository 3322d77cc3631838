"""Metrics in trackio: a local dashboard (``trackio show``), or one in a Hugging Face Space."""

from __future__ import annotations

from typing import Any

from atpo_async.core.doors import Option
from atpo_async.run.metrics import Record
from atpo_async.run.sinks.base import RunFacts, library
from atpo_async.run.sinks.built_in._tracker import TrackerSink

LIBRARY = "trackio"


class TrackioSink(TrackerSink):
    """A trackio run by the id of ours: trackio knows runs by name, and two of one name are to stay two."""

    def begin(self) -> Any:
        # The hardware is not watched: it is that of whichever machine this process runs on.
        return self.library.init(
            **self.settings(name=self.facts.run_id, embed=False, auto_log_gpu=False, auto_log_cpu=False)
        )

    def log(self, run: Any, record: Record) -> None:
        run.log({**record.metrics, "version": record.version}, step=record.step)

    def finish(self, run: Any, outcome: str) -> None:
        run.finish()


def open_sink(run: RunFacts, **options: Option) -> TrackioSink:
    """``options``: of ``trackio.init``, such as ``project``, ``group``, ``space_id``."""
    return TrackioSink(library(LIBRARY, sink="trackio"), run, options)
