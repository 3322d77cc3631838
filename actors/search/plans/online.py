"""Growth turn by turn: whether a branch begins is decided when a turn ends, and it begins at once.

Every decision is a function of the turns up to the one that ended, taken in the order of their numbers.  A tree that
another actor takes over is gone through again in that order, so that the turns that exist are decided on as before;
what of it has not begun begins then.  Where the budget does not bind, also the turns that come later are decided on by
their content alone: the tree is the same whatever the order in which its chains end.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile

from actors.expansion.expansion import ExpansionFailed
from actors.expansion.growing_tree import GrowingTree
from actors.expansion.token_budget import Reserve, affordable
from actors.search.growth import Chain
from actors.search.plans.base import Ground, Plan
from atpo_async.core.tree import ROOT, Turn
from atpo_async.environments.base import Episode


class Online(Plan):
    """The plan of ``search.expand = "online"``: M + L * K leaves; those that no rule asks for are fresh chains."""

    def __init__(self, ground: Ground) -> None:
        super().__init__(ground)
        tree = self.growth.tree
        self._seen = GrowingTree(tree.tree_id, tree.task_index)
        """The turns that have been decided on."""
        self._left = 0
        """Branches that may still begin."""
        self._open: list[Turn] = []
        """Turns that are not decided on yet."""
        self._reserve: Reserve | None = None
        """With ``search.tree_tokens``."""
        self._at_root = 0
        """Branches from the prompt that there are."""
        self._wanted: Counter[int] = Counter()
        """Turn -> branches that begin after it."""
        self._chains: asyncio.TaskGroup | None = None
        """None while nothing is decided: before the first chain has said how many there are."""

    def may_branch_after(self, turn: Turn) -> bool:
        return self._chains is None or self._left > 0

    async def grow(self, first: Episode) -> None:
        """Waits for: every chain, those too that begin meanwhile; then for those that are left of the budget."""
        self._seen.prompt = self.growth.tree.prompt
        episode = await self.probe(first)
        used = False
        if not self.growth.unfinished:
            self._left = self.branches
            if self.expansion is not None and self.expansion.settings.tree_tokens:
                self._reserve = Reserve(self.expansion.settings.tree_tokens, self.chains)
            async with asyncio.TaskGroup() as self._chains:
                used = self._set_out(self._chains, episode)
        if not used and episode is not None:
            await episode.close()
        if self._fresh() and not self.leaves_now():
            fresh, self._left = self._fresh(), 0
            self._wanted[ROOT] += fresh
            async with asyncio.TaskGroup() as self._chains:
                for _ in range(fresh):
                    self.start(Chain(ROOT, 1))

    def _set_out(self, chains: asyncio.TaskGroup, first: Episode | None) -> bool:
        """What there is goes on, what was decided and has not begun begins, and so do the first chains."""
        for turn in self.growth.tree.turns:
            self._decide(turn)
        for tail in self.growth.open_tails():
            self.go_on(chains, tail)
        for parent, wanted in self._wanted.items():
            for _ in range(wanted - self.growth.heads_after(parent)):
                self.start(Chain(parent, self.growth.tree.round_of(parent) + 1))
        return self.first_chains(chains, first)

    def start(self, chain: Chain) -> None:
        if not self.leaves_now():
            assert self._chains is not None
            name = self.name(f"branch-{self._wanted.total()}-of-{chain.parent_id}")
            self.ground.begin(self._chains, chain, name, None)

    def after(self, turn: Turn) -> Sequence[Chain]:
        """The rule's choice; nothing while the first chain is to say how many there are."""
        if self._chains is None:
            return ()
        return [Chain(parent, self.growth.tree.round_of(parent) + 1) for parent in self._decide(turn)]

    def _decide(self, turn: Turn) -> Sequence[int]:
        """The turns after which a chain begins, now that ``turn`` has ended."""
        if turn.parent_id == ROOT and turn.expansion_round > 0:
            self._at_root += 1
            if self._at_root > self._wanted[ROOT]:
                # Nothing but the rest of the budget begins chains from the prompt that no rule has asked for.
                self._wanted[ROOT] += self._fresh()
                self._left = 0
        self._seen.add(turn)
        self._open.append(turn)
        if self._reserve is not None:
            self._reserve.add(turn)
            if not self._reserve.is_known:
                return ()  # what a chain costs is not known before one has ended
        asked, self._open = self._open, []
        return [parent for each in asked for parent in self._granted(each)]

    def _granted(self, turn: Turn) -> Sequence[int]:
        if self.without_branches or self.expansion is None or self._left == 0 or turn.end == "pruned":
            return ()
        try:
            found = self.expansion.decide(self._seen, turn.turn_id, count=self._left, facts=self.facts)
        except ExpansionFailed as exc:
            self.without_branches = True
            self.ground.lost(exc, self._left)
            self._left = 0
            return ()
        if self._reserve is not None:
            found = tuple(takewhile(self._reserve.take, found))
        self._left -= len(found)
        self._wanted.update(found)
        return found

    def _fresh(self) -> int:
        """Chains from the prompt that the rest of the budget pays."""
        if self.expansion is None or self.growth.unfinished:
            return 0
        limit = self.expansion.settings.tree_tokens
        return len(affordable(self._seen, (ROOT,) * self._left, limit=limit)) if limit else self._left
