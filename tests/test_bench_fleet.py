"""The benchmark of fleets: a small pool of simulated actors on a real buffer process."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import fleet_actors
from benchmarks.fleet_parts.pool import pool, pool_of


def test_a_pool_makes_as_many_turns_together_as_asked_for_and_does_not_ask_for_leases_at_one_moment() -> None:
    plans = pool_of(50, turns_per_s=100.0, slots=4, turns_per_tree=5)
    assert sum(plan.turns_per_s or 0.0 for plan in plans) == pytest.approx(100.0)
    assert len({plan.begins_s for plan in plans}) == 50
    assert max(plan.begins_s for plan in plans) < 10.0


def test_a_small_pool_is_measured_on_a_real_buffer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--actors", "3", "--processes", "1", "--turns", "5", "--bytes", "256", "--restart", "--no-sync"]
    args = fleet_actors.parse([*flags, "--warm-seconds", "0.2", "--seconds", "0.3"])
    (record,) = pool(args, tmp_path)
    assert record["turns_per_s"] > 0
    assert record["lease_requests"] > 0
    assert record["buffer_us_per_turn"]["loop"] > 0
    assert record["refused"] == 0
    assert record["all_back_after_kill_s"]["heard"] == 3
    assert '"part": "pool"' in capsys.readouterr().out
