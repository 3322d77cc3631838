"""``tree_trace_selfnorm``: children weighed by their turn ratios, divided by their sum (ALGORITHM, section 4)."""

from __future__ import annotations

from atpo_async.core.credit.backup import weighted_children
from atpo_async.core.credit.marks import reads_ratio
from atpo_async.core.credit.returns import reads_turn_rewards
from atpo_async.core.credit.tree_arrays import F64, TreeArrays
from atpo_async.core.credit.value_modes import child_mean


@reads_turn_rewards
@reads_ratio
def values(arrays: TreeArrays, ratio: F64 | None) -> tuple[F64, float]:
    """With every ratio 1, or none known, as ``child_mean``."""
    return child_mean.values(arrays, None) if ratio is None else weighted_children(arrays, ratio)
