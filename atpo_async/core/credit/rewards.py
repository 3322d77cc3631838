"""Leaf rewards, rewards of turns, or returns, normalised inside their tree (ALGORITHM, section 2)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from atpo_async.core.credit.tree_arrays import F64, TreeArrays

STD_FLOOR = 1e-6
"""Added to the standard deviation (published code)."""


def normalised_leaves(arrays: TreeArrays, *, weights: F64 | None = None) -> F64:
    """float64[N]: ``(r - mean) / (std + 1e-6)`` on the leaves, 0 elsewhere; population moments.

    Args:
        arrays: the tree.
        weights: float64[N] leaf weights that sum to 1 (``branch_prob``); equal ones where None.
    """
    leaf = arrays.is_leaf
    rewards = arrays.reward[leaf]
    q = np.full(len(rewards), 1.0 / max(len(rewards), 1)) if weights is None else weights[leaf]
    mean = float(np.sum(q * rewards))
    std = float(np.sqrt(np.sum(q * (rewards - mean) ** 2)))
    out = np.zeros(len(arrays))
    out[leaf] = (rewards - mean) / (std + STD_FLOOR)
    return out


def normalised_turns(arrays: TreeArrays, *, weights: F64 | None = None, joint: bool = False) -> TreeArrays:
    """The tree with the rewards of inner turns and the outcomes of leaves, ``(x - mean) / (std + 1e-6)`` each.

    Source: IGPO (arXiv 2510.14967), where information gains and outcomes are normalised over the group apart from each
    other (its code) or together (the paper).  An inner turn counts once, however many chains pass through it.  A leaf's
    outcome is its reward and what its own turn earned.

    Args:
        arrays: the tree.
        weights: float64[N] of the leaves, as of ``normalised_leaves``; equal ones where None.
        joint: the moments are those of inner turns and leaves together; takes no weights.
    """
    leaf = arrays.is_leaf
    paid = np.where(leaf, arrays.reward + arrays.turn_reward, arrays.turn_reward)
    if joint:
        found = _to_unit(paid) if len(paid) else paid
    else:
        found = normalised_leaves(arrays.with_reward(paid), weights=weights)
        if not leaf.all():
            found[~leaf] = _to_unit(paid[~leaf])
    return replace(arrays, reward=np.where(leaf, found, 0.0), turn_reward=np.where(leaf, 0.0, found))


def _to_unit(numbers: F64) -> F64:
    found: F64 = (numbers - numbers.mean()) / (numbers.std() + STD_FLOOR)
    return found


def normalised_returns(arrays: TreeArrays, values: F64, root_value: float) -> tuple[TreeArrays, F64, float]:
    """``(V - mean) / (std + 1e-6)`` with the moments of V over all turns, and the rewards that give these values.

    Source: GTPO (arXiv 2511.14846), returns normalised over the turns of the group.  With m, s these moments, t' =
    (t - (1 - gamma) m) / s and r' = (r - gamma m) / s keep V'(n) = t'(n) + gamma * mean of the children's V'.
    """
    if not len(arrays):
        return arrays, values, root_value
    mean, scale = float(values.mean()), float(values.std()) + STD_FLOOR
    gamma = arrays.discount
    shifted = replace(
        arrays,
        reward=(arrays.reward - gamma * mean) / scale,
        turn_reward=(arrays.turn_reward - (1.0 - gamma) * mean) / scale,
    )
    return shifted, (values - mean) / scale, (root_value - mean) / scale
