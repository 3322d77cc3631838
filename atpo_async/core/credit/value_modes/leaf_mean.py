"""``leaf_mean``: the mean, over all finished leaves below a turn, of what their chains earned from there on.

Source: ALGORITHM, section 2.
"""

from __future__ import annotations

import numpy as np

from atpo_async.core.credit.returns import reads_turn_rewards
from atpo_async.core.credit.tree_arrays import F64, TreeArrays


@reads_turn_rewards
def values(arrays: TreeArrays, ratio: F64 | None) -> tuple[F64, float]:
    paid = arrays.turn_reward
    sums = np.append(np.where(arrays.is_leaf, arrays.reward, 0.0), 0.0)
    counts = np.append(arrays.is_leaf.astype(np.float64), 0.0)
    for i in range(len(arrays) - 1, -1, -1):
        if not arrays.is_leaf[i]:
            sums[i] *= arrays.discount
        if paid[i]:
            sums[i] += counts[i] * paid[i]
        sums[arrays.parent[i]] += sums[i]
        counts[arrays.parent[i]] += counts[i]
    mean = sums / np.maximum(counts, 1.0)
    return mean[:-1], float(mean[-1])
