"""A tree's sampling priority from the advantages of its turns: the buffer computes the first, the learner later ones.

Source: ALGORITHM, section 4, "Priorities"; the mixed maximum and mean of R2D2 (Kapturowski et al. 2019).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def tree_priority(advantages: NDArray[np.float64], *, max_share: float) -> float:
    """``p = η·max|A| + (1-η)·mean|A|`` over a tree's turns; 0 for a tree of none.

    Args:
        advantages: float64[N], one for each turn.
        max_share: η, ``buffer.priority_max_share``.
    """
    if not len(advantages):
        return 0.0
    size = np.abs(advantages)
    return float(max_share * size.max() + (1 - max_share) * size.mean())
