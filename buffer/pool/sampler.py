"""The protocol of ``buffer.sampling``, which chooses the trees of a batch.  Pure: random numbers are passed in.

A sampler knows trees by number only.  Numbers are small: that of a tree that has left is given to a later one.  The
pool decides what is ready, what a tree's priority is and what has to be drawn before it is too old; from a sampler
it has the choice and each tree's probability, of which the importance weights are made.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


class Sampler(Protocol):
    """Chooses among the trees that can be drawn; at first there are none."""

    def put(self, trees: I64, priorities: F64) -> None:
        """These can be drawn from now on; one that already could gets another priority.

        Args:
            trees: int64[n], without duplicates.
            priorities: float64[n], at least 0 and finite: the highest one confirmed so far for a tree that no batch
                has had, and aged by ``buffer.freshness``.
        """

    def remove(self, trees: I64) -> None:
        """These cannot be drawn any more.

        Args:
            trees: int64[n], without duplicates, all of which can be drawn.
        """

    def probability(self, trees: I64) -> F64:
        """float64[n]: P_i of each of ``trees``, as ``draw`` would give it now; over all trees it sums to 1."""

    def draw(self, count: int, first: I64, rng: np.random.Generator) -> tuple[I64, F64]:
        """Choose ``count`` different trees beside ``first``.  None of either can be drawn any more then.

        Args:
            count: how many; there are more.
            first: int64[f], trees that are in the batch whatever is drawn: they would be too old for a later one.
            rng: the only source of chance.

        Returns:
            int64[f + count], ``first`` and then those that were chosen, and float64[f + count], P_i of each: how likely
            it is in a single draw from all that could be drawn before this call, above 0.
        """
