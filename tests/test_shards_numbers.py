"""What the front and its shards know of one another's leases while the disk is waited for, and of actors that move."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from atpo_async.wire.messages import Leases, Welcome
from buffer.front import messages as f
from tests.buffer_peers_support import SOON_S, ask, hello, wants
from tests.shards_support import cluster_of, sharded
from tests.waiting_support import until


async def test_the_numbers_before_a_batch_have_the_leases_that_were_granted_while_the_disk_was_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster_of(sharded(), tmp_path) as peers:
        service = peers.cluster.shards[0]
        settle = service.journal.settle

        async def settle_later(**how: Any) -> None:
            assert service.state.lease("b", 1, 0.0).leases
            await settle(**how)

        monkeypatch.setattr(service.journal, "settle", settle_later)
        link = peers.cluster.front.shards.links[0]
        prepared = await link.ask(f.Prepare(front=1, request=ask()), f.Prepared, timeout_s=SOON_S)
        assert prepared.state.under_lease == 1


async def test_a_request_that_waits_ends_when_its_actor_goes_on_under_another_name(tmp_path: Path) -> None:
    async with cluster_of(sharded(links={"deadline_s": 4 * SOON_S}), tmp_path) as peers:
        config = peers.cluster.config
        first = await peers.actor.request(hello(config), timeout_s=SOON_S)
        assert isinstance(first, Welcome)
        await peers.leases(config.staleness.max_trees_pending)
        waiting = asyncio.create_task(peers.actor.request(wants(1), timeout_s=SOON_S))
        queue = peers.cluster.front._actors._queue
        await until(lambda: len(queue) == 1)
        async with peers.another("relay-1/a") as other:
            moved = await other.request(hello(config, continues="a", ticket=first.ticket), timeout_s=SOON_S)
        assert isinstance(moved, Welcome)
        assert len(queue) == 0
        answer = await waiting
        assert isinstance(answer, Leases)
        assert answer.leases == ()
