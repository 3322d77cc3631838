"""Metrics: kinds, the file, and what a reader makes of broken lines."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atpo_async.run.metrics import Aggregator, MetricsTail, MetricsWriter, quantile, read_metrics


def test_a_record_is_one_line_with_the_agreed_fields(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path, source="learner") as writer:
        writer.write(step=3, version=4, metrics={"train/loss": 0.5, "buffer/trees": 12}, time_s=1000.25)
    assert json.loads(path.read_text()) == {
        "time": 1000.25, "source": "learner", "step": 3, "version": 4,
        "metrics": {"train/loss": 0.5, "buffer/trees": 12},
    }  # fmt: skip


def test_numbers_that_are_not_finite_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path, source="x") as writer:
        writer.write(step=0, version=0, metrics={"a": math.nan, "b": math.inf, "c": 1.0})
    assert writer.dropped == 2
    (record,) = read_metrics(path)
    assert record.metrics == {"c": 1.0, "metrics/dropped": 2}


def test_several_writers_append_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path, source="a") as a, MetricsWriter(path, source="b") as b:
        for step in range(3):
            a.write(step=step, version=0, metrics={"x": step})
            b.write(step=step, version=0, metrics={"x": step})
    assert [(r.source, r.step) for r in read_metrics(path)] == [(s, i) for i in range(3) for s in "ab"]


def test_a_line_torn_by_a_crash_costs_no_other_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path, source="a") as writer:
        writer.write(step=0, version=0, metrics={})
    with path.open("ab") as file:
        file.write(b'{"time": 1, "sour')
    with MetricsWriter(path, source="a") as writer:
        writer.write(step=1, version=0, metrics={})
    assert [r.step for r in read_metrics(path)] == [0, 1]


def test_a_tail_gives_each_record_once_and_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.new() == []
    with MetricsWriter(path, source="a") as writer:
        writer.write(step=0, version=0, metrics={})
        assert [r.step for r in tail.new()] == [0]
        assert tail.new() == []
        line = path.read_bytes().replace(b'"step":0', b'"step":1')
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.write(fd, line[:20])
        assert tail.new() == []
        os.write(fd, line[20:])
        os.close(fd)
        assert [r.step for r in tail.new()] == [1]


def test_kinds_are_collected_as_their_names_say() -> None:
    kinds = Aggregator()
    kinds.mean("m", 1.0)
    kinds.mean("m", 4.0, weight=2.0)
    kinds.add("s", 2)
    kinds.add("s", 3)
    kinds.observe("d", [1, 2, 3])
    kinds.observe("d", [10])
    kinds.gauge("g", 7)
    kinds.gauge("g", 8)
    assert kinds.flush() == {
        "m": 3.0, "s": 5.0, "g": 8.0, "d/mean": 4.0, "d/p95": pytest.approx(8.95), "d/max": 10.0,
    }  # fmt: skip


def test_after_a_flush_only_gauges_stay() -> None:
    kinds = Aggregator()
    kinds.mean("m", 1.0)
    kinds.add("s", 1.0)
    kinds.observe("d", [1.0])
    kinds.gauge("g", 1.0)
    kinds.flush()
    assert kinds.flush() == {"g": 1.0}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_quantiles_are_numpys(values: list[float], q: float) -> None:
    assert quantile(values, q) == pytest.approx(float(np.quantile(values, q)), abs=1e-6)
