"""Leaf rewards, or returns, normalised inside their tree (ALGORITHM, section 2, points 1 and 3)."""

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
