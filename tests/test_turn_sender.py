"""An actor's turns go straight to the shard of a tree where it can be reached, and through the buffer where not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from actors.turns import sender as senders
from actors.turns.sender import TurnSender
from atpo_async.core.naming.shards import shard_of
from tests.buffer_peers_support import SOON_S
from tests.shards_support import ShardPeers, cluster_of, sharded
from tests.test_shards import ready, uneven
from tests.waiting_support import LIMIT_S, until


def sender(peers: ShardPeers) -> TurnSender:
    return TurnSender(run="r", name="a", config=peers.cluster.config, buffer=peers.actor)


def handled_directly(peers: ShardPeers) -> list[int]:
    """Messages of this actor that each shard took from it without the front."""
    found = []
    for service in peers.cluster.shards.values():
        status = service.actors.link_status()
        found.append(sum(peer["handled"] for peer in status["peers"] if peer["peer"] == "a"))
    return found


async def test_each_tree_goes_to_its_shard_once_that_has_answered(tmp_path: Path) -> None:
    async with cluster_of(sharded(), tmp_path) as peers, sender(peers) as turns:
        leases = await peers.leases(2)
        turns.learn(leases.shards)
        await until(lambda: turns.num_direct == 2)
        for lease in leases.leases:
            for message in uneven(lease):
                await turns.send(message)
        await ready(peers, 2)
        assert handled_directly(peers) == [4, 4]
        assert turns.waited_s == 0.0


async def test_a_tree_keeps_the_way_that_it_began_on(tmp_path: Path) -> None:
    async with cluster_of(sharded(), tmp_path) as peers, sender(peers) as turns:
        leases = await peers.leases(2)
        first, second = sorted(leases.leases, key=lambda lease: lease.task_index)
        begun, *rest = uneven(first)
        await turns.send(begun)  # before any shard is known
        turns.learn(leases.shards)
        await until(lambda: turns.num_direct == 2)
        for message in (*rest, *uneven(second)):
            await turns.send(message)
        await ready(peers, 2)
        assert handled_directly(peers) == [0, 4]


async def test_what_a_shard_refuses_is_told_as_what_the_buffer_refuses(tmp_path: Path) -> None:
    async with cluster_of(sharded(), tmp_path) as peers, sender(peers) as turns:
        leases = await peers.leases(1)
        turns.learn(leases.shards)
        await until(lambda: turns.num_direct == 2)
        opened, turn, *_ = uneven(leases.leases[0])
        for message in (opened, turn, msgspec.structs.replace(turn, reward=0.5)):
            await turns.send(message)
        await until(lambda: len(peers.refusals) == 1)
        assert "turn 1" in peers.refusals[0]


async def test_where_a_shard_cannot_be_reached_its_trees_go_through_the_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(senders, "KNOCK_S", 0.2)
    async with cluster_of(sharded(), tmp_path) as peers, sender(peers) as turns:
        leases = await peers.leases(2)
        turns.learn(["tcp://127.0.0.1:9", "", *leases.shards])  # nothing listens there; one is not known
        for lease in leases.leases:
            for message in uneven(lease):
                await turns.send(message)
        await peers.actor.drain(timeout_s=SOON_S)
        await ready(peers, 2)
        assert handled_directly(peers) == [0, 0]
        assert not turns.is_cut_off


async def test_a_shard_that_was_started_again_elsewhere_is_found_there(tmp_path: Path) -> None:
    config = sharded(links={"heartbeat_s": 0.1})
    async with cluster_of(config, tmp_path) as peers, sender(peers) as turns:
        leases = await peers.leases(2)
        turns.learn(leases.shards)
        await until(lambda: turns.num_direct == 2)
        lease = next(each for each in leases.leases if shard_of(each.tree_id) == 1)
        opened, *rest = uneven(lease)
        await turns.send(opened)
        await peers.cluster.end("shard 1")
        await until(lambda: turns.is_cut_off)
        for message in rest:
            await turns.send(message)
        await peers.cluster.start_shard(1)
        await peers.cluster.heard()
        async with asyncio.timeout(LIMIT_S):
            # The front may not know yet that the former one is gone: an actor hears it with every answer.
            while peers.cluster.front.shards.total("ready") != 1:
                turns.learn((await peers.leases(0)).shards)
        await until(lambda: not turns.is_cut_off)
        assert handled_directly(peers)[1] > 0
