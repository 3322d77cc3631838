"""One group of trees: proposers grown concurrently, then a synthesizer for each team from what its proposers said.

Source: Rhombus (Findings of ACL 2026, 1956).  A member's number in the group is the ``expansion_round`` of its turns:
proposers first, then synthesizers.  Which proposers a team reads is decided by the lease's seed, so that an actor that
takes the group over decides the same.  Synthesizers begin when all proposers are at their end.  Once one of them has a
turn, a proposer that failed is not tried again: another cue would make another prompt.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import numpy as np

from actors.search.calls import BranchFailed
from actors.search.tree_search import TreeSearch
from actors.teams.rules import Proposal, dealt, hybrid_rewards, shortened_by, synthesis_parts
from atpo_async.config import Config, TeamConfig
from atpo_async.core.tree import ROOT, Turn, TurnTree
from atpo_async.environments.replay import NOTHING, Past, PastTurn
from atpo_async.environments.team import Member
from atpo_async.status import waits
from atpo_async.wire.messages import TreeClosed, TreeOpened

TEAM_INCOMPLETE = "team_incomplete"
"""The reason of a synthesizer that was not begun: a proposer of its team had failed."""


class TeamSearch(TreeSearch):
    """Grows the group of one lease: for training ``team.teams`` teams, for an evaluation a single one.

    Args:
        team: the team settings.
        others: as of ``TreeSearch``; no turn is branched at.
    """

    def __init__(self, *, team: TeamConfig, **others: Any) -> None:
        super().__init__(**{**others, "expansion": None})
        self._team = team
        greedy = self._lease.kind == "eval"
        self._num_teams = 1 if greedy else team.teams
        self._pool = team.proposers if greedy else team.pool
        self._proposals: dict[int, Proposal] = {}
        """By number, of the proposers that came to their end."""

    async def grow(self) -> TurnTree:
        """Grow to the end and close the group, unless the actor is asked to end.

        Waits for: every proposer, then every synthesizer.  Unblocked by: as of ``TreeSearch.grow``.
        """
        self.growth.tree.prompt = NOTHING
        await self._emit(
            TreeOpened(run=self._run, tree_id=self._lease.tree_id, lease_epoch=self._lease.epoch, prompt=NOTHING)
        )
        began = any(turn.role == "synthesizer" for turn in self.growth.tree)
        async with asyncio.TaskGroup() as chains:
            for number in range(self._pool):
                if not began or self._is_done(number):
                    name = f"{self._lease.tree_id}/proposer-{number}"
                    chains.create_task(self._member(number, self._proposer(number)), name=name)
        if not self.unfinished:
            teams = self._teams()
            await self._synthesize(teams)
            if not self.unfinished:
                await self._close(teams)
        return self.growth.tree.frozen(failed_branches=self.growth.failures.total())

    def _proposer(self, number: int) -> Member:
        return Member("proposer", seat=number % self._team.proposers)

    def _teams(self) -> dict[int, tuple[int, ...]]:
        """Number of each synthesizer -> the proposers that it reads, by seat; without the teams that lack one."""
        found, rng = {}, np.random.default_rng(self._lease.seed)
        teams = dealt(self._pool, self._num_teams, seats=self._team.proposers, there=self._proposals, rng=rng)
        for number, team in enumerate(teams, start=self._pool):
            if team is None:
                self.growth.failures[TEAM_INCOMPLETE] += 1
            else:
                found[number] = team
        return found

    async def _synthesize(self, teams: dict[int, tuple[int, ...]]) -> None:
        if self._leaving() and not all(map(self._is_done, teams)):
            self.growth.unfinished = True
            return
        async with asyncio.TaskGroup() as chains:
            for number, team in teams.items():
                cues = tuple(self._proposals[each].cue[: self._team.cue_tokens] for each in team)
                name = f"{self._lease.tree_id}/synthesizer-{number}"
                chains.create_task(self._member(number, Member("synthesizer", cues=cues), team), name=name)

    async def _close(self, teams: dict[int, tuple[int, ...]]) -> None:
        earned = {turn.expansion_round: turn.reward or 0.0 for turn in self.growth.tree if turn.is_leaf}
        late = hybrid_rewards(self._proposals, teams, earned, local_share=self._team.local_share)
        await self._emit(
            TreeClosed(
                run=self._run,
                tree_id=self._lease.tree_id,
                lease_epoch=self._lease.epoch,
                num_turns=len(self.growth.tree),
                failed_branches=self.growth.failures.total(),
                failures=dict(self.growth.failures),
                leaf_rewards=late,
            )
        )

    # --- one member --------------------------------------------------------------------------------------------

    def _path(self, number: int) -> list[Turn]:
        return [turn for turn in self.growth.tree if turn.expansion_round == number]

    def _is_done(self, number: int) -> bool:
        path = self._path(number)
        return bool(path) and path[-1].is_leaf

    async def _member(self, number: int, member: Member, team: tuple[int, ...] = ()) -> None:
        """A member's chain to its end.  A failure ends this chain only and is counted by its reason."""
        try:
            if not self._is_done(number) and not await self._chain_of(number, member, team):
                return
            leaf = self._path(number)[-1]
            if member.role == "proposer":
                self._proposals[number] = Proposal(leaf, await self._cue(number))
        except BranchFailed as failure:
            self._count(failure, "chain")
        else:
            self._chain_ended("chain", None)

    async def _chain_of(self, number: int, member: Member, team: tuple[int, ...]) -> bool:
        """Whether the chain came to its end; not, where the actor is asked to end first."""
        path = self._path(number)
        after = [*(turn.observation for turn in path[1:]), None]
        turns = tuple(PastTurn(turn.action, shown) for turn, shown in zip(path, after, strict=True)) if path else ()
        episode, observation = await self._calls.member(member, Past(turns, path[0].observation if path else None))
        try:
            context = np.concatenate([NOTHING, *(part for turn in path for part in (turn.observation, turn.action))])
            parent_id = path[-1].turn_id if path else ROOT
            while not self._leaving():
                context = np.concatenate([context, observation])
                turn, result = await self._turn(episode, context, observation, parent_id, number)
                turn = await self._judged(turn, number, team)
                # Numbered anew: while it was judged others may have ended.
                turn = msgspec.structs.replace(turn, role=member.role, turn_id=self.growth.tree.next_id)
                self.growth.add(turn)
                await self._emit(turn)
                waits.progress("turns")
                if turn.is_leaf:
                    return True
                context = np.concatenate([context, turn.action])
                observation, parent_id = result.observation, turn.turn_id
            self.growth.unfinished = True
            return False
        finally:
            await episode.close()

    async def _judged(self, turn: Turn, number: int, team: tuple[int, ...]) -> Turn:
        """The turn as its team has it: a proposer's reward less what a long cue costs, a synthesizer's with metrics."""
        if not turn.is_leaf:
            return turn
        if team:
            return synthesis_parts(turn, [self._proposals[each] for each in team])
        return shortened_by(turn, await self._cue(number, turn), self._team)

    async def _cue(self, number: int, last: Turn | None = None) -> np.ndarray:
        """int32[C] of a proposer's chain, not cut; empty where it gave none."""
        path = self._path(number) if last is None else [*self._path(number), last]
        found = await self._calls.cue(tuple(turn.action for turn in path))
        return NOTHING if found is None else np.asarray(found, dtype=np.int32)


def search_of(config: Config, **others: Any) -> TreeSearch:
    """The search of a lease as the configuration has it: of a tree, or of a team's group."""
    return TeamSearch(team=config.team, **others) if config.team.on else TreeSearch(**others)
