"""A batch drawn from the trees of several shards is the one that a single pool with all of these trees gives."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atpo_async.core.vocabulary import WeightsOver
from buffer.front.draw import UnionDraw
from buffer.pool.pool import ReplayPool
from buffer.pool.sampler import F64, I64, Sampler
from buffer.pool.weights import PRIORITY_FLOOR
from buffer.sampling.prioritized import Prioritized
from buffer.sampling.uniform import Uniform
from tests.test_buffer_replay import tree

MAX_LAG = 3
VERSION = 4


class Ranked:
    """A user's: the trees of highest priority, and chance only among equals."""

    def __init__(self) -> None:
        self._priority: dict[int, float] = {}

    def put(self, trees: I64, priorities: F64) -> None:
        self._priority.update(zip(trees.tolist(), priorities.tolist(), strict=True))

    def remove(self, trees: I64) -> None:
        for number in trees.tolist():
            del self._priority[number]

    def probability(self, trees: I64) -> F64:
        return np.full(len(trees), 1.0 / len(self._priority))

    def draw(self, count: int, first: I64, rng: np.random.Generator) -> tuple[I64, F64]:
        probability = np.full(len(first) + count, 1.0 / len(self._priority))
        self.remove(first)
        chance = {number: rng.random() for number in sorted(self._priority)}
        best = sorted(self._priority, key=lambda number: (-self._priority[number], chance[number]))[:count]
        self.remove(np.array(best, dtype=np.int64))
        return np.concatenate([first, np.array(best, dtype=np.int64)]), probability


SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "prioritized": lambda: Prioritized(0.6),
    "uniform": Uniform,
    "ranked": Ranked,
}

Made = tuple[str, int, float | None]
"""(tree, version, priority once it was trained on; None: no batch has had it)."""
Drawn = dict[str, tuple[float, float]]
"""Tree -> (P_i, w_PER)."""


def filled(trees: Sequence[Made], highest: float, **options: Any) -> ReplayPool:
    pool = ReplayPool(max_uses=9, max_lag=MAX_LAG, exponent=0.6, **options)
    for tree_id, version, _ in trees:
        pool.add(tree(tree_id, version), priority=0.5)
    for tree_id, _, priority in trees:
        if priority is not None:
            pool.take([tree_id])
            pool.confirm([tree_id], {tree_id: priority})
    pool.restore_highest_priority(highest)
    pool.advance(VERSION)
    return pool


def drawn_from_one(trees: Sequence[Made], highest: float, count: int, seed: int, **options: Any) -> Drawn:
    pool = filled(trees, highest, **options)
    return {d.tree.tree_id: (d.probability, d.weight) for d in pool.draw(count, rng=rng(seed), beta=0.7)}


