"""Credit of the field's methods on the tree of their numeric examples, and what their options refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from atpo_async.config import Config, CreditConfig, load
from atpo_async.config.credit_rule import credit_rule, try_credit
from atpo_async.core.credit import Credit, TreeArrays, leaf_tokens, turn_weights
from atpo_async.core.credit.advantage_modes import ancestors, optimal_value, preference
from atpo_async.core.credit.rewards import Moments, normalised_returns
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.core.vocabulary import Aggregation


def tree(parents: list[int], rewards: list[float], tokens: list[int], paid: list[float] | None = None) -> TreeArrays:
    leaf = np.array([i not in parents for i in range(len(parents))])
    return TreeArrays(
        parent=np.array(parents),
        is_leaf=leaf,
        reward=np.array(rewards),
        entropy=np.linspace(0.1, 0.9, len(parents)),
        num_action_tokens=np.array(tokens),
        turn_reward=np.array(paid or [0.0] * len(parents)),
    )


T6 = tree([-1, 0, 0, -1, 3, -1], [0, 1, 0, 0, 0, 0], [3, 2, 4, 2, 3, 5])
"""Six turns: 1 with the leaves 2 and 3, 4 with the leaf 5, the leaf 6; the leaf 2 earned 1."""


def credited(arrays: TreeArrays = T6, **settings: object) -> Credit:
    return credit_rule(CreditConfig.model_validate({"normalise_leaves": False, **settings})).credit(arrays)


def advantages(arrays: TreeArrays = T6, **settings: object) -> list[float]:
    found: list[float] = credited(arrays, **settings).advantages.tolist()
    return found


def rounded(*expected: float) -> object:
    """To the digits of the examples."""
    return pytest.approx(list(expected), abs=6e-8)


# --- TreePO -------------------------------------------------------------------------------------------------------


def test_ancestors_compare_a_leaf_with_each_group_it_belongs_to() -> None:
    assert advantages(advantage_mode="ancestors") == rounded(0.125, 0.625, -0.375, -0.25, -0.25, -0.25)
    by_size = advantages(advantage_mode="ancestors", advantage_options={"ancestor_weights": "leaves"})
    assert by_size == rounded(0.1666667, 0.6666667, -0.3333333, -0.25, -0.25, -0.25)


def test_groups_that_all_earned_the_same_may_be_left_out() -> None:
    # Leaves 1 and 2 earned the same, below 0; leaf 3 nothing.
    arrays = tree([-1, 0, 0, -1], [0, 1, 1, 0], [1, 1, 1, 1])
    assert advantages(arrays, advantage_mode="ancestors") == rounded(1 / 6, 1 / 6, 1 / 6, -2 / 3)
    skipped = advantages(arrays, advantage_mode="ancestors", advantage_options={"skip_equal": True})
    assert skipped == rounded(1 / 3, 1 / 3, 1 / 3, -2 / 3)


@pytest.mark.parametrize(
    ("rows", "aggregation"),
    [("equal", "token-mean"), ("token-mean", "seq-mean-token-mean"), ("branch-prob", "branch-prob-token-sum")],
)
def test_a_turns_advantage_is_what_the_rows_below_it_add_up_to(rows: str, aggregation: Aggregation) -> None:
    found = np.array(advantages(advantage_mode="ancestors", advantage_options={"rows": rows}))
    by_leaf = np.array(advantages(advantage_mode="ancestors"))
    weights = turn_weights(T6, aggregation=aggregation)
    paths = {1: [0, 1], 2: [0, 2], 4: [3, 4], 5: [5]}
    row = {leaf: {"equal": 1 / 22, "token-mean": 1 / (4 * t)}.get(rows) for leaf, t in enumerate(leaf_tokens(T6)) if t}
    if rows == "branch-prob":
        row = {1: 1 / 6, 2: 1 / 6, 4: 1 / 3, 5: 1 / 3}
    expected = np.zeros(6)
    for leaf, path in paths.items():
        for turn in path:
            expected[turn] += row[leaf] * by_leaf[leaf]
    np.testing.assert_allclose(weights * found, expected, atol=1e-12)


def test_groups_that_differ_by_rounding_are_alike() -> None:
    # Two chains below turn 0 were paid 0.1 + 0.2 and 0.3.
    arrays = tree([-1, 0, 0, -1], [0, 0.2, 0.3, 0], [1, 1, 1, 1], [0.0, 0.1, 0.0, 0.0])
    assert 0.1 + 0.2 != 0.3
    skipped = advantages(arrays, advantage_mode="ancestors", advantage_options={"skip_equal": True})
    assert skipped == rounded(0.1, 0.1, 0.1, -0.2)


# --- TreeRL, Dr. GRPO, TreePS-RAG ------------------------------------------------------------------------------------


def test_step_values_of_the_leaves_below() -> None:
    assert credited(value_mode="leaf_mean").values.tolist() == rounded(0.5, 1, 0, 0, 0, 0)
    local = advantages(value_mode="leaf_mean", advantage_mode="diff_parent")
    assert local == rounded(0.25, 0.5, -0.5, -0.25, 0, -0.25)
    of_all = advantages(value_mode="leaf_mean", advantage_mode="diff_global")
    assert of_all == rounded(0.25, 0.75, -0.25, -0.25, -0.25, -0.25)


def test_the_sum_of_both_is_divided_by_the_root_of_the_leaves_below() -> None:
    settings = {"value_mode": "leaf_mean", "advantage_mode": "diff_localglobal", "advantage_scale": "sqrt-leaves"}
    assert advantages(T6, **settings) == rounded(0.3535534, 1.25, -0.75, -0.5, -0.25, -0.5)


# --- GTPO -----------------------------------------------------------------------------------------------------------

PAID = tree([-1, 0, 0, -1, 3, -1], [0.0] * 6, [3, 2, 4, 2, 3, 5], [-0.1, 1, 0, 0, -0.1, 0])


def test_discounted_returns_are_normalised_over_all_turns() -> None:
    found = credited(PAID, discount=0.9, normalise_returns="turns")
    expected = (0.4008892, 2.0641530, -0.4947144, -0.7250124, -0.7506011, -0.4947144)
    assert found.advantages.tolist() == rounded(*expected)
    assert advantages(PAID, discount=0.9, normalise_returns=True) == found.advantages.tolist()


def test_chains_are_normalised_as_published() -> None:
    chains = tree([-1, 0, 1, -1, 3], [0.0] * 5, [1] * 5, [0, 0, 1, -0.1, 0])
    found = advantages(chains, discount=0.9, normalise_returns=True)
    assert found == rounded(0.6102339, 0.8009320, 1.0128188, -1.3179358, -1.1060490)


def test_returns_may_be_normalised_by_those_of_first_turns() -> None:
    chains = tree([-1, 0, 1, -1, 3], [0.0] * 5, [1] * 5, [0, 0, 1, -0.1, 0])
    found = advantages(chains, discount=0.9, normalise_returns="first")
    mean, std = (0.81 - 0.1) / 2, (0.81 + 0.1) / 2 + 1e-6
    assert found == pytest.approx([(v - mean) / std for v in (0.81, 0.9, 1, -0.1, 0)])


def test_first_turns_that_are_worth_the_same_say_nothing_and_all_turns_count() -> None:
    chains = tree([-1, 0, 0], [0, 1, 0], [1] * 3)  # one first turn
    value = np.array([0.5, 1.0, 0.0])
    np.testing.assert_array_equal(
        normalised_returns(chains, value, 0.5, "first")[1], normalised_returns(chains, value, 0.5)[1]
    )


# --- Posterior-GRPO ------------------------------------------------------------------------------------------------


def test_rewards_of_turns_count_where_the_outcome_is_right() -> None:
    # Chains 0-1 (right) and 2-3 (wrong) are paid alike for their first turns; 4 has a right and a wrong end.
    arrays = tree([-1, 0, -1, 2, -1, 4, 4], [0, 1, 0, 0, 0, 1, 0], [1] * 7, [0.5, 0, 0.5, 0.25, 0.5, 0, 0])
    found = credited(arrays, turn_rewards="posterior")
    assert found.values.tolist() == pytest.approx([1.5, 1, 0, 0, 0.75, 1, 0])
    plain = credited(arrays)
    assert plain.values.tolist() == pytest.approx([1.5, 1, 0.75, 0.25, 1.0, 1, 0])
    assert not credited(tree([-1, -1], [0, 0], [1, 1], [0.5, 0.1]), turn_rewards="posterior").has_signal
    assert credited(T6, turn_rewards="posterior").values.tobytes() == credited(T6).values.tobytes()


# --- Lite PPO -------------------------------------------------------------------------------------------------------


def test_leaf_rewards_are_divided_by_the_deviation_of_the_whole_batch() -> None:
    groups = [np.array([1.0, 0, 0, 0]), np.array([1.0, 1, 0, 1])]
    std = Moments.sum(map(Moments.of, groups)).std
    assert std == 0.5
    rule = credit_rule(CreditConfig(normalise_leaves="batch"))
    found = [
        rule.credit(tree([-1] * 4, rewards.tolist(), [1] * 4), batch_std=std).advantages.tolist() for rewards in groups
    ]
    assert found[0] == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=4e-6)
    assert found[1] == pytest.approx([0.5, 0.5, -1.5, 0.5], abs=4e-6)
    # The sample's deviation, as one published implementation has it, differs by a factor of the whole batch.
    sample = std * np.sqrt(8 / 7)
    assert sample == pytest.approx(0.5345225, abs=5e-8)
    other = np.concatenate(found) * (std + 1e-6) / sample
    expected = [1.4031215, *[-0.4677072] * 3, 0.4677072, 0.4677072, -1.4031215, 0.4677072]
    assert other.tolist() == pytest.approx(expected, abs=6e-8)


def test_where_no_batch_is_known_a_trees_own_deviation_takes_its_place() -> None:
    rewards = tree([-1] * 4, [1, 0, 0, 0], [1] * 4)
    own = credit_rule(CreditConfig(normalise_leaves="tree")).credit(rewards).advantages
    assert credit_rule(CreditConfig(normalise_leaves="batch")).credit(rewards).advantages.tolist() == own.tolist()
    assert credit_rule(CreditConfig()).credit(rewards, batch_std=7.0).advantages.tolist() == own.tolist()


# --- step preferences -------------------------------------------------------------------------------------------------


def test_a_pair_of_siblings_has_the_loss_of_dpo_and_its_gradient() -> None:
    pair = tree([-1, -1], [1, 0], [2, 3])
    rule = credit_rule(CreditConfig(advantage_mode="preference", normalise_leaves=False))
    found = rule.credit(pair, reference=np.array([0.4, -0.6]))
    assert found.sums["preference_loss"][0] == pytest.approx(0.6443967, abs=6e-8)
    assert found.sums["preference_accuracy"] == (1.0, 1.0)
    by_sigma = 0.1 / (1 + np.exp(0.1))
    assert found.advantages.tolist() == pytest.approx([by_sigma, -by_sigma], abs=1e-12)


def test_visits_are_how_sure_a_pair_is() -> None:
    # The winner has three leaves below, the loser is one itself.
    arrays = replace(tree([-1, 0, 0, 0, -1], [0, 1, 1, 1, 0], [1] * 5), reference=np.array([0.4, 0.0, 0.0, 0.0, -0.6]))
    values = np.array([1.0, 1, 1, 1, 0])
    loss, _ = preference.losses(arrays, *preference.pairs(arrays, values), beta=0.1, label_noise="visits")
    assert loss.tolist() == rounded(0.6693967)
    found = preference.advantages(arrays, values, 0.5, label_noise="visits")
    step = 1e-6

    def loss_at(shift: float) -> float:
        moved = arrays.reference.copy()
        moved[0] += shift
        there = replace(arrays, reference=moved)
        pair = np.array([0]), np.array([4])
        return float(preference.losses(there, *pair, beta=0.1, label_noise="visits")[0][0])

    losses = [loss_at(step), loss_at(-step)]
    assert found[0] == pytest.approx(-(losses[0] - losses[1]) / (2 * step), rel=1e-6)
    assert found.tolist() == pytest.approx([found[0], 0, 0, 0, -found[0]])


def test_only_the_best_and_the_worst_of_unequal_siblings_are_a_pair() -> None:
    arrays = tree([-1, -1, -1, 0, 0], [0, 0.5, 0, 1, 1], [1] * 5)
    found = np.array(advantages(arrays, advantage_mode="preference", value_mode="leaf_mean"))
    assert np.sign(found).tolist() == [1, 0, -1, 0, 0]
    alike = tree([-1, -1], [1, 1], [1, 1])
    assert not credited(alike, advantage_mode="preference").has_signal
    near = advantages(arrays, advantage_mode="preference", advantage_options={"least_margin": 1.0})
    assert near == [0.0] * 5


# --- optimal value ----------------------------------------------------------------------------------------------------


def test_siblings_whose_values_differ_by_rounding_are_no_pair() -> None:
    # Turn 0 is worth the mean of three times 0.1, which is not 0.1; its sibling 0.1.
    arrays = tree([-1, 0, 0, 0, -1], [0, 0.1, 0.1, 0.1, 0.1], [1] * 5)
    assert credited(arrays).values[0] != 0.1
    winners, losers = preference.pairs(arrays, credited(arrays).values)
    assert (len(winners), len(losers)) == (0, 0)


def test_the_optimal_value_its_loss_and_its_gradient_by_token() -> None:
    rewards = [1.0, 1, 0, 0, 0, 0, 0, 0]
    assert optimal_value.optimal_value(np.array(rewards), 0.5) == pytest.approx(0.4772293, abs=6e-8)
    chain = replace(tree([-1], [1.0], [4]), reference=np.array([-2.0]), task_index=7)
    found = optimal_value.advantages(chain, np.array([1.0]), 1.0, rewards={7: rewards})
    assert found.tolist() == pytest.approx([1.04954e-3], abs=5e-9), "the gradient is its negative"
    off, _, _ = optimal_value.residuals(chain, beta1=0.5, beta2=1e-3, rewards={7: rewards})
    assert float(off[0] ** 2) == pytest.approx(0.2753843, abs=6e-8)


def test_a_single_chain_and_one_of_equal_rewards_have_a_signal_for_the_optimal_value() -> None:
    settings = CreditConfig(advantage_mode="optimal_value", normalise_leaves=False)
    rule = credit_rule(settings)
    chain = rule.credit(tree([-1, 0], [0, 1.0], [1, 1]), reference=np.array([3.0, -1.0]))
    assert chain.has_signal
    assert chain.advantages.tolist() == pytest.approx([-2e-3 * 2e-3] * 2), "V* is its own reward; S is 2"
    alike = rule.credit(tree([-1, -1], [1.0, 1.0], [1, 1]))
    assert alike.has_signal
    assert alike.sums["optimal_value"] == (1.0, 1.0)


def test_a_shared_turn_has_the_mean_of_its_leaves() -> None:
    arrays = replace(T6, reference=np.array([0.0, 1, 2, 3, 4, 5]))
    found = optimal_value.advantages(arrays, np.zeros(6), 0.0, beta2=0.5)
    assert found[0] == pytest.approx((found[1] + found[2]) / 2)
    assert found[3] == found[4]


def test_rewards_of_the_tasks_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rewards.json"
    file.write_text(json.dumps({"rewards": {"7": [1, 1, 0, 0, 0, 0, 0, 0]}}))
    settings = CreditConfig(
        advantage_mode="optimal_value", normalise_leaves=False, advantage_options={"rewards": str(file)}
    )
    try_credit(settings)
    rule = credit_rule(settings)
    chain = replace(tree([-1], [1.0], [4]), task_index=7)
    assert rule.credit(chain).sums["optimal_value"][0] == pytest.approx(0.4772293, abs=6e-8)
    with pytest.raises(
        SetupError, match=r"has no rewards of task 8 \(it has those of 1 tasks\): make it of more tasks"
    ):
        rule.credit(replace(chain, task_index=8))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, r"cannot be read \(No such file or directory\); atpo eval MODEL --rewards FILE makes one"),
        ("{", "is no JSON"),
        ("[1]", "has no 'rewards' by task"),
        ('{"rewards": {}}', "has no 'rewards' by task"),
        ('{"rewards": {"0": []}}', "has for task '0' "),
        ('{"rewards": {"0": [NaN]}}', "expected the index of a task and a list of finite numbers"),
        ('{"rewards": {"-1": [1]}}', "has for task '-1'"),
    ],
)
def test_a_file_of_rewards_that_is_none_is_named(tmp_path: Path, text: str | None, said: str) -> None:
    file = tmp_path / "rewards.json"
    if text is not None:
        file.write_text(text)
    options = {"rewards": str(file)}
    settings = CreditConfig(advantage_mode="optimal_value", normalise_leaves=False, advantage_options=options)
    with pytest.raises(ConfigError, match=f"credit.advantage_options.rewards = '.*rewards.json' {said}|{said}"):
        credit_rule(settings)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"credit.advantage_mode": "ancestors", "credit.advantage_options.ancestor_weights": "size"},
            "credit.advantage_options.ancestor_weights must be one of equal, leaves, got 'size'",
        ),
        (
            {"credit.advantage_mode": "ancestors", "credit.advantage_options.weights": "equal"},
            "credit.advantage_mode = 'ancestors' with options {'weights': 'equal'}: got an unexpected keyword argument",
        ),
        (
            {"credit.advantage_mode": "preference", "credit.advantage_options.beta": "0"},
            "credit.advantage_options.beta must be > 0, got 0",
        ),
        (
            {"credit.advantage_mode": "preference", "credit.advantage_options.label_noise": "some"},
            "credit.advantage_options.label_noise must be one of none, visits, got 'some'",
        ),
        (
            {"credit.advantage_mode": "optimal_value"},
            "credit.normalise_leaves = true with credit.advantage_mode = 'optimal_value' would take out what every",
        ),
        (
            {"credit.advantage_mode": "preference", "correction.prox": "interpolate"},
            "correction.prox = 'interpolate' has no log-probs before the first step, and credit.advantage_mode = "
            "'preference' needs them: use recompute",
        ),
        (
            {"credit.advantage_mode": "preference", "credit.whiten_advantages": "true"},
            "credit.whiten_advantages = true with credit.advantage_mode = 'preference': its advantages are",
        ),
        (
            {"credit.advantage_mode": "preference", "implicit_reward.enabled": "true"},
            "implicit_reward.enabled = true with credit.advantage_mode = 'preference': its advantages are the gradient",
        ),
        (
            {"credit.advantage_mode": "optimal_value", "credit.advantage_scale": "sqrt-leaves"},
            "credit.advantage_scale = 'sqrt-leaves' with credit.advantage_mode = 'optimal_value': its advantages are",
        ),
        (
            {
                "credit.advantage_mode": "optimal_value",
                "credit.normalise_leaves": "false",
                "buffer.keep_share": "0.5",
            },
            "buffer.keep_share = 0.5 with credit.advantage_mode = 'optimal_value', which learns from trees whose",
        ),
        ({"credit.normalise_leaves": "leaf"}, "credit.normalise_leaves must be one of true, false, 'tree' or 'batch'"),
        (
            {"credit.normalise_returns": "first", "credit.normalise_leaves": "batch"},
            "credit.normalise_returns = 'first' with credit.normalise_leaves = 'batch' would normalise twice",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_when_the_configuration_is_made(options: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load([], options)
    assert said in str(raised.value)


def test_with_every_option_off_credit_is_what_it_was() -> None:
    assert (Config().credit.normalise_leaves, Config().credit.normalise_returns) == (True, False)
    assert load([], {"credit.normalise_leaves": "true"}) == Config()
    for mode in ("node_value", "diff_parent"):
        plain = credited(normalise_leaves=True, advantage_mode=mode)
        tree_ = credited(normalise_leaves="tree", advantage_mode=mode)
        assert plain.advantages.tobytes() == tree_.advantages.tobytes()
        assert not plain.sums


def test_a_group_of_one_has_no_baseline() -> None:
    assert ancestors.advantages(tree([-1], [1.0], [2]), np.array([1.0]), 1.0).tolist() == [1.0]
