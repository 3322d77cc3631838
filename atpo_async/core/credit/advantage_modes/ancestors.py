"""``ancestors``: what a leaf earned above the mean of each group of leaves it belongs to, averaged over the groups.

Source: TreePO (arXiv 2508.17445) and its published code.  The groups of a leaf are the leaves below each turn above it
that has more than one, and all leaves of the tree:

    a_ij = R_i - mean of R over the leaves below j        A_i = mean over j of a_ij, or weighed by the leaves below j

A turn's advantage is the mean of A_i over the leaves below it, which is what the rows of these leaves add up to.
"""

from __future__ import annotations

import numpy as np

from atpo_async.core.credit.returns import leaf_returns, rounding
from atpo_async.core.credit.tree_arrays import F64, TreeArrays
from atpo_async.core.credit.weights import branch_prob, leaf_tokens, leaves_below, mean_below, sum_below
from atpo_async.core.errors import ConfigError

GROUPS = ("equal", "leaves")
ROWS = ("equal", "token-mean", "branch-prob")


def advantages(
    arrays: TreeArrays,
    values: F64,
    root_value: float,
    *,
    ancestor_weights: str = "equal",
    skip_equal: bool = False,
    rows: str = "equal",
) -> F64:
    """A(n).

    Args:
        arrays: the tree.
        values: of its turns; not read.
        root_value: not read.
        ancestor_weights: how a leaf's groups count: ``equal``, each the same (the published training script), or
            ``leaves``, by their sizes.
        skip_equal: leave out groups all of whose leaves earned the same.
        rows: how the leaves below a turn count: ``equal``, as the rows do under ``objective.aggregation`` token-mean
            and seq-mean-token-sum; ``token-mean`` under seq-mean-token-mean; ``branch-prob`` under
            branch-prob-token-sum.
    """
    _check("ancestor_weights", ancestor_weights, GROUPS)
    _check("rows", rows, ROWS)
    leaf, returns = arrays.is_leaf, leaf_returns(arrays)
    # One place more for the prompt, which is the last: the parent of first turns is -1.
    counts = np.append(leaves_below(arrays), leaf.sum()).astype(np.float64)
    means = np.append(sum_below(arrays, returns), returns.sum()) / np.maximum(counts, 1.0)
    weight = counts.copy() if ancestor_weights == "leaves" else np.ones(len(counts))
    weight[:-1][counts[:-1] < 2] = 0.0
    if skip_equal:
        weight[_all_alike(arrays, returns)] = 0.0
    # Of the groups from the prompt down to each turn: their weights, and their weighted means.
    total, mean = weight.copy(), weight * means
    for i, parent in enumerate(arrays.parent.tolist()):
        total[i] += total[parent]
        mean[i] += mean[parent]
    parent = arrays.parent
    known = total[parent] > 0
    of_leaf = np.where(leaf & known, returns - mean[parent] / np.where(known, total[parent], 1.0), 0.0)
    if leaf.sum() == 1:
        of_leaf = np.where(leaf, returns, 0.0)  # the published code: a group of one has no baseline
    share = {
        "equal": leaf.astype(np.float64),
        "token-mean": np.where(leaf, 1.0 / np.maximum(leaf_tokens(arrays), 1), 0.0),
        "branch-prob": branch_prob(arrays),
    }[rows]
    return mean_below(arrays, of_leaf, share)


def _all_alike(arrays: TreeArrays, returns: F64) -> F64:
    """bool[N + 1]: the leaves below each turn, and below the prompt, all earned the same."""
    low, high = np.full(len(arrays) + 1, np.inf), np.full(len(arrays) + 1, -np.inf)
    for i in range(len(arrays) - 1, -1, -1):
        if arrays.is_leaf[i]:
            low[i] = high[i] = returns[i]
        parent = arrays.parent[i]
        low[parent], high[parent] = min(low[parent], low[i]), max(high[parent], high[i])
    alike: F64 = high - low <= rounding(arrays)
    return alike


def _check(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(
            f"credit.advantage_options.{option} must be one of {', '.join(known)}, got {value!r}: it is how "
            "credit.advantage_mode = 'ancestors' weighs what a leaf earned"
        )
