"""``diff_localglobal``: the turn's value above its parent's, plus that above the prompt's."""

from __future__ import annotations

from atpo_async.core.credit.advantage_modes import diff_global, diff_parent
from atpo_async.core.credit.tree_arrays import F64, TreeArrays


def advantages(arrays: TreeArrays, values: F64, root_value: float) -> F64:
    return diff_parent.advantages(arrays, values, root_value) + diff_global.advantages(arrays, values, root_value)
