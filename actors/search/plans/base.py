"""What all plans of a tree's growth share: the first chains, the losses, and how a chain is begun."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from actors.expansion.expansion import Expansion, ExpansionFailed
from actors.expansion.facts import Facts
from actors.search.budget import Budget
from actors.search.growth import Chain, Growth
from atpo_async.core.tree import ROOT, Turn
from atpo_async.environments.base import Episode

Begin = Callable[[asyncio.TaskGroup, Chain, str, Episode | None], None]
"""``(chains, chain, name, episode)``: begins a chain as a task of ``chains``, on ``episode`` where there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What a plan works on."""

    growth: Growth
    budget: Budget
    expansion: Expansion | None
    seed: int
    """Of the lease."""
    begin: Begin
    lost: Callable[[ExpansionFailed, int], None]
    """Counts so many branches that a strategy's failure has cost."""
    leaving: Callable[[], bool]
    keep_open: Callable[[set[int]], Awaitable[None]]
    """Close the episodes that wait after other turns than these."""


class Plan:
    """Of one tree.  ``grow`` is called once; ``after`` whenever a turn has ended, in the order of their numbers."""

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        self.growth, self.budget, self.expansion = ground.growth, ground.budget, ground.expansion
        self.chains = ground.budget.initial_rollouts
        """M, chains from the prompt at first."""
        self.facts = Facts() if self.expansion is None else self.expansion.facts(ground.seed, self.growth.tree)
        self.without_branches = self.expansion is None
        """No strategy, or it failed on this tree."""

    async def grow(self, first: Episode) -> None:
        """Grow the tree to its end, or until the actor is asked to end.

        Waits for: its chains.  Unblocked by: the engine, the environment, their time limits.

        Args:
            first: the episode that returned the prompt.
        """
        raise NotImplementedError

    def after(self, turn: Turn) -> Sequence[Chain]:
        """The chains that begin now that ``turn`` has ended; ``start`` begins them."""
        return ()

    def start(self, chain: Chain) -> None:
        """Begin a chain that ``after`` returned."""
        raise NotImplementedError

    def may_branch_after(self, turn: Turn) -> bool:
        """Whether a chain may begin after the turn later, so that the state there is worth keeping."""
        return False

    # --- what plans share --------------------------------------------------------------------------------------

    @property
    def branches(self) -> int:
        """Leaves of the whole tree that are not initial chains."""
        return max(0, self.budget.max_leaves - self.chains)

    def leaves_now(self) -> bool:
        """Whether the actor is asked to end; the tree is unfinished then."""
        if self.ground.leaving():
            self.growth.unfinished = True
        return self.growth.unfinished

    def name(self, what: object) -> str:
        """Of a chain's task."""
        return f"{self.growth.tree.tree_id}/{what}"

    def go_on(self, chains: asyncio.TaskGroup, tail: Turn, *, most: int | None = None) -> None:
        """A chain that an earlier holder of the lease left."""
        chain = Chain(tail.turn_id, tail.expansion_round, most)
        self.ground.begin(chains, chain, self.name(f"after-{tail.turn_id}"), None)

    def first_chains(self, chains: asyncio.TaskGroup, first: Episode | None, *, most: int | None = None) -> bool:
        """Chains from the prompt, less those that there are; whether ``first`` serves one."""
        fresh = max(self.chains - len(self.growth.heads(0)), 0)
        for i in range(fresh):
            # The episode that returned the prompt serves the first chain, so that none is started in vain.
            episode = first if i == 0 else None
            self.ground.begin(chains, Chain(ROOT, 0, most), self.name(f"chain-{i}"), episode)
        return fresh > 0

    async def probe(self, first: Episode) -> Episode | None:
        """With ``search.probe_budget`` one chain alone to its end, which decides how many there are.

        Returns ``first`` where no chain has taken it.
        """
        if self.expansion is None or not self.expansion.settings.probe_budget or self.budget.max_leaves < 2:
            return first  # an evaluation is one chain
        heads = self.growth.heads(0)
        episode: Episode | None = first
        if len(heads) < 2:
            tail = self.growth.chain_of(heads[0])[-1] if heads else None
            async with asyncio.TaskGroup() as chains:
                if tail is None:
                    self.ground.begin(chains, Chain(ROOT, 0), self.name("probe"), first)
                    episode = None
                elif tail.end == "continue":
                    self.go_on(chains, tail)
        if not self.growth.unfinished:
            self.chains = self._chains_by(self.growth.heads(0), self.expansion)
        return episode

    def _chains_by(self, heads: Sequence[Turn], expansion: Expansion) -> int:
        """M by the first chain, where that had ended before the next one began; else as configured."""
        probe = self.growth.chain_of(heads[0]) if heads else []
        if not probe or not probe[-1].is_leaf or any(head.turn_id < probe[-1].turn_id for head in heads[1:]):
            return self.budget.initial_rollouts
        try:
            return expansion.chains_after(probe, self.facts)
        except ExpansionFailed as exc:
            self.without_branches = True
            self.ground.lost(exc, self.branches)
            return self.budget.initial_rollouts
