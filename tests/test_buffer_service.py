"""The buffer behind real sockets, and the decisions that need more than one of its parts."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from atpo_async.core.errors import SetupError
from atpo_async.core.tree import Turn
from atpo_async.run.endpoints import Endpoints
from atpo_async.run.rundir import RunDir
from atpo_async.status import waits
from atpo_async.wire import messages as m
from atpo_async.wire.records import TurnRecords
from buffer import service as services
from buffer.journal import chunks
from buffer.journal.tables import Tables
from buffer.service import BufferService
from buffer.state import BufferState
from buffer.trees.registry import TreeRegistry
from tests.buffer_peers_support import (
    LOOPBACK,
    SOON_S,
    Peers,
    ask,
    closed,
    configured,
    grown,
    hello,
    inner,
    leaf,
    limited,
    opened,
    published,
    running,
    stateful,
    take,
    wants,
)
from tests.buffer_peers_support import peers as peers
from tests.buffer_peers_support import state as state
from tests.hang_support import until_async

# --- joining -------------------------------------------------------------------------------------------------------


async def test_an_actor_learns_the_run_and_where_the_weights_are(peers: Peers) -> None:
    first = await peers.actor.request(hello(peers.config, run=""), timeout_s=SOON_S)
    assert isinstance(first, m.Welcome)
    assert (first.run, first.weights_endpoint) == ("r", "")
    await peers.tell(published())
    later = await peers.actor.request(hello(peers.config), timeout_s=SOON_S)
    assert isinstance(later, m.Welcome)
    assert (later.weights_endpoint, later.announce_endpoint) == ("tcp://w:1", "tcp://n:1")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"protocol": 99}, ["99", str(m.PROTOCOL)]),
        ({"run": "other"}, ["'other'", "'r'"]),
        ({"environment": "chess"}, ["'chess'", "'hopqa'"]),
        ({"search_leaves": 7}, ["7 leaves", "of 4"]),
    ],
    ids=["protocol", "run", "environment", "search"],
)
async def test_an_actor_of_another_kind_is_refused_with_both_named(
    peers: Peers, change: dict[str, Any], named: list[str]
) -> None:
    answer = await peers.actor.request(hello(peers.config, **change), timeout_s=SOON_S)
    assert isinstance(answer, m.Refused)
    assert all(name in answer.reason for name in named)


async def test_messages_of_another_run_are_refused(peers: Peers) -> None:
    await peers.send(m.ActorReport(run="other", actor="a", version=0, tree_ids=(), metrics={}))
    assert len(peers.refusals) == 1
    assert "'other'" in peers.refusals[0]
    answer = await peers.learner.request(m.EvalQuery(run="other", step=0, wait_s=0.0), timeout_s=SOON_S)
    assert isinstance(answer, m.Refused)


# --- the way of a tree ---------------------------------------------------------------------------------------------


async def test_leases_go_out_trees_come_in_and_a_batch_is_served_and_confirmed(peers: Peers) -> None:
    await peers.tell(published())
    leases = await peers.leases(2)
    for lease in leases:
        await peers.send(*grown(lease))
    batch = await peers.batch(ask())
    assert sorted(t.tree_id for t in batch.trees) == sorted(lease.tree_id for lease in leases)
    assert (batch.num_trees, batch.num_leaves, batch.num_action_tokens, batch.num_turn_tokens) == (2, 4, 12, 12)
    assert [t.weight for t in batch.trees] == [1.0, 1.0]
    np.testing.assert_array_equal(batch.trees[0].turns[0].action, [0, 1, 2])
    assert batch.metrics["train/reward"] == 0.5
    assert batch.metrics["train/success"] == 0.5
    assert batch.metrics["buffer/trees"] == 2
    await peers.tell(m.Trained(run="r", batch_id=batch.batch_id, version=1, priorities={}))
    # A learner that falls back wants them once more, until a checkpoint holds what it learned.
    assert peers.service.state.nbytes > 0
    await peers.tell(m.Checkpointed(run="r", step=1, version=1))
    assert peers.service.state.nbytes == peers.service.journal.nbytes == 0


async def test_a_request_for_leases_waits_for_the_first_version(peers: Peers) -> None:
    asking = asyncio.create_task(peers.leases(1))
    await peers.send(m.ActorReport(run="r", actor="a", version=-1, tree_ids=(), metrics={}))
    await peers.tell(published())
    # Answered by the publication, or by the next question: never by a lease before it.
    assert len(await asking or await peers.leases(1)) == 1


async def test_closed_admission_says_why(peers: Peers) -> None:
    answer = await peers.actor.request(wants(1), timeout_s=SOON_S)
    assert isinstance(answer, m.Leases)
    assert answer.leases == ()
    assert answer.closed_because is not None
    assert "first version" in answer.closed_because


async def test_a_request_for_a_batch_waits_for_the_trees(peers: Peers) -> None:
    await peers.tell(published())
    leases = await peers.leases(2)
    asking = asyncio.create_task(peers.batch(ask()))
    await peers.send(*grown(leases[0]))
    assert not asking.done()
    await peers.send(*grown(leases[1]))
    assert len((await asking).trees) == 2


async def test_no_batch_in_time_names_what_is_missing(peers: Peers) -> None:
    await peers.tell(published())
    (lease,) = await peers.leases(1)
    await peers.send(*grown(lease, (1.0, 1.0)))
    answer = await peers.learner.request(ask(wait_s=0.0), timeout_s=SOON_S)
    assert isinstance(answer, m.NotYet)
    for part in ("0 of 2 ready", "0 under lease", "1 without signal", "1 actors alive", "published version 0"):
        assert part in answer.waiting_for


async def test_not_yet_says_whether_anything_came_meanwhile(peers: Peers) -> None:
    await peers.tell(published())
    (lease,) = await peers.leases(1)
    seen = []
    for messages in ([opened(lease)], [leaf(lease, 1, 1.0)], [], [closed(lease, 1)]):
        await peers.send(*messages)
        answer = await peers.learner.request(ask(wait_s=0.0), timeout_s=SOON_S)
        assert isinstance(answer, m.NotYet)
        seen.append(answer.progress)
    assert seen == [0, 1, 1, 2]


async def test_ranks_get_shares_of_one_batch_and_the_same_share_again(peers: Peers) -> None:
    await peers.tell(published())
    for tokens, lease in zip((9, 2, 2), await peers.leases(3), strict=True):
        await peers.send(*grown(lease, tokens=tokens))
    requests = [ask(rank=rank, num_ranks=2, num_trees=3) for rank in (0, 1)]
    shares = [await peers.batch(request) for request in requests]
    assert [len(share.trees) for share in shares] == [1, 2]
    assert len({tree.tree_id for share in shares for tree in share.trees}) == 3
    whole = {(s.batch_id, s.num_trees, s.num_leaves, s.num_action_tokens, s.num_turn_tokens) for s in shares}
    assert whole == {(1, 3, 6, 26, 26)}
    again = await peers.batch(requests[1])
    assert [t.tree_id for t in again.trees] == [t.tree_id for t in shares[1].trees]


def test_a_batch_is_confirmed_when_every_rank_has_confirmed_its_share() -> None:
    state = stateful(configured(staleness={"trees_per_batch": 2, "max_lag": 4, "max_uses": 3}))
    for lease in state.lease("a", 2, 0.0).leases:
        take(state, grown(lease))
    shares = [state.sample(ask(rank=rank, num_ranks=2), 0.0) for rank in (0, 1)]
    own: list[dict[str, float]] = []
    for share, priority in zip(shares, (0.25, 0.75), strict=True):
        assert isinstance(share, m.Batch)
        own.append({tree.tree_id: priority for tree in share.trees})
    said = [m.Trained(run="r", rank=i, batch_id=1, version=1, priorities=p) for i, p in enumerate(own)]
    state.trained(said[1])
    state.trained(said[1])
    assert len(state.pool) == 0
    state.trained(said[0])
    assert len(state.pool) == 2
    assert state.pool.mean_priority == pytest.approx(0.5)


def test_the_last_turn_is_told_from_the_first_one_on() -> None:
    state = stateful(configured(staleness={"trees_per_batch": 2}))
    assert "; no turn yet; " in state.waiting_for(ask(), 72.0)
    (lease,) = state.lease("a", 1, 72.0).leases
    take(state, grown(lease))
    said = state.waiting_for(ask(), 75.0)
    assert "no turn yet" not in said
    assert "; last turn " in said


async def test_a_buffer_that_is_asked_for_a_batch_says_at_once_that_it_waits_for_the_actors() -> None:
    async with running() as peers:
        await peers.tell(published())
        asking = asyncio.ensure_future(peers.learner.request(ask(wait_s=SOON_S), timeout_s=SOON_S))
        sign = {"who": "the request for a batch", "on": "actors", "what": "trees for batch 0 (0 of 2 are ready)"}
        try:
            await until_async(lambda: any(sign.items() <= wait.items() for wait in waits.open_waits()))
        finally:
            asking.cancel()


async def test_with_an_exact_lag_the_engines_version_decides_about_leases_and_the_size_about_batches() -> None:
    exact = {"trees_per_batch": 2, "max_lag": 1, "exact_lag": 1}
    async with running(configured(run={"steps": 3}, staleness=exact)) as peers:
        await peers.tell(published())
        answer = await peers.learner.request(ask(wait_s=0.0), timeout_s=SOON_S)
        assert isinstance(answer, m.NotYet)
        assert "exact_lag = 1: version 0 grows 2 batches, 0 of 4 trees are there" in answer.waiting_for
        ahead = await peers.actor.request(msgspec.structs.replace(wants(9), version=1), timeout_s=SOON_S)
        assert isinstance(ahead, m.Leases)
        assert (ahead.leases, "this actor's engine has 1" in str(ahead.closed_because)) == ((), True)
        for lease in await peers.leases(9):
            await peers.send(*grown(lease))
        assert len((await peers.batch(ask())).trees) == 2
        refused = await peers.learner.request(ask(step=1, version=1, num_trees=3), timeout_s=SOON_S)
        assert isinstance(refused, m.Refused)
        assert "staleness.trees_per_batch = 2" in refused.reason


async def test_turns_sent_again_change_nothing_and_other_bytes_are_refused(peers: Peers) -> None:
    await peers.tell(published())
    (lease,) = await peers.leases(1)
    await peers.send(*grown(lease), *grown(lease))
    assert peers.refusals == []
    await peers.send(leaf(lease, 1, 0.5))
    assert len(peers.refusals) == 1
    assert "other bytes" in peers.refusals[0]


async def test_a_turn_of_a_lease_that_was_never_granted_here_is_refused(peers: Peers) -> None:
    await peers.tell(published())
    (lease,) = await peers.leases(1)
    stranger = m.Lease(
        tree_id="b0-00000000", task_index=0, kind="train", epoch=0, lifetime_s=1.0, min_version=0, seed=0,
        committed=TurnRecords.of(()),
    )  # fmt: skip
    await peers.send(opened(stranger), opened(lease))
    assert len(peers.refusals) == 1
    assert "b0-00000000" in peers.refusals[0]


async def test_nothing_is_acknowledged_before_it_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, release = threading.Event(), threading.Event()
    commit = Tables.commit

    def slowly(self: Tables, group: Any) -> None:
        asked.set()
        assert release.wait(SOON_S)
        commit(self, group)

    async with running() as peers:
        await peers.tell(published())
        (lease,) = await peers.leases(1)
        monkeypatch.setattr(Tables, "commit", slowly)
        await peers.actor.send(opened(lease))
        assert await asyncio.to_thread(asked.wait, SOON_S)
        # What is sent meanwhile is taken, and not acknowledged either.
        await peers.actor.send(leaf(lease, 1, 1.0))
        await peers.actor.request(hello(peers.config, protocol=99), timeout_s=SOON_S)
        assert peers.actor.stats.unacked == 2
        release.set()
        await peers.actor.drain(timeout_s=SOON_S)


async def test_a_restarted_actor_finds_its_tree_where_it_left_it(peers: Peers) -> None:
    await peers.tell(published())
    (lease,) = await peers.leases(1)
    await peers.send(opened(lease), leaf(lease, 1, 1.0))
    await peers.actor.request(hello(peers.config), timeout_s=SOON_S)
    (again,) = await peers.leases(1)
    assert (again.tree_id, again.epoch, again.seed) == (lease.tree_id, 1, lease.seed)
    assert [t.turn_id for t in again.committed] == [1]
    await peers.send(leaf(lease, 2, 0.0))
    assert len(peers.refusals) == 1
    assert "epoch 1, this comes from epoch 0" in peers.refusals[0]


async def test_leases_handed_back_go_to_the_next_actor(peers: Peers) -> None:
    await peers.tell(published())
    (lease,) = await peers.leases(1)
    await peers.send(m.LeaseReturned(run="r", actor="a", tree_ids=(lease.tree_id,)))
    answer = await peers.actor.request(wants(1, actor="b"), timeout_s=SOON_S)
    assert isinstance(answer, m.Leases)
    assert answer.leases[0].tree_id == lease.tree_id


# --- evaluation ----------------------------------------------------------------------------------------------------


async def test_an_evaluation_is_leased_first_counted_and_answered(tmp_path: Path) -> None:
    rundir = RunDir.create(configured(run={"dir": tmp_path, "name": "r"}))
    async with running(rundir=rundir) as peers:
        await peers.tell(m.EvalRequest(run="r", step=0, version=0, num_tasks=4, blocking=True), published())
        leases = await peers.leases(8)
        assert [(lease.kind, lease.task_index) for lease in leases] == [("eval", i) for i in range(4)]
        asking = asyncio.create_task(
            peers.learner.request(m.EvalQuery(run="r", step=0, wait_s=SOON_S), timeout_s=SOON_S)
        )  # fmt: skip
        for lease, reward in zip(leases[:3], (1.0, 1.0, 0.0), strict=True):
            await peers.send(*grown(lease, (reward,)))
        await peers.send(opened(leases[3]), closed(leases[3], 0, failed=1))
        result = await asking
        assert isinstance(result, m.EvalResult)
        assert (result.done, result.success, result.num_done) == (True, 0.5, 4)
        assert [lease.kind for lease in await peers.leases(1)] == ["train"]
        assert len(peers.service.state.pool) == 0
    records = [json.loads(line) for line in rundir.metrics_path.read_text().splitlines()]
    assert [r["metrics"]["eval/failed"] for r in records if "eval/failed" in r["metrics"]] == [1]


async def test_an_evaluation_under_way_says_how_far_it_is(peers: Peers) -> None:
    await peers.tell(m.EvalRequest(run="r", step=3, version=0, num_tasks=2, blocking=False), published())
    lease, _ = await peers.leases(2)
    await peers.send(*grown(lease, (1.0,)))
    result = await peers.learner.request(m.EvalQuery(run="r", step=3, wait_s=0.0), timeout_s=SOON_S)
    assert isinstance(result, m.EvalResult)
    assert (result.done, result.success, result.num_done, result.num_tasks) == (False, None, 1, 2)


def test_an_evaluation_tree_that_loses_all_its_holders_counts_as_failed() -> None:
    state = stateful(configured(buffer={"max_reissues": 1}))
    state.evaluate(m.EvalRequest(run="r", step=0, version=0, num_tasks=1, blocking=True))
    for now in (0.0, 1000.0):
        assert len(state.lease("a", 1, now).leases) == 1
        assert state.tick(now + 999.0)
    result = state.eval_result(0)
    assert result.done
    assert state.drain_records()[0][2]["eval/failed"] == 1


def test_an_evaluation_in_which_everything_failed_has_no_success_at_all(state: BufferState) -> None:
    state.evaluate(m.EvalRequest(run="r", step=0, version=0, num_tasks=2, blocking=True))
    for lease in state.lease("a", 2, 0.0).leases:
        take(state, [opened(lease), closed(lease, 0, failed=1)])
    result = state.eval_result(0)
    assert (result.done, result.success, result.num_done) == (True, None, 2)
    assert state.drain_records() == [(0, 0, {"eval/failed": 2.0, "eval/unknown": 0.0})]


def test_the_turns_of_an_evaluation_that_was_replaced_do_not_count(state: BufferState) -> None:
    state.evaluate(m.EvalRequest(run="r", step=0, version=0, num_tasks=2, blocking=True))
    first, _ = state.lease("a", 2, 0.0).leases
    take(state, grown(first, (1.0,)))
    state.publish(published(1))
    state.evaluate(m.EvalRequest(run="r", step=0, version=1, num_tasks=2, blocking=True))
    for lease in state.lease("a", 2, 0.0).leases:
        take(state, grown(lease, (1.0,)))
    assert state.drain_records() == [(0, 1, {"eval/failed": 0.0, "eval/unknown": 0.0, "eval/turns_mean": 1.0})]


# --- what becomes of lost holders ----------------------------------------------------------------------------------


def test_a_lapsed_tree_with_two_finished_leaves_is_ready_without_its_open_chains(state: BufferState) -> None:
    (lease,) = state.lease("a", 1, 0.0).leases
    growing = inner(lease, 3)
    take(state, [opened(lease), leaf(lease, 1, 1.0), leaf(lease, 2, 0.0), growing])
    assert state.tick(10.0)
    batch = state.sample(ask(num_trees=1), 10.0)
    assert isinstance(batch, m.Batch)
    assert [t.turn_id for t in batch.trees[0].turns] == [1, 2]


def test_a_tree_whose_task_cannot_be_started_ends_without_an_opening(state: BufferState) -> None:
    (lease,) = state.lease("a", 1, 0.0).leases
    for _ in range(2):  # at least once
        take(state, [closed(lease, 0, failed=1)])
    assert (len(state.ledger), len(state.assembly)) == (0, 0)
    for usable in state.lease("a", 2, 0.0).leases:
        take(state, grown(usable))
    batch = state.sample(ask(), 0.0)
    assert isinstance(batch, m.Batch)
    assert batch.metrics["buffer/dropped_no_leaf"] == 1
    assert batch.metrics["buffer/failed_branches"] == 1


def test_the_failed_branches_of_a_tree_closed_under_two_leases_count_once(state: BufferState) -> None:
    (lease,) = state.lease("a", 1, 0.0).leases
    take(state, [opened(lease), closed(lease, 2, failed=1)])
    assert state.tick(10.0)
    (again,) = state.lease("b", 1, 10.0).leases
    turns = [leaf(again, i, float(i % 2)) for i in (1, 2)]
    take(state, [*turns, closed(again, 2, failed=1)])
    batch = state.sample(ask(num_trees=1), 10.0)
    assert isinstance(batch, m.Batch)
    assert batch.metrics["buffer/failed_branches"] == 1


def test_an_evaluation_task_that_cannot_be_started_counts_as_failed(state: BufferState) -> None:
    state.evaluate(m.EvalRequest(run="r", step=0, version=0, num_tasks=2, blocking=True))
    good, bad = state.lease("a", 2, 0.0).leases
    take(state, [*grown(good, (1.0,)), closed(bad, 0, failed=1)])
    result = state.eval_result(0)
    assert (result.done, result.success) == (True, 0.5)
    assert state.drain_records()[0][2]["eval/failed"] == 1


def test_a_lapsed_tree_with_one_leaf_goes_to_another_actor(state: BufferState) -> None:
    (lease,) = state.lease("a", 1, 0.0).leases
    take(state, [opened(lease), leaf(lease, 1, 1.0)])
    assert state.tick(10.0)
    (again,) = state.lease("b", 1, 10.0).leases
    assert (again.tree_id, len(again.committed)) == (lease.tree_id, 1)


# --- which trees are served ----------------------------------------------------------------------------------------


def test_trees_without_signal_or_comparison_are_counted_and_never_served(state: BufferState) -> None:
    for rewards, failed in (((1.0, 1.0), 0), ((1.0,), 3), ((), 4), ((1.0, 0.0), 1)):
        (lease,) = state.lease("a", 1, 0.0).leases
        messages = grown(lease, rewards)
        messages[-1] = closed(lease, len(rewards), failed)
        take(state, messages)
    batch = state.sample(ask(num_trees=1), 0.0)
    assert isinstance(batch, m.Batch)
    assert len(batch.trees) == 1
    expected = {
        "buffer/no_signal_trees": 1,
        "buffer/dropped_one_leaf": 1,
        "buffer/dropped_no_leaf": 1,
        "buffer/failed_branches": 8,
        "train/trees": 2,
        "train/reward": 0.75,
    }
    assert {name: batch.metrics[name] for name in expected} == expected


def test_rewards_are_reported_under_the_branch_probabilities(state: BufferState) -> None:
    """Three of four leaves are under one first turn, which the policy takes half the time."""
    (lease,) = state.lease("a", 1, 0.0).leases
    first = inner(lease, 1)
    below = [leaf(lease, i, 1.0, parent_id=1) for i in (3, 4, 5)]
    take(state, [opened(lease), first, leaf(lease, 2, 0.0), *below, closed(lease, 5)])
    batch = state.sample(ask(num_trees=1), 0.0)
    assert isinstance(batch, m.Batch)
    assert batch.metrics["train/reward"] == 0.5
    assert batch.num_action_tokens == 3 + 3 * 6
    assert batch.num_turn_tokens == 3 * 5
    assert batch.metrics["train/tokens"] == 3 * 5, "each turn once, however many leaves share it"


def test_tokens_that_were_sampled_count_whatever_becomes_of_their_trees(state: BufferState) -> None:
    used, unused = state.lease("a", 2, 0.0).leases
    alike = grown(unused, (1.0, 1.0))  # without a signal
    take(state, [*grown(used), *alike, alike[1]])  # the last one came before, and is no second
    batch = state.sample(ask(num_trees=1), 0.0)
    assert isinstance(batch, m.Batch)
    every = [message for message in (*grown(used), *alike) if isinstance(message, Turn)]
    assert batch.metrics["train/tokens"] == sum(len(turn.action) for turn in every)


def test_enough_trees_without_signal_make_a_short_batch() -> None:
    state = stateful(configured(staleness={"trees_per_batch": 2, "max_lag": 8, "max_oversampling": 2.0}))
    for rewards in ((1.0, 1.0), (0.0, 0.0), (1.0, 0.0)):
        take(state, grown(state.lease("a", 1, 0.0).leases[0], rewards))
        assert state.sample(ask(), 0.0) is None
    take(state, grown(state.lease("a", 1, 0.0).leases[0], (1.0, 1.0)))
    batch = state.sample(ask(), 0.0)
    assert isinstance(batch, m.Batch)
    assert (batch.num_trees, batch.metrics["train/trees"]) == (1, 4)


def test_a_learner_that_starts_over_gets_back_what_it_never_confirmed(state: BufferState) -> None:
    for lease in state.lease("a", 2, 0.0).leases:
        take(state, grown(lease))
    first = state.sample(ask(step=7, version=0), 0.0)
    assert isinstance(first, m.Batch)
    again = state.sample(ask(step=7, version=1), 0.0)
    assert isinstance(again, m.Batch)
    assert again.batch_id != first.batch_id
    assert sorted(t.tree_id for t in again.trees) == sorted(t.tree_id for t in first.trees)
    assert [t.uses for t in again.trees] == [1, 1]
    # Word from before the restart confirms nothing now.
    state.trained(m.Trained(run="r", batch_id=first.batch_id, version=1, priorities={}))
    assert len(state.pool) == 0
    assert all(state.pool.is_out(t.tree_id) for t in again.trees)


def test_memory_stays_below_its_limit() -> None:
    config = configured(
        buffer={"max_bytes": 1 << 20}, staleness={"trees_per_batch": 64, "max_lag": 0, "max_oversampling": 100}
    )
    state = stateful(config)
    for _ in range(40):
        leases = state.lease("a", 1, 0.0).leases
        if leases:
            take(state, grown(leases[0], tokens=8000))
        assert state.nbytes <= 1 << 20
    assert state.pool.left["bytes"] > 0


def test_a_partial_tree_is_served_early_and_returns_with_its_later_leaves() -> None:
    config = configured(
        buffer={"ready": "partial", "partial_min_leaves": 2}, staleness={"trees_per_batch": 1, "max_lag": 4}
    )
    state = stateful(config)
    (lease,) = state.lease("a", 1, 0.0).leases
    take(state, [opened(lease), leaf(lease, 1, 1.0)])
    assert state.sample(ask(num_trees=1), 0.0) is None
    take(state, [leaf(lease, 2, 0.0)])
    first = state.sample(ask(num_trees=1), 0.0)
    assert isinstance(first, m.Batch)
    assert len(first.trees[0].turns) == 2
    take(state, [leaf(lease, 3, 0.0)])
    state.trained(m.Trained(run="r", batch_id=first.batch_id, version=1, priorities={}))
    assert state.sample(ask(step=1, version=1, num_trees=1), 0.0) is None
    take(state, [leaf(lease, 4, 0.0)])
    second = state.sample(ask(step=1, version=1, num_trees=1), 0.0)
    assert isinstance(second, m.Batch)
    assert [(len(t.turns), t.uses) for t in second.trees] == [(4, 2)]
    take(state, [leaf(lease, 5, 1.0), closed(lease, 5)])
    state.trained(m.Trained(run="r", batch_id=second.batch_id, version=2, priorities={}))
    third = state.sample(ask(step=2, version=2, num_trees=1), 0.0)
    assert isinstance(third, m.Batch)
    assert [(len(t.turns), t.uses) for t in third.trees] == [(5, 3)]
    assert third.metrics["train/trees"] == 1


# --- files, ends and restarts --------------------------------------------------------------------------------------


async def test_the_metrics_of_an_actor_go_to_the_runs_file_under_its_name(tmp_path: Path) -> None:
    rundir = RunDir.create(configured(run={"dir": tmp_path, "name": "r"}))
    async with running(rundir=rundir) as peers:
        await peers.send(m.ActorReport(run="r", actor="a", version=3, tree_ids=(), metrics={"actor/turns": 1.5}))
    (record,) = [json.loads(line) for line in rundir.metrics_path.read_text().splitlines()]
    assert (record["source"], record["version"], record["metrics"]) == ("a", 3, {"actor/turns": 1.5})


async def test_what_was_committed_is_there_after_a_restart_and_leases_go_on_under_their_epoch(tmp_path: Path) -> None:
    rundir = RunDir.create(configured(run={"dir": tmp_path, "name": "r"}))
    async with running(rundir=rundir) as peers:
        await peers.tell(published())
        leases = await peers.leases(4)
        for lease in leases[:2]:
            await peers.send(*grown(lease))
        await peers.send(opened(leases[2]), leaf(leases[2], 1, 1.0))
    async with running(rundir=rundir) as peers:
        # The actor knows nothing of the restart.
        await peers.send(leaf(leases[2], 1, 1.0), leaf(leases[2], 2, 0.0), closed(leases[2], 2), *grown(leases[3]))
        assert peers.refusals == []
        batch = await peers.batch(ask())
        later = await peers.batch(ask(step=1, version=1))
        assert sorted(t.task_index for t in (*batch.trees, *later.trees)) == [0, 1, 2, 3]
        await peers.tell(published(2))
        assert [lease.task_index for lease in await peers.leases(1)] == [4]


async def test_a_batch_is_the_same_after_a_restart_for_the_ranks_that_had_not_asked(tmp_path: Path) -> None:
    rundir = RunDir.create(configured(run={"dir": tmp_path, "name": "r"}))
    async with running(rundir=rundir) as peers:
        await peers.tell(published())
        for lease in await peers.leases(2):
            await peers.send(*grown(lease))
        first = await peers.batch(ask(num_ranks=2))
    async with running(rundir=rundir) as peers:
        again = await peers.batch(ask(num_ranks=2))
        second = await peers.batch(ask(num_ranks=2, rank=1))
    assert (again.batch_id, second.batch_id) == (first.batch_id, first.batch_id)
    assert [t.tree_id for t in again.trees] == [t.tree_id for t in first.trees]
    assert {t.tree_id for t in first.trees} | {t.tree_id for t in second.trees} == {
        f"b1-{task:08d}" for task in range(2)
    }
    assert again.metrics == first.metrics


async def test_a_learner_that_falls_back_gets_the_trees_of_its_lost_steps_again(tmp_path: Path) -> None:
    config = configured(run={"dir": tmp_path, "name": "r"}, staleness={"trees_per_batch": 1, "max_lag": 8})
    rundir = RunDir.create(config)
    seen: list[int] = []
    async with running(config, rundir=rundir) as peers:
        await peers.tell(published())
        for lease in await peers.leases(3):
            await peers.send(*grown(lease))
        for step in range(3):
            batch = await peers.batch(ask(step=step, version=step, num_trees=1))
            seen.append(batch.trees[0].task_index)
            await peers.tell(m.Trained(run="r", batch_id=batch.batch_id, version=step + 1, priorities={}))
        await peers.tell(m.Checkpointed(run="r", step=1, version=1))
    async with running(config, rundir=rundir) as peers:
        again = []
        for step in range(1, 3):
            batch = await peers.batch(ask(step=step, version=3 + step, num_trees=1))
            (tree,) = batch.trees
            assert tree.uses == 1
            again.append(tree.task_index)
            await peers.tell(m.Trained(run="r", batch_id=batch.batch_id, version=4 + step, priorities={}))
    assert sorted(again) == sorted(seen[1:])


def test_a_learner_in_mid_run_and_an_empty_journal_do_not_go_together_in_silence(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = stateful(configured())
    state.sample(ask(step=3, version=3), 0.0)
    state.sample(ask(step=3, version=3), 0.0)
    assert caplog.text.count("the learner is at step 3 and the journal is empty") == 1


def test_a_learner_behind_the_checkpoint_that_it_reported_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    state = stateful(configured(staleness={"trees_per_batch": 1, "max_lag": 8}))
    for step, lease in enumerate(state.lease("a", 2, 0.0).leases):
        take(state, grown(lease))
        assert isinstance(state.sample(ask(step=step, version=step, num_trees=1), 0.0), m.Batch)
    state.checkpointed(m.Checkpointed(run="r", step=2, version=2))
    assert state.sample(ask(step=1, version=5, num_trees=1), 0.0) is None
    assert "starts again at step 1, though it had reported a checkpoint of step 2" in caplog.text


def test_trees_too_old_for_a_learner_that_falls_back_are_grown_anew() -> None:
    state = stateful(configured(staleness={"trees_per_batch": 1, "max_lag": 2}))
    take(state, grown(state.lease("a", 1, 0.0).leases[0]))
    batch = state.sample(ask(num_trees=1), 0.0)
    assert isinstance(batch, m.Batch)
    state.trained(m.Trained(run="r", batch_id=batch.batch_id, version=1, priorities={}))
    state.publish(published(9))
    assert state.sample(ask(step=0, version=9, num_trees=1), 0.0) is None
    (lease,) = state.lease("a", 1, 0.0).leases
    assert (lease.task_index, lease.tree_id == batch.trees[0].tree_id) == (0, False)


def test_a_batch_is_taken_to_be_trained_on_once_a_later_one_is_asked_for() -> None:
    state = stateful(configured(staleness={"trees_per_batch": 1, "max_lag": 8}))
    for lease in state.lease("a", 3, 0.0).leases:
        take(state, grown(lease))
    for step in range(3):
        assert isinstance(state.sample(ask(step=step, version=step, num_trees=1), 0.0), m.Batch)
    # Of the first, word was lost with the learner that sent it; it is not served again.
    assert state.pool.num_out == 2
    assert len(state.pool) == 0


def test_a_run_of_so_many_tasks_ends_when_each_was_trained_on() -> None:
    state = stateful(configured(run={"max_tasks": 3}, staleness={"trees_per_batch": 2, "max_lag": 8}))
    leases = state.lease("a", 9, 0.0).leases
    assert [lease.task_index for lease in leases] == [0, 1, 2]
    for lease in leases:
        take(state, grown(lease))
    first = state.sample(ask(), 0.0)
    assert isinstance(first, m.Batch)
    assert first.num_trees == 2
    # The last tree could still be joined by one that comes back.
    assert state.sample(ask(step=1, version=1), 0.0) is None
    state.trained(m.Trained(run="r", batch_id=first.batch_id, version=1, priorities={}))
    second = state.sample(ask(step=1, version=1), 0.0)
    assert isinstance(second, m.Batch)
    assert second.num_trees == 1
    state.trained(m.Trained(run="r", batch_id=second.batch_id, version=2, priorities={}))
    last = state.sample(ask(step=2, version=2), 0.0)
    assert isinstance(last, m.Exhausted)
    assert last.reason == "all run.max_tasks = 3 tasks are done: 3 trained on, 0 without signal, 0 failed, 0 given up"


def test_a_task_whose_tree_went_stale_before_any_batch_had_it_is_leased_again() -> None:
    state = stateful(configured(run={"max_tasks": 1}, staleness={"trees_per_batch": 1, "max_lag": 1}))
    take(state, grown(state.lease("a", 1, 0.0).leases[0]))
    state.publish(published(5))
    assert state.sample(ask(version=5, num_trees=1), 0.0) is None
    (again,) = state.lease("a", 1, 0.0).leases
    assert again.task_index == 0
    assert state.nbytes == 0


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_tree_too_old_for_its_second_use_counts_as_such_unless_the_first_is_lost_too(checkpointed: bool) -> None:
    state = stateful(configured(run={"max_tasks": 1}, staleness={"trees_per_batch": 1, "max_lag": 1, "max_uses": 2}))

    def train(step: int, version: int) -> None:
        batch = state.sample(ask(step=step, version=version, num_trees=1), 0.0)
        assert isinstance(batch, m.Batch)
        state.trained(m.Trained(run="r", batch_id=batch.batch_id, version=version + 1, priorities={}))

    take(state, grown(state.lease("a", 1, 0.0).leases[0]))
    train(0, 0)
    state.publish(published(5))
    assert state.counters.tasks["retired"] == 1
    said = "1 trained on (1 of them fewer times than meant, too old by then)"
    if checkpointed:
        state.checkpointed(m.Checkpointed(run="r", step=1, version=5))
    else:
        # The learner starts again where it began: the task is done once more, as often as meant.
        assert state.sample(ask(step=0, version=6, num_trees=1), 0.0) is None
        state.publish(published(6))
        take(state, grown(state.lease("a", 1, 0.0).leases[0], version=6))
        train(0, 6)
        train(1, 7)
        said = "1 trained on"
    assert state.trees._retired == set()
    over = state.sample(ask(step=2, version=8, num_trees=1), 0.0)
    assert isinstance(over, m.Exhausted)
    assert f": {said}, 0 without signal" in over.reason


@pytest.mark.parametrize("why", ["generate_timeout", "generate_failed"])
def test_a_task_for_which_no_engine_answered_is_leased_again_and_given_up_when_that_goes_on(why: str) -> None:
    state = limited(2)
    seen = set()
    for _ in range(3):
        (lease,) = state.lease("a", 9, 0.0).leases
        assert (lease.task_index, len(lease.committed)) == (0, 0)
        seen.add(lease.tree_id)
        # One chain came through, which alone teaches nothing.
        take(state, [opened(lease), leaf(lease, 1, 1.0), closed(lease, 1, failed=3, why=why)])
        assert state.nbytes == 0
    assert (len(seen), state.lease("a", 9, 0.0).leases) == (3, ())
    over = state.sample(ask(num_trees=1), 0.0)
    assert isinstance(over, m.Exhausted)
    assert over.reason.endswith("0 trained on, 0 without signal, 0 failed, 1 given up")


def test_a_task_for_which_no_engine_answered_at_first_is_trained_on() -> None:
    state = limited(2)
    (lease,) = state.lease("a", 9, 0.0).leases
    take(state, [closed(lease, 0, failed=4, why="generate_timeout")])
    (again,) = state.lease("a", 9, 0.0).leases
    take(state, grown(again))
    batch = state.sample(ask(num_trees=1), 0.0)
    assert isinstance(batch, m.Batch)
    assert [tree.task_index for tree in batch.trees] == [0]
    assert batch.metrics["buffer/dropped_no_leaf"] == 1


def test_a_task_whose_environment_fails_is_not_tried_again() -> None:
    state = limited(2)
    (lease,) = state.lease("a", 9, 0.0).leases
    take(state, [closed(lease, 0, failed=4)])
    assert state.lease("a", 9, 0.0).leases == ()
    over = state.sample(ask(num_trees=1), 0.0)
    assert isinstance(over, m.Exhausted)
    assert over.reason.endswith("0 trained on, 0 without signal, 1 failed, 0 given up")


def test_trees_kept_for_a_checkpoint_ask_for_one_when_they_take_the_space() -> None:
    config = configured(buffer={"max_bytes": 1 << 20}, staleness={"trees_per_batch": 1, "max_lag": 50})
    state = stateful(config)
    step, wanted = 0, False
    while not wanted:
        for lease in state.lease("a", 1, 0.0).leases:
            take(state, grown(lease, tokens=4000, version=step))
        batch = state.sample(ask(step=step, version=step, num_trees=1), 0.0)
        assert isinstance(batch, m.Batch)
        wanted = batch.checkpoint_wanted
        step += 1
        state.publish(published(step))
        state.trained(m.Trained(run="r", batch_id=batch.batch_id, version=step, priorities={}))
        assert step < 50
    assert state.nbytes <= 1.5 * (1 << 20)
    state.checkpointed(m.Checkpointed(run="r", step=step, version=step))
    assert not state.checkpoint_wanted
    assert state.nbytes == 0


async def test_what_is_left_of_a_mostly_dead_chunk_is_moved_and_still_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "SPARE_BYTES", 1)
    monkeypatch.setattr(services, "TICK_S", 0.01)
    moved = asyncio.Event()
    relocate: Callable[..., int] = TreeRegistry.relocate

    def watched(self: TreeRegistry, *args: Any) -> int:
        number = relocate(self, *args)
        if number:
            moved.set()
        return number

    monkeypatch.setattr(TreeRegistry, "relocate", watched)
    config = configured(
        run={"dir": tmp_path, "name": "r"}, staleness={"trees_per_batch": 2, "max_lag": 50}, buffer={"commit_ms": 50}
    )
    rundir = RunDir.create(config)
    async with running(config, rundir=rundir) as peers:
        await peers.tell(published())
        leases = await peers.leases(12)
        # All in one group, so in one chunk; ten of the trees have no signal and go, one grows on, one is ready.
        for lease in leases:
            for message in [opened(lease), leaf(lease, 1, 1.0, tokens=50)]:
                await peers.actor.send(message)
        await peers.actor.drain(timeout_s=SOON_S)
        for lease in leases[:10]:
            await peers.send(leaf(lease, 2, 1.0), closed(lease, 2))
        await peers.send(leaf(leases[10], 2, 0.0, tokens=40), closed(leases[10], 2))
        await asyncio.wait_for(moved.wait(), SOON_S)
        await peers.send(leaf(leases[11], 2, 0.0, tokens=30), closed(leases[11], 2))
        batch = await peers.batch(ask())
        kept = {t.tree_id: [turn.action.tolist() for turn in t.turns] for t in batch.trees}
        assert kept == {
            leases[10].tree_id: [list(range(50)), list(range(40))],
            leases[11].tree_id: [list(range(50)), list(range(30))],
        }
    async with running(config, rundir=rundir) as peers:
        again = await peers.batch(ask())
        assert {t.tree_id: [turn.action.tolist() for turn in t.turns] for t in again.trees} == kept


async def test_leases_with_more_turns_than_an_answer_holds_come_in_several() -> None:
    config = configured(links={"max_message_bytes": 1 << 16})
    async with running(config) as peers:
        await peers.tell(published())
        leases = await peers.leases(4)
        for lease in leases:
            await peers.send(opened(lease), *(inner(lease, i, tokens=1000) for i in range(1, 4)))
        await peers.actor.request(hello(config), timeout_s=SOON_S)
        again: list[m.Lease] = []
        while len(again) < 4:
            found = await peers.leases(4)
            assert 1 <= len(found) < 4
            again += found
        assert sorted(lease.tree_id for lease in again) == sorted(lease.tree_id for lease in leases)
        assert all(len(list(lease.committed)) == 3 for lease in again)


async def test_a_second_buffer_on_the_same_journal_is_refused(tmp_path: Path) -> None:
    rundir = RunDir.create(configured(run={"dir": tmp_path, "name": "r"}))
    async with running(rundir=rundir) as peers:
        with pytest.raises(SetupError, match="in use by another buffer"):
            BufferService(
                peers.config, run="r", endpoints=LOOPBACK, rundir=rundir, stopping=asyncio.Event()
            )  # fmt: skip


async def test_an_unknown_evaluation_is_refused_so_that_the_learner_asks_for_it_again(peers: Peers) -> None:
    answer = await peers.learner.request(m.EvalQuery(run="r", step=20, wait_s=0.0), timeout_s=SOON_S)
    assert isinstance(answer, m.Refused)
    assert "no evaluation of step 20" in answer.reason


async def test_a_buffer_restarted_during_an_evaluation_does_it_without_another_publication() -> None:
    async with running(endpoints=Endpoints(LOOPBACK.actors, LOOPBACK.learner, "tcp://w:2", "tcp://n:2")) as peers:
        await peers.tell(m.EvalRequest(run="r", step=20, version=17, num_tasks=1, blocking=True))
        await peers.learner.request(m.EvalQuery(run="r", step=20, wait_s=0.0), timeout_s=SOON_S)
        assert [(lease.kind, lease.min_version) for lease in await peers.leases(1)] == [("eval", 17)]
        welcome = await peers.actor.request(hello(peers.config), timeout_s=SOON_S)
        assert isinstance(welcome, m.Welcome)
        assert welcome.weights_endpoint == "tcp://w:2"


async def test_at_the_runs_end_the_actors_hear_of_it_and_the_buffer_ends() -> None:
    async with running() as peers:
        ended = asyncio.create_task(peers.service.serve())
        waiting = asyncio.create_task(peers.actor.request(wants(1), timeout_s=SOON_S))
        await peers.tell(m.RunFinished(run="r"))
        answer = await waiting
        if isinstance(answer, m.Leases) and not answer.finished:
            answer = await peers.actor.request(wants(1), timeout_s=SOON_S)
        assert isinstance(answer, m.Leases)
        assert answer.finished
        await asyncio.wait_for(ended, SOON_S)


async def test_the_buffer_stops_when_asked_though_a_learner_waits() -> None:
    stopping = asyncio.Event()
    async with running(stopping=stopping) as peers:
        waiting = asyncio.create_task(peers.learner.request(ask(), timeout_s=SOON_S))
        await peers.send(m.ActorReport(run="r", actor="a", version=0, tree_ids=(), metrics={}))
        stopping.set()
        await asyncio.wait_for(peers.service.serve(), SOON_S)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_a_taken_port_is_an_error_that_names_it(peers: Peers) -> None:
    taken = Endpoints(actors=LOOPBACK.actors, learner=peers.service.learner.endpoint)
    service = BufferService(
        configured(), run="r", endpoints=taken, rundir=None, stopping=asyncio.Event()
    )  # fmt: skip
    port = taken.learner.rpartition(":")[2]
    with pytest.raises(SetupError, match=rf"links\.learner_port = {port} is in use .* by process {os.getpid()} "):
        async with service:
            pass


def fails_on_two_turns(arrays: Any, values: np.ndarray, root_value: float) -> np.ndarray:
    """An advantage mode that passes the trial before the run, whose tree has four turns."""
    if len(arrays) == 2:
        raise KeyError("no such turn")
    return values - root_value


async def test_the_buffer_ends_with_a_users_credit_mode_that_fails() -> None:
    name = f"{__name__}:fails_on_two_turns"
    async with running(configured(credit={"advantage_mode": name})) as peers:
        await peers.tell(published())
        ended = asyncio.create_task(peers.service.serve())
        for message in grown((await peers.leases(1))[0]):
            await peers.actor.send(message)
        with pytest.raises(ExceptionGroup) as caught:
            await asyncio.wait_for(ended, SOON_S)
    assert caught.group_contains(
        SetupError, match=f"credit.advantage_mode = '{name}' failed on a tree of 2 turns: KeyError: 'no such turn'"
    )
