"""What reaches the loss: each kind of bad tree is left out under its name, the good ones pass as they are."""

from __future__ import annotations

import itertools
import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atpo_async.config import Config
from atpo_async.config.credit_rule import credit_rule
from atpo_async.core.errors import BadMessage
from atpo_async.core.tree import Turn, VersionSpan
from atpo_async.wire import codec
from atpo_async.wire.messages import Batch, BatchTree, BufferToLearner
from atpo_async.wire.records import TurnRecords
from learner.batches.intake import REASONS, Sifted, sift
from learner.packing.credited import CreditedTree, Normaliser
from learner.packing.rows import leaf_rows
from learner.packing.staleness import Staleness
from tests.bad_batch_support import (
    BAD,
    MAX_LAG,
    TREES,
    VERSION,
    every_turn_with,
    good_batch,
    item,
    span,
    tree_with,
    turn_with,
    with_tree,
)
from tests.learner_support import VOCAB, batch_of, make_tree


def sifted(batch: Batch, *, version: int = VERSION, max_lag: int = MAX_LAG) -> Sifted:
    return sift(batch, version=version, vocab_size=VOCAB, max_lag=max_lag)


def test_a_batch_without_fault_is_handed_on_as_it_is() -> None:
    batch = good_batch()
    result = sifted(batch)
    assert result.batch is batch
    assert (result.dropped, result.messages) == ({}, ())
    assert result.metrics() == {f"dropped/{reason}": 0.0 for reason in REASONS}


def test_an_empty_share_stays_one() -> None:
    batch = msgspec.structs.replace(good_batch(), trees=())
    assert sifted(batch).batch is batch


@pytest.mark.parametrize("index", range(TREES))
@pytest.mark.parametrize("name", BAD)
def test_a_bad_tree_is_left_out_under_its_name_and_the_good_ones_stay_as_they_are(name: str, index: int) -> None:
    change, reason, said = BAD[name]
    batch = with_tree(good_batch(), index, change)
    result = sifted(batch)
    good = [tree for i, tree in enumerate(batch.trees) if i != index]
    assert [id(tree) for tree in result.batch.trees] == [id(tree) for tree in good]
    assert result.dropped == {reason: (f"tree-{index}",)}
    assert result.metrics() == {f"dropped/{r}": float(r == reason) for r in REASONS}
    (message,) = result.messages
    assert message.startswith(f"tree tree-{index} is left out ({reason}): ")
    assert said in message
    assert "\n" not in message
    # A fact and a way out.
    assert message.count("; ") == 1


def test_every_reason_has_a_bad_tree_here() -> None:
    assert {reason for _, reason, _ in BAD.values()} | {"bad_counts", "bad_record"} == set(REASONS)


@pytest.mark.parametrize("name", BAD)
def test_a_batch_of_nothing_else_ends_up_empty_with_a_line_for_each_tree(name: str) -> None:
    change, reason, _ = BAD[name]
    batch = good_batch()
    for index in range(TREES):
        batch = with_tree(batch, index, change)
    result = sifted(batch)
    assert result.batch.trees == ()
    assert result.dropped == {reason: ("tree-0", "tree-1", "tree-2")}
    assert len(result.messages) == TREES
    assert result.metrics()[f"dropped/{reason}"] == TREES


def test_everything_else_of_the_batch_is_kept_the_global_normalisers_too() -> None:
    batch = with_tree(good_batch(), 1, tree_with(weight=math.nan))
    result = sifted(batch).batch
    for name in batch.__struct_fields__:
        if name != "trees":
            assert getattr(result, name) is getattr(batch, name)


def test_what_is_left_weighs_what_it_would_have_weighed() -> None:
    """As if every turn of the tree left out were masked: so a rank without a bad tree need not know of one."""
    batch = good_batch()
    bad = with_tree(batch, 1, turn_with(4, reward=math.nan))

    def rows(trees: tuple[BatchTree, ...], of: Batch) -> list[tuple[bytes, bytes]]:
        normaliser = Normaliser(
            num_trees=of.num_trees, num_leaves=of.num_leaves, num_action_tokens=of.num_action_tokens,
            num_turn_tokens=of.num_turn_tokens,
        )  # fmt: skip
        credited = [CreditedTree.of(tree, credit_rule(Config().credit)) for tree in trees]
        found = leaf_rows(
            credited, version=VERSION, max_lag=MAX_LAG, aggregation="seq-mean-token-mean", normaliser=normaliser
        )
        return [(row.tokens.tobytes(), row.weight.tobytes()) for row in found]

    good = (batch.trees[0], batch.trees[2])
    assert rows(sifted(bad).batch.trees, sifted(bad).batch) == rows(good, batch) != []