def drawn_from_shards(
    shards: Sequence[Sequence[Made]], highest: float, count: int, seed: int, *, sampler: Sampler, over: WeightsOver,
    freshness: float,
) -> Drawn:  # fmt: skip
    pools = [filled(trees, highest, freshness=freshness, sampler=Uniform()) for trees in shards]
    union = UnionDraw(sampler, exponent=0.6, max_lag=MAX_LAG, weights_over=over)
    choices = union.draw([pool.ready_trees() for pool in pools], count, rng=rng(seed), beta=0.7)
    found: Drawn = {}
    for pool, choice in zip(pools, choices, strict=True):
        rows = pool.find_entered(choice.entered)
        assert rows is not None
        for drawn in pool.take_rows(rows, choice.probability, choice.weight):
            found[drawn.tree.tree_id] = drawn.probability, drawn.weight
    return found


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@settings(max_examples=30)
@given(
    data=st.lists(
        st.lists(st.tuples(st.integers(VERSION - MAX_LAG, VERSION), st.none() | st.floats(0.01, 3.0)), max_size=7),
        min_size=2, max_size=4,
    ),
    count=st.integers(1, 8),
    seed=st.integers(0, 10),
    sampler=st.sampled_from(sorted(SAMPLERS)),
    over=st.sampled_from(["max", "mean", "none"]),
    freshness=st.sampled_from([1.0, 0.8]),
)  # fmt: skip
def test_trees_probabilities_and_weights_are_those_of_one_pool_with_the_trees_of_one_shard_after_the_others(
    data: list[list[tuple[int, float | None]]], count: int, seed: int, sampler: str, over: WeightsOver, freshness: float
) -> None:
    # Uniform has its trees in an order that past draws made: path by path it is compared where there were none.
    served = sampler != "uniform"
    shards: list[list[Made]] = [
        [(f"s{k}b1-{i}", version, priority if served else None) for i, (version, priority) in enumerate(trees)]
        for k, trees in enumerate(data)
    ]
    together = list(itertools.chain.from_iterable(shards))
    one = drawn_from_one(
        together, 4.0, count, seed, weights_over=over, freshness=freshness, sampler=SAMPLERS[sampler]()
    )  # fmt: skip
    several = drawn_from_shards(
        shards, 4.0, count, seed, sampler=SAMPLERS[sampler](), over=over, freshness=freshness
    )  # fmt: skip
    assert several == one
    assert len(one) == min(count, len(together))


def test_what_would_expire_in_any_shard_goes_first() -> None:
    oldest = VERSION - MAX_LAG
    shards: list[list[Made]] = [
        [(f"s0b1-{i}", VERSION, 3.0) for i in range(6)],
        [("s1b1-0", oldest, None), ("s1b1-1", oldest, None)],
    ]
    for seed in range(20):
        found = drawn_from_shards(shards, 3.0, 2, seed, sampler=Prioritized(0.6), over="max", freshness=1.0)
        assert set(found) == {"s1b1-0", "s1b1-1"}


# --- the law, by enumeration -----------------------------------------------------------------------------------


class Grid:
    """In place of chance: stands for the middle of each cell of a grid so fine that no draw changes within a cell."""

    def __init__(self, cells: Callable[[], int]) -> None:
        self._cells = cells
        self.path: list[tuple[int, ...]] = []
        self.sizes: list[int] = []
        self._at = 0

    def start_over(self) -> None:
        self._at = 0

    def random(self, count: int) -> F64:
        if self._at == len(self.path):
            self.path.append((0,) * count)
            self.sizes.append(self._cells())
        cell, size = self.path[self._at], self.sizes[self._at]
        self._at += 1
        return (np.array(cell) + 0.5) / size

    def next(self) -> bool:
        """To the next cell; False after the last."""
        del self.path[self._at :], self.sizes[self._at :]
        while self.path:
            cells = list(self.path[-1])
            for place in reversed(range(len(cells))):
                cells[place] += 1
                if cells[place] < self.sizes[-1]:
                    self.path[-1] = tuple(cells)
                    return True
                cells[place] = 0
            self.path.pop()
            self.sizes.pop()
        return False

    @property
    def probability(self) -> Fraction:
        found = Fraction(1)
        for cell, size in zip(self.path[: self._at], self.sizes, strict=False):
            found /= size ** len(cell)
        return found


Law = dict[frozenset[str], Fraction]


def law(draw: Callable[[Grid], Sequence[str]], cells: Callable[[], int]) -> Law:
    """The probability of each set of trees."""
    grid = Grid(cells)
    found: Counter[frozenset[str]] = Counter()
    going = True
    while going:
        grid.start_over()
        found[frozenset(draw(grid))] += grid.probability  # type: ignore[assignment]
        going = grid.next()
    return dict(found)  # type: ignore[arg-type]


