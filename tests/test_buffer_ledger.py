"""Leases, admission and evaluations; and the whole loop, played by a scripted learner and scripted actors."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import pytest

from atpo_async.config import Config, build
from atpo_async.core.errors import ConfigError
from atpo_async.core.tree import Turn, VersionSpan, is_fresh
from atpo_async.wire.messages import (
    Batch,
    EvalRequest,
    Lease,
    SampleRequest,
    Trained,
    TreeClosed,
    TreeOpened,
    VersionPublished,
)
from buffer.leases.evaluations import Evaluation
from buffer.leases.ledger import Ledger
from buffer.leases.table import HeldLease
from buffer.state import BufferState
from buffer.trees.index import MemoryStore, TreeEntry, entry_from_turns

PROMPT = np.array([1], dtype=np.int32)


def ledger(**changes: Any) -> Ledger:
    staleness = {"trees_per_batch": 4, "max_lag": 1} | changes.pop("staleness", {})
    settings: dict[str, Any] = {
        "staleness": build({"staleness": staleness}).staleness,
        "lifetime_s": 10.0,
        "silent_s": 6.0,
        "max_reissues": 1,
        "seed": 0,
        "prefix": "b1",
    }
    return Ledger(**(settings | changes))


def granted(made: Ledger, count: int = 1, *, actor: str = "a", now: float = 0.0, ready: int = 0) -> list[str]:
    return [held.tree_id for held in made.grant(actor, count, now=now, ready=ready).leases]


def evaluation(made: Ledger, step: int) -> Evaluation:
    found = made.evaluations.find(step)
    assert found is not None
    return found


def one_turn(tree_id: str, success: float) -> TreeEntry:
    """The tree of a greedy episode of one turn."""
    turn = Turn(
        run="r", tree_id=tree_id, turn_id=1, parent_id=0, lease_epoch=0, expansion_round=0,
        observation=np.zeros(0, dtype=np.int32), action=np.zeros(1, dtype=np.int32),
        logprobs=np.zeros(1, dtype=np.float32), spans=(VersionSpan(0, 0, 1),), end="done", reward=success,
        success=success > 0, generate_s=0.0, environment_s=0.0,
    )  # fmt: skip
    return entry_from_turns(tree_id, 0, PROMPT, (turn,), MemoryStore())


# --- admission -----------------------------------------------------------------------------------------------------


def test_nothing_is_granted_before_the_learner_published_its_first_version() -> None:
    made = ledger()
    answer = made.grant("a", 4, now=0.0, ready=0)
    assert answer.leases == ()
    assert answer.closed_because is not None
    assert "first version" in answer.closed_because


def test_admission_closes_at_the_bound_and_says_so() -> None:
    made = ledger()
    made.progress.publish(0)
    assert len(granted(made, 100)) == 8
    answer = made.grant("a", 1, now=0.0, ready=0)
    assert answer.closed_because is not None
    assert "allows 8" in answer.closed_because


def test_ready_trees_count_towards_the_bound() -> None:
    made = ledger()
    made.progress.publish(0)
    assert len(granted(made, 100, ready=5)) == 3


def test_leases_go_through_the_tasks_in_order_with_seeds_of_their_own() -> None:
    made = ledger()
    made.progress.publish(0)
    held = made.grant("a", 3, now=0.0, ready=0).leases
    assert [h.task_index for h in held] == [0, 1, 2]
    assert len({h.tree_id for h in held} | {h.seed for h in held}) == 6


def test_time_in_which_the_buffer_stood_still_lets_no_lease_lapse() -> None:
    made = ledger()
    made.progress.publish(0)
    (tree_id,) = granted(made, 1)
    made.excuse(30.0, 31.0)
    assert made.lapsed(31.0) == []
    assert made.lapsed(36.0) == []
    assert [held.tree_id for held in made.lapsed(41.5)] == [tree_id]


def test_a_lease_whose_answer_was_lost_goes_to_another_after_a_few_reports_without_it() -> None:
    made = ledger()
    made.progress.publish(0)
    known, lost = granted(made, 2)
    for report in range(2):
        assert made.renew("a", [known], float(report)) == []
    made.renew("a", [known, lost], 2.0)  # a report from before the lease had been under way
    for report in range(2):
        assert made.renew("a", [known], 3.0 + report) == []
    assert [held.tree_id for held in made.renew("a", [known], 5.0)] == [lost]
    made.reissue(lost, lost=False)
    assert [h.tree_id for h in made.grant("b", 1, now=5.0, ready=0).leases] == [lost]


def test_old_results_and_actors_long_gone_are_forgotten() -> None:
    made = ledger()
    made.progress.publish(0)
    for step in range(30):
        made.evaluate(step=step, version=0, num_tasks=1, blocking=False)
        (held,) = made.grant(f"a{step}", 1, now=float(step), ready=99).leases
        made.end(held.tree_id)
        made.evaluations.record(step, held.task_index, None)
    assert len(made.evaluations) <= 9
    assert max(each.step for each in made.evaluations) == 29
    assert made.actors.num_alive(30.0) > 0
    made.lapsed(1e6)
    assert len(made.actors) == 0


def test_tasks_whose_trees_are_gone_are_leased_first_under_other_ids() -> None:
    made = ledger(staleness={"max_lag": 4})
    made.progress.publish(0)
    old = granted(made, 4)
    for tree_id in old:
        made.end(tree_id)
    assert made.tasks.retry(3)
    assert made.tasks.retry(1)
    held = made.grant("a", 3, now=0.0, ready=0).leases
    assert [h.task_index for h in held] == [3, 1, 4]
    assert not {h.tree_id for h in held} & set(old)


def test_a_task_whose_trees_come_too_late_too_often_is_given_up() -> None:
    made = ledger(max_reissues=1)
    made.progress.publish(0)
    assert made.tasks.retry(0)
    made.grant("a", 1, now=0.0, ready=0)
    assert not made.tasks.retry(0)
    assert (made.tasks.given_up, list(made.tasks.retries)) == (1, [])


def test_a_learner_that_starts_over_does_not_count_against_a_task() -> None:
    made = ledger(max_reissues=1)
    made.progress.publish(0)
    for _ in range(5):
        assert made.tasks.retry(0, in_vain=False)
        (held,) = made.grant("a", 1, now=0.0, ready=0).leases
        made.end(held.tree_id)


def test_no_task_from_max_tasks_on_is_leased() -> None:
    made = ledger(max_tasks=3)
    made.progress.publish(0)
    answer = made.grant("a", 8, now=0.0, ready=0)
    assert [h.task_index for h in answer.leases] == [0, 1, 2]
    assert answer.closed_because is not None
    assert "run.max_tasks = 3" in answer.closed_because
    assert made.tasks.all_leased
    made.tasks.retry(1)
    assert not made.tasks.all_leased


@pytest.mark.parametrize(("max_lag", "pending", "least"), [(0, 0, 3), (1, 0, 2), (1, 4, 3), (4, 9, 1)])
def test_a_lease_asks_for_the_version_that_keeps_its_tree_fresh(max_lag: int, pending: int, least: int) -> None:
    made = ledger(staleness={"max_lag": max_lag})
    made.progress.publish(3)
    assert made.grant("a", 1, now=0.0, ready=pending).leases[0].min_version == least


def test_without_lag_no_tree_begins_between_a_batch_and_the_version_made_of_it() -> None:
    made = ledger(staleness={"max_lag": 0})
    made.progress.publish(0)
    for tree_id in granted(made, 4):
        made.end(tree_id)
    made.progress.consumed(0)
    answer = made.grant("a", 1, now=0.0, ready=0)
    assert answer.leases == ()
    assert "version 1 must be published first" in str(answer.closed_because)
    made.progress.publish(1)
    assert made.grant("a", 1, now=0.0, ready=0).leases[0].min_version == 1


def test_a_full_memory_closes_admission() -> None:
    made = ledger()
    made.progress.publish(0)
    assert "max_bytes" in str(made.grant("a", 1, now=0.0, ready=0, memory_full=True).closed_because)


class Counted(dict[str, HeldLease]):
    """Leases; counts how often all of them are gone through."""

    walks = 0

    def values(self) -> Any:
        self.walks += 1
        return super().values()

    def __iter__(self) -> Any:
        self.walks += 1
        return super().__iter__()


def test_what_a_grant_costs_does_not_depend_on_how_many_leases_there_are() -> None:
    made = ledger(staleness={"trees_per_batch": 4000, "max_lag": 4})
    made.progress.publish(0)
    made._leases._by_tree = held = Counted()
    trees = granted(made, 4000)
    for tree_id in trees:
        made.reissue(tree_id, lost=False)
    assert granted(made, 5000)[:4000] == trees
    assert (len(made), made.num_training, held.walks) == (5000, 5000, 0)
    for tree_id in trees:
        made.end(tree_id)
    assert (len(made), made.num_training, held.walks) == (1000, 1000, 0)


def test_what_a_report_or_a_hello_costs_does_not_depend_on_the_leases_of_others() -> None:
    made = ledger(staleness={"trees_per_batch": 4000, "max_lag": 4})
    made.progress.publish(0)
    made._leases._by_tree = held = Counted()
    mine, _ = granted(made, 2, actor="a"), granted(made, 3000, actor="b")
    for report in range(3):
        lost = made.renew("a", mine[:1], float(report))
    assert [each.tree_id for each in lost] == mine[1:]
    assert [each.tree_id for each in made.held_by("a")] == mine
    made.reissue(mine[1], lost=False)
    assert [each.tree_id for each in made.held_by("a")] == mine[:1]
    assert held.walks == 0


# --- renewing and losing -------------------------------------------------------------------------------------------


def test_a_lease_lapses_when_it_is_not_renewed() -> None:
    made = ledger(silent_s=100.0)
    made.progress.publish(0)
    one, two = granted(made, 2)
    made.renew("a", [one], now=5.0)
    assert [h.tree_id for h in made.lapsed(now=11.0)] == [two]
    assert [h.tree_id for h in made.lapsed(now=16.0)] == [one, two]


def test_a_silent_actor_loses_its_leases_before_they_expire() -> None:
    made = ledger()
    made.progress.publish(0)
    mine, other = granted(made, 1, actor="a"), granted(made, 1, actor="b")
    made.actors.heard("b", 5.0)
    assert [h.tree_id for h in made.lapsed(now=7.0)] == mine
    assert other[0] in made


def test_a_lost_lease_is_reissued_under_a_higher_epoch_until_its_task_is_given_up() -> None:
    made = ledger()
    made.progress.publish(0)
    (tree_id,) = granted(made)
    assert made.reissue(tree_id, lost=True)
    (again,) = made.grant("b", 1, now=1.0, ready=0).leases
    assert (again.tree_id, again.epoch, again.holder) == (tree_id, 1, "b")
    assert not made.reissue(tree_id, lost=True)
    assert (tree_id in made, made.tasks.given_up) == (False, 1)


def test_a_lease_handed_back_costs_no_attempt() -> None:
    made = ledger(max_reissues=0)
    made.progress.publish(0)
    (tree_id,) = granted(made)
    assert made.reissue(tree_id, lost=False)
    assert granted(made) == [tree_id]


def test_a_holder_that_comes_back_before_the_reissue_keeps_its_lease() -> None:
    made = ledger()
    made.progress.publish(0)
    (tree_id,) = granted(made)
    made.reissue(tree_id, lost=True)
    made.renew("a", [tree_id], now=20.0)
    assert tree_id not in granted(made, 2, actor="b", now=20.0)
    made.renew("b", [tree_id], now=100.0)
    assert tree_id in [h.tree_id for h in made.lapsed(now=30.0)]


# --- evaluation ----------------------------------------------------------------------------------------------------


def test_evaluation_comes_before_training_and_a_blocking_one_keeps_it_back() -> None:
    made = ledger()
    made.evaluate(step=0, version=0, num_tasks=3, blocking=True)
    made.progress.publish(0)
    answer = made.grant("a", 5, now=0.0, ready=0)
    assert [(h.kind, h.task_index, h.min_version) for h in answer.leases] == [("eval", i, 0) for i in range(3)]
    assert "evaluation of step 0 comes first: 0 of 3" in str(answer.closed_because)
    for held, success in zip(answer.leases, (1.0, 0.0, None), strict=True):
        made.end(held.tree_id)
        made.evaluations.record(0, held.task_index, None if success is None else one_turn(held.tree_id, success))
    assert evaluation(made, 0).success == pytest.approx(1 / 3)
    assert evaluation(made, 0).num_failed == 1
    assert made.grant("a", 1, now=0.0, ready=0).leases[0].kind == "train"


def test_an_evaluation_that_does_not_block_shares_the_actors() -> None:
    made = ledger()
    made.progress.publish(0)
    made.evaluate(step=5, version=0, num_tasks=2, blocking=False)
    assert [h.kind for h in made.grant("a", 3, now=0.0, ready=0).leases] == ["eval", "eval", "train"]


def test_an_evaluation_of_a_version_that_is_not_out_yet_blocks_nothing() -> None:
    made = ledger()
    made.progress.publish(0)
    made.evaluate(step=5, version=2, num_tasks=2, blocking=True)
    assert [h.kind for h in made.grant("a", 1, now=0.0, ready=0).leases] == ["train"]
    made.progress.publish(2)
    assert [h.kind for h in made.grant("a", 1, now=0.0, ready=0).leases] == ["eval"]


def test_the_same_evaluation_again_goes_on_and_another_version_begins_anew() -> None:
    made = ledger()
    made.progress.publish(0)
    made.evaluate(step=5, version=0, num_tasks=2, blocking=True)
    first = granted(made, 1)
    assert made.evaluate(step=5, version=0, num_tasks=2, blocking=True) == []
    assert evaluation(made, 5).next_task == 1
    assert made.evaluate(step=5, version=0, num_tasks=3, blocking=True) == first
    assert (evaluation(made, 5).next_task, len(made)) == (0, 0)


def test_a_lost_evaluation_lease_goes_out_again_while_training_waits() -> None:
    made = ledger()
    made.progress.publish(0)
    (train,) = granted(made)
    made.evaluate(step=5, version=0, num_tasks=1, blocking=True)
    (evaluation,) = granted(made)
    made.reissue(train, lost=True)
    made.reissue(evaluation, lost=True)
    assert granted(made, 3) == [evaluation]


# --- the whole loop, without sockets -------------------------------------------------------------------------------


class Loop:
    """Actors of several speeds and a learner on one simulated clock; trees with several turns, versions as they go.

    Every action is an event at a time; weights reach an actor when they are published, in the middle of trees too.
    """

    def __init__(self, config: Config, *, no_signal: float = 0.2, actors: int = 3, slots: int = 4) -> None:
        self.config = config
        self.rng = np.random.default_rng(1)
        self.state = BufferState(config, run="r", rng=np.random.default_rng(2), now=0.0)
        self.no_signal = no_signal
        self.now = 0.0
        self.published = -1
        self.events: list[tuple[float, int, Any]] = []
        self.count = 0
        self.free = {f"a{i}": slots for i in range(actors)}
        self.parked: list[tuple[str, Lease]] = []
        self.batches: list[Batch] = []
        self.served_lags: list[int] = []
        self.masked = 0
        self.version = 0
        self.step = 0

    def at(self, delay: float, action: Any) -> None:
        self.count += 1
        heapq.heappush(self.events, (self.now + delay, self.count, action))

    def publish(self) -> None:
        self.published = self.version
        self.state.publish(
            VersionPublished(run="r", version=self.version, weights_endpoint="w", announce_endpoint="n")
        )  # fmt: skip
        waiting, self.parked = self.parked, []
        for actor, lease in waiting:
            self.begin(actor, lease)

    def begin(self, actor: str, lease: Lease) -> None:
        if lease.min_version > self.published:
            self.parked.append((actor, lease))
            return
        self.state.take(TreeOpened(run="r", tree_id=lease.tree_id, lease_epoch=lease.epoch, prompt=PROMPT), self.now)
        same = bool(self.rng.random() < self.no_signal)
        self.at(float(self.rng.uniform(0.5, 1.5)), lambda: self.grow(actor, lease, 1, same))

    def grow(self, actor: str, lease: Lease, turn_id: int, same: bool) -> None:
        """Four chains of one turn each, one after another."""
        turn = Turn(
            run="r", tree_id=lease.tree_id, turn_id=turn_id, parent_id=0, lease_epoch=lease.epoch, expansion_round=0,
            observation=np.zeros(0, dtype=np.int32), action=PROMPT, logprobs=np.zeros(1, dtype=np.float32),
            spans=(VersionSpan(self.published, 0, 1),), end="done", reward=1.0 if same else float(turn_id % 2),
            success=None, generate_s=0.0, environment_s=0.0,
        )  # fmt: skip
        self.state.take(turn, self.now)
        if turn_id < 4:
            self.at(float(self.rng.uniform(0.5, 1.5)), lambda: self.grow(actor, lease, turn_id + 1, same))
            return
        closed = TreeClosed(
            run="r", tree_id=lease.tree_id, lease_epoch=lease.epoch, num_turns=4, failed_branches=0, failures={}
        )  # fmt: skip
        self.state.take(closed, self.now)
        self.free[actor] += 1

    def learn(self, step_s: float) -> bool:
        """Ask for a batch; train on it if there is one."""
        request = SampleRequest(
            run="r", rank=0, num_ranks=1, step=self.step, version=self.version,
            num_trees=self.config.staleness.trees_per_batch, wait_s=0.0,
        )  # fmt: skip
        batch = self.state.sample(request, self.now)
        if batch is None:
            return False
        assert isinstance(batch, Batch)
        self.batches.append(batch)
        max_lag = self.config.staleness.max_lag
        for tree in batch.trees:
            lags = [self.version - t.oldest_version for t in tree.turns]
            assert min(lags) <= max_lag
            self.served_lags += lags
            self.masked += sum(not is_fresh(t, current=self.version, max_lag=max_lag) for t in tree.turns)
        self.at(step_s, lambda: self.finish_step(batch))
        return True

    def finish_step(self, batch: Batch) -> None:
        self.step += 1
        self.version += 1
        if self.version % self.config.staleness.publish_every == 0:
            self.publish()
        priorities = {tree.tree_id: 0.5 for tree in batch.trees}
        self.state.trained(Trained(run="r", batch_id=batch.batch_id, version=self.version, priorities=priorities))
        self.learning = False

    def run(self, steps: int, *, step_s: float) -> Loop:
        self.learning = False
        self.publish()
        while self.step < steps:
            for actor in self.free:
                if self.free[actor]:
                    for lease in self.state.lease(actor, self.free[actor], self.now).leases:
                        self.free[actor] -= 1
                        self.begin(actor, lease)
            self.state.report("a0", [], self.now)
            for actor in self.free:
                held = [h.tree_id for h in self.state.ledger.held_by(actor)]
                self.state.report(actor, held, self.now)
            if not self.learning:
                self.learning = self.learn(step_s)
            assert self.events, (
                f"deadlock at step {self.step}: {self.state.ledger.grant('a0', 1, now=self.now, ready=0)}"
            )
            self.now, _, action = heapq.heappop(self.events)
            action()
        return self

    def total(self, name: str) -> float:
        return sum(batch.metrics.get(name, 0.0) for batch in self.batches)


def staleness(max_lag: int, publish_every: int, **other: Any) -> Config:
    return build({"staleness": {"trees_per_batch": 8, "max_lag": max_lag, "publish_every": publish_every, **other}})


@pytest.mark.parametrize("step_s", [0.2, 3.0, 20.0], ids=["fast learner", "even", "slow learner"])
@pytest.mark.parametrize(("max_lag", "publish_every"), [(0, 1), (1, 1), (1, 2), (4, 1), (4, 2)])
def test_the_loop_neither_stops_nor_discards_much(max_lag: int, publish_every: int, step_s: float) -> None:
    played = Loop(staleness(max_lag, publish_every)).run(25, step_s=step_s)
    produced = played.total("train/trees")
    assert produced >= 25 * 8 * 0.9
    assert played.total("buffer/dropped_stale") <= 0.03 * produced
    assert played.masked <= 0.05 * len(played.served_lags)
    assert all(batch.num_trees == 8 for batch in played.batches)
    if max_lag == 0:
        assert set(played.served_lags) == {0}
    elif step_s > 1:
        assert max(played.served_lags) > 0


@pytest.mark.parametrize("no_signal", [0.0, 0.9], ids=["all with signal", "few with signal"])
@pytest.mark.parametrize("publish_every", [1, 2, 3])
@pytest.mark.parametrize("max_uses", [1, 2, 3, 8])
@pytest.mark.parametrize("spare_lag", [0, 1])
def test_whatever_the_configuration_accepts_does_not_stall(
    spare_lag: int, max_uses: int, publish_every: int, no_signal: float
) -> None:
    max_lag = (publish_every - 1) + (max_uses - 1) + spare_lag
    for step_s in (0.2, 20.0):
        played = Loop(staleness(max_lag, publish_every, max_uses=max_uses), no_signal=no_signal).run(8, step_s=step_s)
        assert len(played.batches) == 8


@pytest.mark.parametrize(("max_lag", "max_uses", "publish_every"), [(0, 2, 1), (4, 8, 1), (2, 3, 3), (2, 2, 3)])
def test_what_the_configuration_refuses_would_have_stalled(max_lag: int, max_uses: int, publish_every: int) -> None:
    with pytest.raises(ConfigError, match="cannot hold"):
        staleness(max_lag, publish_every, max_uses=max_uses)
    accepted = staleness(max_lag + 8, publish_every, max_uses=max_uses)
    unchecked = accepted.model_copy(update={"staleness": accepted.staleness.model_copy(update={"max_lag": max_lag})})
    with pytest.raises(AssertionError, match="deadlock"):
        Loop(unchecked, no_signal=0.9).run(40, step_s=0.2)


def test_with_many_trees_without_signal_a_synchronous_run_goes_on_in_short_batches() -> None:
    played = Loop(staleness(0, 1, max_oversampling=2.0), no_signal=0.9).run(20, step_s=0.5)
    assert set(played.served_lags) <= {0}
    assert played.total("buffer/dropped_stale") == 0
    assert any(batch.num_trees < 8 for batch in played.batches)


def test_when_nothing_has_a_signal_the_batches_are_empty_and_the_run_goes_on() -> None:
    played = Loop(staleness(4, 1), no_signal=1.0).run(5, step_s=0.5)
    assert [batch.trees for batch in played.batches] == [()] * 5
    assert played.batches[-1].metrics["train/reward"] == 1.0


def test_trees_used_twice_take_half_as_many_new_ones() -> None:
    played = Loop(staleness(4, 1, max_uses=2), no_signal=0.0).run(40, step_s=3.0)
    assert played.total("train/trees") <= 40 * 8 * 0.65
    assert played.total("buffer/dropped_stale") <= 0.03 * played.total("train/trees")
    assert {tree.uses for batch in played.batches for tree in batch.trees} == {1, 2}


def test_a_blocking_evaluation_in_mid_run_ends_and_training_goes_on() -> None:
    played = Loop(staleness(1, 1))
    played.state.evaluate(EvalRequest(run="r", step=0, version=0, num_tasks=10, blocking=True))
    played.run(5, step_s=1.0)
    result = played.state.eval_result(0)
    assert (result.done, result.num_done) == (True, 10)
    assert all("-e0v0-" not in tree.tree_id for batch in played.batches for tree in batch.trees)