def test_a_tree_with_several_faults_is_counted_once_under_the_first_of_the_list() -> None:
    changes = {reason: change for change, reason, _ in BAD.values()}
    for first, second in itertools.pairwise(REASONS):
        if second == "bad_counts" or {first, second} & {"bad_record", "no_leaf", "all_stale"}:
            continue  # these cannot be had together with any other fault
        batch = with_tree(with_tree(good_batch(), 0, changes[second]), 0, changes[first])
        assert sifted(batch).dropped == {first: ("tree-0",)}


def test_a_record_that_is_none_costs_its_tree_alone() -> None:
    batch = good_batch()
    damaged = TurnRecords.raw([bytes(64)], 1)
    trees = (msgspec.structs.replace(batch.trees[0], turns=damaged), *batch.trees[1:])
    result = sifted(msgspec.structs.replace(batch, trees=trees))
    assert result.dropped == {"bad_record": ("tree-0",)}
    assert "journal" in result.messages[0]
    assert [tree.tree_id for tree in result.batch.trees] == ["tree-1", "tree-2"]


def test_turns_that_came_as_records_are_decoded_once_for_all() -> None:
    batch: Batch = codec.decode(codec.encode(good_batch()), BufferToLearner)
    kept = sifted(batch).batch
    assert all(isinstance(tree.turns, tuple) for tree in kept.trees)
    assert [len(t.turns) for t in kept.trees] == [len(t.turns) for t in batch.trees]


def test_a_log_prob_above_zero_by_rounding_is_fine() -> None:
    slack = np.float32(codec.LOGPROB_SLACK)
    at = with_tree(good_batch(), 0, turn_with(1, logprobs=item("logprobs", slack)))
    assert sifted(at).dropped == {}
    beyond = with_tree(good_batch(), 0, turn_with(1, logprobs=item("logprobs", np.nextafter(slack, np.float32(1)))))
    assert sifted(beyond).dropped == {"bad_logprobs": ("tree-0",)}


def test_the_learners_own_version_and_the_last_token_id_are_fine() -> None:
    batch = with_tree(good_batch(), 0, turn_with(1, spans=span(VERSION), action=item("action", VOCAB - 1)))
    assert sifted(batch).dropped == {}


def test_one_fresh_turn_on_the_way_to_a_leaf_keeps_a_tree() -> None:
    fresh = VERSION - MAX_LAG
    stale = every_turn_with(spans=span(fresh - 1))
    for turn_id in (1, 2, 3, 6):
        batch = with_tree(with_tree(good_batch(), 0, stale), 0, turn_with(turn_id, spans=span(fresh)))
        assert sifted(batch).dropped == {}


def test_a_fresh_turn_that_leads_to_no_leaf_does_not_keep_a_tree() -> None:
    """There is no row it would be in: what ``CreditedTree`` prunes cannot be trained on."""
    stale = every_turn_with(spans=span(0))

    def with_dead_end(tree: BatchTree) -> BatchTree:
        tree = stale(tree)
        dead = msgspec.structs.replace(
            tree.turns[1], turn_id=99, parent_id=2, spans=span(VERSION)(tree.turns[1]), reward=None, end="continue"
        )
        return msgspec.structs.replace(tree, turns=(*tree.turns, dead))

    batch = with_tree(good_batch(), 0, with_dead_end)
    assert sifted(batch).dropped == {"all_stale": ("tree-0",)}
    credited = [CreditedTree.of(batch.trees[0], credit_rule(Config().credit))]
    assert not Staleness.of(credited, version=VERSION, max_lag=MAX_LAG).by_lag.any()


def test_a_chain_that_never_ended_beside_finished_ones_is_no_fault() -> None:
    batch = with_tree(good_batch(), 0, turn_with(6, end="continue", reward=None, success=None))
    assert sifted(batch).dropped == {}


def test_the_order_of_turns_does_not_matter() -> None:
    batch = with_tree(good_batch(), 0, lambda tree: msgspec.structs.replace(tree, turns=tree.turns[::-1]))
    assert sifted(batch).dropped == {}


@pytest.mark.parametrize(
    ("name", "count"), [("num_trees", 2), ("num_leaves", 14), ("num_action_tokens", 0), ("num_turn_tokens", 0)]
)
def test_a_share_larger_than_its_whole_batch_is_left_out(name: str, count: int) -> None:
    """The loss is divided by these numbers: by zero, or by less than it is added up over."""
    batch = good_batch()
    assert sum(len(CreditedTree.of(tree, credit_rule(Config().credit)).tree.leaves()) for tree in batch.trees) == 15
    result = sifted(msgspec.structs.replace(batch, **{name: count}))
    assert result.dropped == {"bad_counts": ("tree-0", "tree-1", "tree-2")}
    assert all(f"{name} = {count}" in message for message in result.messages)


