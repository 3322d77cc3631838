"""Which trees are kept for their spread: of those that ended lately, those whose chains earned the most unlike returns.

Source: StarPO-S (RAGEN, arXiv 2504.20073) and Dr.BoT (SPEAR, arXiv 2509.22601) keep a share of the groups of a batch by
the standard deviation of their rewards; RAGEN-2 the fewest groups that hold a share of the variance.  There a batch is
generated as a whole; here trees come one by one, so each is judged among the last ``window`` that ended, itself
included, and the trees without a signal count among them with a spread of 0.  Pure.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

import numpy as np

from atpo_async.config.sections.data import BufferConfig, StalenessConfig
from atpo_async.core.credit import TreeArrays
from atpo_async.core.credit.returns import leaf_returns

MOST = 256
"""Trees that a window holds at most: it is part of the journal."""


def spread_of(arrays: TreeArrays) -> float:
    """The population's standard deviation of the returns of a tree's chains.

    Args:
        arrays: the tree, with rewards of turns and discount as they count (``CreditRule.counted``).
    """
    return float(leaf_returns(arrays)[arrays.is_leaf].std()) if arrays.is_leaf.any() else 0.0


def filter_of(buffer: BufferConfig, staleness: StalenessConfig) -> SpreadFilter | None:
    """The filter of a run; None where it keeps every tree."""
    if buffer.keep_share >= 1.0:
        return None
    batch = math.ceil(staleness.trees_per_batch / buffer.keep_share)
    return SpreadFilter(buffer.keep_share, by_variance=buffer.keep_by == "variance", window=min(batch, MOST))


class SpreadFilter:
    """Judges trees in the order in which they end.

    Args:
        share: of the trees, or of their variance, that is kept.
        by_variance: of their variance.
        window: how many trees are compared, at least 1.
    """

    def __init__(self, share: float, *, by_variance: bool, window: int) -> None:
        self._share = share
        self._by_variance = by_variance
        self._window: deque[tuple[float, bool]] = deque(maxlen=window)

    def keeps(self, spread: float) -> bool:
        """Whether a tree of this spread is kept.  Of those as unlike as the last that is kept, as many are as fit."""
        earlier = [*self._window][-((self._window.maxlen or 1) - 1) :] if (self._window.maxlen or 1) > 1 else []
        spreads = np.sort([spread, *(each for each, _ in earlier)])[::-1]
        most = self._num_kept(spreads)
        if most == 0:
            kept = False
        else:
            last = float(spreads[most - 1])
            above = int((spreads > last).sum())
            like_it = sum(was_kept for each, was_kept in earlier if each == last)
            kept = spread > last or (spread == last and like_it < most - above)
        self._window.append((spread, kept))
        return kept

    def _num_kept(self, spreads: np.ndarray) -> int:
        """Of float64[n], descending, how many are kept."""
        if not self._by_variance:
            return math.ceil(self._share * len(spreads))
        variance = np.cumsum(spreads**2)
        if variance[-1] <= 0:
            return 0
        # A share that is reached but for rounding is reached.
        return int(np.searchsorted(variance, self._share * variance[-1] * (1 - 1e-12))) + 1

    def snapshot(self) -> tuple[tuple[float, bool], ...]:
        """The window, oldest first."""
        return tuple(self._window)

    def restore(self, window: Iterable[tuple[float, bool]]) -> None:
        """As an earlier process had it."""
        self._window.extend((float(spread), bool(kept)) for spread, kept in window)
