"""A group of trees in the buffer: served, counted, aged, reissued and resumed as a whole, whatever starts again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atpo_async.config import Config, build
from atpo_async.core.errors import BadMessage, Conflict
from atpo_async.core.tree import LeafReward, Turn, VersionSpan
from atpo_async.wire import messages as m
from buffer.state import BufferState
from buffer.trees.groups import unusable
from buffer.trees.index import MemoryStore, entry_from_turns
from tests.actor_support import NOTHING, ints
from tests.buffer_support import Disk
from tests.test_buffer_restore import Life, snapshot

PROMPT = np.array([1, 2, 3], dtype=np.int32)


def config_of(**sections: dict[str, object]) -> Config:
    data: dict[str, Any] = {
        "run": {"max_tasks": 8},
        "team": {"proposers": 1, "teams": 2, "cue_tokens": 4},
        "staleness": {"trees_per_batch": 3, "max_lag": 200},
        "buffer": {"max_reissues": 50},
    }
    for name, section in sections.items():
        data[name] = {**data.get(name, {}), **section}
    return build(data)


def member(lease: m.Lease, number: int, version: int, **changes: Any) -> Turn:
    """Turn ``number`` of a group of two proposers (turns 1, 2) and two synthesizers (3, 4)."""
    role: Any = "proposer" if number <= 2 else "synthesizer"
    fields: dict[str, Any] = {
        "run": "r", "tree_id": lease.tree_id, "turn_id": number, "parent_id": 0, "lease_epoch": lease.epoch,
        "expansion_round": number - 1, "observation": PROMPT if number <= 2 else ints(4, number), "role": role,
        "action": np.full(2, lease.task_index, dtype=np.int32), "logprobs": np.full(2, -0.5, dtype=np.float32),
        "spans": (VersionSpan(version, 0, 2),), "end": "done", "reward": float(number % 2),
        "success": number % 2 == 1, "generate_s": 0.0, "environment_s": 0.0,
    }  # fmt: skip
    return Turn(**(fields | changes))


def closing(lease: m.Lease, **changes: Any) -> m.TreeClosed:
    fields: dict[str, Any] = {
        "run": "r", "tree_id": lease.tree_id, "lease_epoch": lease.epoch, "num_turns": 4, "failed_branches": 0,
        "failures": {}, "leaf_rewards": late(lease.task_index),
    }  # fmt: skip
    return m.TreeClosed(**(fields | changes))


def late(task: int) -> tuple[LeafReward, ...]:
    return LeafReward(1, 0.5 + task), LeafReward(2, 0.25)


def opening(lease: m.Lease) -> m.TreeOpened:
    return m.TreeOpened(run="r", tree_id=lease.tree_id, lease_epoch=lease.epoch, prompt=NOTHING)


class TeamLife(Life):
    """The same with groups: proposers, then synthesizers, and what the proposers earned at the closing."""

    def grow(self) -> None:
        actor = self.chance.choice(list(self.leases))
        if not self.leases[actor]:
            return
        lease = self.chance.choice(self.leases[actor])
        mine = self.sent.setdefault(f"{lease.tree_id} {lease.epoch}", [])
        number = max((turn.turn_id for turn in lease.committed), default=0) + len(mine)
        message: Any
        if not mine:
            message = opening(lease)
        elif number <= 4:
            message = member(lease, number, max(self.version, lease.min_version))
        else:
            message = closing(lease)
            self.leases[actor].remove(lease)
        mine.append(message)
        try:
            self.state.take(message, self.now)
            if self.chance.random() < 0.2:
                self.state.take(self.chance.choice(mine), self.now)  # its acknowledgement was lost
        except BadMessage:
            if lease in self.leases[actor]:
                self.leases[actor].remove(lease)

    def learn(self) -> None:
        if self.in_hand is not None:
            for tree in self.in_hand.trees:
                assert [turn.turn_id for turn in tree.turns] == [1, 2, 3, 4], "a group is never served in part"
                assert tree.leaf_rewards == late(tree.task_index)
        super().learn()


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(1, 2))
def test_every_group_is_trained_on_whole_and_as_often_as_intended_whoever_starts_again(seed: int, uses: int) -> None:
    life = TeamLife(config_of(staleness={"trees_per_batch": 3, "max_lag": 200, "max_uses": uses}), seed)
    life.live(500).finish()
    assert Counter(task for batch in life.lineage for task, _, _ in batch) == dict.fromkeys(range(8), uses)


def begun(config: Config | None = None) -> tuple[BufferState, Disk, m.Lease]:
    disk = Disk()
    state = disk.open(config or config_of())
    state.publish(m.VersionPublished(run="r", version=1, weights_endpoint="w", announce_endpoint="n"))
    (lease,) = state.lease("a", 1, 0.0).leases
    return state, disk, lease


def messages(lease: m.Lease, *numbers: int, closed: bool = False) -> list[Any]:
    turns = [member(lease, number, 1) for number in numbers]
    return [opening(lease), *turns, *([closing(lease)] if closed else [])]


def take(state: BufferState, sent: list[Any]) -> None:
    for message in sent:
        state.take(message, 0.0)


def request(num_trees: int = 1, step: int = 0) -> m.SampleRequest:
    return m.SampleRequest(run="r", rank=0, num_ranks=1, step=step, version=1, num_trees=num_trees, wait_s=0.0)


def test_a_group_is_not_served_before_it_is_closed() -> None:
    state, _, lease = begun(config_of(staleness={"trees_per_batch": 1, "max_lag": 9}))
    take(state, messages(lease, 1, 2, 3, 4))
    assert state.sample(request(), 0.0) is None
    state.take(closing(lease), 0.0)
    batch = state.sample(request(), 0.0)
    assert isinstance(batch, m.Batch)
    assert (batch.num_trees, batch.num_leaves) == (1, 4)
    assert batch.trees[0].leaf_rewards == late(0)


@pytest.mark.parametrize("turns", [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)], ids=str)
def test_a_group_that_loses_its_actor_is_leased_again_with_what_is_there(turns: tuple[int, ...]) -> None:
    """Trees that have two leaves are used as they are then; a group's proposers have not been judged."""
    state, disk, lease = begun()
    take(state, messages(lease, *turns))
    disk.commit()
    state = disk.open(config_of(), now=0.0)
    state.hello("a", 1.0)
    (again,) = state.lease("b", 1, 1.0).leases
    assert again.tree_id == lease.tree_id
    assert again.epoch > lease.epoch
    assert [(turn.turn_id, turn.role) for turn in again.committed] == [
        (number, "proposer" if number <= 2 else "synthesizer") for number in turns
    ]
    rest = [number for number in (1, 2, 3, 4) if number not in turns]
    take(state, [opening(again), *(member(again, number, 1) for number in rest), closing(again)])
    assert len(state.pool) == 1


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (5, 0, 3, 1, 2, 4)], ids=str)
def test_what_was_known_at_the_closing_survives_a_crash_at_every_message(order: tuple[int, ...]) -> None:
    """In whatever order they come: growing, ready, with the learner, used up."""
    config = config_of(staleness={"trees_per_batch": 1, "max_lag": 9, "max_uses": 2})
    state, disk, lease = begun(config)
    sent = messages(lease, 1, 2, 3, 4, closed=True)
    for at in order:
        state.take(sent[at], 0.0)
        state = _crashed(state, disk, config)
    for step in range(2):
        batch = state.sample(request(step=step), 0.0)
        assert isinstance(batch, m.Batch)
        assert batch.trees[0].leaf_rewards == late(0)
        state = _crashed(state, disk, config)
        done = m.Trained(run="r", batch_id=batch.batch_id, version=1, priorities={lease.tree_id: 0.5})
        state.trained(done)
        state = _crashed(state, disk, config)
    again = state.sample(request(step=1), 0.0)  # its learner fell back
    assert isinstance(again, m.Batch)
    assert again.trees[0].leaf_rewards == late(0)


