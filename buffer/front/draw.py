"""Draws a batch from the ready trees of several shards, as if they lay in one pool.  Pure: chance is passed in.

The trees have numbers here, given when a tree is first seen and kept until it has left: one shard's after the other's,
where all are seen for the first time at once.  The sampler, the choice of trees that must not wait and the importance
weights are those of one pool (``pool.pool.ReplayPool``), over the same numbers.  With the built-in sampler, whose sum
tree holds the masses in the order of the numbers, a stratum's target falls into a shard by the shard's mass, and within
it into a tree by the tree's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atpo_async.core.vocabulary import WeightsOver
from buffer.pool.expiry import Expiry
from buffer.pool.outcomes import ReadyTrees
from buffer.pool.sampler import F64, I64, Sampler
from buffer.pool.weights import importance_weights, proportional

Tree = tuple[int, int]
"""(shard, ``ReadyTrees.entered``)."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The trees that were drawn of one shard, n of them."""

    entered: I64
    """int64[n]."""
    probability: F64
    """float64[n], P_i among the trees of all shards."""
    weight: F64
    """float64[n], w_PER."""


class UnionDraw:
    """Draws from several pools.

    Args:
        sampler: chooses the trees of a batch.
        exponent: a in P_i ~ p_i^a.
        max_lag: a tree is too old when all its turns are older than this.
        weights_over: what w_PER is divided by.
    """

    def __init__(self, sampler: Sampler, *, exponent: float, max_lag: int, weights_over: WeightsOver) -> None:
        self._sampler = sampler
        self._exponent = exponent
        self._max_lag = max_lag
        self._weights_over: WeightsOver = weights_over
        self._numbers: dict[Tree, int] = {}
        self._drawable: set[int] = set()
        """Numbers that the sampler has."""

    def draw(self, pools: Sequence[ReadyTrees], count: int, *, rng: np.random.Generator, beta: float) -> list[Choice]:
        """Choose up to ``count`` different trees; what was chosen of each pool.

        Trees that were never served and would expire come first; the sampler chooses the others.  Where there are no
        more than ``count``, all are taken: P is 1/N and the weights are 1.
        """
        shards = np.repeat(np.arange(len(pools)), [len(pool.entered) for pool in pools])
        entered = np.concatenate([pool.entered for pool in pools])
        num_ready = len(entered)
        of_all: F64 | None = None
        if num_ready <= count:
            at, probability = np.arange(num_ready), np.full(num_ready, 1.0 / max(num_ready, 1))
        else:
            priority = np.concatenate([pool.priority for pool in pools])
            numbers = self._known(shards, entered, priority)
            of_all = self._sampler.probability(numbers) if self._weights_over == "mean" else None
            first = self._due(pools, count, numbers, priority, rng)
            chosen, probability = self._sampler.draw(count - len(first), first, rng)
            self._drawable.difference_update(chosen.tolist())
            position = {number: i for i, number in enumerate(numbers.tolist())}
            at = np.array([position[number] for number in chosen.tolist()], dtype=np.int64)
        weight = importance_weights(
            probability, num_trees=num_ready, beta=beta, over=self._weights_over, ready=of_all
        )  # fmt: skip
        return [
            Choice(entered[at[mine]], probability[mine], weight[mine])
            for mine in (shards[at] == k for k in range(len(pools)))
        ]

    def _known(self, shards: I64, entered: I64, priority: F64) -> I64:
        """int64[N]: the numbers of these trees, all that are ready; the sampler has them and no others."""
        trees = list(zip(shards.tolist(), entered.tolist(), strict=True))
        here = set(trees)
        gone = [tree for tree in self._numbers if tree not in here]
        left = [number for tree in gone if (number := self._numbers.pop(tree)) in self._drawable]
        if left:
            self._sampler.remove(np.array(left, dtype=np.int64))
            self._drawable.difference_update(left)
        used = set(self._numbers.values())
        free = iter([number for number in range(len(used) + len(trees)) if number not in used])
        for tree in trees:
            if tree not in self._numbers:
                self._numbers[tree] = next(free)
        numbers = np.array([self._numbers[tree] for tree in trees], dtype=np.int64)
        self._sampler.put(numbers, priority)
        self._drawable.update(numbers.tolist())
        return numbers

    def _due(
        self, pools: Sequence[ReadyTrees], count: int, numbers: I64, priority: F64, rng: np.random.Generator
    ) -> I64:
        """int64[f]: numbers of never-served trees that must go now for none of them to be lost."""
        expiry = Expiry(self._max_lag)
        oldest = np.concatenate([pool.oldest for pool in pools])
        unserved = np.concatenate([pool.unserved for pool in pools])
        for number, version in zip(numbers[unserved].tolist(), oldest[unserved].tolist(), strict=True):
            expiry.put_unserved(number, version)
        by_number = np.zeros(int(numbers.max()) + 1)
        by_number[numbers] = priority
        return expiry.choose_due(
            count, max(pool.version for pool in pools), rng=rng,
            weigh=lambda rows: proportional(by_number[rows], exponent=self._exponent),
        )  # fmt: skip
