"""Turns become the same trees whatever the order, and however often they come."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atpo_async.core.errors import BadMessage, Conflict
from atpo_async.core.tree import Turn, VersionSpan
from atpo_async.wire.messages import TreeClosed, TreeOpened
from buffer.trees.assembly import Assembly, TreeMessage
from buffer.trees.index import ROW, MemoryStore, Place, TreeEntry, places_of

PROMPT = np.array([7, 8], dtype=np.int32)


def turn(turn_id: int, parent_id: int = 0, *, tree_id: str = "t", reward: float | None = None, **other: Any) -> Turn:
    fields: dict[str, Any] = {
        "run": "r",
        "tree_id": tree_id,
        "turn_id": turn_id,
        "parent_id": parent_id,
        "lease_epoch": 0,
        "expansion_round": 0,
        "observation": np.array([turn_id], dtype=np.int32),
        "action": np.array([turn_id, 1], dtype=np.int32),
        "logprobs": np.array([-0.5, -0.25], dtype=np.float32),
        "spans": (VersionSpan(0, 0, 2),),
        "end": "continue" if reward is None else "done",
        "reward": reward,
        "success": None,
        "generate_s": 0.1,
        "environment_s": 0.0,
    }
    return Turn(**(fields | other))


def opened(tree_id: str = "t", *, epoch: int = 0, prompt: np.ndarray = PROMPT) -> TreeOpened:
    return TreeOpened(run="r", tree_id=tree_id, lease_epoch=epoch, prompt=prompt)


def closed(num_turns: int, tree_id: str = "t", *, epoch: int = 0, failed: int = 0) -> TreeClosed:
    failures = {"timeout": failed} if failed else {}
    return TreeClosed(
        run="r", tree_id=tree_id, lease_epoch=epoch, num_turns=num_turns, failed_branches=failed, failures=failures
    )


def assembly(*tree_ids: str, store: MemoryStore | None = None) -> Assembly:
    made = Assembly(store or MemoryStore())
    for index, tree_id in enumerate(tree_ids or ("t",)):
        made.expect(tree_id, number=index + 1, task_index=index, kind="train", epoch=0)
    return made


def describe(tree: TreeEntry, store: MemoryStore) -> tuple[Any, ...]:
    records = [bytes(store.read(place)) for place in (*places_of(tree.prompt), *places_of(tree.rows))]
    numbers = [
        [value for name, value in zip(ROW.names or (), row.tolist(), strict=True) if name not in Place._fields]
        for row in (*tree.prompt, *tree.rows)
    ]
    return tree.tree_id, tree.task_index, numbers, records, tree.failed_branches


def ids(tree: TreeEntry) -> list[int]:
    return [int(i) for i in tree.rows["turn_id"]]


@st.composite
def forests(draw: st.DrawFn) -> list[TreeMessage]:
    """All messages of one to three trees, each in order."""
    messages: list[TreeMessage] = []
    for number in range(draw(st.integers(1, 3))):
        tree_id = f"t{number}"
        inner = [0]
        count = draw(st.integers(0, 8))
        messages.append(opened(tree_id))
        for turn_id in range(1, count + 1):
            parent = draw(st.sampled_from(inner))
            leaf = draw(st.booleans())
            messages.append(
                turn(turn_id, parent, tree_id=tree_id, reward=draw(st.sampled_from([0.0, 1.0])) if leaf else None)
            )
            if not leaf:
                inner.append(turn_id)
        messages.append(closed(count, tree_id, failed=draw(st.integers(0, 2))))
    return messages


@settings(max_examples=150)
@given(forests(), st.randoms(use_true_random=False), st.integers(0, 12))
def test_any_order_and_any_duplication_gives_the_same_trees(
    messages: list[TreeMessage], shuffler: random.Random, repeats: int
) -> None:
    tree_ids = sorted({m.tree_id for m in messages})

    def assemble(sequence: Sequence[TreeMessage]) -> list[tuple[Any, ...]]:
        store = MemoryStore()
        made = assembly(*tree_ids, store=store)
        for message in sequence:
            made.add(message)
        assert all(made.is_complete(tree_id) for tree_id in tree_ids)
        assert made.num_parked() == 0
        found = [describe(made.finish(tree_id), store) for tree_id in tree_ids]
        assert made.nbytes == 0
        # What is done is done: everything once more changes nothing.
        assert not any(made.add(message) for message in sequence)
        return found

    disordered = messages + [shuffler.choice(messages) for _ in range(repeats)]
    shuffler.shuffle(disordered)
    assert assemble(disordered) == assemble(messages)


def test_a_turn_before_its_parent_is_parked_until_the_parent_comes() -> None:
    made = assembly()
    made.add(opened())
    made.add(turn(2, 1, reward=1.0))
    assert (made.num_parked(), len(made.tree("t"))) == (1, 0)
    made.add(turn(1))
    assert (made.num_parked(), len(made.tree("t"))) == (0, 2)


def test_turns_before_the_prompt_are_parked() -> None:
    made = assembly()
    made.add(turn(1, reward=1.0))
    made.add(closed(1))
    assert (made.num_parked(), made.is_complete("t")) == (1, False)
    made.add(opened())
    assert made.is_complete("t")


def test_a_tree_is_complete_only_when_closed_and_all_turns_are_there() -> None:
    made = assembly()
    made.add(opened())
    made.add(turn(1, reward=1.0))
    assert not made.is_complete("t")
    made.add(closed(2))
    assert not made.is_complete("t")
    made.add(turn(2, reward=0.0))
    assert made.is_complete("t")


def test_the_same_turn_again_changes_nothing() -> None:
    made = assembly()
    assert made.add(turn(1))
    before = made.nbytes
    assert not made.add(turn(1))
    assert made.nbytes == before


@pytest.mark.parametrize(
    "change",
    [
        {"action": np.array([1, 2], dtype=np.int32)},
        {"logprobs": np.array([-0.5, -0.26], dtype=np.float32)},
        {"observation": np.zeros(0, dtype=np.int32)},
        {"spans": (VersionSpan(1, 0, 2),)},
        {"expansion_round": 1},
        {"generate_s": 0.2},
    ],
    ids=lambda c: next(iter(c)),
)
@pytest.mark.parametrize("finished", [False, True])
def test_other_bytes_under_the_same_key_are_a_conflict(change: dict[str, Any], finished: bool) -> None:
    kept: dict[str, TreeEntry] = {}
    made = Assembly(MemoryStore(), find=kept.get)
    made.expect("t", number=1, task_index=0, kind="train", epoch=0)
    made.add(opened())
    made.add(turn(1))
    if finished:
        kept["t"] = made.finish("t")
        assert not made.add(turn(1))
    other = turn(1, **change)
    with pytest.raises(Conflict, match=r"turn 1 of .*tree t"):
        made.add(other)


def test_another_prompt_or_another_closing_is_a_conflict() -> None:
    made = assembly()
    made.add(opened())
    with pytest.raises(Conflict, match="prompt"):
        made.add(opened(prompt=np.array([9], dtype=np.int32)))
    made.add(closed(3))
    with pytest.raises(Conflict, match="closed with 3"):
        made.add(closed(4))


def test_turns_of_an_unknown_lease_are_refused_by_name() -> None:
    with pytest.raises(BadMessage, match="no lease of tree x"):
        assembly().add(turn(1, tree_id="x"))


def test_a_reissue_keeps_what_is_attached_and_fences_the_older_holder() -> None:
    made = assembly()
    made.add(opened())
    made.add(turn(1))
    made.add(turn(4, 3, reward=1.0))
    made.add(closed(4))
    made.expect("t", number=1, task_index=0, kind="train", epoch=1)
    assert ids(made.tree("t")) == [1]
    assert not made.add(turn(1))
    with pytest.raises(BadMessage, match="epoch 1, this comes from epoch 0"):
        made.add(turn(3, 1))
    with pytest.raises(BadMessage, match="epoch 1, this comes from epoch 0"):
        made.add(closed(4))
    assert made.add(turn(4, 1, reward=0.0, lease_epoch=1))
    assert not made.add(opened(epoch=1))
    made.add(closed(2, epoch=1))
    assert made.is_complete("t")


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (turn(3, 3), "parent_id is 3"),
        (turn(3, 2), "ended its chain"),
        (turn(3, reward=float("nan")), "reward is nan"),
        (msgspec.structs.replace(turn(3), end="done"), "reward is None with end"),
        (msgspec.structs.replace(turn(3, reward=1.0), end="continue"), "reward is 1.0 with end"),
        (turn(5, 1, reward=1.0), "has children"),
        (closed(2), "3 came"),
    ],
    ids=["own parent", "after a leaf", "no number", "leaf without reward", "inner with reward", "leaf with children",
         "too few"],
)  # fmt: skip
def test_what_no_tree_can_hold_is_refused(bad: TreeMessage, complaint: str) -> None:
    made = assembly()
    for message in (opened(), turn(1), turn(2, 1, reward=1.0), turn(6, 5)):
        made.add(message)
    with pytest.raises(BadMessage, match=complaint):
        made.add(bad)
    assert ids(made.tree("t")) == [1, 2]


def test_more_turns_than_the_closing_counted_are_refused() -> None:
    made = assembly()
    made.add(closed(1))
    made.add(turn(1))
    with pytest.raises(BadMessage, match="one more than the 1"):
        made.add(turn(2))


def test_a_turn_that_comes_after_its_tree_was_finished_without_it_is_refused() -> None:
    made = assembly()
    made.add(opened())
    made.add(turn(1, reward=1.0))
    made.finish("t")
    with pytest.raises(BadMessage, match="too late"):
        made.add(turn(2))


def test_the_memory_of_finished_trees_is_bounded() -> None:
    made = Assembly(MemoryStore(), remembered_trees=2)
    for tree_id in ("a", "b", "c"):
        made.expect(tree_id, number=1, task_index=0, kind="train", epoch=0)
        made.add(turn(1, tree_id=tree_id))
        made.finish(tree_id)
    assert not made.add(turn(1, tree_id="c"))
    with pytest.raises(BadMessage, match="no lease of tree a"):
        made.add(turn(1, tree_id="a"))
