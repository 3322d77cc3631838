"""Metrics as JSON lines.  A run's own ``metrics.jsonl`` is written by its roles in any case; this makes a copy."""

from __future__ import annotations

from pathlib import Path

from atpo_async.run.metrics import MetricsWriter, Record
from atpo_async.run.sinks.base import RunFacts


class Copy:
    """Appends every record to a file of the user's; to none where ``path`` is empty."""

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None
        self._writers: dict[str, MetricsWriter] = {}

    def write(self, record: Record) -> None:
        if self._path is None:
            return
        if record.source not in self._writers:
            self._writers[record.source] = MetricsWriter(self._path, source=record.source)
        self._writers[record.source].write(
            step=record.step, version=record.version, metrics=record.metrics, time_s=record.time
        )

    def close(self, outcome: str) -> None:
        for writer in self._writers.values():
            writer.close()


def open_sink(run: RunFacts, *, path: str = "") -> Copy:
    """``path``: another file that is to hold the same records."""
    return Copy(path)
