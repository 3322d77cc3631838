"""``diff_parent``: the turn's value above its parent's."""

from __future__ import annotations

import numpy as np

from atpo_async.core.credit.tree_arrays import F64, TreeArrays


def advantages(arrays: TreeArrays, values: F64, root_value: float) -> F64:
    above: F64 = values - np.append(values, root_value)[arrays.parent]
    return above
