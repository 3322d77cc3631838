"""Sampling probabilities of trees, and the importance weights that correct for them.  Pure.

Source: ALGORITHM, section 4; prioritized experience replay (arXiv 1511.05952) with trees as units.
"""

from __future__ import annotations

import numpy as np

from atpo_async.core.vocabulary import WeightsOver
from buffer.pool.sampler import F64

PRIORITY_FLOOR = 0.01
"""Added to every priority, so that a tree whose advantage came out small can still be drawn."""


def proportional(priorities: F64, *, exponent: float, floor: float = PRIORITY_FLOOR) -> F64:
    """float64[n]: ``(p_i + floor)^a``, what a tree is drawn in proportion to."""
    weights: F64 = (priorities + floor) ** exponent
    return weights


def probabilities(priorities: F64, *, exponent: float, floor: float = PRIORITY_FLOOR) -> F64:
    """float64[n]: P_i ∝ (p_i + floor)^a."""
    scaled = proportional(priorities, exponent=exponent, floor=floor)
    probability: F64 = scaled / scaled.sum()
    return probability


def importance_weights(
    probability: F64, *, num_trees: int, beta: float, over: WeightsOver, ready: F64 | None = None
) -> F64:
    """w_PER = (N·P_i)^-β of the trees of a batch (ALGORITHM, section 4), as float64[B].

    Args:
        probability: float64[B], P_i of the trees that were drawn.
        num_trees: N, how many were ready.
        beta: β.
        over: what the weights are divided by: ``max``, the largest of the batch; ``mean``, what a tree drawn under P
            weighs on average, Σ P_i w_i over all that were ready; ``none``, nothing.
        ready: float64[N], P of all that were ready, read for ``mean`` alone; ``probability`` where None.
    """
    weight: F64 = (num_trees * probability) ** -beta
    if over == "none" or not len(weight):
        return weight
    p = probability if ready is None else ready
    unit = weight.max() if over == "max" else np.sum(p * (num_trees * p) ** -beta)
    return np.asarray(weight / unit)


def annealed_beta(step: int, *, start: float, num_steps: int) -> float:
    """β at ``step``: from ``start`` in a straight line to 1 at ``num_steps``."""
    return start + (1.0 - start) * min(max(step / max(num_steps, 1), 0.0), 1.0)
