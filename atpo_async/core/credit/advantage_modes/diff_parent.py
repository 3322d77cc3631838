"""``diff_parent``: the turn's value above the mean of its siblings and itself: its parent's, its own reward taken out.

Without rewards of turns and discount that is the turn's value above its parent's.
"""

from __future__ import annotations

import numpy as np

from atpo_async.core.credit.tree_arrays import F64, TreeArrays


def advantages(arrays: TreeArrays, values: F64, root_value: float) -> F64:
    """What the parent earned before the turn is no merit of the turn: (V(parent) − t(parent)) / γ is left of it."""
    rest = values if arrays.only_outcomes else (values - arrays.turn_reward) / arrays.discount
    above: F64 = values - np.append(rest, root_value)[arrays.parent]
    return above
