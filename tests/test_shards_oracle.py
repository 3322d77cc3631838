"""Exactly once over shards: scripted runs on a buffer of several shards, whose front and shards are killed as well."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.fault_support import Spawner
from tests.oracle_support import NUM_KILLS, plan_kills, run_oracle

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds out through /proc who stands still"),
    pytest.mark.slow,
]

SEEDS = {4: 3}
"""Seed -> shards."""


@pytest.mark.parametrize(("seed", "shards"), SEEDS.items())
def test_every_task_is_trained_on_as_often_as_intended_whichever_part_of_the_buffer_is_killed(
    seed: int, shards: int, spawner: Spawner, tmp_path: Path
) -> None:
    verdict = run_oracle(tmp_path / "run", spawner, seed=seed, shards=shards)
    assert not verdict.problems, "\n".join(verdict.problems)
    assert sum(verdict.kills[victims] for victims in ("buffer", "shard", "learner", "actor", "all")) == NUM_KILLS


def test_the_kills_of_these_runs_hit_front_and_shards_each_at_a_kill_point_and_in_between() -> None:
    kills = [kill for seed, shards in SEEDS.items() for kill in plan_kills(seed, NUM_KILLS, shards=shards)]
    hit = Counter((kill.victims, bool(kill.point)) for kill in kills)
    assert all(hit[victims, at_point] for victims in ("buffer", "shard") for at_point in (True, False)), hit
