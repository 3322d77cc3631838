"""``child_mean``: the plain mean of the children's values (ALGORITHM, section 2)."""

from __future__ import annotations

import numpy as np

from atpo_async.core.credit.backup import weighted_children
from atpo_async.core.credit.returns import reads_turn_rewards
from atpo_async.core.credit.tree_arrays import F64, TreeArrays


@reads_turn_rewards
def values(arrays: TreeArrays, ratio: F64 | None) -> tuple[F64, float]:
    return weighted_children(arrays, np.ones(len(arrays)))
