"""The running medians against which a leaf's reward is judged when it is imitated.  Pure.

Source: SPEAR (arXiv 2509.22601), recalibrated advantages: of the last groups (here: trees) the mean and the standard
deviation of the leaf rewards are kept, and an old leaf is worth what it earned above the median of these means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from atpo_async.core.credit.rewards import STD_FLOOR

BLOCK = 64
"""Trees whose numbers are written to the journal together: a tree that ends changes one block."""

Moments = tuple[float, float]
"""Mean and standard deviation of the leaf rewards of one tree."""


class Baseline(NamedTuple):
    """The medians over the last trees."""

    mean: float
    std: float

    def advantage(self, reward: float, *, normalise: bool) -> float:
        """What a leaf of ``reward`` is worth now: r - P50(mean), over P50(std) + 1e-6 where the run normalises."""
        above = reward - self.mean
        return above / (self.std + STD_FLOOR) if normalise else above


class _Series:
    """The numbers of one environment's trees, in blocks; trees are counted from 0, block k begins with k * BLOCK."""

    def __init__(self) -> None:
        self.blocks: dict[int, list[Moments]] = {}
        """The newest last; all but that one are full."""
        self.baseline: Baseline | None = None
        """Once it was asked for, until another tree ends."""

    @property
    def count(self) -> int:
        """Of all trees that ever ended."""
        newest = max(self.blocks, default=0)
        return newest * BLOCK + len(self.blocks.get(newest, ()))

    def last(self, history: int) -> list[Moments]:
        return [each for block in self.blocks.values() for each in block][-history:]


class GroupMoments:
    """Mean and standard deviation of the leaf rewards of the last trees, by environment.

    Args:
        history: trees of each environment that count.
    """

    def __init__(self, history: int) -> None:
        self._history = history
        self._by_label: dict[str, _Series] = {}
        self._changed: set[tuple[str, int]] = set()

    def add(self, label: str, moments: Moments) -> None:
        """A tree of the environment ``label`` has ended."""
        series = self._by_label.setdefault(label, _Series())
        number = series.count // BLOCK
        series.blocks.setdefault(number, []).append(moments)
        series.baseline = None
        self._changed.add((label, number))
        self._forget_old(label, series)

    def _forget_old(self, label: str, series: _Series) -> None:
        first = (series.count - self._history) // BLOCK
        for number in [number for number in series.blocks if number < first]:
            del series.blocks[number]
            self._changed.add((label, number))

    @property
    def labels(self) -> list[str]:
        """Environments of which trees have ended."""
        return list(self._by_label)

    def baseline(self, label: str) -> Baseline | None:
        """The medians of an environment; None before its first tree."""
        series = self._by_label.get(label)
        if series is None:
            return None
        if series.baseline is None:
            mean, std = np.median(np.array(series.last(self._history)), axis=0).tolist()
            series.baseline = Baseline(mean, std)
        return series.baseline

    # --- snapshot ----------------------------------------------------------------------------------------------

    def drain_changes(self) -> dict[tuple[str, int], list[Moments] | None]:
        """(label, block) -> its numbers, of every block that has changed since the last call; None of one that went."""
        changed, self._changed = self._changed, set()
        return {(label, number): self._by_label[label].blocks.get(number) for label, number in changed}

    def restore(self, blocks: Mapping[tuple[str, int], Iterable[Moments]]) -> None:
        """As an earlier process left them."""
        for (label, number), numbers in sorted(blocks.items()):
            self._by_label.setdefault(label, _Series()).blocks[number] = list(numbers)
        for label, series in self._by_label.items():
            self._forget_old(label, series)
