"""What credit promises of any tree; its reference numbers are in test_vectors.py."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atpo_async.config import CreditConfig, doors
from atpo_async.config.credit_rule import credit_rule
from atpo_async.core.credit import (
    Credit,
    TreeArrays,
    branch_prob,
    has_signal,
    leaf_tokens,
    leaves_below,
    normalised_leaves,
    turn_weights,
)
from atpo_async.core.tree import Turn, TurnTree, VersionSpan
from atpo_async.core.vocabulary import Aggregation, LeafWeights


def tree_of(parents: list[int], rewards: list[float], *, seed: int = 0) -> TreeArrays:
    """A turn under each of ``parents`` (positions, -1 for the root); rewards of the leaves in order, then 0."""
    parent = np.array(parents, dtype=np.int64)
    is_leaf = ~np.isin(np.arange(len(parent)), parent)
    reward = np.zeros(len(parent))
    reward[is_leaf] = (rewards + [0.0] * int(is_leaf.sum()))[: int(is_leaf.sum())]
    rng = np.random.default_rng(seed)
    return TreeArrays(
        parent=parent, is_leaf=is_leaf, reward=reward, entropy=rng.random(len(parent)) * 2,
        num_action_tokens=rng.integers(1, 9, len(parent)),
    )  # fmt: skip


def credit(tree: TurnTree | TreeArrays, *, ratio: np.ndarray | None = None, **settings: Any) -> Credit:
    return credit_rule(CreditConfig(**settings)).credit(tree, ratio=ratio)


def values(
    tree: TreeArrays, *, mode: str = "child_mean", ratio: np.ndarray | None = None, trace_cap: float = 1.0
) -> tuple[np.ndarray, float]:
    """V(n) and V(root), of the rewards as they are."""
    found = credit(tree, value_mode=mode, ratio=ratio, trace_cap=trace_cap, normalise_leaves=False)
    return found.values, found.root_value


@pytest.fixture
def arrays() -> TreeArrays:
    r"""Three chains from the root, the first branches in its second turn: leaves at 1, 4, 5, 6 and 7."""
    return tree_of([-1, -1, -1, 0, 0, 3, 3, 2], [1.0, 0.0, -1.0, 1.0, 0.5])


@st.composite
def trees(draw: st.DrawFn) -> TreeArrays:
    count = draw(st.integers(1, 30))
    parents = [draw(st.integers(-1, i - 1)) for i in range(count)]
    rewards = draw(st.lists(st.floats(-10, 10), min_size=count, max_size=count))
    return tree_of(parents, rewards, seed=count)


def test_leaves_and_their_tokens_are_counted_along_the_paths(arrays: TreeArrays) -> None:
    assert leaves_below(arrays).tolist() == [3, 1, 1, 2, 1, 1, 1, 1]
    tokens = arrays.num_action_tokens
    assert leaf_tokens(arrays)[5] == tokens[0] + tokens[3] + tokens[5]
    assert not leaf_tokens(arrays)[[0, 2, 3]].any()


@given(trees())
def test_branch_probabilities_sum_to_1_and_give_the_child_mean(tree: TreeArrays) -> None:
    q = branch_prob(tree)
    assert q.sum() == pytest.approx(1.0)
    assert float(np.sum(q * tree.reward)) == pytest.approx(values(tree)[1], abs=1e-12)


@given(trees(), st.sampled_from(["child_mean", "leaf_mean", "child_softmax", "child_entropy_linear"]))
def test_a_value_lies_between_the_rewards_of_the_leaves_below(tree: TreeArrays, mode: Any) -> None:
    value, root = values(tree, mode=mode)
    rewards = tree.reward[tree.is_leaf]
    assert rewards.min() - 1e-9 <= min(*value, root) <= max(*value, root) <= rewards.max() + 1e-9


@given(trees(), st.just(0.0) | st.floats(1e-6, 5), st.floats(0.1, 3))
def test_a_self_normalised_trace_forgets_how_large_all_ratios_are(tree: TreeArrays, ratio: float, cap: float) -> None:
    found, root = values(tree, mode="tree_trace_selfnorm", ratio=np.full(len(tree), ratio), trace_cap=cap)
    plain, plain_root = values(tree)
    np.testing.assert_allclose(found, plain, atol=1e-9)
    assert root == pytest.approx(plain_root, abs=1e-9)


@given(trees(), st.booleans())
def test_a_trace_of_fresh_turns_is_the_mean_of_the_children(tree: TreeArrays, known: bool) -> None:
    plain = credit(tree)
    for mode in ("tree_trace", "tree_trace_selfnorm"):
        found = credit(tree, value_mode=mode, ratio=np.ones(len(tree)) if known else None)
        np.testing.assert_allclose(found.values, plain.values, atol=1e-12)
        np.testing.assert_allclose(found.advantages, plain.advantages, atol=1e-12)


def test_a_trace_without_any_ratio_left_falls_back_on_what_is_believed_of_the_whole_tree(arrays: TreeArrays) -> None:
    none = np.zeros(len(arrays))
    plain, baseline = values(arrays)
    traced, root = values(arrays, mode="tree_trace", ratio=none)
    inner = ~arrays.is_leaf
    np.testing.assert_allclose(traced[inner], baseline)
    np.testing.assert_array_equal(traced[arrays.is_leaf], arrays.reward[arrays.is_leaf])
    assert root == pytest.approx(baseline)
    np.testing.assert_allclose(values(arrays, mode="tree_trace_selfnorm", ratio=none)[0], plain)


def test_a_trace_counts_a_stale_sibling_less(arrays: TreeArrays) -> None:
    ratio = np.ones(len(arrays))
    ratio[5] = 0.1
    # Turns 5 and 6 share a parent: rewards -1 and 1.
    assert (arrays.reward[5], arrays.reward[6], values(arrays)[0][3]) == (-1.0, 1.0, 0.0)
    found, _ = values(arrays, mode="tree_trace_selfnorm", ratio=ratio)
    assert found[3] == pytest.approx((1 - 0.1) / 1.1)
    above, _ = values(arrays, mode="tree_trace_selfnorm", ratio=np.where(ratio < 1, 7.0, ratio), trace_cap=2.0)
    assert above[3] == pytest.approx((1 - 2.0) / 3.0)


@pytest.mark.parametrize(("bad", "said"), [(-0.5, "-0.5"), (np.nan, "nan"), (np.inf, "inf")])
def test_a_ratio_that_is_none_is_refused_with_its_turn(arrays: TreeArrays, bad: float, said: str) -> None:
    ratio = np.ones(len(arrays))
    ratio[3] = bad
    with pytest.raises(ValueError, match=f"turn 3 has the ratio {said}"):
        credit(arrays, value_mode="tree_trace", ratio=ratio)
    with pytest.raises(ValueError, match="7 turn ratios for 8 turns"):
        credit(arrays, value_mode="tree_trace", ratio=ratio[1:])


def test_a_ratio_of_a_tree_is_refused_with_the_turns_own_id() -> None:
    turns = (turn(4, 0, reward=0.0), turn(9, 0, reward=1.0))
    with pytest.raises(ValueError, match="turn 9 has the ratio nan"):
        credit(TurnTree("t", 0, np.zeros(1, dtype=np.int32), turns), ratio=np.array([1.0, np.nan]))


@given(trees(), st.sampled_from(get_args(LeafWeights)))
def test_normalised_rewards_have_mean_0_under_the_weights_they_were_normalised_with(
    tree: TreeArrays, leaf_weights: LeafWeights
) -> None:
    q = branch_prob(tree) if leaf_weights == "branch-prob" else tree.is_leaf / tree.is_leaf.sum()
    found = normalised_leaves(tree, weights=q)
    assert float(np.sum(q * found)) == pytest.approx(0.0, abs=1e-6)
    assert float(np.sum(q * found**2)) <= 1 + 1e-9
    if leaf_weights == "branch-prob":
        assert values(tree.with_reward(found))[1] == pytest.approx(0.0, abs=1e-6)


def test_every_value_mode_and_advantage_mode_of_the_configuration_is_computed(arrays: TreeArrays) -> None:
    fields = CreditConfig.model_fields
    assert get_args(fields["leaf_weights"].annotation) == get_args(LeafWeights)
    for value_mode in doors.VALUE_MODE.names():
        for advantage_mode in doors.ADVANTAGE_MODE.names():
            found = credit(arrays, value_mode=value_mode, advantage_mode=advantage_mode)
            assert np.isfinite(found.advantages).all()
            assert found.advantages.any()


@pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "token-mean", "unique-token-mean", "branch-prob"])
@given(tree=trees())
def test_the_weights_of_a_mean_over_tokens_sum_to_1(tree: TreeArrays, aggregation: Aggregation) -> None:
    found = turn_weights(tree, aggregation=aggregation)
    assert float(np.sum(found * tree.num_action_tokens)) == pytest.approx(1.0)


def test_turn_weights_of_a_batch_are_normalised_by_the_whole_batch(arrays: TreeArrays) -> None:
    whole: dict[Aggregation, dict[str, Any]] = {
        "seq-mean-token-mean": {"num_leaves": 15},
        "seq-mean-token-sum": {"num_leaves": 15},
        "token-mean": {"num_action_tokens": 3 * int(leaf_tokens(arrays).sum())},
        "unique-token-mean": {"num_turn_tokens": 3 * int(arrays.num_action_tokens.sum())},
        "branch-prob": {"num_trees": 3},
        "branch-prob-token-sum": {"num_trees": 3},
    }
    assert set(whole) == set(get_args(Aggregation))
    for aggregation, sizes in whole.items():
        own = turn_weights(arrays, aggregation=aggregation)
        np.testing.assert_allclose(turn_weights(arrays, aggregation=aggregation, **sizes), own / 3)


@pytest.mark.parametrize("normalise", [True, False])
def test_a_tree_whose_leaves_earned_the_same_has_no_advantage(arrays: TreeArrays, normalise: bool) -> None:
    same = arrays.with_reward(np.ones(len(arrays)))
    assert not has_signal(same)
    assert not credit(same, normalise_leaves=normalise).advantages.any()
    assert has_signal(arrays)


def two_leaves(entropy: np.ndarray) -> TreeArrays:
    """Siblings that end with 1 and 0."""
    return TreeArrays(
        parent=np.array([-1, -1]),
        is_leaf=np.array([True, True]),
        reward=np.array([1.0, 0.0]),
        entropy=entropy,
        num_action_tokens=np.ones(2, dtype=np.int64),
    )


def test_certain_siblings_share_equally_where_entropy_cannot_weigh_them() -> None:
    tree = two_leaves(entropy=np.zeros(2))
    assert values(tree, mode="child_entropy_linear")[1] == 0.5


def test_an_entropy_that_an_engine_rounded_below_zero_weighs_nothing() -> None:
    tree = two_leaves(entropy=np.array([-1e-3, 2e-3]))
    assert values(tree, mode="child_entropy_linear")[1] == 0.0


def test_a_softmax_over_large_entropies_stays_finite() -> None:
    tree = two_leaves(entropy=np.array([2000.0, 0.0]))
    assert values(tree, mode="child_softmax")[1] == 1.0


def turn(turn_id: int, parent_id: int, *, reward: float | None) -> Turn:
    return Turn(
        run="r", tree_id="t", turn_id=turn_id, parent_id=parent_id, lease_epoch=0, expansion_round=0,
        observation=np.zeros(0, dtype=np.int32), action=np.arange(turn_id, dtype=np.int32),
        logprobs=np.full(turn_id, -0.5, dtype=np.float32), spans=(VersionSpan(0, 0, turn_id),),
        end="continue" if reward is None else "done", reward=reward, success=None, generate_s=0.0, environment_s=0.0,
    )  # fmt: skip


def test_a_turn_tree_is_credited_in_the_order_of_its_turns() -> None:
    prompt = np.zeros(1, dtype=np.int32)
    turns = (turn(1, 0, reward=None), turn(2, 0, reward=0.0), turn(3, 1, reward=1.0), turn(4, 1, reward=0.0))
    tree = TurnTree("t", 0, prompt, turns)
    result = credit(tree, normalise_leaves=False)
    np.testing.assert_allclose(result.values, [0.5, 0.0, 1.0, 0.0])
    assert result.root_value == 0.25
    assert TreeArrays.of(tree).num_action_tokens.tolist() == [1, 2, 3, 4]


def test_a_chain_without_a_leaf_is_refused_by_name() -> None:
    tree = TurnTree("t", 0, np.zeros(1, dtype=np.int32), (turn(1, 0, reward=None), turn(2, 0, reward=1.0)))
    with pytest.raises(ValueError, match=r"turns at \[0\]"):
        TreeArrays.of(tree)
    assert len(TreeArrays.of(tree.pruned())) == 1
