"""The buffer killed in mid-commit, frozen, on a disk that is full or has errors, under a clock that jumps, and moved to
another address: what it acknowledged is there, and the run goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from atpo_async.core.errors import PeerLost
from atpo_async.core.tree import Turn
from atpo_async.wire.messages import Lease
from tests.fault_support import CLOCK, WAIT_S, Recovery, Spawner, Tricks, until_async
from tests.scene_support import Hand, Scene, begun_by_hand
from tests.scripted_trees_support import hash_of

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes through /proc")


def failing(scene: Scene) -> bool:
    """Whether the buffer's own status says that its journal takes nothing."""
    file = scene.rundir.path / "status" / "buffer.json"
    facts: dict[str, dict[str, str]] = json.loads(file.read_text())["facts"] if file.exists() else {}
    return facts.get("buffer", {}).get("journal failing", "no") != "no"


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_what_was_acknowledged_survives_a_kill_in_mid_commit(
    moment: str, spawner: Spawner, tmp_path: Path
) -> None:
    stop = tmp_path / "stop"
    tricks = Tricks(**{f"stop_{moment}_commit": str(stop)})  # type: ignore[arg-type]
    fault = Recovery(
        f"kill -9 of the buffer {moment} a commit's bytes are on disk",
        "what it acknowledged is there; what it did not is sent again and taken once",
    )
    async with Scene(tmp_path / "run", spawner, how={"actors": 1, "tricks": tricks}) as scene:
        scene.roles.start("buffer", "learner")
        async with Hand(scene) as hand:
            lease, turns, _ = await hand.begin_slow_tree(2)
            stop.touch()
            acked = hand.link.stats.acked
            await hand.link.send(turns[2])
            await scene.until(lambda: scene["buffer"].frozen, "the commit")
            assert hand.link.stats.acked == acked
            scene.roles.kill("buffer")
            fault.over()
            scene.roles.start("buffer")
            await hand.link.drain(timeout_s=WAIT_S)
            fault.recovered()
            assert not hand.refusals
        # Another process of its name: it is told what there is, and all of it was acknowledged.
        async with Hand(scene) as hand:
            (again,) = [each for each in await hand.leases(8) if each.tree_id == lease.tree_id]
            assert again.epoch > lease.epoch
            assert [hash_of(turn) for turn in again.committed] == [
                hash_of(turn) for turn in turns[:3] if isinstance(turn, Turn)
            ]
        scene.roles.start("actor-0")
        await scene.ended_well()


async def test_a_frozen_buffer_goes_on_where_it_stood(spawner: Spawner, tmp_path: Path) -> None:
    fault = Recovery(
        "SIGSTOP of the buffer for longer than its heartbeat, then SIGCONT",
        "links are given up and come back; what was under way is sent again; nothing is done twice",
    )
    async with Scene(tmp_path / "run", spawner, how={"tricks": Tricks(silent_s=0.3)}) as scene:
        scene.roles.start()
        await scene.until(lambda: scene.steps >= 2, "two batches")
        async with Hand(scene) as hand:
            scene["buffer"].freeze()
            await until_async(lambda: not hand.link.connected, "the link to be given up")
            scene["buffer"].thaw()
            fault.over()
            await scene.recovered(fault)
        await scene.ended_well()


async def test_a_full_disk_stops_acknowledgements_loudly_and_space_brings_them_back(
    spawner: Spawner, tmp_path: Path
) -> None:
    fault = Recovery(
        "the journal's disk is full",
        "nothing is acknowledged, the log says so; the buffer stays up, and acknowledges when there is room",
    )
    async with begun_by_hand(tmp_path / "run", spawner) as (scene, hand, begun):
        # The journal's own pages lie behind its first two: no commit finds room, the log still does.
        scene["buffer"].fill_disk(len(scene["buffer"].said().encode()) + 8192)
        for message in (*begun.turns, begun.closed):
            await hand.link.send(message)
        await scene.until(lambda: "cannot be written" in scene["buffer"].said(), "the log to say it")
        await scene.until(lambda: failing(scene), "the buffer's status to say it")
        assert hand.link.stats.acked == begun.acked
        with pytest.raises(PeerLost):
            await hand.link.drain(timeout_s=0.5)
        scene["buffer"].free_disk()
        fault.over()
        await hand.link.drain(timeout_s=WAIT_S)
        fault.recovered()


