"""``tree_trace``: siblings of other versions count in proportion to their turn ratio (ALGORITHM, section 4)."""

from __future__ import annotations

import numpy as np

from atpo_async.core.credit.marks import reads_ratio
from atpo_async.core.credit.returns import reads_turn_rewards
from atpo_async.core.credit.tree_arrays import F64, TreeArrays
from atpo_async.core.credit.value_modes import child_mean


@reads_turn_rewards
@reads_ratio
def values(arrays: TreeArrays, ratio: F64 | None) -> tuple[F64, float]:
    """The baseline is the root's ``child_mean``; with every ratio 1, or none known, all is as in ``child_mean``."""
    plain, baseline = child_mean.values(arrays, None)
    return (plain, baseline) if ratio is None else traced(arrays, ratio, baseline)


def traced(arrays: TreeArrays, weight: F64, baseline: float) -> tuple[F64, float]:
    """V(n) = t(n) + γ (b + mean over the children of weight_c (V(c) - b)): a child counts in proportion to its ratio.

    Args:
        arrays: the tree.
        weight: float64[N], min(rho, c-bar) of each turn.
        baseline: b, the value of a turn whose children have no weight.
    """
    gain, count = np.zeros(len(arrays) + 1), np.zeros(len(arrays) + 1)
    value, paid = np.zeros(len(arrays)), arrays.turn_reward
    for i in range(len(arrays) - 1, -1, -1):
        value[i] = arrays.reward[i] if arrays.is_leaf[i] else arrays.discount * (baseline + gain[i] / count[i])
        if paid[i]:
            value[i] += paid[i]
        gain[arrays.parent[i]] += weight[i] * (value[i] - baseline)
        count[arrays.parent[i]] += 1
    return value, float(baseline + gain[-1] / count[-1]) if count[-1] else 0.0
