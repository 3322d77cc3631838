"""``child_softmax``: children weighed by ``exp(H)``, the entropy of their own action (the published code)."""

from __future__ import annotations

import numpy as np

from atpo_async.core.credit.backup import weighted_children
from atpo_async.core.credit.returns import reads_turn_rewards
from atpo_async.core.credit.tree_arrays import F64, TreeArrays


@reads_turn_rewards
def values(arrays: TreeArrays, ratio: F64 | None) -> tuple[F64, float]:
    # Among siblings only differences matter for the exponential; the largest of each family keeps it in range.
    families = arrays.parent + 1
    largest = np.full(len(arrays) + 1, -np.inf)
    np.maximum.at(largest, families, arrays.entropy)
    weight: F64 = np.exp(arrays.entropy - largest[families])
    return weighted_children(arrays, weight)