def laws(masses: Sequence[Sequence[int]], count: int) -> Iterator[Law]:
    """Of one pool and of shards, whose trees have these masses, over batches of ``count`` trees."""
    trees = [[(f"s{k}b1-{i}", mass) for i, mass in enumerate(own)] for k, own in enumerate(masses)]

    def pool_of(own: Sequence[tuple[str, int]], sampler: Sampler) -> ReplayPool:
        pool = ReplayPool(max_uses=9, max_lag=10**6, exponent=1.0, sampler=sampler)
        for tree_id, mass in own:
            pool.add(tree(tree_id, 0), priority=0.5)
            pool.take([tree_id])
            pool.confirm([tree_id], {tree_id: mass - PRIORITY_FLOOR})
        return pool

    sampler = Prioritized(1.0)

    def cells() -> int:
        return round(sampler._sums.total)  # a stratum's ends lie on the grid of as many cells

    def from_one(grid: Any) -> list[str]:
        nonlocal sampler
        sampler = Prioritized(1.0)
        pool = pool_of(list(itertools.chain.from_iterable(trees)), sampler)
        return [drawn.tree.tree_id for drawn in pool.draw(count, rng=grid, beta=1.0)]

    def from_shards(grid: Any) -> list[str]:
        nonlocal sampler
        sampler = Prioritized(1.0)
        union = UnionDraw(sampler, exponent=1.0, max_lag=10**6, weights_over="none")
        pools = [pool_of(own, Uniform()) for own in trees]
        found = []
        for own, choice in zip(
            trees, union.draw([pool.ready_trees() for pool in pools], count, rng=grid, beta=1.0), strict=True
        ):
            found += [own[int(entered)][0] for entered in choice.entered]
        return found

    yield law(from_one, cells)
    yield law(from_shards, cells)


@pytest.mark.parametrize("masses", [[[1, 2], [3]], [[4], [1], [1, 2]], [[2, 2], [], [3, 1]]])
def test_the_law_of_batches_over_shards_is_that_of_one_pool_by_enumeration_of_all_chances(
    masses: list[list[int]],
) -> None:
    one, several = laws(masses, 2)
    assert several == one
    assert sum(one.values()) == 1
    assert len(one) > 1


def test_a_single_draw_falls_into_a_shard_by_its_mass_and_into_a_tree_by_its_own() -> None:
    masses = [[1, 2], [3, 4, 5]]
    _, several = laws(masses, 1)
    total = Fraction(sum(map(sum, masses)))
    for k, own in enumerate(masses):
        shard = sum((p for (name,), p in ((tuple(names), p) for names, p in several.items())
                     if name.startswith(f"s{k}b")), Fraction(0))  # fmt: skip
        assert shard == sum(own) / total
        for i, mass in enumerate(own):
            assert several[frozenset([f"s{k}b1-{i}"])] == shard * Fraction(mass, sum(own))


def test_numbers_of_trees_stay_while_they_are_ready_and_are_given_again_when_they_have_left() -> None:
    seen: list[dict[int, float]] = []

    class Noting(Ranked):
        def draw(self, count: int, first: I64, rng: np.random.Generator) -> tuple[I64, F64]:
            seen.append(dict(self._priority))
            return super().draw(count, first, rng)

    pools = [filled([(f"s{k}b1-{i}", VERSION, 1.0 + k + i / 8) for i in range(3)], 5.0) for k in range(2)]
    union = UnionDraw(Noting(), exponent=0.6, max_lag=MAX_LAG, weights_over="max")
    union.draw([pool.ready_trees() for pool in pools], 1, rng=rng(0), beta=1.0)  # not taken: as if a shard had refused
    pools[0].discard(["s0b1-0"], "stale")
    pools[1].add(tree("s1b1-9", VERSION), priority=0.5)
    union.draw([pool.ready_trees() for pool in pools], 1, rng=rng(0), beta=1.0)
    assert [sorted(numbers) for numbers in seen] == [list(range(6)), list(range(6))]
    first, second = seen
    assert {n: first[n] for n in range(1, 6)} == {n: second[n] for n in range(1, 6)}
    assert second[0] == 5.0
