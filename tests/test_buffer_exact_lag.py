"""``staleness.exact_lag``: the line's decisions one by one, and whole runs with everything in any order."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atpo_async.config import Config, build
from atpo_async.core.errors import BadMessage
from atpo_async.core.tree import Turn, VersionSpan
from atpo_async.wire import messages as m
from buffer.batches.delay_line import Asked, DelayLine, TreeSet
from buffer.state import BufferState
from buffer.trees.assembly import TreeMessage
from tests.buffer_peers_support import closed, opened, published
from tests.buffer_support import Disk

PER_BATCH = 2


def configured(lag: int, *, steps: int = 6, per_batch: int = PER_BATCH, **sections: Any) -> Config:
    staleness = {"exact_lag": lag, "trees_per_batch": per_batch, "max_lag": max(lag, 8), "max_oversampling": 2.0}
    staleness |= sections.pop("staleness", {})
    return build(
        {
            "run": {"steps": steps},
            "search": {"initial_rollouts": 4, "rounds": 0},
            "staleness": staleness,
            **sections,
        }
    )


def ask(step: int, version: int, **changes: Any) -> m.SampleRequest:
    fields: dict[str, Any] = {"rank": 0, "num_ranks": 1, "num_trees": PER_BATCH, "wait_s": 0.0}
    return m.SampleRequest(run="r", step=step, version=version, **(fields | changes))


def leaf(lease: m.Lease, turn_id: int, reward: float, versions: Sequence[int], *, tokens: int = 2) -> Turn:
    """A first turn that ends its chain, its tokens sampled by ``versions`` in equal shares."""
    share = tokens // len(versions)
    spans = tuple(VersionSpan(v, i * share, (i + 1) * share) for i, v in enumerate(versions))
    return Turn(
        run="r", tree_id=lease.tree_id, turn_id=turn_id, parent_id=0, lease_epoch=lease.epoch, expansion_round=0,
        observation=np.zeros(0, dtype=np.int32), action=np.arange(share * len(versions), dtype=np.int32),
        logprobs=np.zeros(share * len(versions), dtype=np.float32), spans=spans, end="done", reward=reward,
        success=None, generate_s=0.0, environment_s=0.0,
    )  # fmt: skip


def stateful(config: Config, version: int = 1) -> BufferState:
    made = BufferState(config, run="r", rng=np.random.default_rng(0), now=0.0)
    made.publish(published(version))
    return made


def grow(
    state: BufferState, lease: m.Lease, *versions: int, rewards: Sequence[float] = (1.0, 0.0), tokens: int = 2
) -> None:
    """Send the whole tree of a lease, sampled by its version if no other is given."""
    turns = [leaf(lease, i, r, versions or (lease.min_version,), tokens=tokens) for i, r in enumerate(rewards, start=1)]
    messages: list[TreeMessage] = [opened(lease), *turns, closed(lease, len(turns))]
    for message in messages:
        state.take(message, 0.0)


def lags(batch: m.Batch | m.Exhausted | None, version: int) -> list[int]:
    """Of every token span of a batch consumed at ``version``."""
    assert isinstance(batch, m.Batch)
    return [version - span.version for tree in batch.trees for turn in tree.turns for span in turn.spans]


def step(state: BufferState, number: int, version: int, *, leased: int) -> m.Batch:
    """Ask, see to it that exactly ``leased`` trees are wanted, grow them, get the batch, train on it, publish."""
    first = state.sample(ask(number, version), 0.0)
    leases = state.lease("a", 100, 0.0, engine_version=version).leases
    assert len(leases) == leased
    for lease in leases:
        grow(state, lease)
    batch = first or state.sample(ask(number, version), 0.0)
    assert isinstance(batch, m.Batch)
    state.publish(published(version + 1))
    state.trained(m.Trained(run="r", batch_id=batch.batch_id, version=version + 1, priorities={}))
    return batch


# --- the line by itself --------------------------------------------------------------------------------------------


def line(lag: int, **changes: Any) -> DelayLine:
    settings_: dict[str, Any] = {"max_lag": 8, "trees_per_set": 2, "max_oversampling": 2.0, "num_steps": 10}
    return DelayLine(lag=lag, **(settings_ | changes))


def fill(made: DelayLine, version: int, count: int, *, prefix: str = "t") -> None:
    for i in range(count):
        assert made.place(f"{prefix}{version}-{i}", {version}, signal=True, fits=True) == "taken"


def room(made: DelayLine, *, under_lease: int = 0, published: int | None = 5, engine: int | None = None) -> int | str:
    """How many trees may begin, or what holds them back."""
    answer = made.admit(under_lease=under_lease, published=published, engine_version=engine, memory_full=False)
    return answer.capacity if answer.held_back is None else answer.held_back


def test_before_the_first_batch_the_first_version_grows_lag_plus_one_sets() -> None:
    made = line(2)
    made.ask(step=0, version=5, under_lease=0)
    assert room(made) == 6
    fill(made, 5, 6)
    made.ask(step=0, version=5, under_lease=0)
    assert (made.ready, len(made)) == (True, 3)
    assert made.pop() == TreeSet(5, ("t5-0", "t5-1"))


def test_every_later_version_grows_one_set_and_the_last_ones_none() -> None:
    made = line(2, num_steps=5)
    for step_, version in enumerate(range(5, 10)):
        assert made.ask(step=step_, version=version, under_lease=0) == Asked()
        wanted = {0: 6, 1: 2, 2: 2}.get(step_, 0)
        if wanted:
            assert room(made, published=version) == wanted
            fill(made, version, wanted)
            made.ask(step=step_, version=version, under_lease=0)
        assert made.ready
        assert made.pop().version == 5 + max(0, step_ - 2)
    assert len(made) == 0


def test_nothing_is_served_while_a_training_tree_is_under_lease() -> None:
    made = line(0)
    made.ask(step=0, version=5, under_lease=0)
    fill(made, 5, 2)
    made.ask(step=0, version=5, under_lease=1)
    assert not made.ready
    made.ask(step=0, version=5, under_lease=0)
    assert made.ready


@pytest.mark.parametrize(
    ("published", "engine", "said"),
    [
        (None, None, "has not published its first version"),
        (4, 4, "wants trees of version 5, the newest published is 4"),
        (6, 5, "wants trees of version 5, and 6 is out"),
        (5, 6, "wants trees of version 5, this actor's engine has 6"),
    ],
)
def test_only_the_sets_own_version_grows_it(published: int | None, engine: int | None, said: str) -> None:
    made = line(1)
    made.ask(step=0, version=5, under_lease=0)
    assert said in str(room(made, published=published, engine=engine))
    assert room(made, published=5, engine=4) == 4


def test_nothing_is_grown_before_the_learner_asked_nor_while_it_trains() -> None:
    made = line(1)
    assert "has not asked for its first batch" in str(room(made))
    made.ask(step=0, version=5, under_lease=0)
    fill(made, 5, 4)
    made.ask(step=0, version=5, under_lease=0)
    made.pop()
    assert "the learner is at version 5" in str(room(made))


def test_what_becomes_of_a_tree() -> None:
    made = line(0)
    assert made.place("early", {5}, signal=True, fits=True) == "surplus"
    made.ask(step=0, version=5, under_lease=0)
    assert made.place("other", {4}, signal=True, fits=True) == "inexact"
    assert made.place("mixed", {5, 6}, signal=False, fits=True) == "inexact"
    assert made.place("same", {5}, signal=False, fits=True) == "no_signal"
    assert made.place("large", {5}, signal=True, fits=False) == "too_large"
    fill(made, 5, 2)
    assert made.place("more", {5}, signal=True, fits=True) == "surplus"


def test_a_set_is_complete_though_short_once_enough_trees_came_for_it() -> None:
    made = line(0)
    made.ask(step=0, version=5, under_lease=0)
    fill(made, 5, 1)
    for i in range(3):
        assert room(made) == 1
        assert made.place(f"s{i}", {5}, signal=False, fits=True) == "no_signal"
    assert room(made) == 0
    made.ask(step=0, version=5, under_lease=0)
    assert made.pop().tree_ids == ("t5-0",)


def test_sets_grown_together_share_what_came_in_the_order_of_their_tasks() -> None:
    made = line(2)
    made.ask(step=0, version=5, under_lease=0)
    for name in ("d", "a", "c", "b"):
        made.place(name, {5}, signal=True, fits=True)
    for i in range(8):
        made.place(f"s{i}", {5}, signal=False, fits=True)
    made.ask(step=0, version=5, under_lease=0)
    assert [made.pop().tree_ids for _ in range(3)] == [("a",), ("b",), ("c", "d")]


def test_with_memory_full_the_sets_under_way_are_as_complete_as_they_can_be() -> None:
    made = line(1)
    made.ask(step=0, version=5, under_lease=0)
    fill(made, 5, 2)
    answer = made.admit(under_lease=1, published=5, engine_version=5, memory_full=True)
    assert answer.held_back is None  # a lost lease still goes to another actor
    assert "buffer.max_bytes" in str(answer.why_closed(0))
    made.ask(step=0, version=5, under_lease=1, memory_full=True)
    assert not made.ready
    made.ask(step=0, version=5, under_lease=0, memory_full=True)
    assert [made.pop().tree_ids for _ in range(2)] == [("t5-0",), ("t5-1",)]


def test_a_learner_that_starts_again_gets_whole_sets_first_and_nothing_over_max_lag() -> None:
    made = line(2, max_lag=4)
    made.ask(step=0, version=5, under_lease=0)
    fill(made, 5, 6)
    made.ask(step=0, version=5, under_lease=0)
    first = made.pop()
    made.ask(step=1, version=6, under_lease=0)
    fill(made, 6, 1)
    made.give_back([first])
    asked = made.ask(step=0, version=8, under_lease=0)
    # Three sets of version 5: at 8 and 9 they are 3 and 4 versions old, at 10 one would be 5.
    assert (len(made), made.greatest_lag) == (2, 4)
    assert (asked.anew, asked.stale, asked.unfinished) == (True, ("t5-4", "t5-5"), ("t6-0",))
    assert room(made, published=8) == 2
    fill(made, 8, 2)
    made.ask(step=0, version=8, under_lease=0)
    assert [made.pop().tree_ids[0] for _ in range(3)] == ["t5-0", "t5-2", "t8-0"]


def test_sets_given_back_come_first_and_in_their_order() -> None:
    made = line(2)
    made.ask(step=0, version=5, under_lease=0)
    fill(made, 5, 6)
    made.ask(step=0, version=5, under_lease=0)
    served = [made.pop(), made.pop()]
    made.give_back(served)
    assert [made.pop().tree_ids for _ in range(3)] == [("t5-0", "t5-1"), ("t5-2", "t5-3"), ("t5-4", "t5-5")]


def test_a_learner_that_starts_again_during_the_first_sets_keeps_those_that_are_whole() -> None:
    made = line(2)
    made.ask(step=0, version=5, under_lease=0)
    fill(made, 5, 3)
    asked = made.ask(step=0, version=6, under_lease=0)
    assert (asked.anew, asked.stale, asked.unfinished) == (True, (), ("t5-2",))
    assert (len(made), room(made, published=6)) == (1, 4)


# --- with the buffer around it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 1, 2, 8])
def test_the_lag_rises_to_its_value_and_stays_there(lag: int) -> None:
    steps = 12
    state = stateful(configured(lag, steps=steps))
    batches = []
    for number in range(steps):
        leased = PER_BATCH * ((lag + 1 if number == 0 else 1) if number + lag < steps else 0)
        batches.append(step(state, number, 1 + number, leased=leased))
        assert lags(batches[-1], 1 + number) == [min(number, lag)] * 4
    state.checkpointed(m.Checkpointed(run="r", step=steps, version=1 + steps))
    assert (len(state.pool), state.nbytes) == (0, 0)
    assert {tree.weight for batch in batches for tree in batch.trees} == {1.0}
    assert {tree.probability for batch in batches for tree in batch.trees} == {1 / PER_BATCH}


def test_a_run_shorter_than_the_lag_grows_no_more_than_its_batches() -> None:
    state = stateful(configured(8, steps=3))
    for number in range(3):
        step(state, number, 1 + number, leased=6 if number == 0 else 0)
    assert len(state.pool) == 0


def test_what_a_step_reports_of_training_is_of_the_trees_grown_last() -> None:
    state = stateful(configured(1, steps=3))
    metrics = [step(state, n, 1 + n, leased=leased).metrics for n, leased in enumerate((4, 2, 0))]
    assert [m["train/trees"] for m in metrics] == [4, 2, 0]
    assert ["train/reward" in m for m in metrics] == [True, True, False]


def test_a_tree_with_a_token_of_another_version_is_dropped_and_grown_again(caplog: pytest.LogCaptureFixture) -> None:
    state = stateful(configured(0))
    assert state.sample(ask(0, 1), 0.0) is None
    bad, good = state.lease("a", 2, 0.0, engine_version=1).leases
    grow(state, good)
    grow(state, bad, 1, 2)
    assert state.sample(ask(0, 1), 0.0) is None
    assert f"tree {bad.tree_id} is dropped, versions [1, 2] sampled it" in caplog.text
    (again,) = state.lease("a", 9, 0.0, engine_version=1).leases
    grow(state, again)
    batch = state.sample(ask(0, 1), 0.0)
    assert lags(batch, 1) == [0] * 4
    assert isinstance(batch, m.Batch)
    assert batch.metrics["buffer/dropped_inexact"] == 1
    assert batch.metrics["train/trees"] == 2


def test_an_actor_whose_trees_are_never_exact_makes_batches_short_but_does_not_stop_the_run() -> None:
    state = stateful(configured(0))
    assert state.sample(ask(0, 1), 0.0) is None
    for _ in range(2 * PER_BATCH):
        (lease,) = state.lease("a", 1, 0.0, engine_version=1).leases
        grow(state, lease, 9)
    batch = state.sample(ask(0, 1), 0.0)
    assert isinstance(batch, m.Batch)
    assert (batch.trees, batch.num_trees, batch.metrics["buffer/dropped_inexact"]) == ((), 0, 4)


def test_an_actor_that_is_ahead_gets_no_training_lease_and_hears_why() -> None:
    state = stateful(configured(0))
    state.sample(ask(0, 1), 0.0)
    answer = state.lease("a", 1, 0.0, engine_version=2)
    assert answer.leases == ()
    assert "wants trees of version 1, this actor's engine has 2" in str(answer.closed_because)


def test_an_actor_that_is_behind_gets_leases_that_wait_for_the_version() -> None:
    state = stateful(configured(0), version=3)
    state.sample(ask(0, 3), 0.0)
    assert [lease.min_version for lease in state.lease("a", 9, 0.0, engine_version=2).leases] == [3, 3]


def test_a_request_that_overtakes_the_publication_waits_for_it() -> None:
    state = stateful(configured(1))
    step(state, 0, 1, leased=4)
    state.sample(ask(1, 3), 0.0)
    answer = state.lease("a", 1, 0.0, engine_version=2)
    assert answer.leases == ()
    assert "wants trees of version 3, the newest published is 2" in str(answer.closed_because)
    state.publish(published(3))
    assert len(state.lease("a", 9, 0.0, engine_version=2).leases) == PER_BATCH


def test_a_lost_lease_keeps_the_batch_back_and_goes_to_another_actor() -> None:
    state = stateful(configured(0))
    state.sample(ask(0, 1), 0.0)
    lost, kept = state.lease("a", 2, 0.0, engine_version=1).leases
    grow(state, kept)
    state.take(opened(lost), 0.0)
    state.take(leaf(lost, 1, 1.0, (1,)), 0.0)
    assert state.tick(1000.0)
    assert state.sample(ask(0, 1), 1000.0) is None
    assert state.lease("b", 9, 1000.0, engine_version=2).leases == ()
    (again,) = state.lease("b", 9, 1000.0, engine_version=1).leases
    assert (again.tree_id, again.min_version, len(again.committed)) == (lost.tree_id, 1, 1)
    state.take(leaf(again, 2, 0.0, (1,)), 1000.0)
    state.take(closed(again, 2), 1000.0)
    assert lags(state.sample(ask(0, 1), 1000.0), 1) == [0] * 4


def test_a_task_that_lost_all_its_holders_is_replaced_by_another() -> None:
    state = stateful(configured(0, buffer={"max_reissues": 0}))
    state.sample(ask(0, 1), 0.0)
    _, kept = state.lease("a", 2, 0.0, engine_version=1).leases
    grow(state, kept)
    assert state.tick(1000.0)
    (other,) = state.lease("b", 9, 1000.0, engine_version=1).leases
    assert other.task_index == 2
    grow(state, other)
    assert lags(state.sample(ask(0, 1), 1000.0), 1) == [0] * 4


def test_evaluations_go_on_between_the_sets_and_into_the_next_version() -> None:
    state = stateful(configured(1))
    step(state, 0, 1, leased=4)
    state.evaluate(m.EvalRequest(run="r", step=1, version=2, num_tasks=2, blocking=False))
    # Nothing is grown for training before the learner asks; evaluation is.
    first, second = state.lease("a", 9, 0.0, engine_version=2).leases
    assert (first.kind, second.kind) == ("eval", "eval")
    grow(state, first)
    batch = step(state, 1, 2, leased=2)
    assert lags(batch, 2) == [1] * 4
    state.sample(ask(2, 3), 0.0)
    grow(state, second, 2, 3)
    assert state.eval_result(1).done


def test_a_blocking_evaluation_comes_before_the_first_sets() -> None:
    state = stateful(configured(1))
    state.evaluate(m.EvalRequest(run="r", step=0, version=1, num_tasks=1, blocking=True))
    state.sample(ask(0, 1), 0.0)
    (lease,) = state.lease("a", 9, 0.0, engine_version=1).leases
    assert lease.kind == "eval"
    grow(state, lease)
    assert len(state.lease("a", 9, 0.0, engine_version=1).leases) == 4


def test_two_ranks_get_shares_of_one_set_and_the_same_share_again() -> None:
    state = stateful(configured(0))
    state.sample(ask(0, 1, rank=1, num_ranks=2), 0.0)
    for lease in state.lease("a", 9, 0.0, engine_version=1).leases:
        grow(state, lease)
    shares = [state.sample(ask(0, 1, rank=rank, num_ranks=2), 0.0) for rank in (0, 1, 1)]
    found = [[tree.tree_id for tree in share.trees] for share in shares if isinstance(share, m.Batch)]
    assert [len(ids) for ids in found] == [1, 1, 1]
    assert found[0] != found[1] == found[2]


def test_a_request_of_a_learner_that_was_replaced_changes_nothing() -> None:
    state = stateful(configured(0))
    state.sample(ask(0, 1), 0.0)
    state.publish(published(2))
    state.sample(ask(0, 2), 0.0)
    assert state.sample(ask(0, 1), 0.0) is None
    leases = state.lease("a", 9, 0.0, engine_version=2).leases
    assert [lease.min_version for lease in leases] == [2, 2]
    for lease in leases:
        grow(state, lease)
    assert state.sample(ask(0, 1), 0.0) is None
    assert lags(state.sample(ask(0, 2), 0.0), 2) == [0] * 4


def test_a_batch_of_another_size_is_refused_with_the_way_out() -> None:
    state = stateful(configured(0))
    with pytest.raises(BadMessage, match=r"asks for 3 trees.*trees_per_batch = 2: start both on the same"):
        state.sample(ask(0, 1, num_trees=3), 0.0)


def test_the_wait_names_what_the_exact_lag_waits_for() -> None:
    state = stateful(configured(2))
    state.sample(ask(0, 1), 0.0)
    lease, *_ = state.lease("a", 4, 0.0, engine_version=1).leases
    grow(state, lease)
    said = state.waiting_for(ask(0, 1), 0.0)
    assert "exact_lag = 2: version 1 grows 3 batches, 1 of 6 trees are there, 3 under lease, 0 without signal; " in said


def test_a_learner_that_starts_again_trains_on_what_is_whole_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """Stopped while it trained on step 2, it begins again at step 1, two version numbers on."""
    state = stateful(configured(1, steps=8))
    _, lost = (step(state, number, 1 + number, leased=leased) for number, leased in ((0, 4), (1, 2)))
    state.sample(ask(2, 3), 0.0)
    for lease in state.lease("a", 9, 0.0, engine_version=3).leases:
        grow(state, lease)
    given_up = state.sample(ask(2, 3), 0.0)
    assert isinstance(given_up, m.Batch)
    state.publish(published(5))
    seen = [step(state, 1 + i, 5 + i, leased=leased) for i, leased in enumerate((0, 0, 2, 2))]
    assert [set(lags(batch, 5 + i)) for i, batch in enumerate(seen)] == [{4}, {4}, {4}, {1}]
    # The batch of step 1 was trained on; what was learned from it is lost.
    assert [t.tree_id for t in seen[0].trees] == [t.tree_id for t in lost.trees]
    assert [t.tree_id for t in seen[1].trees] == [t.tree_id for t in given_up.trees]
    assert "the learner starts again at step 1, version 5 after 3; 3 whole batches come first, up to 4" in caplog.text
    assert caplog.text.count("starts again") == 1


def test_trees_under_way_when_the_learner_starts_again_are_revoked() -> None:
    state = stateful(configured(0))
    state.sample(ask(0, 1), 0.0)
    done, under_way = state.lease("a", 9, 0.0, engine_version=1).leases
    grow(state, done)
    state.take(opened(under_way), 0.0)
    state.publish(published(2))
    assert state.lease("a", 9, 0.0, engine_version=1).leases == ()
    state.sample(ask(0, 2), 0.0)
    with pytest.raises(BadMessage, match="comes too late"):
        state.take(leaf(under_way, 1, 1.0, (1, 2)), 0.0)
    for lease in state.lease("a", 9, 0.0, engine_version=2).leases:
        assert lease.tree_id not in (done.tree_id, under_way.tree_id)
        grow(state, lease)
    batch = state.sample(ask(0, 2), 0.0)
    assert lags(batch, 2) == [0] * 4
    assert isinstance(batch, m.Batch)
    assert batch.metrics["buffer/dropped_inexact"] == 2


def test_a_buffer_that_starts_in_mid_run_says_that_the_lag_rises_again(caplog: pytest.LogCaptureFixture) -> None:
    state = stateful(configured(1), version=9)
    with caplog.at_level(logging.WARNING):
        batches = [step(state, 3 + i, 9 + i, leased=leased) for i, leased in enumerate((4, 2, 0))]
    assert [set(lags(batch, 9 + i)) for i, batch in enumerate(batches)] == [{0}, {1}, {1}]
    assert caplog.text.count("starts at step 3 without trees; the lag rises from 0 again") == 1


def test_a_memory_too_small_for_the_line_makes_batches_short_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    state = stateful(configured(2, steps=9, buffer={"max_bytes": 1 << 20}))
    sizes = []
    for number in range(9):
        version = 1 + number
        batch = state.sample(ask(number, version), 0.0)
        while batch is None:
            for lease in state.lease("a", 1, 0.0, engine_version=version).leases:
                grow(state, lease, tokens=14_000)
                assert state.nbytes <= 1.5 * (1 << 20)
            batch = state.sample(ask(number, version), 0.0)
        assert isinstance(batch, m.Batch)
        assert set(lags(batch, version)) <= {min(number, 2)}
        sizes.append(len(batch.trees))
        state.publish(published(version + 1))
        state.checkpointed(m.Checkpointed(run="r", step=number, version=version))
    # About four and a half of the six trees that the line holds fit.
    assert min(sizes) < PER_BATCH
    assert sum(sizes) >= 9
    assert f"has {min(sizes)} of 2 trees" in caplog.text


# --- whole runs in any order ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class Growing:
    """A tree that an actor grows: a turn at a time, each sampled by what the engine has then."""

    lease: m.Lease
    turns: int
    same: bool
    """No signal."""
    open: bool = False


@dataclass(slots=True)
class Player:
    """An actor; its engine takes a version up some time after it was published, in the middle of trees too."""

    name: str
    version: int
    trees: list[Growing] = field(default_factory=list)
    silent: bool = False
    """Alive, but neither heard nor growing until its leases have lapsed."""


@dataclass(frozen=True, slots=True)
class Faults:
    """How likely each is whenever something happens."""

    actor_dies: float = 0.0
    actor_hangs: float = 0.0
    learner_dies: float = 0.0
    buffer_dies: float = 0.0


class World:
    """A buffer, actors and a learner of several ranks; what happens next is drawn, messages may overtake one another.

    Checked at every batch: one version sampled all of it, ``min(j, lag)`` versions ago, where j counts batches since
    the buffer or the learner began; only what was whole when a learner died may be older.
    """

    def __init__(
        self, config: Config, seed: int, *, no_signal: float, actors: int, ranks: int, faults: Faults | None = None
    ) -> None:
        self.config, self.faults, self.no_signal = config, faults or Faults(), no_signal
        self.chance = random.Random(seed)
        self.now = 0.0
        self.counter = 1
        self.disk = Disk()
        self.state = self.disk.open(config)
        self.players = [Player(f"a{i}", -1) for i in range(actors)]
        self.ranks = ranks
        self.step, self.version, self.published = 0, 1, 1
        self.shares: dict[int, m.Batch] = {}
        self.mail: list[Any] = [published(1)]
        """Messages of the learner that are on their way."""
        self.since = 0
        """Batches since the learner or the buffer began."""
        self.learner_died = False
        self.asked_at = 0, False
        """``since`` and ``learner_died`` when the batch in hand was made."""
        self.batches = 0
        self.lost_steps = 0
        """Steps that were trained and are to be trained again since the learner began."""
        self.starts_left = 8
        """A learner that dies more often than a set takes to grow would get nowhere."""
        self.trained_on: set[str] = set()
        self.short = 0

    def run(self) -> World:
        for _ in range(60_000):
            if self.step == self.config.run.steps:
                return self
            self.now += 0.01
            for player in self.players:
                if not player.silent:
                    self.state.report(player.name, [each.lease.tree_id for each in player.trees], self.now)
            self.chance.choice(self.possible())()
            self.disk.commit()
        raise AssertionError(
            f"step {self.step} is never reached: {self.state.waiting_for(self.request(0), self.now)}; "
            f"{[(p.name, p.version, len(p.trees), p.silent) for p in self.players]}"
        )

    def possible(self) -> list[Callable[[], None]]:
        """Everything that can happen now."""
        found: list[Callable[[], None]] = [self.pass_time, self.ask]
        if self.mail:
            found.append(self.deliver)
        if len(self.shares) == self.ranks:
            found.append(self.train)
        for player in self.players:
            if not player.silent:
                found += [lambda p=player: self.play(p)] * 3  # type: ignore[misc]
            if player.version < self.published:
                found.append(lambda p=player: self.swap(p))  # type: ignore[misc]
        return found

    # --- actors

    def swap(self, player: Player) -> None:
        player.version = self.published

    def play(self, player: Player) -> None:
        if self.chance.random() < self.faults.actor_dies:
            player.trees.clear()
            self.state.hello(player.name, self.now)
        elif self.chance.random() < self.faults.actor_hangs:
            player.silent = True
        elif len(player.trees) < 3 and self.chance.random() < 0.5:
            answer = self.state.lease(player.name, self.chance.randint(1, 2), self.now, engine_version=player.version)
            for lease in answer.leases:
                list(lease.committed)  # read now, as when it is sent
            player.trees += [
                Growing(lease, self.chance.randint(2, 3), self.chance.random() < self.no_signal)
                for lease in answer.leases
            ]
        elif player.trees:
            growing = self.chance.choice(player.trees)
            if player.version >= growing.lease.min_version:
                self.grow(player, growing)

    def grow(self, player: Player, growing: Growing) -> None:
        """The next message of a tree; a refused one ends it."""
        lease = growing.lease
        done = max((turn.turn_id for turn in lease.committed), default=0)
        if not growing.open:
            message: Any = opened(lease)
            growing.open, growing.turns = True, growing.turns + done
            growing.lease = lease
        elif growing.turns > 0 and (number := self.sent(lease)) < growing.turns:
            reward = 1.0 if growing.same else float(number % 2)
            message = leaf(lease, number + 1, reward, (player.version,))
        else:
            message = closed(lease, growing.turns)
            player.trees.remove(growing)
        try:
            self.state.take(message, self.now)
        except BadMessage:
            if growing in player.trees:
                player.trees.remove(growing)

    def sent(self, lease: m.Lease) -> int:
        """Turns of a tree that the buffer has."""
        try:
            return len(self.state.assembly.tree(lease.tree_id))
        except KeyError:
            return 0

    def pass_time(self) -> None:
        """Leases of the silent lapse, and the silent are back."""
        if self.starts_left and self.chance.random() < self.faults.buffer_dies:
            self.starts_left -= 1
            # Nobody notices: what is on its way is sent again until it is acknowledged.
            self.state = self.disk.open(self.config, now=self.now)
        if any(player.silent for player in self.players) and self.chance.random() < 0.2:
            self.now += 1000.0
            for player in self.players:
                if not player.silent:
                    self.state.report(player.name, [each.lease.tree_id for each in player.trees], self.now)
            self.state.tick(self.now)
            for player in self.players:
                player.silent = False

    # --- the learner

    def request(self, rank: int) -> m.SampleRequest:
        per_batch = self.config.staleness.trees_per_batch
        return ask(self.step, self.version, rank=rank, num_ranks=self.ranks, num_trees=per_batch)

    def ask(self) -> None:
        if self.starts_left and self.chance.random() < self.faults.learner_dies:
            self.die()
            return
        rank = self.chance.randrange(self.ranks)
        share = self.state.sample(self.request(rank), self.now)
        if share is None:
            return
        assert isinstance(share, m.Batch)
        if not self.shares:
            self.asked_at = self.since, self.learner_died
        before = self.shares.setdefault(rank, share)
        assert [t.tree_id for t in before.trees] == [t.tree_id for t in share.trees]

    def die(self) -> None:
        """And start again at some earlier checkpoint, under a new version number; what was on its way may be lost."""
        self.starts_left -= 1
        self.mail = [each for each in self.mail if self.chance.random() < 0.5]
        self.shares.clear()
        before = self.step
        self.step = self.chance.randint(max(self.step - 2, 0), self.step)
        # Their batches come again, before what was grown for those after them.
        self.lost_steps = max(self.lost_steps - self.since, 0) + before - self.step
        self.counter += self.chance.randint(1, 2)
        self.version = self.published = self.counter
        self.mail.append(published(self.version))
        self.since = 0
        self.learner_died = True

    def deliver(self) -> None:
        message = self.mail.pop(self.chance.randrange(len(self.mail)))
        if isinstance(message, m.VersionPublished):
            self.state.publish(message)
        elif isinstance(message, m.Trained):
            self.state.trained(message)
        else:
            self.state.evaluate(message)

    def train(self) -> None:
        trees = [tree for share in self.shares.values() for tree in share.trees]
        assert len({tree.tree_id for tree in trees}) == len(trees) == self.shares[0].num_trees
        self.check({self.version - v for tree in trees for turn in tree.turns for v in turn.token_versions().tolist()})
        self.trained_on |= {tree.tree_id for tree in trees}
        self.short += len(trees) < self.config.staleness.trees_per_batch
        self.batches += 1
        self.counter += 1
        self.step, self.version, self.published = self.step + 1, self.counter, self.counter
        self.mail.append(published(self.version))
        for rank, share in self.shares.items():
            self.mail.append(
                m.Trained(run="r", rank=rank, batch_id=share.batch_id, version=self.version, priorities={})
            )  # fmt: skip
        if self.step % 2:
            self.mail.append(
                m.EvalRequest(run="r", step=self.step, version=self.version, num_tasks=2, blocking=self.step % 3 == 0)
            )
        self.shares = {}
        self.since += 1

    def check(self, lags_found: set[int]) -> None:
        since, learner_died = self.asked_at
        lag, max_lag = self.config.staleness.exact_lag, self.config.staleness.max_lag
        assert lag is not None
        assert len(lags_found) <= 1
        for found in lags_found - {min(since, lag)}:
            assert learner_died, f"batch {since} is {found} versions old, not {min(since, lag)}"
            again = lag + self.lost_steps
            assert since <= again, f"batch {since} since the learner began again is {found} versions old, not {lag}"
            assert found <= max_lag


WORLDS = {
    "lag": st.sampled_from([0, 1, 2, 8]),
    "seed": st.integers(0, 2**32 - 1),
    "no_signal": st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    "actors": st.integers(1, 3),
    "ranks": st.integers(1, 2),
    "per_batch": st.integers(1, 3),
    "steps": st.integers(1, 12),
}


@settings(max_examples=40)
@given(**WORLDS)
def test_in_any_order_every_turn_is_exactly_as_old_as_asked_for_and_the_run_ends(
    lag: int, seed: int, no_signal: float, actors: int, ranks: int, per_batch: int, steps: int
) -> None:
    config = configured(lag, steps=steps, per_batch=per_batch)
    world = World(config, seed, no_signal=no_signal, actors=actors, ranks=ranks).run()
    assert world.batches == steps
    # No set is grown in vain, and without losses nothing is dropped.
    assert len(world.state.pool) == 0
    assert world.state.ledger.num_training == 0
    if no_signal == 0.0:
        assert world.state.ledger.tasks.next_task == len(world.trained_on) == steps * per_batch
        assert world.short == 0


@settings(max_examples=40)
@given(**WORLDS)
def test_lost_actors_change_nothing_about_that(
    lag: int, seed: int, no_signal: float, actors: int, ranks: int, per_batch: int, steps: int
) -> None:
    config = configured(lag, steps=steps, per_batch=per_batch, buffer={"max_reissues": 1})
    faults = Faults(actor_dies=0.02, actor_hangs=0.02)
    world = World(config, seed, no_signal=no_signal, actors=actors, ranks=ranks, faults=faults).run()
    assert world.batches == steps
    assert len(world.state.pool) == 0


@settings(max_examples=40)
@given(**WORLDS, spare_lag=st.integers(0, 4))
def test_learners_and_buffers_that_start_again_do_not_stop_the_run(
    lag: int, seed: int, no_signal: float, actors: int, ranks: int, per_batch: int, steps: int, spare_lag: int
) -> None:
    config = configured(lag, steps=steps, per_batch=per_batch, staleness={"max_lag": lag + spare_lag})
    faults = Faults(actor_dies=0.01, actor_hangs=0.01, learner_dies=0.02, buffer_dies=0.02)
    world = World(config, seed, no_signal=no_signal, actors=actors, ranks=ranks, faults=faults).run()
    assert world.step == steps
