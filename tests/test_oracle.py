"""Exactly once: twenty scripted runs whose roles are killed at chosen and at random moments, each judged at its end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from scripts.kill_points import ask_for, stopped_at
from tests.fault_support import ROOT, Spawner, state_of, until
from tests.oracle_support import NUM_KILLS, plan_kills, run_oracle
from tests.scripted_roles_support import KILL_POINTS
from tests.scripted_trees_support import planned, possible_trees

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds out through /proc who stands still")

SEEDS = range(20)


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.slow] if seed > 3 else []) for seed in SEEDS])
def test_every_task_is_trained_on_as_often_as_intended_whoever_is_killed(
    seed: int, spawner: Spawner, tmp_path: Path
) -> None:
    verdict = run_oracle(tmp_path / "run", spawner, seed=seed)
    assert not verdict.problems, "\n".join(verdict.problems)
    assert sum(verdict.kills[victims] for victims in ("buffer", "learner", "actor", "all")) == NUM_KILLS


def test_the_kills_of_all_seeds_hit_everybody_at_every_kill_point_and_in_between() -> None:
    kills = [kill for seed in SEEDS for kill in plan_kills(seed, NUM_KILLS)]
    victims = Counter(kill.victims for kill in kills)
    assert all(victims[name] >= 10 for name in ("buffer", "learner", "actor", "all")), victims
    # The first one is only passed by a learner that starts: the others' kills make it start often enough.
    assert {kill.point for kill in kills} == {"", *KILL_POINTS[1:]}
    assert {kill.victims for kill in kills if kill.point == "finishing"} == {"buffer", "learner", "all"}


def test_the_script_holds_trees_with_failed_chains_branches_and_nothing_to_learn() -> None:
    plans = [planned(0, task) for task in range(100)]
    assert {plan.kind for plan in plans} == {"plain", "dull", "barren"}
    assert any(plan.failed_branches and plan.kind == "plain" for plan in plans)
    assert any(part.expansion_round for plan in plans for part in plan.parts)
    for task, plan in enumerate(plans):
        whole = [lacking for lacking in possible_trees(0, task).values() if lacking == 0]
        assert len(whole) == (plan.kind != "barren")
        if plan.kind == "plain":
            rewards = [part.reward for part in plan.parts if part.is_leaf]
            assert len(set(rewards[:2])) == 2


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_whole_run_of_the_real_roles_is_exact_though_killed_in_mid_step_and_in_mid_checkpoint(
    hopqa_policy: Path, tmp_path: Path
) -> None:
    words = ["--seeds", "1", "--at", "gradients", "written", "--tasks", "16", "--policy", str(hopqa_policy)]
    run = subprocess.run(
        [sys.executable, ROOT / "scripts" / "oracle.py", *words, "--dir", str(tmp_path / "runs")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 of 1 runs exact" in run.stdout
    assert "killed: all at written 1x, learner at gradients 1x; 2 calls of `atpo train`" in run.stdout


def test_a_driver_stops_a_role_at_the_kill_point_that_it_asked_for_and_at_no_other(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from scripts.kill_points import passes
for point in ("batch", "gradients", "written"):
    print(point, flush=True)
    passes(Path({str(tmp_path)!r}), point)
"""
    ask_for(tmp_path, "gradients")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) as role:
        until(lambda: stopped_at(tmp_path) and state_of(role.pid) == "T", "the role to stand still")
        role.kill()
        said, _ = role.communicate()
    assert said.split() == ["batch", "gradients"]
    assert stopped_at(tmp_path) == "gradients"
