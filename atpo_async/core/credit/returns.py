"""Rewards of single turns: what each chain earned, whether a tree has anything to learn from, and values with them.

Source: ALGORITHM, section 2, "Rewards of turns".  Over its turns 1 to d a chain earns the return
R = Σ_k γ^(k−1) t_k + γ^(d−1) r: t_k each turn's own reward, r the leaf's, γ the discount.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np

from atpo_async.core.credit.tree_arrays import F64, TreeArrays

M = TypeVar("M", bound=Callable[..., object])

ROUNDING = 1e-12
"""Of the size of what a chain is paid: sums of the same numbers in another order differ by less."""

LEAST_SHARE = 1e-8
"""A turn whose discount is smaller cannot be told apart within the return of its chain."""


def reads_turn_rewards(mode: M) -> M:
    """Decorator: this value mode takes ``arrays.turn_reward`` and ``arrays.discount`` into account by itself."""
    mode.reads_turn_rewards = True  # type: ignore[attr-defined]
    return mode


def before(arrays: TreeArrays) -> tuple[F64, F64]:
    """float64[N] each: what the turns above each turn earned, discounted, and its own discount γ^(turns above it)."""
    earned, share = [0.0] * (len(arrays) + 1), [1.0] * (len(arrays) + 1)
    own, gamma = arrays.turn_reward.tolist(), arrays.discount
    for i, parent in enumerate(arrays.parent.tolist()):
        if parent >= 0:
            earned[i] = earned[parent] + share[parent] * own[parent]
            share[i] = gamma * share[parent]
    return np.array(earned[:-1]), np.array(share[:-1])


def leaf_returns(arrays: TreeArrays) -> F64:
    """float64[N]: R of the chain that ends at each leaf, 0 elsewhere."""
    earned, share = before(arrays)
    found: F64 = np.where(arrays.is_leaf, earned + share * (arrays.turn_reward + arrays.reward), 0.0)
    return found


def has_signal(arrays: TreeArrays) -> bool:
    """Whether the finished chains earned different returns; without that there is nothing to learn from a tree.

    Chains that share a beginning earned the same from there on exactly if their returns are the same.
    """
    leaf = arrays.is_leaf
    if not leaf.any():
        return False
    if arrays.only_outcomes:
        rewards = arrays.reward[leaf]
        return bool(np.any(rewards != rewards[0]))
    returns = leaf_returns(arrays)[leaf]
    return bool(np.any(np.abs(returns - returns[0]) > rounding(arrays)))


def rounding(arrays: TreeArrays) -> float:
    """By no more than this do returns, and means of them, differ that would be equal in exact arithmetic."""
    paid = leaf_returns(replace(arrays, reward=np.abs(arrays.reward), turn_reward=np.abs(arrays.turn_reward)))
    return ROUNDING * float(paid.max(initial=0.0))


def in_one_sum(arrays: TreeArrays) -> TreeArrays:
    """The same tree with each chain's return as its leaf's reward, and no rewards of turns."""
    none = np.zeros(len(arrays))
    return replace(arrays, reward=leaf_returns(arrays), turn_reward=none, discount=1.0)
