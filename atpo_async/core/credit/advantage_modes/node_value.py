"""``node_value``: the turn's own value."""

from __future__ import annotations

from atpo_async.core.credit.tree_arrays import F64, TreeArrays


def advantages(arrays: TreeArrays, values: F64, root_value: float) -> F64:
    return values.copy()
