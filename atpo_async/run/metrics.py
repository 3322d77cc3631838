"""Metrics: kinds (mean, sum, quantiles, gauge) collected in a process, and one JSON line per report in a shared file.

A line is ``{"time", "source", "step", "version", "metrics": {name: number}}``; ``time`` is Unix seconds.  Every role
may append to the same file: a line is one ``write`` to a file opened for appending, so lines never mix.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atpo_async.run.tail import Tail

log = logging.getLogger("atpo.metrics")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One line of a metrics file."""

    time: float
    """Unix seconds."""
    source: str
    """The role that wrote it: ``learner``, ``buffer``, ``actor-0``, ``supervisor``."""
    step: int
    version: int
    metrics: Mapping[str, float]


def eval_versions(record: Record) -> tuple[int, int] | None:
    """Oldest and newest version that sampled an evaluation; None where the record does not say."""
    found = record.metrics.get("eval/version_min"), record.metrics.get("eval/version_max")
    return None if found[0] is None or found[1] is None else (int(found[0]), int(found[1]))


def versions_said(oldest: int, newest: int) -> str:
    """``version 4``, or ``versions 4 to 6``."""
    return f"version {oldest}" if oldest == newest else f"versions {oldest} to {newest}"


class MetricsWriter:
    """Appends records to a metrics file.  Numbers that are not finite are left out and counted.

    A full disk is waited for: records stay in memory, ``MAX_HELD`` of them, and are written when there is space.
    """

    MAX_HELD = 10_000
    """Records that a writer keeps while the disk is full."""

    def __init__(self, path: Path, *, source: str) -> None:
        self.source = source
        self._dropped: Counter[str] = Counter()
        self._path = path
        self._held: deque[bytes] = deque(maxlen=self.MAX_HELD)
        """Lines that the disk has not taken yet, oldest first."""
        self._broken = False
        """The file ends in mid-line: a new one begins with a line break."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd: int | None = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self._fd).st_size
        # A writer died in mid-line: end its line, or the next record is lost with it.
        self._broken = bool(size) and os.pread(self._fd, 1, size - 1) != b"\n"

    def write(
        self, *, step: int, version: int, metrics: Mapping[str, float], time_s: float | None = None, source: str = ""
    ) -> None:
        """Append one record.  ``time_s`` is Unix seconds; now where None.  ``source``: where it is another's."""
        source = source or self.source
        finite: dict[str, float] = {}
        for name, value in metrics.items():
            number = float(value)
            if math.isfinite(number):
                finite[name] = int(number) if number.is_integer() and abs(number) < 2**53 else number
            else:
                self._dropped[source] += 1
        if dropped := self._dropped[source]:
            finite["metrics/dropped"] = dropped
        line = json.dumps(
            {
                "time": round(time.time() if time_s is None else time_s, 3),
                "source": source,
                "step": int(step),
                "version": int(version),
                "metrics": finite,
            },
            separators=(",", ":"),
        )
        if self._fd is None:
            raise ValueError("metrics writer is closed")
        failing = bool(self._held)
        self._held.append(line.encode() + b"\n")
        try:
            self._write_held(self._fd)
        except OSError as exc:
            if not failing:
                log.warning(
                    "%s cannot be written: %s; its records wait in memory, the last %d of them", self._path,
                    exc.strerror, self.MAX_HELD,
                )  # fmt: skip

    def _write_held(self, fd: int) -> None:
        """Raises OSError where the disk refuses; what it has not taken whole stays held."""
        while self._held:
            line = self._held[0]
            data = b"\n" + line if self._broken else line
            written = os.write(fd, data)
            self._broken = written < len(data) if written else self._broken
            if written == len(data):
                self._held.popleft()

    @property
    def dropped(self) -> int:
        """Non-finite values left out so far; also written as ``metrics/dropped``, of each source, once there is one."""
        return self._dropped.total()

    def close(self) -> None:
        """Idempotent."""
        if self._fd is not None:
            with contextlib.suppress(OSError):
                self._write_held(self._fd)
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Aggregator:
    """Collects values between two reports; ``flush`` returns them by name and starts over."""

    def __init__(self) -> None:
        self._means: dict[str, tuple[float, float]] = {}
        self._sums: dict[str, float] = {}
        self._samples: dict[str, list[float]] = {}
        self._gauges: dict[str, float] = {}

    def mean(self, name: str, value: float, weight: float = 1.0) -> None:
        """Weighted mean of the values since the last flush."""
        total, weights = self._means.get(name, (0.0, 0.0))
        self._means[name] = (total + float(value) * weight, weights + weight)

    def add(self, name: str, value: float) -> None:
        """Sum of the values since the last flush."""
        self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def observe(self, name: str, values: Iterable[float]) -> None:
        """Distribution: becomes ``name/mean``, ``name/p95`` and ``name/max``."""
        self._samples.setdefault(name, []).extend(float(v) for v in values)

    def gauge(self, name: str, value: float) -> None:
        """The last value; it survives flushes until it is set again."""
        self._gauges[name] = float(value)

    def flush(self) -> dict[str, float]:
        """Name -> number of everything collected; means without weight and empty distributions are left out."""
        out = dict(self._gauges)
        out.update(self._sums)
        out.update({name: total / weight for name, (total, weight) in self._means.items() if weight})
        for name, values in self._samples.items():
            if values:
                out[f"{name}/mean"] = math.fsum(values) / len(values)
                out[f"{name}/p95"] = quantile(values, 0.95)
                out[f"{name}/max"] = max(values)
        self._means.clear()
        self._sums.clear()
        self._samples.clear()
        return out


def quantile(values: Iterable[float], q: float) -> float:
    """The ``q`` quantile of at least one value, linear between neighbours (numpy's default)."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def parse_record(line: str | bytes) -> Record | None:
    """One line of a metrics file, or None where it is no record (a writer died in mid-line)."""
    try:
        data: Any = json.loads(line)
        return Record(
            time=float(data["time"]),
            source=str(data["source"]),
            step=int(data["step"]),
            version=int(data["version"]),
            metrics={str(k): float(v) for k, v in data["metrics"].items()},
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def read_metrics(path: Path) -> Iterator[Record]:
    """All records of a file in the order written; nothing where the file is missing."""
    yield from MetricsTail(path).new()


def eval_lines(path: Path) -> bytes:
    """The lines of a file that hold the result of an evaluation, as they are: a few, which say what is evaluated."""
    return b"".join(line for line in Tail(path).new() if b'"eval/success"' in line and parse_record(line) is not None)


class MetricsTail:
    """Reads what others append to a metrics file."""

    def __init__(self, path: Path) -> None:
        self._tail = Tail(path)
        self.left_out = 0
        """Lines so far that are no records; empty ones are not counted."""

    def new(self) -> list[Record]:
        """Records written since the last call.  A line not ended yet is left for the next call."""
        lines = [line for line in self._tail.new() if line.strip()]
        records = [record for line in lines if (record := parse_record(line)) is not None]
        self.left_out += len(lines) - len(records)
        return records
