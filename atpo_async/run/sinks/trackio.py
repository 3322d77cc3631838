"""Metrics in trackio: a local dashboard (``trackio show``), or one in a Hugging Face Space."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from atpo_async.core.doors import Option
from atpo_async.run.metrics import Record
from atpo_async.run.sink import RunFacts, library

LIBRARY = "trackio"
"""Looked for before a run begins."""


class TrackioRun:
    """Begins the trackio run with the first record."""

    def __init__(self, trackio: ModuleType, run: RunFacts, options: dict[str, Option]) -> None:
        self._trackio, self._facts, self._options = trackio, run, options
        self._run: Any = None

    def write(self, record: Record) -> None:
        if self._run is None:
            self._run = self._trackio.init(
                **{
                    "project": "atpo-async",
                    # Its name is what a trackio run is known by: two runs of one name are to stay two.
                    "name": self._facts.run_id,
                    "resume": "allow",
                    "config": dict(self._facts.config),
                    "embed": False,
                    "auto_log_gpu": False,
                    "auto_log_cpu": False,
                    **self._options,
                }
            )
        self._run.log({**record.metrics, "version": record.version}, step=record.step)

    def close(self, outcome: str) -> None:
        if self._run is not None:
            self._run.finish()


def open_sink(run: RunFacts, **options: Option) -> TrackioRun:
    """``options``: of ``trackio.init``, such as ``project``, ``group``, ``space_id``."""
    return TrackioRun(library(LIBRARY, sink="trackio"), run, options)
