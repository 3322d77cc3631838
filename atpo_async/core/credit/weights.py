"""Weights of leaves and turns: branch probabilities, leaves and tokens below a turn, each turn's weight in the loss.

Source: ALGORITHM, section 2 for the branch probabilities, section 5 for the loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from atpo_async.core.credit.roles import EQUAL_SHARES, role_factors
from atpo_async.core.credit.tree_arrays import F64, I64, TreeArrays
from atpo_async.core.vocabulary import Aggregation


def branch_prob(arrays: TreeArrays) -> F64:
    """float64[N]: q_i on the leaves, 0 elsewhere: the product over the path of 1 / (children of the parent).

    They sum to 1; the mean of leaf rewards under them is the ``child_mean`` value of the root.
    """
    families = np.bincount(arrays.parent + 1, minlength=len(arrays) + 1)
    share = (1.0 / np.maximum(families, 1)).tolist()
    reach = [1.0] * (len(arrays) + 1)
    for i, parent in enumerate(arrays.parent.tolist()):
        reach[i] = reach[parent] * share[parent + 1]
    return np.where(arrays.is_leaf, reach[:-1], 0.0)


def leaves_below(arrays: TreeArrays) -> I64:
    """int64[N]: L_n, the leaves under each turn, a leaf itself counted."""
    return sum_below(arrays, arrays.is_leaf.astype(np.float64)).astype(np.int64)


def leaf_tokens(arrays: TreeArrays) -> I64:
    """int64[N]: T_i on the leaves, the action tokens on the path that ends there; 0 elsewhere."""
    depth = np.zeros(len(arrays) + 1, dtype=np.int64)
    for i in range(len(arrays)):
        depth[i] = depth[arrays.parent[i]] + arrays.num_action_tokens[i]
    return np.where(arrays.is_leaf, depth[:-1], 0)


def sum_along(arrays: TreeArrays, own: F64) -> F64:
    """float64[N]: each turn's own number and those of all turns above it."""
    sums = np.zeros(len(arrays) + 1)
    for i, parent in enumerate(arrays.parent.tolist()):
        sums[i] = sums[parent] + own[i]
    along: F64 = sums[:-1]
    return along


def mean_below(arrays: TreeArrays, of_leaf: F64, weight: F64) -> F64:
    """float64[N]: the mean of the leaves' numbers below each turn, a leaf's own counted, under their ``weight``."""
    weight = np.where(arrays.is_leaf, weight, 0.0)
    total = sum_below(arrays, weight)
    found: F64 = sum_below(arrays, weight * of_leaf) / np.where(total > 0, total, 1.0)
    return found


def turn_weights(
    arrays: TreeArrays,
    *,
    aggregation: Aggregation = "seq-mean-token-mean",
    num_leaves: int | None = None,
    num_action_tokens: int | None = None,
    num_turn_tokens: int | None = None,
    num_trees: int = 1,
    role_shares: Mapping[int, float] = EQUAL_SHARES,
) -> F64:
    """float64[N]: ω_n, with which one pass over the tree equals the flat loss (ALGORITHM, section 5).

    Of a group of trees they are multiplied by ``role_weights``.

    Args:
        arrays: the tree.
        aggregation: how the flat loss averages.
        num_leaves: N, of the whole batch; this tree's own where None.
        num_action_tokens: ΣT_i, of the whole batch; this tree's own where None.
        num_turn_tokens: action tokens, each turn once, of the whole batch; this tree's own where None.
        num_trees: of the whole batch.
        role_shares: of a group, the share of each role in its weight.
    """
    base = _turn_weights(arrays, aggregation, num_leaves, num_action_tokens, num_turn_tokens, num_trees)
    return base * role_weights(arrays, aggregation, role_shares) if arrays.role.any() else base


def role_weights(arrays: TreeArrays, aggregation: Aggregation, shares: Mapping[int, float]) -> F64:
    """float64[N]: factors that give each role of a group its share of the group's weight in the loss.

    The weight of a role is that of its tokens, all together; where rows are sums over their tokens, that of its rows.
    All 1 outside groups.
    """
    if not arrays.role.any():
        return np.ones(len(arrays))
    by_rows: dict[Aggregation, Aggregation] = {
        "seq-mean-token-sum": "seq-mean-token-mean",
        "branch-prob-token-sum": "branch-prob",
    }
    mass = _turn_weights(arrays, by_rows.get(aggregation, aggregation), None, None, None, 1)
    return role_factors(arrays, mass * arrays.num_action_tokens, shares)


def _turn_weights(
    arrays: TreeArrays,
    aggregation: Aggregation,
    num_leaves: int | None,
    num_action_tokens: int | None,
    num_turn_tokens: int | None,
    num_trees: int,
) -> F64:
    leaves = int(arrays.is_leaf.sum()) if num_leaves is None else num_leaves
    tokens = leaf_tokens(arrays)
    by_token = np.where(arrays.is_leaf, 1.0 / np.maximum(tokens, 1), 0.0)
    match aggregation:
        case "seq-mean-token-mean":
            return sum_below(arrays, by_token / leaves)
        case "seq-mean-token-sum":
            return leaves_below(arrays) / leaves
        case "token-mean":
            return leaves_below(arrays) / (int(tokens.sum()) if num_action_tokens is None else num_action_tokens)
        case "unique-token-mean":
            total = int(arrays.num_action_tokens.sum()) if num_turn_tokens is None else num_turn_tokens
            return np.full(len(arrays), 1.0 / total)
        case "branch-prob":
            return sum_below(arrays, branch_prob(arrays) * by_token / num_trees)
        case "branch-prob-token-sum":
            return sum_below(arrays, branch_prob(arrays) / num_trees)


def sum_below(arrays: TreeArrays, own: F64) -> F64:
    """float64[N]: each turn's own number and those of all turns under it."""
    sums = np.append(own, 0.0)
    for i in range(len(arrays) - 1, -1, -1):
        sums[arrays.parent[i]] += sums[i]
    below: F64 = sums[:-1]
    return below
