"""The learner killed in mid-step and in mid-checkpoint, frozen, and slow: nothing is trained on twice or skipped."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from atpo_async.run.metrics import read_metrics
from tests.fault_support import Recovery, Spawner
from tests.scene_support import Scene
from tests.scripted_roles_support import STOP_AT, STOPPED_AT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes through /proc")

MOMENTS = {
    "batch": "with a batch in hand",
    "numbered": "in mid-step, its version number taken",
    "told": "after a step that no checkpoint holds",
    "aside": "in mid-checkpoint, before it is in place",
    "renamed": "in mid-checkpoint, before the buffer knows of it",
}


@pytest.mark.parametrize("point", MOMENTS)
async def test_a_learner_killed_at_any_point_goes_on_from_its_checkpoint(
    point: str, spawner: Spawner, tmp_path: Path
) -> None:
    fault = Recovery(
        f"kill -9 of the learner {MOMENTS[point]}",
        "batches after its checkpoint are undone in the ledger and served again, no version number comes twice",
    )
    # Three batches to a checkpoint: there is always something to be undone.
    async with Scene(tmp_path / "run", spawner, how={"checkpoint_every": 3}) as scene:
        scene.roles.start()
        await scene.stepped(4)
        folder = scene.rundir.path
        (folder / STOP_AT).write_text(point)
        scene.allow(scene.steps + 4)
        await scene.until(lambda: (folder / STOPPED_AT).exists() and scene["learner"].frozen, f"kill point {point}")
        scene.roles.kill("learner")
        fault.over()
        scene.roles.start("learner")
        await scene.recovered(fault)
        await scene.ended_well()


async def test_a_frozen_learner_goes_on_where_it_stood(spawner: Spawner, tmp_path: Path) -> None:
    fault = Recovery(
        "SIGSTOP of the learner for longer than its heartbeat, then SIGCONT",
        "actors fill the buffer and wait; awake again it trains on",
    )
    async with Scene(tmp_path / "run", spawner) as scene:
        scene.roles.start()
        await scene.stepped(2)
        scene["learner"].freeze()
        # As long as its link may be silent, and while there is nothing left to do for the others.
        await scene.until(lambda: "forgets learner" in scene["buffer"].said() or idle(scene), "the others to wait")
        scene["learner"].thaw()
        fault.over()
        await scene.recovered(fault)
        await scene.ended_well()


def idle(scene: Scene) -> bool:
    """Whether every actor has reported at least ten times since that it grows nothing."""
    records = [r for r in read_metrics(scene.rundir.metrics_path) if r.source.startswith("actor")]
    last: dict[str, list[float]] = {}
    for record in records:
        last.setdefault(record.source, []).append(record.metrics.get("actor/trees_in_flight", -1.0))
    return len(last) == 2 and all(each[-15:] == [0.0] * 15 for each in last.values())


@pytest.mark.slow
async def test_a_slow_learner_makes_actors_wait_and_the_buffer_stays_small(spawner: Spawner, tmp_path: Path) -> None:
    fault = Recovery(
        "a learner that takes no batch",
        "admission closes: trees and bytes in the buffer stay bounded, actors wait without polling it to death",
    )
    async with Scene(tmp_path / "run", spawner, num_tasks=120, allowed=1) as scene:
        scene.roles.start()
        await scene.until(lambda: scene.steps >= 1, "a batch")
        await scene.until(lambda: idle(scene), "the actors to wait")
        staleness = scene.rundir.config.staleness
        grown = {r.step: r for r in read_metrics(scene.rundir.metrics_path) if r.source == "buffer"}
        before = scene.resident_mb("buffer")
        fault.over()
        await scene.recovered(fault)
        await scene.until(lambda: idle(scene), "the actors to wait again")
        assert scene.resident_mb("buffer") < before + 32
        pending = [r.metrics.get("buffer/trees", 0.0) for r in grown.values()]
        assert all(trees <= staleness.max_trees_pending for trees in pending)
        await scene.ended_well()
