"""Rewards of single turns in credit: returns, discount, signal; and that without them nothing changes, bit for bit."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from atpo_async.config import CreditConfig, build
from atpo_async.config.credit_rule import credit_rule
from atpo_async.config.doors import VALUE_MODE
from atpo_async.core.credit import Credit, CreditRule, TreeArrays, has_signal, reads_turn_rewards
from atpo_async.core.credit.advantage_modes import node_value
from atpo_async.core.credit.backup import weighted_children
from atpo_async.core.credit.returns import leaf_returns
from atpo_async.core.credit.value_modes.tree_trace import values as tree_trace
from atpo_async.core.errors import ConfigError, SetupError

MODES = sorted(VALUE_MODE.names())
RECURSIVE = [mode for mode in MODES if mode != "leaf_mean"]


def tree_of(parents: list[int], rewards: dict[int, float], paid: list[float] | None = None) -> TreeArrays:
    """A turn under each of ``parents`` (positions, -1 for the root); rewards by the position of their leaf."""
    parent = np.array(parents, dtype=np.int64)
    return TreeArrays(
        parent=parent,
        is_leaf=~np.isin(np.arange(len(parent)), parent),
        reward=np.array([rewards.get(i, 0.0) for i in range(len(parent))]),
        turn_reward=np.array([0.0] * len(parent) if paid is None else paid),
        entropy=np.linspace(0.25, 1.5, len(parent)),
        num_action_tokens=np.arange(1, len(parent) + 1),
    )


def credit(tree: TreeArrays, *, ratio: np.ndarray | None = None, **settings: Any) -> Credit:
    return credit_rule(CreditConfig(**{"normalise_leaves": False, **settings})).credit(tree, ratio=ratio)


def random_tree(rng: np.random.Generator, *, paid: bool = False) -> TreeArrays:
    """Of 2 to 24 turns; rewards of few values or of many, some of them equal, some a negative zero."""
    count = int(rng.integers(2, 25))
    parent = np.array([int(rng.integers(-1, i)) for i in range(count)], dtype=np.int64)
    kinds = (rng.choice([0.0, 1.0], count), rng.choice([-0.0, 0.1, -1.0], count), rng.normal(size=count))
    reward = kinds[int(rng.integers(3))] if rng.random() < 0.9 else np.full(count, rng.choice([0.1, -0.0, 7.3]))
    return TreeArrays(
        parent=parent,
        is_leaf=~np.isin(np.arange(count), parent),
        reward=reward,
        turn_reward=rng.choice([0.0, -0.1, 0.5, 1.0], count) if paid else np.zeros(count),
        entropy=rng.random(count) * 2 * (rng.random() < 0.9),
        num_action_tokens=rng.integers(1, 9, count),
    )


# --- without rewards of turns: the computation as it was before there were any -----------------------------------


class Before:
    """Credit of leaf rewards alone, turn by turn from the definitions; every sum in the order it was always taken."""

    def __init__(self, tree: TreeArrays, ratio: np.ndarray, rewards: np.ndarray) -> None:
        self.tree, self.ratio, self.rewards = tree, ratio.tolist(), rewards.tolist()
        self.entropy = tree.entropy.tolist()

    def children(self, turn: int) -> list[int]:
        return [i for i in range(len(self.tree) - 1, -1, -1) if self.tree.parent[i] == turn]

    def weighted(self, turn: int, weight: Any) -> float:
        below = self.children(turn)
        if not below:
            return float(self.rewards[turn])
        total = plain = share = 0.0
        for child in below:
            worth = self.weighted(child, weight)
            total += weight(child, turn) * worth
            share += weight(child, turn)
            plain += worth
        return total / share if share > 0 else plain / len(below)

    def leaf_sum(self, turn: int) -> tuple[float, float]:
        total, leaves = (0.0, 0.0) if turn < 0 or self.children(turn) else (self.rewards[turn], 1.0)
        for child in self.children(turn):
            more, of = self.leaf_sum(child)
            total, leaves = total + more, leaves + of
        return total, leaves

    def traced(self, turn: int, baseline: float) -> float:
        below = self.children(turn)
        if not below:
            return float(self.rewards[turn])
        gain = 0.0
        for child in below:
            gain += self.ratio[child] * (self.traced(child, baseline) - baseline)
        return baseline + gain / len(below)

    def value(self, mode: str, turn: int) -> float:
        def softmax(child: int, parent: int) -> float:
            largest = max(self.entropy[i] for i in self.children(parent))
            return float(np.exp(np.array([self.entropy[child] - largest]))[0])

        match mode:
            case "child_mean":
                return self.weighted(turn, lambda child, parent: 1.0)
            case "child_entropy_linear":
                return self.weighted(turn, lambda child, parent: max(self.entropy[child], 0.0))
            case "child_softmax":
                return self.weighted(turn, softmax)
            case "leaf_mean":
                total, leaves = self.leaf_sum(turn)
                return total / leaves
            case "tree_trace_selfnorm":
                return self.weighted(turn, lambda child, parent: self.ratio[child])
        assert mode == "tree_trace"
        return self.traced(turn, self.value("child_mean", -1))

    def advantage(self, mode: str, values: list[float], root: float) -> list[float]:
        def parents(turn: int) -> float:
            return root if self.tree.parent[turn] < 0 else values[self.tree.parent[turn]]

        local = [value - parents(turn) for turn, value in enumerate(values)]
        above = [value - root for value in values]
        return {
            "node_value": values,
            "diff_parent": local,
            "diff_global": above,
            "diff_localglobal": [a + b for a, b in zip(local, above, strict=True)],
        }[mode]


def as_normalised(tree: TreeArrays) -> np.ndarray:
    leaves = tree.reward[tree.is_leaf]
    share = np.full(len(leaves), 1.0 / len(leaves))
    mean = float(np.sum(share * leaves))
    std = float(np.sqrt(np.sum(share * (leaves - mean) ** 2)))
    found = np.zeros(len(tree))
    if np.ptp(leaves):  # of equal ones nothing is left but rounding
        found[tree.is_leaf] = (leaves - mean) / (std + 1e-6)
    return found


def bits(numbers: Any) -> bytes:
    return struct.pack(f"{len(numbers)}d", *numbers)


@pytest.mark.parametrize("mode", MODES)
def test_without_rewards_of_turns_and_discount_credit_is_what_it_was_bit_for_bit(mode: str) -> None:
    rng = np.random.default_rng(len(mode))
    for number in range(600):
        tree, normalise = random_tree(rng), bool(number % 2)
        advantage_mode = ("diff_global", "diff_localglobal", "diff_parent", "node_value")[number % 4]
        ratio = rng.random(len(tree))
        rewards = as_normalised(tree) if normalise else tree.reward
        before = Before(tree, ratio, rewards)
        values = [before.value(mode, turn) for turn in range(len(tree))]
        root = before.value(mode, -1)
        found = credit(tree, ratio=ratio, value_mode=mode, advantage_mode=advantage_mode, normalise_leaves=normalise)
        assert bits([*found.values, found.root_value]) == bits([*values, root])
        leaves = rewards[tree.is_leaf].tolist()
        assert found.has_signal == any(reward != leaves[0] for reward in leaves)
        expected = before.advantage(advantage_mode, values, root) if found.has_signal else [0.0] * len(tree)
        assert bits(found.advantages) == bits(expected)


# --- with them ---------------------------------------------------------------------------------------------------

T6 = tree_of([-1, 0, 0, -1, 3, -1], {1: 1.0, 2: 0.0, 4: 0.0, 5: 0.0}, [-0.1, 0.0, 0.0, 0.0, -0.1, 0.0])
"""Six turns: 1 forks into 2 and 3, 4 goes on with 5, 6 is alone."""


def test_values_are_the_discounted_returns_of_gtpo() -> None:
    found = credit(T6, discount=0.9)
    np.testing.assert_allclose(found.values, [0.35, 1.0, 0.0, -0.09, -0.1, 0.0], rtol=0, atol=1e-12)
    assert found.root_value == pytest.approx((0.35 - 0.09 + 0.0) / 3, abs=1e-12)


def test_normalised_returns_are_gtpos_advantages() -> None:
    found = credit(T6, discount=0.9, normalise_returns=True).advantages
    np.testing.assert_allclose(
        found, [0.4008892, 2.0641530, -0.4947144, -0.7250124, -0.7506011, -0.4947144], rtol=0, atol=1e-7
    )
    values = credit(T6, discount=0.9).values
    assert (values.mean(), values.std()) == pytest.approx((0.1933333, 0.3907969), abs=5e-8)
    # As flat rows, where the shared turn stands twice, the moments are others.
    flat = tree_of([-1, 0, -1, 2, -1, 4, -1], {1: 1.0, 3: 0.0, 5: 0.0, 6: 0.0}, [-0.1, 0.0, -0.1, 0.0, 0.0, -0.1, 0.0])
    rows = credit(flat, discount=0.9).values
    assert (rows.mean(), rows.std()) == pytest.approx((0.2157143, 0.4379125), abs=5e-8)


def test_two_chains_have_gtpos_returns_and_advantages() -> None:
    # Rewards 0, 0, 1 and -.1, 0; the last turn's is the outcome.
    chains = tree_of([-1, 0, 1, -1, 3], {2: 1.0, 4: 0.0}, [0.0, 0.0, 0.0, -0.1, 0.0])
    found = credit(chains, discount=0.9, normalise_returns=True)
    returns = credit(chains, discount=0.9).values
    assert (returns.mean(), returns.std()) == pytest.approx((0.522, 0.4719491), abs=5e-8)
    np.testing.assert_allclose(credit(chains, discount=0.9).values, [0.81, 0.9, 1.0, -0.1, 0.0], atol=1e-12)
    np.testing.assert_allclose(
        found.advantages, [0.6102339, 0.8009320, 1.0128188, -1.3179358, -1.1060490], rtol=0, atol=1e-7
    )


def test_the_mean_over_leaves_is_that_of_the_returns_of_flat_rows() -> None:
    # Turn 1 is in two rows, with returns .8 and -.1 from there on.
    found = credit(T6, discount=0.9, value_mode="leaf_mean")
    assert found.values[0] == pytest.approx((0.8 - 0.1) / 2, abs=1e-12)
    rng = np.random.default_rng(3)
    for _ in range(50):
        tree = random_tree(rng, paid=True)
        mean = credit(tree, discount=0.9, value_mode="leaf_mean").values
        for turn in range(len(tree)):
            rows = []
            for leaf in np.flatnonzero(tree.is_leaf).tolist():
                path = [leaf]
                while path[-1] >= 0:
                    path.append(int(tree.parent[path[-1]]))
                if turn in path:
                    rest = path[: path.index(turn) + 1][::-1]
                    earned = [*(float(tree.turn_reward[i]) for i in rest), float(tree.reward[leaf])]
                    rows.append(sum(0.9 ** min(k, len(rest) - 1) * reward for k, reward in enumerate(earned)))
            assert mean[turn] == pytest.approx(np.mean(rows), abs=1e-12)


@pytest.mark.parametrize("mode", RECURSIVE)
@pytest.mark.parametrize("discount", [1.0, 0.8])
def test_a_turn_is_worth_its_own_reward_and_the_discounted_aggregate_of_its_children(
    mode: str, discount: float
) -> None:
    """The aggregate is that of a tree without rewards of turns whose leaves are the children, with their values."""
    rng = np.random.default_rng(7)
    for _ in range(25):
        tree = random_tree(rng, paid=True)
        ratio = rng.random(len(tree))
        found = credit(tree, discount=discount, value_mode=mode, ratio=ratio)
        # The trace's baseline is the prompt's child_mean.
        baseline = credit(tree, discount=discount, value_mode="child_mean").root_value
        for turn in range(-1, len(tree)):
            children = np.flatnonzero(tree.parent == turn)
            if turn >= 0 and not len(children):
                assert found.values[turn] == pytest.approx(tree.turn_reward[turn] + tree.reward[turn], abs=1e-12)
                continue
            family = tree_of([-1] * len(children), dict(enumerate(found.values[children].tolist())))
            family = replace(family, entropy=tree.entropy[children])
            if mode == "tree_trace":
                aggregate = baseline + float(np.mean(ratio[children] * (found.values[children] - baseline)))
            else:
                aggregate = credit(family, value_mode=mode, ratio=ratio[children]).root_value
            here = found.root_value if turn < 0 else found.values[turn]
            own = 0.0 if turn < 0 else tree.turn_reward[turn]
            assert here == pytest.approx(own + (1.0 if turn < 0 else discount) * aggregate, abs=1e-9)


def test_siblings_are_compared_with_one_another_whatever_their_parent_earned() -> None:
    found = credit(T6, discount=0.9, advantage_mode="diff_parent").advantages
    assert found[1] + found[2] == pytest.approx(0.0, abs=1e-12)
    assert found[[0, 3, 5]].sum() == pytest.approx(0.0, abs=1e-12)
    assert found[4] == pytest.approx(0.0, abs=1e-12)
    normalised = credit(T6, discount=0.9, advantage_mode="diff_parent", normalise_returns=True).advantages
    np.testing.assert_allclose(normalised, found / (0.3907969 + 1e-6), rtol=1e-6, atol=1e-12)


def test_rewards_of_turns_are_added_to_normalised_leaf_rewards_as_they_are() -> None:
    tree = replace(T6, discount=1.0)
    plain = credit(replace(T6, turn_reward=np.zeros(6)), normalise_leaves=True).values
    found = credit(tree, normalise_leaves=True).values
    below = [-0.1 + (0.0 + 0.0) / 2, 0.0, 0.0, 0.0 - 0.1, -0.1, 0.0]
    np.testing.assert_allclose(found - plain, below, atol=1e-12)


# --- signal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paid", "rewards", "discount", "signal"),
    [
        ([0.0, 0.0, 0.0, 0.0], {1: 1.0, 3: 1.0}, 1.0, False),
        ([0.0, -0.1, 0.0, 0.0], {1: 1.0, 3: 1.0}, 1.0, True),
        ([-0.1, 0.0, 0.0, -0.1], {1: 1.0, 3: 1.0}, 1.0, False),  # the same, elsewhere on the way
        ([-0.1, 0.0, 0.0, -0.1], {1: 1.0, 3: 1.0}, 0.9, True),
        ([1.0, 0.0, 0.0, 0.0], {1: 0.0, 3: 1.0}, 1.0, False),  # together they earned the same
        ([0.1, 0.2, 0.3, 0.0], {1: 0.3, 3: 0.3}, 1.0, False),  # but for rounding
    ],
)
def test_a_tree_has_a_signal_if_its_chains_earned_different_returns(
    paid: list[float], rewards: dict[int, float], discount: float, signal: bool
) -> None:
    tree = tree_of([-1, 0, -1, 2], rewards, paid)
    found = credit(tree, discount=discount)
    assert found.has_signal is signal
    assert has_signal(replace(tree, discount=discount)) is signal
    assert bool(found.advantages.any()) is signal


def test_equal_outcomes_of_chains_of_different_length_are_a_signal_only_with_a_discount() -> None:
    tree = tree_of([-1, 0, -1], {1: 1.0, 2: 1.0})
    assert not credit(tree).has_signal
    assert credit(tree, discount=0.9).has_signal
    assert leaf_returns(replace(tree, discount=0.9)).tolist() == [0.0, 0.9, 1.0]


# --- value modes of one's own ------------------------------------------------------------------------------------


def mean_of_mine(arrays: TreeArrays, ratio: np.ndarray | None) -> tuple[np.ndarray, float]:
    """Knows leaf rewards only."""
    assert not arrays.turn_reward.any()
    return weighted_children(arrays, np.ones(len(arrays)))


def best_of_mine(arrays: TreeArrays, ratio: np.ndarray | None) -> tuple[np.ndarray, float]:
    best = np.append(np.where(arrays.is_leaf, arrays.reward, -np.inf), -np.inf)
    for i in range(len(arrays) - 1, -1, -1):
        best[arrays.parent[i]] = max(best[arrays.parent[i]], best[i])
    return best[:-1], float(best[-1])


def halved(arrays: TreeArrays, ratio: np.ndarray | None) -> tuple[np.ndarray, float]:
    """No mean: it discounts by itself."""
    value, root = weighted_children(replace(arrays, discount=0.5), np.ones(len(arrays)))
    return value, root


def rule(mode: Any, discount: float) -> CreditRule:
    return CreditRule(value_mode=mode, advantage_mode=node_value.advantages, normalise=False, discount=discount)


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_a_mode_of_ones_own_that_knows_leaf_rewards_only_gets_the_same_recursion(discount: float) -> None:
    rng = np.random.default_rng(11)
    for _ in range(100):
        tree = random_tree(rng, paid=True)
        expected = credit(tree, discount=discount)
        found = rule(mean_of_mine, discount).credit(tree)
        np.testing.assert_allclose(found.values, expected.values, atol=1e-9)
        assert found.root_value == pytest.approx(expected.root_value, abs=1e-9)
        best = rule(best_of_mine, discount).credit(tree).values
        for turn in range(len(tree)):
            children = best[tree.parent == turn]
            below = discount * children.max() if len(children) else tree.reward[turn]
            assert best[turn] == pytest.approx(tree.turn_reward[turn] + below, abs=1e-9)


def test_a_mode_of_ones_own_that_says_so_adds_rewards_of_turns_itself() -> None:
    marked = reads_turn_rewards(lambda arrays, ratio: tree_trace(arrays, ratio))
    assert rule(marked, 0.9).credit(T6).values.tolist() == credit(T6, discount=0.9).values.tolist()


def test_a_mode_that_is_no_mean_is_refused_where_turns_have_rewards_and_only_there() -> None:
    plain = replace(T6, turn_reward=np.zeros(6))
    assert rule(halved, 1.0).credit(plain).values[0] == 0.25
    with pytest.raises(SetupError, match=r"^credit.value_mode cannot be used with rewards of turns, .*reads_turn_rew"):
        rule(halved, 1.0).credit(T6)


def test_normalising_twice_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"would normalise twice: .*set --credit\.normalise_leaves false"):
        build({"credit": {"normalise_returns": True}})


@pytest.mark.parametrize(
    "settings", [{"normalise_leaves": True}, {"normalise_leaves": True, "turn_rewards": "normalised"}]
)
@pytest.mark.parametrize("reward", [1.0, -1.0, 0.1])
def test_normalised_outcomes_that_are_equal_are_no_signal_whatever_the_discount(
    settings: dict[str, Any], reward: float
) -> None:
    # The mean of n equal numbers may be off by a rounding, which a deviation of 0 and its floor would blow up.
    for chains in range(2, 33):
        parents: list[int] = []
        for number in range(chains):
            parents += [-1, len(parents)] if number % 2 else [-1]
        tree = tree_of(parents, dict.fromkeys(range(len(parents)), reward))
        assert not credit(tree, discount=0.9, **settings).has_signal, chains