def _crashed(state: BufferState, disk: Disk, config: Config) -> BufferState:
    disk.commit()
    before = snapshot(state, disk, partial=False)
    opened = disk.open(config, now=0.0)
    assert snapshot(opened, disk, partial=False) == before
    return opened


def test_training_counts_the_synthesizers_outcome_and_each_role_apart() -> None:
    state, _, lease = begun(config_of(staleness={"trees_per_batch": 1, "max_lag": 9}))
    take(state, messages(lease, 1, 2, 3, 4, closed=True))
    batch = state.sample(request(), 0.0)
    assert isinstance(batch, m.Batch)
    expected = {
        "train/success": 0.5, "train/reward": 0.5, "team/synthesizer/reward": 0.5, "team/synthesizer/success": 0.5,
        "team/synthesizer/signal": 1.0, "team/proposer/reward": 0.375, "team/proposer/success": 0.5,
        "team/proposer/signal": 1.0,
    }  # fmt: skip
    assert {name: batch.metrics.get(name) for name in expected} == expected


def test_the_first_priority_is_by_advantages_of_both_roles() -> None:
    state, _, lease = begun()
    equal = [member(lease, number, 1, reward=1.0, success=True) for number in (1, 2, 3, 4)]
    take(state, [opening(lease), *equal, closing(lease, leaf_rewards=())])
    assert len(state.pool) == 0, "no leaf earned more than another: there is no signal"
    (other,) = state.lease("a", 1, 0.0).leases
    equal = [member(other, number, 1, reward=1.0, success=True) for number in (1, 2, 3, 4)]
    take(state, [opening(other), *equal, closing(other)])
    assert len(state.pool) == 1, "what is known at the closing tells the proposers apart"


