"""Hands the records of ``metrics.jsonl`` to one sink, each once, however slow or broken the sink is.

The file is the queue: it holds what a slow sink has not taken yet, and what a run that stopped has not handed on.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from atpo_async.core.texts import of_error
from atpo_async.run.metrics import Record, parse_record
from atpo_async.run.sinks.base import MetricsSink
from atpo_async.run.tail import Tail

LOOK_S = 0.25
"""Between two looks at the file."""
MOST_BYTES = 1 << 20
"""Of the file that are in memory at once."""
FOLDER = "sinks"
"""In the run's folder: how many bytes of the metrics file each sink has taken."""

_ROLES = re.compile(r"learner|buffer|supervisor")
"""Sources whose names of metrics are theirs alone; several actors have the same."""


class SinkFollower:
    """One sink and its place in the file.

    Args:
        name: of the sink, as ``metrics.sinks`` names it.
        rundir: the run's folder.
        metrics: the file.
        say: one line for the user.
    """

    def __init__(
        self, name: str, sink: MetricsSink, *, rundir: Path, metrics: Path, say: Callable[[str], None]
    ) -> None:
        self.name = name
        self.num_lost = 0
        """Records that the sink refused."""
        self._sink = sink
        self._metrics = metrics
        self._say = say
        self._place = Place(rundir / FOLDER / f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)}.offset")

    def follow(self, stop: threading.Event) -> None:
        """Hand on what there is and what comes, and after ``stop`` what is there then.  Never raises."""
        tail = Tail(self._metrics, offset=min(self._place.load(), _size(self._metrics)))
        at = tail.offset
        while True:
            last = stop.is_set()
            while lines := tail.new(most_bytes=MOST_BYTES):
                for line in lines:
                    at += len(line)
                    # Before the record is handed on: one too few is in metrics.jsonl, one twice cannot be taken back.
                    self._place.save(at)
                    if (record := parse_record(line)) is not None:
                        self._hand_on(record)
            if last:
                return
            stop.wait(LOOK_S)

    def close(self, outcome: str) -> None:
        """Close the sink.  Never raises."""
        try:
            self._sink.close(outcome)
        except BaseException as exc:  # a sink may be a user's, and fail in any way
            self._say(f"metrics sink {self.name!r} could not be closed: {of_error(exc)}")

    def left(self) -> int:
        """Records that the sink has not taken yet."""
        tail = Tail(self._metrics, offset=self._place.load())
        return sum(parse_record(line) is not None for line in tail.new())

    def _hand_on(self, record: Record) -> None:
        try:
            self._sink.write(with_unique_names(record))
        except BaseException as exc:
            self.num_lost += 1
            if self.num_lost == 1:
                self._say(
                    f"metrics sink {self.name!r} failed at step {record.step}: {of_error(exc)}; training goes on, and "
                    f"{self._metrics} has every record"
                )


class Place:
    """How much of a file was handed on, on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def load(self) -> int:
        """Bytes; 0 where nothing is known."""
        try:
            return int(self._path.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return 0

    def save(self, offset: int) -> None:
        """A disk that refuses is no reason to stop: the record may then be handed on twice."""
        with contextlib.suppress(OSError):
            if self._fd is None:
                self._path.parent.mkdir(exist_ok=True)
                self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
            os.pwrite(self._fd, f"{offset:020}\n".encode("ascii"), 0)


def with_unique_names(record: Record) -> Record:
    """Each metric of an actor under the actor's name."""
    if _ROLES.fullmatch(record.source):
        return record
    return replace(record, metrics={f"{record.source}/{name}": value for name, value in record.metrics.items()})


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
