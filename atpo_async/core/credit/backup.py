"""Values from the leaves up: an inner turn's value as its own reward and a weighted mean of its children's values."""

from __future__ import annotations

import numpy as np

from atpo_async.core.credit.tree_arrays import F64, TreeArrays


def weighted_children(arrays: TreeArrays, weight: F64) -> tuple[F64, float]:
    """V(n) = t(n) + γ · (sum of weight_c V(c) over sum of weight_c; the plain mean where no child has weight).

    A leaf's value is t(n) + r; the root has no reward of its own, and what comes first is not discounted.
    """
    # The buffer does this for every tree that ends, and one number at a time lists are several times faster than
    # arrays.  One slot more for the root: index -1 is the last one.
    length = len(arrays)
    weighted, total, plain, count = ([0.0] * (length + 1) for _ in range(4))
    parents, leaf, reward = arrays.parent.tolist(), arrays.is_leaf.tolist(), arrays.reward.tolist()
    own, paid, gamma = weight.tolist(), arrays.turn_reward.tolist(), arrays.discount
    value = [0.0] * length
    for i in range(length - 1, -1, -1):
        parent = parents[i]
        mean = weighted[i] / total[i] if total[i] > 0 else plain[i] / max(count[i], 1.0)
        worth = reward[i] if leaf[i] else gamma * mean
        if paid[i]:  # adding 0.0 to -0.0 would change a bit
            worth += paid[i]
        value[i] = worth
        weighted[parent] += own[i] * worth
        total[parent] += own[i]
        plain[parent] += worth
        count[parent] += 1
    return np.array(value), weighted[-1] / total[-1] if total[-1] > 0 else plain[-1] / max(count[-1], 1.0)
