"""Growth by rounds: M chains to their ends, then L rounds of K branches, each chosen on the whole tree before it."""

from __future__ import annotations

import asyncio
from collections import Counter

import numpy as np

from actors.expansion.candidates import sibling_parent
from actors.expansion.expansion import ExpansionFailed
from actors.search.growth import Chain
from actors.search.plans.base import Ground, Plan
from atpo_async.core.tree import Turn, TurnTree
from atpo_async.environments.base import Episode


class Rounds(Plan):
    """The plan of ``search.expand = "rounds"``."""

    def __init__(self, ground: Ground) -> None:
        super().__init__(ground)
        self._rng = np.random.default_rng(ground.seed)

    def may_branch_after(self, turn: Turn) -> bool:
        return self.expansion is not None and turn.expansion_round < self.budget.rounds

    async def grow(self, first: Episode) -> None:
        """Waits for: every chain of a round."""
        episode = await self.probe(first)
        if not self.growth.unfinished:
            await self._initial_round(episode)
        elif episode is not None:
            await episode.close()
        for number in range(1, self.budget.rounds + 1):
            if not self.growth.unfinished:
                await self._branch_round(number)

    async def _initial_round(self, first: Episode | None) -> None:
        """M chains from the prompt, less those that an earlier holder began."""
        async with asyncio.TaskGroup() as chains:
            for tail in self.growth.tails(0):
                if tail.end == "continue":
                    self.go_on(chains, tail)
            used = self.first_chains(chains, first)
        if not used and first is not None:
            await first.close()

    async def _branch_round(self, number: int) -> None:
        """K new siblings, chosen on the tree as it was before this round, less those already begun."""
        before = self.growth.tree.frozen(before_round=number, failed_branches=self.growth.failures.total())
        chosen = self._choose(before, number)
        wanted = Counter(sibling_parent(before, turn_id) for turn_id in chosen)
        wanted -= Counter(t.parent_id for t in self.growth.heads(number))
        begun = [tail for tail in self.growth.tails(number) if tail.end == "continue"]
        if (wanted or begun) and self.leaves_now():
            return
        async with asyncio.TaskGroup() as chains:
            for tail in begun:
                self.go_on(chains, tail)
            for i, parent in enumerate(wanted.elements()):
                self.ground.begin(chains, Chain(parent, number), self.name(f"round-{number}-{i}"), None)

    def _count(self, number: int) -> int:
        """Branches of a round: K, or where a first chain has decided on M, an equal share of the rest."""
        rounds = self.budget.rounds
        if self.expansion is None or not self.expansion.settings.probe_budget:
            return self.budget.branches
        return self.branches * number // rounds - self.branches * (number - 1) // rounds

    def _choose(self, before: TurnTree, number: int) -> tuple[int, ...]:
        """The turns to branch at.  A strategy that fails costs the tree this round and those after it."""
        count = self._count(number)
        if self.expansion is None or self.without_branches or not count:
            return ()
        try:
            return self.expansion.choose(before, count=count, rng=self._rng, facts=self.facts, round_number=number)
        except ExpansionFailed as exc:
            self.without_branches = True
            self.ground.lost(exc, count - len(self.growth.heads(number)))
            return ()
