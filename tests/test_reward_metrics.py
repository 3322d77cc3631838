"""Metrics of the named parts of a reward and of what turns earn of their own; trees whose signal is in the latter."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from atpo_async.core.tree import Turn
from atpo_async.wire.messages import Batch, Lease, NotYet
from buffer.state import BufferState
from buffer.trees.parts import MOST_NAMES
from tests.buffer_peers_support import (
    ask,
    closed,
    configured,
    grown,
    inner,
    leaf,
    opened,
    published,
    running,
    state,
    stateful,
    take,
)
from tests.buffer_support import Disk
from tests.test_evaluations import asked, eval_leases

__all__ = ["state"]


def paid(turn: Turn, turn_reward: float) -> Turn:
    return msgspec.structs.replace(turn, turn_reward=turn_reward)


def below(lease: Lease, turn_id: int, parent_id: int, reward: float, **changes: Any) -> Turn:
    return leaf(lease, turn_id, reward, parent_id=parent_id, **changes)


def training(state: BufferState, count: int = 1) -> tuple[Lease, ...]:
    return state.lease("a", count, 0.0).leases


def means(state: BufferState) -> dict[str, float]:
    found = state.counters.since.means
    return {name: total / number for name, (total, number) in found.items()}


def test_a_named_part_is_averaged_over_the_leaves_that_have_it_as_rewards_are(state: BufferState) -> None:
    first, second = training(state, 2)
    # One turn forks into two leaves, another is a leaf: branch probabilities 1/4, 1/4, 1/2.
    turns = [
        inner(first, 1),
        below(first, 2, 1, 1.0, rewards={"exact": 1.0, "format": 0.0}),
        below(first, 3, 1, 0.0, rewards={"exact": 0.0}),
        leaf(first, 4, 0.0, rewards={"exact": 0.5, "format": 1.0}),
    ]
    take(state, [opened(first), *turns, closed(first, 4)])
    assert means(state)["train/reward"] == 0.25
    assert means(state)["reward/exact"] == 0.25 * 1.0 + 0.5 * 0.5
    assert means(state)["reward/format"] == pytest.approx((0.5 * 1.0) / (0.25 + 0.5))
    take(state, grown(second, (1.0, 0.0), rewards={"exact": 0.0}))
    assert means(state)["reward/exact"] == 0.25
    assert means(state)["reward/format"] == pytest.approx(2 / 3)


def test_parts_of_a_tree_that_began_before_the_buffer_was_started_anew_count_too() -> None:
    disk, config = Disk(), configured()
    state = disk.open(config)
    state.publish(published())
    (lease,) = training(state)
    messages = grown(lease, (1.0, 0.0), rewards={"exact": 0.75})
    take(state, messages[:2])
    disk.commit()
    state = disk.open(config)
    take(state, messages[2:])
    assert means(state)["reward/exact"] == 0.75


async def test_names_without_end_are_metrics_up_to_a_number_and_those_left_out_are_counted() -> None:
    async with running(configured(staleness={"trees_per_batch": 8, "max_lag": 1, "max_oversampling": 1.0})) as peers:
        await peers.tell(published())
        for number, lease in enumerate(await peers.leases(8)):
            await peers.send(*grown(lease, rewards={f"task {number}, part {i}": 1.0 for i in range(16)}))
        metrics = (await peers.batch(ask(num_trees=8))).metrics
    assert sum(name.startswith("reward/") for name in metrics) == MOST_NAMES
    assert metrics["buffer/reward_names_left_out"] == 8 * 16 - MOST_NAMES


def test_an_evaluation_gives_each_part_of_its_rewards_also_after_a_restart() -> None:
    disk, config = Disk(), configured()
    state = disk.open(config)
    state.publish(published())
    state.evaluate(asked(num_tasks=3))
    first, second, third = eval_leases(state, 3)
    take(state, grown(first, (1.0,), rewards={"exact": 1.0, "judge": 0.5}))
    take(state, grown(second, (0.0,), rewards={"exact": 0.0}))
    disk.commit()
    state = disk.open(config)
    take(state, grown(third, (0.0,)))
    ((_, _, metrics),) = state.drain_records()
    assert (metrics["eval/reward/exact"], metrics["eval/reward/judge"]) == (0.5, 0.5)
    assert not any(name.startswith("reward/") for name in means(state))


def test_a_held_out_task_that_cannot_be_judged_is_unknown_and_no_failure(state: BufferState) -> None:
    state.evaluate(asked(num_tasks=3))
    right, unjudged, failed = eval_leases(state, 3)
    take(state, grown(right, (1.0,)))
    take(state, [opened(unjudged), closed(unjudged, 0, failed=1, why="not_judged")])
    take(state, [opened(failed), closed(failed, 0, failed=1)])
    result = state.eval_result(0)
    assert (result.done, result.success, result.num_unknown) == (True, 0.5, 1)
    assert state.drain_records() == [(0, 0, {"eval/failed": 1.0, "eval/unknown": 1.0, "eval/turns_mean": 1.0})]


async def test_what_turns_earn_is_a_metric_of_its_own_from_the_first_that_does() -> None:
    async with running(configured(staleness={"trees_per_batch": 1, "max_lag": 1, "max_oversampling": 1.0})) as peers:
        await peers.tell(published())
        first, second = await peers.leases(2)
        await peers.send(*grown(first, (1.0, 0.0)))
        before = await peers.batch(ask(num_trees=1))
        # Chains with 0.5 - 0.25 and with 0.
        turns = [paid(inner(second, 1), 0.5), below(second, 2, 1, 1.0, turn_reward=-0.25), leaf(second, 3, 1.0)]
        await peers.send(opened(second), *turns, closed(second, 3))
        after = await peers.batch(ask(step=1, num_trees=1))
    assert "train/turn_reward" not in before.metrics
    assert after.metrics["train/turn_reward"] == 0.125
    assert after.metrics["train/reward"] == 1.0


# --- signal ------------------------------------------------------------------------------------------------------


def test_equal_outcomes_with_different_rewards_of_turns_are_a_tree_to_learn_from() -> None:
    state = stateful(configured(credit={"normalise_leaves": False}))
    first, second = training(state, 2)
    take(state, [opened(first), leaf(first, 1, 1.0), leaf(first, 2, 1.0, turn_reward=-0.5), closed(first, 2)])
    take(state, grown(second, (1.0, 1.0), turn_reward=-0.5))
    assert state.pool.ready_ids() == [first.tree_id]
    assert state.counters.tasks["no_signal"] == 1
    tree = state.pool.find(first.tree_id)
    assert tree is not None
    # Values 1 and 0.5, mixed from their largest and their mean.
    share = configured().buffer.priority_max_share
    assert state.pool.snapshot(first.tree_id).priority == share * 1.0 + (1 - share) * 0.75  # type: ignore[union-attr]
    np.testing.assert_array_equal(tree.arrays().turn_reward, [0.0, -0.5])


async def test_a_batch_carries_the_rewards_of_turns_and_no_batch_comes_of_trees_without_a_signal() -> None:
    async with running(configured(staleness={"trees_per_batch": 1, "max_lag": 1, "max_oversampling": 1.0})) as peers:
        await peers.tell(published())
        alike, apart = await peers.leases(2)
        await peers.send(*grown(alike, (1.0, 1.0), turn_reward=0.5))
        answer = await peers.learner.request(ask(num_trees=1, wait_s=0.0), timeout_s=60.0)
        assert isinstance(answer, NotYet | Batch)
        assert isinstance(answer, NotYet) or not answer.trees
        turns = [leaf(apart, 1, 1.0, rewards={"exact": 1.0}), leaf(apart, 2, 1.0, turn_reward=0.5)]
        await peers.send(opened(apart), *turns, closed(apart, 2))
        step = 0 if isinstance(answer, NotYet) else 1
        (tree,) = (await peers.batch(ask(step=step, num_trees=1))).trees
    assert [turn.turn_reward for turn in tree.turns] == [0.0, 0.5]
    assert [turn.rewards for turn in tree.turns] == [{"exact": 1.0}, {}]