def test_a_share_of_a_larger_batch_is_fine() -> None:
    whole = good_batch()
    for i in range(TREES):
        assert sifted(batch_of(whole.trees[i : i + 1], whole.trees)).dropped == {}


def test_what_the_wire_lets_through_is_told_apart_from_what_it_refuses() -> None:
    """The rest can reach a learner from a socket or a kept batch: nobody before it knows the model and its version."""
    through = set()
    for name, (change, reason, _) in BAD.items():
        try:
            again: Batch = codec.decode(codec.encode(with_tree(good_batch(), 0, change)), BufferToLearner)
        except BadMessage:
            continue
        (found,) = sifted(again).dropped.items()
        if found == ("bad_record", ("tree-0",)):
            continue  # refused as well, once somebody looks at the turn
        assert found == (reason, ("tree-0",))
        through.add(name)
    assert through == {
        "no turns",
        "no leaves",
        "a version from the future",
        "an action token beyond the vocabulary",
        "an observation token beyond the vocabulary",
        "a prompt token beyond the vocabulary",
        "an unknown parent",
        "an empty prompt",
        "a turn twice",
        "a turn after the end",
        "nothing but stale turns",
    }


# --- any corruption at all ---------------------------------------------------------------------------------------

INTS = st.one_of(st.integers(-2, 9), st.sampled_from([VERSION, VERSION + 1, VOCAB, 2**31 - 1, 2**63, -(2**70)]))
FLOATS = st.one_of(
    st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-3, 2.0**-10, 1e39, -1e39, 1e300]), st.floats(-5, 5)
)
TOKENS = st.builds(
    lambda values, kind, shape: np.array(values).astype(kind).reshape(shape),
    st.lists(st.sampled_from([0, 1, VOCAB - 1, VOCAB, -1, 7, 7, 7]), max_size=6),
    st.sampled_from(["int32", "int64", "uint8", "uint64", "float32", "bool"]),
    st.sampled_from([(-1,), (-1,), (-1,), (1, -1)]),
)
LOGPROBS = st.builds(
    lambda values, kind: np.array(values).astype(kind),
    st.lists(FLOATS, max_size=6),
    st.sampled_from(["float32", "float64", "float32", "float32"]),
)
SPANS = st.lists(st.builds(VersionSpan, INTS, st.integers(-1, 6), st.integers(-1, 6)), max_size=3).map(tuple)
TURN_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "turn_id": INTS,
    "parent_id": INTS,
    "observation": TOKENS,
    "action": TOKENS,
    "logprobs": LOGPROBS,
    "spans": SPANS,
    "end": st.sampled_from(["continue", "done", "turn_limit", "length_limit"]),
    "reward": st.none() | FLOATS,
}
TREE_FIELDS: dict[str, st.SearchStrategy[Any]] = {"prompt": TOKENS, "weight": FLOATS}


def corrupted(tree: BatchTree, data: st.DataObject) -> BatchTree:
    turns = list(tree.turns)
    what = data.draw(st.sampled_from(["turn", "turn", "turn", "tree", "lose", "repeat", "shuffle", "age"]))
    at = data.draw(st.integers(0, max(0, len(turns) - 1)))
    if what == "tree":
        name = data.draw(st.sampled_from(sorted(TREE_FIELDS)))
        return msgspec.structs.replace(tree, **{name: data.draw(TREE_FIELDS[name])})
    if what == "age":
        return every_turn_with(spans=span(data.draw(st.integers(VERSION - MAX_LAG - 2, VERSION - MAX_LAG))))(tree)
    if what == "shuffle":
        turns = data.draw(st.permutations(turns))
    elif turns and what == "lose":
        del turns[at]
    elif turns and what == "repeat":
        turns.append(turns[at])
    elif turns:
        name = data.draw(st.sampled_from(sorted(TURN_FIELDS)))
        turns[at] = msgspec.structs.replace(turns[at], **{name: data.draw(TURN_FIELDS[name])})
    return msgspec.structs.replace(tree, turns=tuple(turns))


def are_token_ids(array: np.ndarray) -> bool:
    return array.ndim == 1 and array.dtype.kind in "iu" and all(0 <= int(token) < VOCAB for token in array)


