"""The benchmark of fleets: a small pool of simulated actors on a real buffer process."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks import fleet_actors
from benchmarks.fleet_parts.actors import ActorResult
from benchmarks.fleet_parts.pool import pool, pool_of
from benchmarks.fleet_parts.unlike import Learned, actors_of, summary


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


def test_what_came_of_unlike_actors_says_who_was_busy_how_old_turns_were_and_which_tasks_were_lost() -> None:
    args = fleet_actors.parse(["--part", "unlike", "--tasks", "4", "--speed", "10", "--turns", "5"])
    assert [plan.turns_per_s for plan in actors_of(args)] == [10.0, 20.0, 40.0, 80.0, 40.0, 20.0, 20.0]
    learned = Learned(tasks=Counter({0: 1, 1: 2, 3: 1}), lags=[0, 1, 4, 5], batches=2, seconds=2.0)
    slow = ActorResult(name="slow", turns=5, trees=1, worked_s=10.0, idle_s=0.2)
    fast = ActorResult(name="fast", turns=15, trees=3, worked_s=10.0, idle_s=6.0)
    found = summary([slow, fast], learned, args)
    assert (found["tasks_not_trained_on"], found["tasks_trained_on_twice"], found["trees_per_s"]) == (1, 1, 2.0)
    assert (found["lag_mean"], found["lag_max"], found["turns_over_max_lag"]) == (2.5, 5, 0.25)
    assert found["actors"]["slow"] == {"busy": 0.98, "trees": 1, "share": 0.25}
    assert found["actors"]["fast"] == {"busy": 0.4, "trees": 3, "share": 0.75}
