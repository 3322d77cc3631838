"""Growth by waves: all chains take a few turns, then states are drawn by their value, and chains go on from those.

A turn's round is the number of its wave.  A chain that is not gone on with leads to no end, and leaves the tree.
Source: Fleet of Agents (arXiv 2405.06691).
"""

from __future__ import annotations

import asyncio
from collections import Counter

import numpy as np

from actors.expansion.expansion import Expansion, ExpansionFailed
from actors.search.growth import Chain
from actors.search.plans.base import Ground, Plan
from atpo_async.core.tree import ROOT, Turn
from atpo_async.environments.base import Episode


class Waves(Plan):
    """The plan of ``search.strategy = "resample"``: M chains, drawn anew up to L times, each from states of the tree.

    Args:
        ground: of the tree.
        expansion: its strategy.
    """

    def __init__(self, ground: Ground, expansion: Expansion) -> None:
        super().__init__(ground)
        self._draws, self._every = expansion, expansion.settings.resample_every

    def may_branch_after(self, turn: Turn) -> bool:
        return turn.expansion_round < self.budget.rounds

    async def grow(self, first: Episode) -> None:
        """Waits for: every chain of a wave."""
        episode: Episode | None = first
        last = self.budget.rounds
        # Chains of an earlier wave that stopped were not drawn again, or failed: they are over.
        for number in range(self.growth.newest_round, last + 1):
            most = None if number == last else self._every
            wanted = self._wanted(number)
            if wanted is None:
                break
            wanted -= Counter(head.parent_id for head in self.growth.heads(number))
            begun = {tail.turn_id: self._left_of(tail, most) for tail in self.growth.tails(number)}
            begun = {turn_id: left for turn_id, left in begun.items() if left != 0}
            if (wanted or begun) and self.leaves_now():
                break
            await self.ground.keep_open(set(wanted))
            async with asyncio.TaskGroup() as chains:
                for turn_id, left in begun.items():
                    self.go_on(chains, self.growth.tree[turn_id], most=left)
                for i, parent in enumerate(wanted.elements()):
                    serves = episode if parent == ROOT else None
                    self.ground.begin(chains, Chain(parent, number, most), self.name(f"wave-{number}-{i}"), serves)
                    episode = episode if serves is None else None
            if self.growth.unfinished or not self.growth.heads(number):
                break
        if episode is not None:
            await episode.close()

    def _wanted(self, number: int) -> Counter[int] | None:
        """Turn -> chains of the wave that go on after it; None where no chain is left."""
        if number == 0:
            return Counter({ROOT: self.chains})
        before = self.growth.tree.frozen(before_round=number)
        # One that failed is drawn anew like any other: its state is lost, not its place.
        living = self.chains - len(before.leaves())
        if living <= 0 or self.without_branches:
            return None
        rng = np.random.default_rng([self.ground.seed, number])
        try:
            return Counter(
                self._draws.choose(before, count=living, rng=rng, facts=self.facts, round_number=number)
            )  # fmt: skip
        except ExpansionFailed as exc:
            self.without_branches = True
            self.ground.lost(exc, living)
            return None

    def _left_of(self, tail: Turn, most: int | None) -> int | None:
        """Turns that a chain of the wave has yet to take; None: to its end; 0 where it has stopped."""
        if tail.end != "continue":
            return 0
        return None if most is None else max(0, most - self.growth.length_up_to(tail))