async def test_io_errors_of_the_journal_stop_acknowledgements_until_they_are_gone(
    spawner: Spawner, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    fault = Recovery(
        "the journal's disk has I/O errors",
        "nothing is acknowledged, the log says so; killed meanwhile, the buffer has what it acknowledged",
    )
    tricks = Tricks(fail_commits=str(broken))
    async with begun_by_hand(tmp_path / "run", spawner, tricks=tricks) as (scene, hand, begun):
        broken.touch()
        await hand.link.send(begun.turns[0])
        await scene.until(lambda: "Input/output error" in scene["buffer"].said(), "the log to say it")
        assert hand.link.stats.acked == begun.acked
        scene.roles.kill("buffer")
        broken.unlink()
        fault.over()
        scene.roles.start("buffer")
        await hand.send(*begun.turns[1:], begun.closed)
        fault.recovered()


async def test_a_slow_disk_delays_leases_and_acknowledgements_and_none_leaves_before_its_commit(
    spawner: Spawner, tmp_path: Path
) -> None:
    slow = tmp_path / "slow"
    fault = Recovery(
        "a commit to the journal's disk takes longer than a request waits",
        "no lease, batch or acknowledgement leaves before it; killed meanwhile, the buffer gave nothing that it forgot",
    )
    tricks = Tricks(slow_commits=str(slow), settle_wait_s=0.05)
    async with begun_by_hand(tmp_path / "run", spawner, tricks=tricks) as (scene, hand, begun):
        slow.touch()
        await hand.link.send(begun.turns[0])
        for _ in range(5):
            assert await hand.leases(3) == ()
        assert hand.link.stats.acked == begun.acked
        scene.roles.kill("buffer")
        slow.unlink()
        fault.over()
        scene.roles.start("buffer")
        await hand.link.drain(timeout_s=WAIT_S)
        fault.recovered()
        # Nothing of what was granted meanwhile was ever out: given now, it is given for the first time.
        granted: tuple[Lease, ...] = ()
        while not granted:
            granted = await hand.leases(3)
        assert {each.epoch for each in granted if each.tree_id != begun.lease.tree_id} <= {0}


@pytest.mark.parametrize("seconds", [3600, -3600])
async def test_a_wall_clock_that_is_moved_by_an_hour_changes_nothing(
    seconds: int, spawner: Spawner, tmp_path: Path
) -> None:
    clock = tmp_path / "clock"
    clock.write_text("0")
    ahead = "forward" if seconds > 0 else "back"
    fault = Recovery(f"the wall clock is moved {ahead} by an hour", "no lease lapses, no task is given up")
    async with Scene(tmp_path / "run", spawner, how={"env": {CLOCK: str(clock)}}) as scene:
        scene.roles.start()
        await scene.until(lambda: scene.steps >= 2, "two batches")
        clock.write_text(str(seconds))
        fault.over()
        await scene.recovered(fault)
        await scene.ended_well()
        assert "lapsed" not in scene.roles.story()


async def test_a_buffer_that_comes_back_at_another_address_is_found_behind_its_name(
    spawner: Spawner, tmp_path: Path
) -> None:
    fault = Recovery(
        "the buffer's machine restarts with a new address",
        "peers that know it by a name find it there, send what was not acknowledged, and the run goes on",
    )
    async with Scene(tmp_path / "run", spawner, proxied=True) as scene:
        scene.roles.start()
        await scene.until(lambda: scene.steps >= 2, "two batches")
        scene.roles.kill("buffer")
        moved = scene.move_buffer()
        scene.roles.start("buffer")
        scene.actors_proxy.target, scene.learner_proxy.target = moved.actors, moved.learner
        fault.over()
        await scene.recovered(fault)
        await scene.ended_well()
