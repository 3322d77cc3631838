"""A tree whose turns are refused for what is in them counts as lost, and does not come back for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from atpo_async.core.tree import Turn
from atpo_async.wire.messages import ActorReport, Exhausted, Lease, LeaseReturned
from tests.buffer_peers_support import (
    SOON_S,
    Peers,
    ask,
    closed,
    configured,
    inner,
    leaf,
    limited,
    opened,
    published,
    running,
)

CONFIG: dict[str, Any] = {
    "run": {"max_tasks": 1},
    "staleness": {"trees_per_batch": 1, "max_lag": 8},
    "buffer": {"max_reissues": 2},
}


def other_bytes(lease: Lease) -> Turn:
    return inner(lease, 1, tokens=4)


def child_of_a_leaf(lease: Lease) -> Turn:
    return leaf(lease, 3, 0.0, parent_id=2)


def no_number(lease: Lease) -> Turn:
    """Refused before anybody sees a turn of a tree in it: its sender alone knows of which it was."""
    return leaf(lease, 3, float("nan"))


async def returned(peers: Peers, lease: Lease, reason: str = "") -> None:
    await peers.send(LeaseReturned(run="r", actor="a", tree_ids=(lease.tree_id,), reason=reason))


@pytest.mark.parametrize("bad", [other_bytes, child_of_a_leaf, no_number])
async def test_a_task_whose_turns_are_refused_each_time_is_given_up_with_the_reason(
    bad: Callable[[Lease], Turn], caplog: pytest.LogCaptureFixture
) -> None:
    async with running(configured(**CONFIG)) as peers:
        await peers.tell(published())
        for attempt in range(3):
            (lease,) = await peers.leases(1)
            assert (lease.task_index, lease.epoch) == (0, attempt)
            if not attempt:
                await peers.send(opened(lease), inner(lease, 1), leaf(lease, 2, 1.0))
            await peers.send(bad(lease))
            assert len(peers.refusals) == attempt + 1
            await returned(peers, lease, reason=peers.refusals[-1])
        assert await peers.leases(1) == ()
        assert peers.service.state.ledger.tasks.given_up == 1
        over = await peers.learner.request(ask(num_trees=1), timeout_s=SOON_S)
        assert isinstance(over, Exhausted)
        assert over.reason.endswith("1 given up")
        (given_up,) = [line for line in caplog.messages if line.startswith("task 0 given up: ")]
        assert given_up.endswith(f"lost 3 holders, the last as it was refused: {peers.refusals[-1]}")


async def test_a_holder_that_hands_a_refused_tree_back_without_a_reason_counts_as_well() -> None:
    async with running(configured(**CONFIG)) as peers:
        await peers.tell(published())
        for _ in range(3):
            (lease,) = await peers.leases(1)
            await peers.send(inner(lease, 1, tokens=3 + lease.epoch), inner(lease, 1, tokens=9))
            await returned(peers, lease)
        assert await peers.leases(1) == ()


async def test_a_tree_closed_without_all_its_turns_that_its_holder_forgets_counts_too() -> None:
    async with running(configured(**CONFIG)) as peers:
        await peers.tell(published())
        for _ in range(3):
            (lease,) = await peers.leases(1)
            await peers.send(closed(lease, 2))
            for _ in range(3):
                await peers.send(ActorReport(run="r", actor="a", version=0, tree_ids=(), metrics={}))
        assert await peers.leases(1) == ()


async def test_late_turns_of_an_earlier_lease_count_for_nothing() -> None:
    async with running(configured(**CONFIG)) as peers:
        await peers.tell(published())
        (first,) = await peers.leases(1)
        await returned(peers, first)
        for epoch in range(1, 9):
            (lease,) = await peers.leases(1)
            assert lease.epoch == epoch
            await peers.send(leaf(first, epoch, 1.0))
            assert f"epoch {epoch}, this comes from epoch 0" in peers.refusals[-1]
            await returned(peers, lease)


def test_two_good_leaves_of_a_refused_tree_are_used() -> None:
    state = limited(2)
    (lease,) = state.lease("a", 9, 0.0).leases
    for message in (opened(lease), leaf(lease, 1, 1.0), leaf(lease, 2, 0.0)):
        state.take(message, 0.0)
    assert state.returned("a", [lease.tree_id], "its turn 3 is not for us")
    assert lease.tree_id in state.pool
