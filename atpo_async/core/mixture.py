"""Decides which environment of several each task of a run belongs to, and which of its own tasks it is.  Pure.

Training tasks come in blocks.  In each block every environment has the number of tasks that its weight says, in an
order that the run's seed decides; so any prefix of the run's tasks has them by weight, to within a few.  An
environment's own tasks are counted up without a gap.  Held-out tasks go round evenly: an environment's success is
measured equally well whatever its weight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from atpo_async.core.shuffling import shuffled
from atpo_async.core.vocabulary import Split

MOST_IN_A_BLOCK = 1000
"""Tasks; weights that no block of this size can give exactly are rounded to the nearest that one can."""

STRETCH = 32
"""Tasks of a block that are shuffled among themselves: a larger block keeps its proportions along its whole length."""


class Place(NamedTuple):
    """Where a task of the run belongs."""

    environment: int
    """Position among the environments."""
    task: int
    """Its number among that environment's own; past the end of a finite split it begins again."""


class Mixture:
    """The tasks of a run over its environments.

    Args:
        weights: one for each environment, > 0.
        seed: of the order within blocks.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.counts = block_counts(weights)
        """Tasks of each environment in every block."""
        self.block = sum(self.counts)
        self._seed = seed
        self._layout = functools.lru_cache(maxsize=64)(self._lay_out)

    def place(self, split: Split, task: int) -> Place:
        """Of the ``task``-th task of the run.  O(1), but for the first task of a block."""
        if split == "eval":
            return Place(task % len(self.counts), task // len(self.counts))
        block, at = divmod(task, self.block)
        environment, rank = self._layout(block)
        found = int(environment[at])
        return Place(found, block * self.counts[found] + int(rank[at]))

    def num_held_out(self, num_tasks: int) -> tuple[int, ...]:
        """How many of an evaluation's ``num_tasks`` each environment has."""
        several = len(self.counts)
        return tuple(len(range(number, num_tasks, several)) for number in range(several))

    def _lay_out(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each task of a block its environment, and how many tasks of that one lie before it."""
        # Spread evenly first: an environment's k-th of n tasks lies at (k + 1/2) / n of the block.
        spread = [((k + 0.5) / n, number) for number, n in enumerate(self.counts) for k in range(n)]
        environment = np.array([number for _, number in sorted(spread)])
        for start in range(0, self.block, STRETCH):
            part = environment[start : start + STRETCH]
            part[:] = part[shuffled(len(part), (self._seed * 1_000_003 + block) * 1_000_003 + start)]
        rank = np.zeros(self.block, dtype=np.int64)
        for number, count in enumerate(self.counts):
            rank[environment == number] = np.arange(count)
        return environment, rank


class TaskLabels:
    """The label of the environment that each task belongs to.

    Args:
        labels: of several environments; none where the run has one: then every task's label is empty.
        weights, seed: as of ``Mixture``.
    """

    def __init__(self, labels: Sequence[str] = (), weights: Sequence[float] = (), seed: int = 0) -> None:
        self._labels = tuple(labels)
        self._mixture = Mixture(weights, seed) if labels else None

    def of(self, split: Split, task: int) -> str:
        """Empty where the run has one environment."""
        return "" if self._mixture is None else self._labels[self._mixture.place(split, task).environment]


def block_counts(weights: Sequence[float]) -> tuple[int, ...]:
    """The least whole numbers that are to one another as ``weights`` are: (0.5, 0.25, 0.25) gives (2, 1, 1).

    Where they add up to more than ``MOST_IN_A_BLOCK``, those that do and are nearest, by largest remainder; at least 1.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    unit = math.lcm(*(each.denominator for each in exact))
    whole = [int(each * unit) for each in exact]
    divisor = math.gcd(*whole)
    counts = [each // divisor for each in whole]
    return tuple(counts) if sum(counts) <= MOST_IN_A_BLOCK else _largest_remainder(counts)


def _largest_remainder(counts: Sequence[int]) -> tuple[int, ...]:
    """``MOST_IN_A_BLOCK`` shared out in proportion, at least 1 to each."""
    total, seats = sum(counts), MOST_IN_A_BLOCK
    quotas = [Fraction(count * seats, total) for count in counts]
    given = [max(1, math.floor(quota)) for quota in quotas]
    by_remainder = sorted(range(len(counts)), key=lambda i: (given[i] - quotas[i], i))
    for i in by_remainder[: max(0, seats - sum(given))]:
        given[i] += 1
    divisor = math.gcd(*given)
    return tuple(each // divisor for each in given)
