"""Values, advantages and weights against the reference vectors and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from atpo_async.credit import (
    AdvantageMode,
    TreeArrays,
    ValueMode,
    advantages,
    branch_prob,
    credit,
    has_signal,
    leaf_tokens,
    leaves_below,
    normalised_leaves,
    turn_weights,
    values,
)
from atpo_async.tree import Turn, TurnTree, VersionSpan

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "at2po_vectors.json").read_text())["tree"]
NEAR = 1e-9


@pytest.fixture
def arrays() -> TreeArrays:
    """The reference tree: node n of the file is at position n - 1."""
    nodes = VECTORS["nodes"][1:]
    return TreeArrays(
        parent=np.array([n["parent"] - 1 for n in nodes]),
        is_leaf=np.array([n["reward"] is not None for n in nodes]),
        reward=np.array([n["reward"] or 0.0 for n in nodes], dtype=np.float64),
        entropy=np.array([n["H"] for n in nodes]),
        num_action_tokens=np.array([n["n_act"] for n in nodes]),
    )


def expected(section: dict[str, float], *, root: bool = False) -> np.ndarray:
    """By position; turns that the section does not name are 0."""
    out = np.zeros(9)
    for name, value in section.items():
        if name != "0":
            out[int(name) - 1] = value
    return np.append(out, section["0"]) if root else out


def test_leaf_rewards_are_normalised_inside_the_tree(arrays: TreeArrays) -> None:
    np.testing.assert_allclose(normalised_leaves(arrays), expected(VECTORS["leaf_reward_normalised"]), atol=NEAR)


def test_leaf_rewards_can_be_normalised_under_the_branch_probabilities(arrays: TreeArrays) -> None:
    found = normalised_leaves(arrays, weights=branch_prob(arrays))
    np.testing.assert_allclose(found, expected(VECTORS["leaf_reward_normalised_branch_prob"]), atol=NEAR)
    value, root = values(arrays.with_reward(found))
    np.testing.assert_allclose(
        np.append(value, root), expected(VECTORS["V_child_mean_branch_prob_norm"], root=True), atol=NEAR
    )


@pytest.mark.parametrize("value_mode", get_args(ValueMode))
@pytest.mark.parametrize("suffix", ["", "_unnormalised_rewards"])
def test_values_and_advantages_are_those_of_the_reference(
    arrays: TreeArrays, value_mode: ValueMode, suffix: str
) -> None:
    tree = arrays if suffix else arrays.with_reward(normalised_leaves(arrays))
    value, root = values(tree, mode=value_mode)
    np.testing.assert_allclose(
        np.append(value, root), expected(VECTORS[f"V{suffix}"][value_mode], root=True), atol=NEAR
    )
    for mode in get_args(AdvantageMode):
        found = advantages(tree, value, root, mode=mode)
        np.testing.assert_allclose(found, expected(VECTORS[f"A{suffix}"][value_mode][mode]), atol=NEAR)
        whole = credit(arrays, value_mode=value_mode, advantage_mode=mode, normalise=not suffix)
        np.testing.assert_allclose(whole.advantages, found, atol=NEAR)
        assert whole.root_value == pytest.approx(root, abs=NEAR)


def test_branch_probabilities_are_those_of_the_reference_and_give_the_child_mean(arrays: TreeArrays) -> None:
    q = branch_prob(arrays)
    np.testing.assert_allclose(q, expected(VECTORS["branch_prob_q"]), atol=NEAR)
    assert q.sum() == pytest.approx(1.0)
    assert float(np.sum(q * arrays.reward)) == pytest.approx(values(arrays)[1])


def test_leaf_tokens_count_the_actions_of_the_path(arrays: TreeArrays) -> None:
    np.testing.assert_array_equal(leaf_tokens(arrays), expected(VECTORS["T_leaf"]).astype(int))
    np.testing.assert_array_equal(leaves_below(arrays), [3, 1, 2, 1, 2, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("aggregation", "name"),
    [
        ("seq-mean-token-mean", "seq_mean_token_mean"),
        ("seq-mean-token-sum", "seq_mean_token_sum"),
        ("token-mean", "token_mean"),
        ("branch-prob", "branch_prob_token_mean"),
    ],
)
def test_turn_weights_are_those_of_the_reference(arrays: TreeArrays, aggregation: Any, name: str) -> None:
    found = turn_weights(arrays, aggregation=aggregation)
    np.testing.assert_allclose(found, expected(VECTORS["node_weight"][name]), atol=NEAR)


def test_turn_weights_of_a_batch_are_normalised_by_the_whole_batch(arrays: TreeArrays) -> None:
    own = turn_weights(arrays, aggregation="seq-mean-token-mean")
    np.testing.assert_allclose(turn_weights(arrays, num_leaves=12), own / 2)
    own = turn_weights(arrays, aggregation="token-mean")
    np.testing.assert_allclose(turn_weights(arrays, aggregation="token-mean", num_action_tokens=360), own / 10)


@pytest.mark.parametrize("normalise", [True, False])
def test_a_tree_whose_leaves_earned_the_same_has_no_advantage(arrays: TreeArrays, normalise: bool) -> None:
    same = arrays.with_reward(np.ones(len(arrays)))
    assert not has_signal(same)
    assert not credit(same, normalise=normalise).advantages.any()
    assert has_signal(arrays)


def test_certain_siblings_share_equally_where_entropy_cannot_weigh_them() -> None:
    tree = TreeArrays(
        parent=np.array([-1, -1]),
        is_leaf=np.array([True, True]),
        reward=np.array([1.0, 0.0]),
        entropy=np.zeros(2),
        num_action_tokens=np.ones(2, dtype=np.int64),
    )
    assert values(tree, mode="child_entropy_linear")[1] == 0.5


def test_a_softmax_over_large_entropies_stays_finite() -> None:
    tree = TreeArrays(
        parent=np.array([-1, -1]),
        is_leaf=np.array([True, True]),
        reward=np.array([1.0, 0.0]),
        entropy=np.array([2000.0, 0.0]),
        num_action_tokens=np.ones(2, dtype=np.int64),
    )
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
    result = credit(tree, normalise=False)
    np.testing.assert_allclose(result.values, [0.5, 0.0, 1.0, 0.0])
    assert result.root_value == 0.25
    assert TreeArrays.of(tree).num_action_tokens.tolist() == [1, 2, 3, 4]


def test_a_chain_without_a_leaf_is_refused_by_name() -> None:
    tree = TurnTree("t", 0, np.zeros(1, dtype=np.int32), (turn(1, 0, reward=None), turn(2, 0, reward=1.0)))
    with pytest.raises(ValueError, match=r"turns at \[0\]"):
        TreeArrays.of(tree)
    assert len(TreeArrays.of(tree.pruned())) == 1