def test_an_evaluation_asks_what_the_synthesizer_made_of_it() -> None:
    state, _, _ = begun()
    state.evaluate(m.EvalRequest(run="r", step=0, version=1, num_tasks=1, blocking=False))
    (lease,) = (each for each in state.lease("b", 1, 0.0).leases if each.kind == "eval")
    wrong = {"reward": 0.0, "success": False}
    turns = [member(lease, 1, 1), member(lease, 2, 1), member(lease, 3, 1, rewards={"team_gap": 1.0}, **wrong)]
    take(state, [opening(lease), *turns, closing(lease, num_turns=3)])
    found = state.eval_result(0)
    assert (found.done, found.success) == (True, 0.0)
    ((_, _, metrics),) = state.drain_records()
    assert metrics["eval/reward/team_gap"] == 1.0


@pytest.mark.parametrize(
    ("roles", "why"),
    [
        ("PPSS", None), ("PPS", None), ("PSS", None), ("PS", "one_leaf"), ("PP", "no_leaf"), ("", "no_leaf"),
        ("SS", None), ("S", "one_leaf"),
    ],
)  # fmt: skip
def test_a_group_is_of_use_with_an_answer_and_two_members_to_compare(roles: str, why: str | None) -> None:
    lease = begun()[2]
    named = {"P": "proposer", "S": "synthesizer"}
    turns = [member(lease, i + 1, 1, role=named[each]) for i, each in enumerate(roles)]
    assert unusable(entry_from_turns("t", 0, NOTHING, turns, MemoryStore()).pruned()) == why


def test_a_reward_of_a_turn_that_is_no_leaf_is_refused_whichever_comes_last() -> None:
    state, _, lease = begun()
    take(state, messages(lease, 1, 2, 3, 4))
    with pytest.raises(BadMessage, match="was closed with a reward of turn 9, which is no leaf of it"):
        state.take(closing(lease, leaf_rewards=(LeafReward(9, 1.0),)), 0.0)
    state, _, lease = begun()
    take(state, [*messages(lease, 1, 2, 3), closing(lease, leaf_rewards=(LeafReward(9, 1.0),))])
    with pytest.raises(BadMessage, match="was closed with a reward of turn 9"):
        state.take(member(lease, 4, 1), 0.0)


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), 1e39])
def test_a_reward_that_is_no_number_is_refused(reward: float) -> None:
    state, _, lease = begun()
    with pytest.raises(BadMessage, match="reward is"):
        state.take(closing(lease, leaf_rewards=(LeafReward(1, reward),)), 0.0)


def test_the_same_closing_with_other_rewards_is_a_conflict() -> None:
    state, _, lease = begun()
    take(state, [*messages(lease, 1), closing(lease)])
    assert not state.assembly.add(closing(lease))
    with pytest.raises(Conflict):
        state.take(closing(lease, leaf_rewards=()), 0.0)


def test_a_group_leaves_when_none_of_its_turns_is_fresh_and_is_drawn_as_old_as_its_oldest() -> None:
    config = config_of(staleness={"trees_per_batch": 1, "max_lag": 3}, buffer={"freshness": 0.5})
    state, _, lease = begun(config)
    turns = [member(lease, number, 1 if number <= 2 else 2) for number in (1, 2, 3, 4)]
    take(state, [opening(lease), *turns, closing(lease)])
    state.trees.heard(3)
    state.trees.advance()
    assert state.pool.mean_priority == 0.25, "two versions behind: its proposers"
    state.trees.heard(5)
    state.trees.advance()
    assert len(state.pool) == 1
    state.trees.heard(6)
    state.trees.advance()
    assert len(state.pool) == 0
