"""Trees in proportion to priority, as in prioritized experience replay: every operation in O(log N).  Pure.

Source: arXiv 1511.05952, sections 3.3 and B.2.1 (stratified draws from a sum tree), with trees as units.
"""

from __future__ import annotations

import numpy as np

from buffer.pool.sampler import F64, I64
from buffer.pool.sum_tree import SumTree, stratified
from buffer.pool.weights import proportional


class Prioritized:
    """P_i ∝ (p_i + floor)^a.

    Args:
        exponent: a, ``buffer.priority_exponent``.
    """

    def __init__(self, exponent: float) -> None:
        self._exponent = exponent
        self._sums = SumTree()

    def put(self, trees: I64, priorities: F64) -> None:
        if len(trees):
            self._sums.grow(1 + int(trees[0] if len(trees) == 1 else trees.max()))
            self._sums.set(trees, proportional(priorities, exponent=self._exponent))

    def remove(self, trees: I64) -> None:
        self._sums.set(trees, np.zeros(len(trees)))

    def probability(self, trees: I64) -> F64:
        return self._sums.get(trees) / self._sums.total

    def draw(self, count: int, first: I64, rng: np.random.Generator) -> tuple[I64, F64]:
        """One draw from each of ``count`` equal strata of the sum; what came twice is drawn again from the rest."""
        sums, total = self._sums, self._sums.total
        parts, weights = [first], [sums.get(first)]
        if len(first):
            self.remove(first)
        while count > 0 and sums.total > 0:
            drawn = np.unique(stratified(sums, rng.random(count)))
            parts.append(drawn)
            weights.append(sums.get(drawn))
            self.remove(drawn)
            count -= len(drawn)
        return np.concatenate(parts), np.concatenate(weights) / total


def make(exponent: float) -> Prioritized:
    return Prioritized(exponent)
