"""Metrics as TensorBoard events, in the folder ``tensorboard`` of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atpo_async.run.metrics import Record
from atpo_async.run.sinks.base import RunFacts, library

LIBRARY = "tensorboard"


class Events:
    """Writes scalars with ``tensorboard.summary.Writer``, which needs neither torch nor TensorFlow."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, record: Record) -> None:
        for name, value in record.metrics.items():
            self._writer.add_scalar(name, value, record.step, wall_time=record.time)
        self._writer.flush()

    def close(self, outcome: str) -> None:
        self._writer.close()


def open_sink(run: RunFacts, *, folder: str = "") -> Events:
    """``folder``: of the event files; ``tensorboard`` in the run's folder where empty."""
    writer = library("tensorboard.summary", sink="tensorboard").Writer
    return Events(writer(str(Path(folder) if folder else run.folder / "tensorboard")))
