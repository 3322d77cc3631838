"""Runs on a Ray cluster of three nodes and a head, all in this machine: placed, attached to, each node lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from atpo_async.cli.main import main
from scripts.oracle_run import judge
from tests.ray_cluster_support import Nodes, RayRun, run_on

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.fleet,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

TASKS, OPEN = 56, 36
"""Those from the second number on wait until every node was lost."""
PLACES = {
    "ray.buffer.resources.journal": 1.0,
    "ray.learner.resources.learn": 1.0,
    "ray.actor.resources.act": 1.0,
    "ray.buffer.num_cpus": 0.5,
    "ray.learner.num_cpus": 0.5,
    "ray.actor.num_cpus": 0.5,
}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    before = dict(os.environ)
    found = Nodes()
    try:
        for resource in ("journal", "learn", "act"):
            found.add(resource)
        yield found
    finally:
        found.end()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def run(tmp_path: Path, hopqa_policy: Path, nodes: Nodes) -> Iterator[RayRun]:
    options = {
        **PLACES,
        "ray.learner.dir": str(tmp_path / "replicas"),
        "buffer.lease_lifetime_s": 3.0,
        "learner.checkpoint_url": f"file://{tmp_path}/checkpoints",
    }
    settings = {"num_tasks": TASKS, "open_tasks": OPEN, "options": options}
    with run_on(tmp_path, hopqa_policy, nodes.address, **settings) as made:
        yield made


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What ``atpo`` says when it refuses a command with what its user can mend."""
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_is_refused_before_anything_starts(run: RayRun, capsys: pytest.CaptureFixture[str]) -> None:
    train = ("train", run.config, "--on", "ray")
    said = refused(capsys, *train, "--ray.actor.num_gpus", "4")
    assert "an actor needs 0.5 CPU, 4 GPU, 1 act on one node, and none can ever have that: " in said
    assert "has 2 CPU, " in said
    said = refused(capsys, *train, "--ray.buffer.node", "192.0.2.200")
    assert "no node of the cluster is the one for the buffer and the run's folder (journal, node 192.0.2.200)" in said
    said = refused(capsys, *train, "--ray.address", "127.0.0.1:1")
    assert "there is no Ray cluster at ray.address = '127.0.0.1:1': Connection refused" in said
    said = refused(capsys, "status", f"ray://{run.config.stem}")
    assert "there is no Ray cluster" in said or "no run run is going on" in said
    assert not run.path.exists()


def test_every_node_is_lost_and_comes_back_and_the_run_is_exact(
    run: RayRun, nodes: Nodes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = run.train()
    run.until(lambda: run.steps() >= 2, "the first steps")
    _look_from_outside(run, nodes, capfd)
    first.kill()  # the driver alone: the run goes on
    first.wait()
    driver = run.train()
    run.until(lambda: "run run is going on; attached to it" in run.said(), "a second driver")

    nodes.lose("act")
    nodes.lose("learn")
    shutil.rmtree(tmp_path / "replicas")  # with its disk
    waits = "waits for a place on the cluster (0.5 CPU, 1"
    run.until(lambda: f"actor-0 {waits} act)" in run.said(), "the actor's wait")
    run.until(lambda: f"learner {waits} learn)" in run.said(), "the learner's wait")
    steps = run.steps()
    nodes.add("learn")
    nodes.add("act")
    run.until(lambda: run.steps() > steps, "a step after both were lost")

    nodes.lose("journal")
    run.until(lambda: "the supervisor of run run is out of reach" in run.said(), "the supervisor's loss")
    steps = run.steps()
    nodes.add("journal")
    run.until(lambda: run.attempts("buffer") == 2, "another start of the buffer")
    run.until(lambda: "the supervisor has started again, and goes on with the run" in run.said(), "its own line")
    run.until(lambda: run.steps() > steps, "a step after the supervisor was lost")
    _stop_and_go_on(run, driver)

    story = run.story()
    for line in ("actor-0 ended: node ", "learner ended: node ", "is gone; starting it again", "actor-0 has its place"):
        assert line in story
    assert "crashed" not in story
    outcome = judge(run.path, num_tasks=TASKS, max_uses=1)
    assert not outcome.problems, outcome.problems
    assert (run.path / "report.html").is_file()
    assert (run.path / "model" / "config.json").is_file()
    assert not (run.path / "scratch" / "keys").exists()


def _look_from_outside(run: RayRun, nodes: Nodes, capfd: pytest.CaptureFixture[str]) -> None:
    """The screen of ``atpo status``, and a second run of that name."""
    assert main(["status", f"ray://{nodes.address}/run"]) == 0
    screen = capfd.readouterr().out
    assert f"run {run.path} (" in screen
    assert "running, supervised by process" in screen
    for role in ("buffer", "learner", "actor-0"):
        assert any(line.startswith(f"{role} ") and " runs " in line for line in screen.splitlines()), screen
    assert "joined by address" not in screen  # they are the run's own
    assert main(["train", str(run.config), "--on", "ray", "--learner.lr", "0.5"]) == 2
    assert (
        "a run run is going on in the namespace atpo with another configuration: learner.lr is"
        in capfd.readouterr().err
    )


def _stop_and_go_on(run: RayRun, driver: subprocess.Popen[bytes]) -> None:
    """Ctrl-C once, then the same command."""
    driver.send_signal(signal.SIGINT)
    assert run.exit_code(driver) == 130
    assert "stopping; Ctrl-C again ends everything at once" in run.said()
    assert "no process is left.  Saved: step " in run.said()
    run.open_gate()
    assert run.exit_code(run.train()) == 0, run.story()
    assert "(goes on; " in run.said()
    assert "done in " in run.said()
