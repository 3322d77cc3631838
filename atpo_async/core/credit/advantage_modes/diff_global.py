"""``diff_global``: the turn's value above the prompt's."""

from __future__ import annotations

from atpo_async.core.credit.tree_arrays import F64, TreeArrays


def advantages(arrays: TreeArrays, values: F64, root_value: float) -> F64:
    above: F64 = values - root_value
    return above
