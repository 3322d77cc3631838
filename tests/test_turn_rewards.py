"""Rewards of single turns and named parts of a reward, on their way from a task to the buffer."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch

from atpo_async.config import SearchConfig
from atpo_async.core.bounds import MAX_REWARD_PARTS
from atpo_async.core.errors import BadMessage
from atpo_async.core.tree import ROOT, Turn
from atpo_async.environments.base import StepResult
from atpo_async.wire import codec
from buffer.journal import earlier, tables
from buffer.journal.journal import Journal
from buffer.trees.index import ROW, MemoryStore, TurnEntry, entry_from_turns, places_of
from tests.actor_support import CountingEnvironment, CountingEpisode, ints, leaf, turn
from tests.test_search import search_of
from tests.test_values import ENDED, GOING_ON, refusal, said
from tests.wire_support import contents

# --- what a task hands over --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "number"),
    [(0.25, 0.25), (1, 1.0), (True, 1.0), (np.float32(-0.5), -0.5), (torch.tensor([2.0]), 2.0), (Fraction(1, 4), 0.25)],
)
@pytest.mark.parametrize("result", [GOING_ON, ENDED])
async def test_a_turns_reward_of_any_number_type_becomes_a_float_on_any_step(
    result: StepResult, given: Any, number: float
) -> None:
    found = (await said(replace(result, turn_reward=given))).turn_reward
    assert type(found) is float
    assert found == number


@pytest.mark.parametrize("given", [None, math.nan, math.inf, 1e39, "1", [1.0], np.ones(2), object()])
@pytest.mark.parametrize("result", [GOING_ON, ENDED])
async def test_a_turns_reward_that_is_no_finite_number_is_refused_by_name(result: StepResult, given: Any) -> None:
    refused = await refusal(replace(result, turn_reward=given))
    assert refused.field == "turn_reward"
    assert f"({type(given).__name__}); expected a finite number that fits float32, 0.0 where" in str(refused)


async def test_a_reward_before_the_end_of_a_chain_is_refused_with_the_field_that_it_belongs_in() -> None:
    refused = await refusal(replace(GOING_ON, reward=0.5))
    assert "what a turn earns of its own is its turn_reward" in str(refused)


async def test_named_parts_of_a_reward_of_any_number_type_become_floats() -> None:
    given: Any = {"exact match": True, "format": np.float32(0.5)}
    found = (await said(replace(ENDED, rewards=given))).rewards
    assert found == {"exact match": 1.0, "format": 0.5}
    assert {type(part) for part in found.values()} == {float}
    assert (await said(replace(GOING_ON, rewards={}))).rewards == {}


@pytest.mark.parametrize(
    ("rewards", "field", "says"),
    [
        ({"judge": math.nan}, "rewards['judge']", "rewards['judge'] is nan (float); expected a finite number"),
        ({"judge": None}, "rewards['judge']", "is None (NoneType)"),
        ({"judge": "good"}, "rewards['judge']", "is 'good' (str)"),
        ({3: 1.0}, "rewards", "rewards is named 3 (int); expected 1 to 64 printable characters"),
        ({"": 1.0}, "rewards", "rewards is named '' (str)"),
        ({"x" * 65: 1.0}, "rewards", "expected 1 to 64 printable characters"),
        ({"a\nb": 1.0}, "rewards", "rewards is named 'a\\nb' (str)"),
        ({"é" * 64 + "x": 1.0}, "rewards", "at most 128 bytes in UTF-8"),
        ({f"part {i}": 1.0 for i in range(17)}, "rewards", "rewards has 17 names; expected 16 at most"),
        ([("judge", 1.0)], "rewards", "expected a mapping of names to numbers"),
    ],
)
async def test_named_parts_that_are_none_are_refused_with_task_field_name_and_value(
    rewards: Any, field: str, says: str
) -> None:
    refused = await refusal(replace(ENDED, rewards=rewards))
    assert refused.field == field
    assert says in str(refused)


async def test_parts_of_a_reward_belong_to_the_end_of_a_chain() -> None:
    refused = await refusal(replace(GOING_ON, rewards={"format": 1.0}))
    assert "expected none, since done is False" in str(refused)


# --- through the search ------------------------------------------------------------------------------------------


class Paid(CountingEpisode):
    """Its n-th action earns n/8, the last one two parts of its reward too."""

    async def step(self, action: np.ndarray) -> StepResult:
        result = await super().step(action)
        parts = {"format": 0.5, "answer": 1.0} if result.done else {}
        return replace(result, turn_reward=self._actions / 8, rewards=parts)


class Paying(CountingEnvironment):
    async def start(self, split: Any, task_index: int) -> CountingEpisode:
        await super().start(split, task_index)
        return Paid(self, task_index)


async def test_every_turn_of_a_tree_has_its_own_reward_the_forked_ones_too() -> None:
    tree = await search_of(environment=Paying(turns=3)).grow()
    assert any(turn.expansion_round for turn in tree)
    for each in tree:
        assert each.turn_reward == len(tree.path(each.turn_id)) / 8
        assert each.rewards == ({"format": 0.5, "answer": 1.0} if each.is_leaf else {})


async def test_the_turns_of_a_chain_that_was_cut_by_its_length_keep_what_they_earned() -> None:
    only_chain = SearchConfig(initial_rollouts=1, strategy="none", max_action_tokens=8)
    environment = Paying(turns=99)
    tree = await search_of(environment=environment, config=only_chain, max_context_tokens=10).grow()
    assert [t.end for t in tree] == ["continue", "continue", "length_limit"]
    assert [t.turn_reward for t in tree] == [1 / 8, 2 / 8, 3 / 8]
    assert tree.leaves()[0].rewards == {}


@pytest.mark.parametrize("reward", [0.0, -1.0])
async def test_a_chain_that_was_cut_by_its_length_earns_what_the_settings_give_it(reward: float) -> None:
    settings = SearchConfig(initial_rollouts=2, strategy="none", max_action_tokens=8, truncated_reward=reward)
    tree = await search_of(environment=Paying(turns=99), config=settings, max_context_tokens=10).grow()
    assert [(t.end, t.reward, t.success) for t in tree.leaves()] == [("length_limit", reward, False)] * 2


# --- over the wire -----------------------------------------------------------------------------------------------


def without(frames: Any, *names: str) -> list[bytes]:
    header = msgpack.unpackb(frames[0])
    return [msgpack.packb({key: value for key, value in header.items() if key not in names}), bytes(frames[1])]


def test_a_turn_comes_back_with_its_own_reward_and_the_parts_of_its_leaf() -> None:
    sent = leaf(2, 1, turn_reward=-0.125, rewards={"format": 0.5, "judge": -1.0})
    assert contents(codec.decode(codec.encode(sent), Turn)) == contents(sent)


def test_a_turn_that_an_earlier_program_wrote_earned_nothing_of_its_own() -> None:
    old = without(codec.encode(leaf(2, 1)), "turn_reward", "rewards")
    found = codec.decode(old, Turn)
    assert (found.turn_reward, found.rewards) == (0.0, {})
    assert contents(found) == contents(leaf(2, 1))


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"turn_reward": math.inf}, "turn_reward is inf, expected a finite number"),
        ({"rewards": {"x": math.nan}}, "rewards['x'] is nan, expected a finite number"),
        ({"rewards": {"x" * 65: 1.0}}, "expected 1 to 64 printable characters"),
        ({"rewards": {"": 1.0}}, "rewards has the name ''"),
        ({"rewards": {str(i): 0.0 for i in range(MAX_REWARD_PARTS + 1)}}, "rewards has 17 names, expected 16 at most"),
        ({"rewards": {"x": 1.0}, "end": "continue", "reward": None}, "on a turn that is no leaf"),
    ],
)
def test_rewards_that_no_task_may_hand_over_are_refused_on_the_wire_too(changes: dict[str, Any], fact: str) -> None:
    with pytest.raises(BadMessage, match=r"Turn \(run 'r', tree_id 't0', turn_id 2") as refused:
        codec.decode(codec.encode(turn(2, 1, **({"end": "done", "reward": 1.0} | changes))), Turn)
    assert fact in str(refused.value)


# --- in the buffer -----------------------------------------------------------------------------------------------


def test_the_buffers_entry_of_a_tree_has_the_rewards_of_its_turns() -> None:
    turns = [turn(1, ROOT, turn_reward=0.5), leaf(2, 1, 0.0, turn_reward=-0.25), leaf(3, 1)]
    entry = entry_from_turns("t0", 0, ints(10), turns, MemoryStore())
    assert entry.arrays().turn_reward.tolist() == [0.5, -0.25, 0.0]


def as_earlier(rows: bytes) -> bytes:
    """Rows without their last field."""
    found, cut = np.frombuffer(rows, dtype=ROW), np.dtype(ROW.descr[:-1])
    before = np.zeros(len(found), dtype=cut)
    for name in cut.names or ():
        before[name] = found[name]
    return before.tobytes()


async def test_a_journal_of_an_earlier_program_is_brought_to_this_ones_format_once(tmp_path: Path) -> None:
    def opened() -> Journal:
        return Journal(tmp_path, max_bytes=1 << 24, gather_s=0.0)

    async with opened() as journal:
        journal.recover()
        for number in (1, 2):
            place = journal.add(bytes(8 * number))
            journal.note(TurnEntry(7, number, 0, 1, 2, 3, 0.5, 0.25, 7, 8, *place, turn_reward=number / 4))
            await journal.settle()
        new = journal.recover().rows
    # As the earlier program would have written them: without the last field.
    written = tables.Tables(tmp_path, max_bytes=1 << 24, sync=True, leased=lambda: True)
    with contextlib.closing(written), written._env.begin(write=True) as txn:
        for key, rows in list(txn.cursor(db=written._rows)):
            txn.put(key, as_earlier(rows), db=written._rows)
        txn.put(tables._META, b"1", db=written._state)
    for _ in range(2):
        async with opened() as journal:
            found = journal.recover().rows
            assert found["turn_reward"].tolist() == [0.0, 0.0]
            assert found[list(ROW.names or ())[:-1]].tolist() == new[list(ROW.names or ())[:-1]].tolist()
            assert [len(record) for record in await journal.load(places_of(found))] == [8, 16]
    with pytest.raises(ValueError, match="buffer size must be a multiple of element size"):
        earlier.upgraded(bytes(77))
