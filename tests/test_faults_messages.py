"""Messages that are corrupt, cut short, too large, out of order, late, repeated, contradictory or full of nonsense: the
buffer refuses what is wrong by name, takes what is right once, and its other peers notice nothing."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from atpo_async.core.errors import PeerLost
from atpo_async.core.tree import Turn
from atpo_async.links.client import Client
from atpo_async.wire.messages import BufferToLearner, Trained
from tests.fault_support import WAIT_S, Recovery, Spawner
from tests.scene_support import Hand, Scene, starts_slowly
from tests.scripted_trees_support import Planned

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes through /proc")


@pytest.fixture
async def scene(spawner: Spawner, tmp_path: Path) -> AsyncIterator[Scene]:
    """A buffer and a learner; the actor comes when the test has done its worst."""
    sections = {"links": {"max_message_bytes": 1 << 20}}
    async with Scene(tmp_path / "run", spawner, how={"actors": 1}, proxied=True, sections=sections) as made:
        made.roles.start("buffer", "learner")
        yield made


def turns_of(messages: list[Any]) -> list[Turn]:
    return [message for message in messages if isinstance(message, Turn)]


async def finished(scene: Scene) -> None:
    scene.roles.start("actor-0")
    await scene.ended_well()


@pytest.mark.parametrize("how", ["corrupt", "truncated"])
async def test_bytes_that_change_on_the_way_trouble_nobody_but_their_sender(how: str, scene: Scene) -> None:
    fault = Recovery(
        f"{how} bytes on an actor's link",
        "the connection or the message is refused; the buffer stays up and its other peers notice nothing",
    )
    rng = random.Random(7)
    spoiled = 0

    def mangle(chunk: bytes) -> bytes:
        nonlocal spoiled
        # Greetings are short and left alone: what is spoiled are messages.
        if rng.random() > 0.2 or len(chunk) < 150:
            return chunk
        spoiled += 1
        if how == "truncated":
            return chunk[: len(chunk) // 2]
        at = rng.randrange(len(chunk))
        return chunk[:at] + bytes([chunk[at] ^ 0x41]) + chunk[at + 1 :]

    async with Hand(scene) as good, Hand(scene, "bad", endpoint=scene.actors_proxy.endpoint) as bad:
        lease = await good.lease(of=starts_slowly)
        scene.actors_proxy.up.mangle = mangle
        # Under a lease that is nobody's: a flipped bit in a token is for no one to find.
        strange = [msgspec.structs.replace(turn, lease_epoch=99) for turn in turns_of(good.messages(lease))]
        with contextlib.suppress(PeerLost):
            async with asyncio.timeout(WAIT_S):
                while spoiled < 5:
                    await bad.link.send(strange[spoiled % len(strange)])
                    await asyncio.sleep(0)
        assert spoiled >= 5
        fault.over()
        await good.grow(lease)
        fault.recovered()
        assert not good.refusals
        assert good.link.connected
        scene.actors_proxy.up.mangle = None
        scene.actors_proxy.break_connections()
    # Its successor starts with a clean line, and with whole messages.
    async with Hand(scene, "bad", endpoint=scene.actors_proxy.endpoint) as bad:
        await bad.grow(await bad.lease())
        assert not bad.refusals
    await finished(scene)


async def test_an_oversized_message_never_reaches_the_buffer_and_its_other_peers_go_on(scene: Scene) -> None:
    fault = Recovery(
        "an oversized message", "it is refused before it is read; its sender's connection ends, the others stay up"
    )
    # A sender with a limit of its own, larger than the buffer's.
    async with Hand(scene) as good, Hand(scene, "bad", max_message_bytes=64 << 20) as bad:
        lease = await good.lease(of=starts_slowly)
        size = 1 << 20
        huge = msgspec.structs.replace(
            turns_of(bad.messages(lease))[0],
            action=np.zeros(size, np.int32),
            logprobs=np.zeros(size, np.float32),
        )
        before = scene.resident_mb("buffer")
        await bad.link.send(huge)
        await scene.until(lambda: not bad.link.connected, "the connection to end")
        fault.over()
        await good.grow(lease)
        fault.recovered()
        assert not good.refusals
        assert good.link.connected
        assert scene.resident_mb("buffer") < before + 16
    await finished(scene)


async def test_turns_in_any_order_any_number_of_times_make_the_same_tree(scene: Scene) -> None:
    fault = Recovery(
        "reordered and duplicated messages", "parked until their parents come; repeats are acknowledged, taken once"
    )
    async with Hand(scene) as hand:
        lease = await hand.lease(of=starts_slowly)
        messages = hand.messages(lease)
        last = messages.pop(1)
        rng = random.Random(3)
        shuffled = rng.sample(messages, len(messages))
        fault.over()
        # All but one turn, three times over: the tree is not complete, so nothing is late.
        await hand.send(*shuffled, *shuffled, *reversed(shuffled))
        await hand.send(last)
        fault.recovered()
        # The tree is done: what is the same is still recognised.
        await hand.send(*messages)
        assert not hand.refusals
    await finished(scene)


async def test_a_key_that_comes_again_with_other_bytes_is_refused_and_the_first_stays(scene: Scene) -> None:
    fault = Recovery("the same key with other bytes", "refused as a conflict; what was acknowledged first stays")
    async with Hand(scene) as hand:
        lease = await hand.lease(of=starts_slowly)
        opened, *rest = hand.messages(lease)
        first = turns_of(rest)[0]
        await hand.send(opened, first)
        await hand.send(
            msgspec.structs.replace(first, action=first.action + 1),
            msgspec.structs.replace(first, logprobs=first.logprobs - 1),
            msgspec.structs.replace(first, expansion_round=5),
            msgspec.structs.replace(opened, prompt=np.zeros(3, np.int32)),
        )
        assert len(hand.refusals) == 4
        assert all("other bytes" in r or "another prompt" in r for r in hand.refusals), hand.refusals
        fault.over()
        await hand.send(*rest)
        fault.recovered()
        assert len(hand.refusals) == 4
    await finished(scene)


async def test_what_comes_after_the_end_of_its_tree_is_refused(scene: Scene) -> None:
    fault = Recovery("late messages", "a turn more than the tree was closed with is refused; the tree stays as it was")
    async with Hand(scene) as hand:
        lease = await hand.lease(of=starts_slowly)
        await hand.grow(lease)
        extra = msgspec.structs.replace(turns_of(hand.messages(lease))[-1], turn_id=77)
        fault.over()
        await hand.send(extra)
        assert len(hand.refusals) == 1
        await hand.grow(await hand.lease())
        fault.recovered()
        assert len(hand.refusals) == 1
    await finished(scene)


NONSENSE: dict[str, dict[str, Any]] = {
    "reward NaN": {"reward": float("nan")},
    "reward infinite": {"reward": float("inf")},
    "a leaf without reward": {"reward": None},
    "log-probs NaN": {"logprobs": float("nan")},
    "log-probs infinite": {"logprobs": float("-inf")},
    "log-probs positive": {"logprobs": 0.5},
    "a parent that comes later": {"parent_id": 50},
    "a parent of its own": {"parent_id": -1},
    "a turn id of nothing": {"turn_id": 0},
    "a turn id out of range": {"turn_id": 1 << 40},
    "no action": {"action": np.zeros(0, np.int32), "logprobs": np.zeros(0, np.float32), "spans": ()},
    "tokens below zero": {"action": -1},
    "versions with gaps": {"spans": ()},
    "times that are none": {"generate_s": float("nan")},
}


def leaf_first(plan: Planned) -> bool:
    return plan.kind == "plain" and plan.parts[-1].is_leaf


async def test_numbers_that_are_none_are_refused_by_name_and_never_reach_a_batch(scene: Scene) -> None:
    fault = Recovery(
        "NaN, infinite or impossible rewards, log-probs, ids and versions", "refused by name; the tree stays usable"
    )
    async with Hand(scene) as hand:
        lease = await hand.lease(of=leaf_first)
        messages = hand.messages(lease)
        await hand.send(messages[0])
        good = turns_of(messages)[-1]
        for number, (name, change) in enumerate(NONSENSE.items(), start=1):
            fields = dict(change)
            for array in ("action", "logprobs"):
                if array in fields and not isinstance(fields[array], np.ndarray):
                    fields[array] = np.full_like(getattr(good, array), fields[array])
            await hand.send(msgspec.structs.replace(good, **fields))
            assert len(hand.refusals) == number, f"{name} was taken"
        fault.over()
        await hand.send(*messages[1:])
        fault.recovered()
        assert len(hand.refusals) == len(NONSENSE)
    await finished(scene)


@pytest.mark.parametrize("priority", [float("nan"), float("inf"), -1.0])
async def test_a_priority_that_is_none_is_refused_and_sampling_goes_on(scene: Scene, priority: float) -> None:
    fault = Recovery(f"a priority of {priority}", "refused; the tree keeps the one it had, batches go on")
    refusals: list[str] = []
    scene.roles.start("actor-0")
    await scene.stepped()
    async with Client(
        scene.rundir.read_endpoints().learner,
        peer="buffer",
        identity="learner-1",
        receives=BufferToLearner,
        settings=scene.rundir.config.links,
        on_refused=lambda message, reason: refusals.append(reason),
    ) as link:
        run = scene.rundir.run_id
        await link.send(Trained(run=run, batch_id=1, version=1, priorities={"b1-00000000": priority}))
        await link.drain(timeout_s=WAIT_S)
    assert len(refusals) == 1
    fault.over()
    await scene.recovered(fault)
    await scene.ended_well()
