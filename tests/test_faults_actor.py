"""Actors killed in mid-turn, frozen, too late, and back from another address: others go on from their turns."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

from atpo_async.core.tree import Turn
from tests.fault_support import Recovery, Spawner, Tricks
from tests.scene_support import Hand, Scene
from tests.scripted_trees_support import hash_of

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes through /proc")


async def test_the_tree_of_an_actor_killed_in_mid_turn_goes_on_from_its_last_turn(
    spawner: Spawner, tmp_path: Path
) -> None:
    fault = Recovery(
        "kill -9 of an actor in mid-turn",
        "its trees go to others (at once to its successor), who go on from the turns that were committed",
    )
    # Turns that never end in time: whoever is killed is in the middle of one.
    async with Scene(tmp_path / "run", spawner, how={"actors": 2, "turn_s": 0.02}) as scene:
        scene.roles.start()
        await scene.stepped()
        scene.roles.kill("actor-0")
        fault.over()
        scene.roles.start("actor-0")
        await scene.recovered(fault, "actor-0")
        await scene.ended_well()


async def test_a_killed_actor_that_is_not_started_again_has_its_trees_finished_by_others(
    spawner: Spawner, tmp_path: Path
) -> None:
    fault = Recovery("an actor's machine is gone for good", "its leases lapse, and others finish its trees")
    async with Scene(
        tmp_path / "run", spawner, how={"actors": 2, "turn_s": 0.01, "tricks": Tricks(silent_s=0.3)}
    ) as scene:
        scene.roles.start()
        await scene.stepped()
        scene.roles.kill("actor-0")
        fault.over()
        await scene.until(lambda: "lapsed" in scene["buffer"].said(), "its leases to lapse")
        await scene.recovered(fault, "actor-1")
        await scene.ended_well()


async def test_an_actor_that_was_frozen_gives_up_what_others_have_taken_over(spawner: Spawner, tmp_path: Path) -> None:
    fault = Recovery(
        "SIGSTOP of an actor for longer than its heartbeat, then SIGCONT",
        "its leases lapse and go to others; awake again, its late turns are refused and it takes new trees",
    )
    how = {"actors": 2, "turn_s": 0.02, "tricks": Tricks(silent_s=0.3)}
    async with Scene(tmp_path / "run", spawner, how=how) as scene:
        scene.roles.start()
        await scene.stepped()
        scene["actor-0"].freeze()
        await scene.until(lambda: "lapsed" in scene["buffer"].said(), "its leases to lapse")
        scene["actor-0"].thaw()
        fault.over()
        await scene.recovered(fault, "actor-0")
        await scene.ended_well()


async def test_late_turns_of_a_fenced_actor_are_refused_and_its_successor_gets_the_committed_ones(
    spawner: Spawner, tmp_path: Path
) -> None:
    fault = Recovery(
        "an actor comes back after its tree went to another",
        "turns under its old lease are refused by their epoch; the other's tree is untouched",
    )
    how = {"actors": 1, "tricks": Tricks(silent_s=0.3)}
    async with Scene(tmp_path / "run", spawner, how=how) as scene:
        scene.roles.start("buffer", "learner")
        async with Hand(scene, "first") as first:
            lease, turns, closed = await first.begin_slow_tree(2)
            # Another process under its name: what the first held is free at once.
            async with Hand(scene, "second") as second, Hand(scene, "third") as third:
                await first.return_all()
                (mine,) = [each for each in await second.leases(1) if each.tree_id == lease.tree_id]
                assert [hash_of(t) for t in mine.committed] == [hash_of(t) for t in turns[:2] if isinstance(t, Turn)]
                await first.send(turns[2])
                assert len(first.refusals) == 1
                assert "epoch" in first.refusals[0]
                # A stranger may not send under a lease that is not its own either, whatever epoch it names.
                assert isinstance(turns[2], Turn)
                await third.send(msgspec.structs.replace(turns[2], lease_epoch=mine.epoch + 1))
                assert len(third.refusals) == 1
                await first.send(closed)
                assert len(first.refusals) == 2
                fault.over()
                await second.grow(mine)
                fault.recovered()
                assert not second.refusals
        scene.roles.start("actor-0")
        await scene.ended_well()


async def test_an_actor_whose_machine_has_a_new_address_goes_on_under_its_name(
    spawner: Spawner, tmp_path: Path
) -> None:
    fault = Recovery(
        "an actor's machine restarts with a new address",
        "under its name it gets its trees back at once, with the turns that were committed",
    )
    async with Scene(tmp_path / "run", spawner, proxied=True, how={"actors": 1}) as scene:
        scene.roles.start("buffer", "learner")
        async with Hand(scene, endpoint=scene.actors_proxy.endpoint) as before:
            lease, _, _ = await before.begin_slow_tree(2)
            # The old machine is off: its end of the connection never says goodbye.
            scene.actors_proxy.up.hold()
            fault.over()
            async with Hand(scene) as after:
                (again,) = [each for each in await after.leases(8) if each.tree_id == lease.tree_id]
                await after.grow(again)
                fault.recovered()
                assert len(again.committed) == 2
                assert not after.refusals
            before.forget()
        scene.actors_proxy.up.release()
        scene.roles.start("actor-0")
        await scene.ended_well()
