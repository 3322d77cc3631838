"""The sum tree: draws in proportion to a weight and changes of weights, both in O(log N).  Pure."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from buffer.pool.sampler import F64, I64

FANOUT = 16
"""Of the sum tree: two lines of memory."""

WHOLE_LEVEL = 8192
"""A level of the sum tree with at most so many numbers is summed whole: sooner done than its groups are picked out."""


class SumTree:
    """Prefix sums over a growing array of non-negative numbers; every operation takes many indices at once.

    A node has ``FANOUT`` children, side by side: few levels, and of each one or two lines of memory are looked at.
    Inner sums are computed again from their children, never adjusted by differences, so they cannot drift.
    """

    def __init__(self, capacity: int = 16) -> None:
        self._levels: list[F64] = []
        """The numbers themselves, then the sums of ever larger groups of them; the last has at most ``FANOUT``."""
        self.grow(capacity)

    @property
    def capacity(self) -> int:
        return len(self._levels[0])

    @property
    def total(self) -> float:
        return float(self._levels[-1].sum())

    def values(self) -> F64:
        """float64[capacity]: a view."""
        return self._levels[0]

    def get(self, indices: I64) -> F64:
        """float64[n]."""
        found: F64 = self._levels[0][indices]
        return found

    def set(self, indices: I64, values: F64) -> None:
        """Put ``values`` at ``indices`` (without duplicates)."""
        if not len(indices):
            return
        self._levels[0][indices] = values
        if len(indices) == 1:
            at = int(indices[0])
            for below, above in pairwise(self._levels):
                at //= FANOUT
                above[at] = below[at * FANOUT : (at + 1) * FANOUT].sum()
            return
        nodes = indices
        for below, above in pairwise(self._levels):
            nodes = nodes // FANOUT
            groups = below.reshape(-1, FANOUT)
            if len(below) <= max(WHOLE_LEVEL, FANOUT * len(nodes)):
                np.einsum("ij->i", groups, out=above[: len(groups)])
            else:
                # A group that is there twice is the same sum twice; to find such ones would cost more.
                above[nodes] = np.einsum("ij->i", groups.take(nodes, axis=0))

    def grow(self, capacity: int) -> None:
        """Hold at least ``capacity`` numbers."""
        old = self._levels[0] if self._levels else np.zeros(0)
        if self._levels and capacity <= len(old):
            return
        length = _whole_groups(capacity)
        self._levels = [np.zeros(length)]
        while length > FANOUT:
            length = _whole_groups(length // FANOUT)
            self._levels.append(np.zeros(length))
        if len(old):
            self.set(np.arange(len(old)), old)

    def find(self, targets: F64) -> I64:
        """int64[n]: for each target in [0, total) the index whose interval of the prefix sums it falls into.

        Never an index that holds zero while there are others, whatever the rounding.
        """
        target = targets.astype(np.float64, copy=True)
        node = np.zeros(len(target), dtype=np.int64)
        every = np.arange(len(target))
        for level in reversed(self._levels):
            children = level.reshape(-1, FANOUT).take(node, axis=0)
            ends = np.cumsum(children, axis=1)
            last = FANOUT - 1 - np.argmax(children[:, ::-1] > 0, axis=1)
            child = np.minimum((target[:, None] >= ends).sum(axis=1), last)
            target -= np.where(child > 0, ends[every, child - 1], 0.0)
            node = node * FANOUT + child
        return node


def _whole_groups(count: int) -> int:
    return -(-max(count, 1) // FANOUT) * FANOUT


def stratified(sums: SumTree, uniform: F64) -> I64:
    """int64[n]: one draw from each of n equal strata of the sum, at ``uniform`` (float64[n] in [0, 1)) within it."""
    count = len(uniform)
    return sums.find((np.arange(count) + uniform) / count * sums.total)
