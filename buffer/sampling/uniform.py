"""Every tree with the same probability, whatever its priority: P_i = 1/N, and every importance weight is 1.  Pure."""

from __future__ import annotations

import numpy as np

from buffer.pool.sampler import F64, I64


class Uniform:
    """The trees that can be drawn, side by side in one array: a draw costs as much as the batch has trees."""

    def __init__(self) -> None:
        self._trees = np.zeros(16, dtype=np.int64)
        """The first ``_count`` of them can be drawn, in no particular order."""
        self._at = np.full(16, -1, dtype=np.int64)
        """Tree -> its place in ``_trees``; -1 where it cannot be drawn."""
        self._count = 0

    def put(self, trees: I64, priorities: F64) -> None:
        if not len(trees):
            return
        if (most := int(trees.max())) >= len(self._at):
            more = max(2 * len(self._at), most + 1) - len(self._at)
            self._at = np.concatenate([self._at, np.full(more, -1, dtype=np.int64)])
            self._trees = np.concatenate([self._trees, np.zeros(more, dtype=np.int64)])
        new = trees[self._at[trees] < 0]
        places = np.arange(self._count, self._count + len(new))
        self._trees[places], self._at[new] = new, places
        self._count += len(new)

    def remove(self, trees: I64) -> None:
        for tree in trees.tolist():
            self._count -= 1
            at, last = self._at[tree], self._trees[self._count]
            self._trees[at], self._at[last] = last, at
            self._at[tree] = -1

    def probability(self, trees: I64) -> F64:
        return np.full(len(trees), 1.0 / max(self._count, 1))

    def draw(self, count: int, first: I64, rng: np.random.Generator) -> tuple[I64, F64]:
        probability = np.full(len(first) + count, 1.0 / self._count)
        self.remove(first)
        drawn = self._trees[rng.choice(self._count, count, replace=False, shuffle=False)]
        self.remove(drawn)
        return np.concatenate([first, drawn]), probability


def make(exponent: float) -> Uniform:
    """``exponent`` is what priorities are raised to; here they do not count."""
    return Uniform()
