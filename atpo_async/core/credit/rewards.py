"""Leaf rewards normalised inside their tree (ALGORITHM, section 2, point 1)."""

from __future__ import annotations

import numpy as np

from atpo_async.core.credit.tree_arrays import F64, TreeArrays

STD_FLOOR = 1e-6
"""Added to the standard deviation of leaf rewards (published code)."""


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
