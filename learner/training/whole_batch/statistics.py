"""Numbers over the action tokens of all ranks, exact and the same however the batch is cut.

Every rank gathers all values and sorts them: a sum is then over the same numbers in the same order, whichever rank and
micro-batch held them.  A batch of a million tokens takes 8 MB for this.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from learner.training.reductions import Reductions


class GatheredStatistics:
    """``learner.loss.protocols.BatchStatistics``.  Every rank calls the same methods in the same order."""

    def __init__(self, reductions: Reductions) -> None:
        self._reductions = reductions

    def count(self, where: Tensor) -> int:
        """How many tokens of the batch are in ``where``."""
        return round(sum(self._reductions.gather(float(where.sum()))))

    def sum(self, values: Tensor, where: Tensor | None = None) -> float:
        """0 of none."""
        return float(self._gathered(values, where).sum())

    def mean(self, values: Tensor, where: Tensor | None = None) -> float:
        """NaN of none."""
        return float(_mean(self._gathered(values, where)))

    def std(self, values: Tensor, where: Tensor | None = None, *, sample: bool = False) -> float:
        """The population's, or a sample's; NaN of none (of fewer than two)."""
        found = self._gathered(values, where)
        count = len(found) - sample
        if count < 1:
            return math.nan
        # In the order of the numbers that they are squares of, which is always the same.
        return math.sqrt(float((found - _mean(found)).square().sum()) / count)

    def quantile(self, values: Tensor, share: float, where: Tensor | None = None) -> float:
        """Linear between neighbours; NaN of none."""
        found = self._gathered(values, where)
        if not len(found):
            return math.nan
        at = share * (len(found) - 1)
        below = min(int(at), len(found) - 1)
        above = min(below + 1, len(found) - 1)
        low, high = float(found[below]), float(found[above])
        return low if low == high else low + (at - below) * (high - low)

    def smallest(self, values: Tensor, number: int, where: Tensor | None = None) -> float:
        """The ``number``-th smallest; -inf where there is none, or ``number`` is 0."""
        found = self._gathered(values, where)
        return float(found[min(number, len(found)) - 1]) if number > 0 and len(found) else -math.inf

    def largest(self, values: Tensor, number: int, where: Tensor | None = None) -> float:
        """The ``number``-th largest; inf where there is none, or ``number`` is 0."""
        found = self._gathered(values, where)
        return float(found[-min(number, len(found))]) if number > 0 and len(found) else math.inf

    def _gathered(self, values: Tensor, where: Tensor | None) -> Tensor:
        """float64, ascending, of all ranks; without NaN."""
        own = values.detach().double().reshape(-1)
        own = own if where is None else own[where.reshape(-1)]
        every = self._reductions.concatenated(own)
        return every[~every.isnan()].sort().values


def _mean(values: Tensor) -> Tensor:
    return values.sum() / len(values) if len(values) else torch.tensor(math.nan)
