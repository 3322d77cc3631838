"""A whole run whose learner, on two machines, and whose actor see nothing of the run's folder: a machine is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from atpo_async.models.policy import steps_trained
from atpo_async.report.facts import facts
from atpo_async.report.tree_samples import read_tree_samples
from atpo_async.run.metrics import read_metrics
from atpo_async.run.rundir import RunDir
from scripts.oracle_run import Run, judge
from tests.joined_support import environment_of

pytestmark = [
    pytest.mark.fleet,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds a machine's processes through /proc"),
    pytest.mark.slow,
]
TASKS = 24


def of_machine(run: Run, index: int) -> list[int]:
    """The learner's processes of one machine."""
    return [pid for pid in run.processes_of("learner") if environment_of(pid).get("GROUP_RANK") == str(index)]


def of_all_ranks(run: Path, seen: Path) -> Path:
    """A folder for the judge: what a step's ranks were trained on as one line, and the step of the last checkpoint."""
    (seen / "joined").mkdir(parents=True)
    for file in ("run.json", "config.json", "joined/checkpoint.json"):
        shutil.copy(run / file, seen / file)
    steps: dict[tuple[int, int], dict[str, Any]] = {}
    for text in (run / "lineage.jsonl").read_text().splitlines():
        line = json.loads(text)
        if "starts_at" not in line:
            of_step = steps.setdefault((line["step"], line["version"]), {**line, "trees": [], "ranks": []})
            of_step["trees"] += line["trees"]
            of_step["ranks"].append(line["rank"])
    # Of a step that is done again the lost machine's line may be missing: it had not arrived.
    assert all(len(set(line["ranks"])) == len(line["ranks"]) for line in steps.values()), "no line twice"
    (seen / "lineage.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps.values()))
    return seen


@pytest.mark.timeout(200)
def test_a_machine_of_the_learner_is_lost_with_all_its_files_and_the_run_is_exact(
    hopqa_policy: Path, tmp_path: Path
) -> None:
    far, url = tmp_path / "far", tmp_path / "url"
    run = Run(
        tmp_path / "job",
        hopqa_policy,
        seed=1,
        engine="transformers",
        num_tasks=TASKS,
        max_uses=1,
        options={
            "supervisor.launcher": "tests.joined_support:JoinedLauncher",
            "supervisor.launcher_options.config": str(tmp_path / "job" / "run.toml"),
            "supervisor.launcher_options.folder": str(far),
            "supervisor.launcher_options.machines": 2,
            "learner.num_processes": 2,
            "learner.checkpoint_url": f"file://{url}",
            "supervisor.hang_s": 60.0,
            "supervisor.max_restarts": 2,
            "eval.every_steps": 2,
            "eval.num_tasks": 2,
        },
    )
    try:
        run.start()
        assert run.until(lambda: len(run.lineage()) >= 6, "three steps of both ranks"), run.story()
        for pid in of_machine(run, 1):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(far)
        run.until(lambda: run.code is not None, "the end of the run")
    finally:
        run.close()
    assert run.code == 0, run.story()
    assert "learner ended: " in run.said()
    found = RunDir.open(run.path)
    verdict = judge(of_all_ranks(run.path, tmp_path / "seen"), num_tasks=TASKS, max_uses=1)
    assert not verdict.problems, "\n".join(verdict.problems)
    assert verdict.steps == steps_trained(found) == TASKS // 4
    # What is read of a run on one machine is all there.
    assert (found.path / "model" / "config.json").is_file()
    assert (url / found.run_id / "model.json").is_file()
    assert {int(r.step) for r in read_metrics(found.metrics_path) if "train/loss" in r.metrics} == set(range(1, 7))
    assert {r.step for r in read_metrics(found.metrics_path) if "eval/success" in r.metrics} >= {2, 4}
    assert read_tree_samples(found.trees_path)
    assert facts(found).lines()
    assert not list(found.checkpoints.iterdir()), "the learner had no way to this folder"
