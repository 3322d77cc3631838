"""``child_entropy_linear``: children weighed by ``H``, the entropy of their own action (the paper's equation)."""

from __future__ import annotations

import numpy as np

from atpo_async.core.credit.backup import weighted_children
from atpo_async.core.credit.returns import reads_turn_rewards
from atpo_async.core.credit.tree_arrays import F64, TreeArrays


@reads_turn_rewards
def values(arrays: TreeArrays, ratio: F64 | None) -> tuple[F64, float]:
    # A family of certain actions has no entropy to weigh by: its weights are all zero, and the plain mean is taken.
    return weighted_children(arrays, np.maximum(arrays.entropy, 0.0))