def is_fit(tree: BatchTree) -> bool:
    """The same question, asked turn by turn and token by token."""
    by_id = {turn.turn_id: turn for turn in tree.turns}
    if len(by_id) != len(tree.turns) or not len(tree.prompt) or not are_token_ids(tree.prompt):
        return False
    for turn in tree.turns:
        if not 1 <= turn.turn_id < 2**31 or not 0 <= turn.parent_id < turn.turn_id:
            return False
        if turn.parent_id and (turn.parent_id not in by_id or by_id[turn.parent_id].end != "continue"):
            return False
        if not are_token_ids(turn.observation) or not are_token_ids(turn.action) or not len(turn.action):
            return False
        if turn.logprobs.dtype.kind != "f" or turn.logprobs.shape != turn.action.shape:
            return False
        if not all(math.isfinite(float(p)) and float(p) <= 2.0**-10 for p in turn.logprobs):
            return False
        covered = [token for s in turn.spans for token in range(s.start, s.end)]
        if covered != list(range(len(turn.action))) or any(s.start >= s.end for s in turn.spans):
            return False
        if any(not 0 <= s.version <= VERSION for s in turn.spans):
            return False
        if turn.end == "continue":
            if turn.reward is not None or turn.success is not None:
                return False
        elif turn.reward is None or not math.isfinite(np.float32(turn.reward)):
            return False
    # Only now is every turn known to come after its parent: before, the way up may be a ring.
    trained_on: set[int] = set()
    for turn in tree.turns:
        step: Turn | None = turn if turn.end != "continue" else None
        while step is not None:
            trained_on.add(step.turn_id)
            step = by_id.get(step.parent_id)
    ages = [VERSION - min(s.version for s in by_id[turn_id].spans) for turn_id in trained_on]
    return bool(ages) and min(ages) <= MAX_LAG and tree.weight >= 0 and math.isfinite(np.float32(tree.weight))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in cast:RuntimeWarning")
@settings(max_examples=150)
@given(st.data())
def test_whatever_is_corrupted_the_fit_trees_pass_and_no_others(data: st.DataObject) -> None:
    batch = good_batch()
    for _ in range(data.draw(st.integers(1, 4))):
        batch = with_tree(batch, data.draw(st.integers(0, TREES - 1)), lambda tree: corrupted(tree, data))
    batch = msgspec.structs.replace(batch, num_leaves=100)  # corruption may turn inner turns into leaves
    result = sifted(batch)
    fit = [tree for tree in batch.trees if is_fit(tree)]
    assert [id(tree) for tree in result.batch.trees] == [id(tree) for tree in fit], result.messages
    left_out = [tree_id for tree_ids in result.dropped.values() for tree_id in tree_ids]
    assert sorted(left_out) == sorted(tree.tree_id for tree in batch.trees if not is_fit(tree))
    assert len(result.messages) == len(left_out) == sum(result.metrics().values())
    assert_ready_for_the_loss(result.batch)


def assert_ready_for_the_loss(batch: Batch) -> None:
    """What is left has rows, and whatever is in them is finite and within the vocabulary."""
    credited = [CreditedTree.of(tree, credit_rule(Config().credit)) for tree in batch.trees]
    rows = leaf_rows(
        credited,
        version=VERSION,
        max_lag=MAX_LAG,
        aggregation="seq-mean-token-mean",
        normaliser=Normaliser.of(credited),
        keep_idle=True,
    )
    assert {row.tree for row in rows} == set(range(len(credited)))
    for row in rows:
        assert (row.at > 0).all()  # there is a token before it, which predicts it
        for numbers in (row.mu, row.advantage, row.weight):
            assert np.isfinite(numbers.astype(np.float32)).all()
        assert row.tokens.min() >= 0
        assert row.tokens.max() < VOCAB
        assert (row.version <= VERSION).all()


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(0, 40), st.integers(0, 40))
def test_no_valid_tree_is_ever_left_out_but_for_its_age(seed: int, leaves: int, made_at: int, age: int) -> None:
    tree = make_tree("tree", np.random.default_rng(seed), version=made_at, leaves=leaves)
    result = sifted(batch_of((tree,), (tree,)), version=made_at + age, max_lag=age + 2)
    assert result.messages == ()
    if age:
        newest = max(turn.oldest_version for turn in CreditedTree.of(tree, credit_rule(Config().credit)).tree)
        lag = made_at + age - newest
        assert sifted(batch_of((tree,), (tree,)), version=made_at + age, max_lag=lag).dropped == {}
        assert sifted(batch_of((tree,), (tree,)), version=made_at + age, max_lag=lag - 1).dropped == {
            "all_stale": ("tree",)
        }
