"""One tree, grown concurrently: M chains from the prompt, then L rounds of K branches.

Every finished turn is emitted at once.  A chain that fails ends alone and is counted; it never becomes a reward.
A tree that an earlier actor left unfinished goes on from the turns it had committed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from actors.engines.base import Engine, Generation
from actors.expansion.candidates import sibling_parent
from actors.expansion.expansion import Expansion, ExpansionFailed
from actors.faults.fault import EXPANSION_FAILED, Fault, Place
from actors.search.budget import budget_of
from actors.search.calls import FORK_DIVERGED, BranchCalls, BranchFailed, diverged_kind
from actors.search.forks import Forks
from actors.search.gains import NO_GAIN, Gain, InformationGains
from atpo_async.config import SearchConfig
from atpo_async.core.tree import ROOT, Turn, TurnTree
from atpo_async.core.vocabulary import EndReason
from atpo_async.environments.base import Environment, Episode, StepResult
from atpo_async.environments.replay import NOTHING, WAY_OUT
from atpo_async.environments.values import TOO_LONG
from atpo_async.status import waits
from atpo_async.wire.messages import Lease, TreeClosed, TreeOpened

Emit = Callable[[TreeOpened | Turn | TreeClosed], Awaitable[None]]
ChainEnded = Callable[[Place, Fault | None], None]


@dataclass(slots=True)
class Growth:
    """Counts of one tree's growth so far."""

    turns: list[Turn] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    last_detail: str = ""
    """The text of the latest failure, for the log."""
    actions: int = 0
    cut_actions: int = 0
    """Of those, the ones that no stop token ended."""


class TreeSearch:
    """Grows the tree of one lease.

    Args:
        run: run id, part of every turn's key.
        lease: what to grow; its ``committed`` turns are not grown again.
        task_index: of the task among the environment's own; None: as in the lease.
        engine, environment: where actions and observations come from.
        search: the search settings.
        expansion: which turns are branched at; None where none ever is, as in an evaluation.
        max_context_tokens: a path that leaves no space for another action ends with ``length_limit``.
        emit: takes every message for the buffer; may wait for space in the window of unacknowledged messages.
        chain_ended: called when a chain has ended, with the fault that it was lost to, if any; may raise to end all.
        leaving: whether the actor is asked to end: every chain stops after its turn under way, and the tree is left
            as it is, for another actor.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        run: str,
        lease: Lease,
        task_index: int | None = None,
        engine: Engine,
        environment: Environment,
        search: SearchConfig,
        expansion: Expansion | None,
        max_context_tokens: int,
        emit: Emit,
        chain_ended: ChainEnded = lambda place, fault: None,
        leaving: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._lease = lease
        self._expansion = expansion
        self._budget = budget_of(
            search,
            kind=lease.kind,
            stop_token_ids=environment.stop_token_ids,
            stop_strings=getattr(environment, "stop_strings", ()),
        )
        known = environment.num_tasks(lease.kind)
        task = lease.task_index if task_index is None else task_index
        if known is not None and lease.kind == "train":
            task %= known  # training goes through a finite set of tasks again and again; the lease counts on
        self._calls = BranchCalls(lease=lease, task=task, engine=engine, environment=environment, search=search)
        self.gains: InformationGains | None = None
        """Of a tree whose turns are paid by what they tell of the right answer."""
        if search.turn_reward == "information-gain" and lease.kind == "train":
            # An engine takes one token less than the context has.
            most = max_context_tokens - 1
            self.gains = InformationGains(self._calls, search, most_tokens=most, clock=clock)
        self._forks = Forks(self._calls, rounds=self._budget.rounds if expansion is not None else 0)
        self._max_context = max_context_tokens
        self._truncated_reward = search.truncated_reward
        self._emit = emit
        self._chain_ended = chain_ended
        self._leaving = leaving
        self.unfinished = False
        """The tree was left as it is, since the actor is asked to end: it is not closed."""
        self._clock = clock
        self._without_branches = False
        """The strategy failed on this tree."""
        self._rng = np.random.default_rng(lease.seed)
        self.growth = Growth(turns=list(lease.committed))

    async def grow(self) -> TurnTree:
        """Grow to the end and close the tree, unless the actor is asked to end.

        Waits for: every chain of a round.  Unblocked by: the engine, the environment, their time limits, and
        space in the window of messages that the buffer has not acknowledged.
        """
        try:
            first = await self._calls.start()
        except BranchFailed as failure:
            self._count(failure, "chain")
            prompt = NOTHING
        else:
            prompt = first.prompt
            await self._emit(
                TreeOpened(run=self._run, tree_id=self._lease.tree_id, lease_epoch=self._lease.epoch, prompt=prompt)
            )
            try:
                await self._initial_round(prompt, first)
                for number in range(1, self._budget.rounds + 1):
                    if not self.unfinished:
                        await self._branch_round(prompt, number)
            finally:
                self._forks.release()
        tree = self._tree(prompt, self.growth.turns)
        if self.unfinished:
            return tree
        await self._emit(
            TreeClosed(
                run=self._run,
                tree_id=self._lease.tree_id,
                lease_epoch=self._lease.epoch,
                num_turns=len(tree),
                failed_branches=self.growth.failures.total(),
                failures=dict(self.growth.failures),
            )
        )
        return tree

    # --- rounds ------------------------------------------------------------------------------------------------

    async def _initial_round(self, prompt: np.ndarray, first: Episode) -> None:
        """M chains from the prompt, less those that an earlier holder began."""
        begun = self._tails(0)
        fresh = max(self._budget.initial_rollouts - len(begun), 0)
        async with asyncio.TaskGroup() as chains:
            for tail in begun:
                self._resume(chains, prompt, tail)
            for i in range(fresh):
                # The episode that returned the prompt serves the first chain, so that none is started in vain.
                episode = first if i == 0 else None
                chains.create_task(self._chain(prompt, ROOT, 0, episode), name=f"{self._lease.tree_id}/chain-{i}")
        if fresh == 0:
            await first.close()

    async def _branch_round(self, prompt: np.ndarray, number: int) -> None:
        """K new siblings, chosen on the tree as it was before this round, less those already begun."""
        before = self._tree(prompt, [t for t in self.growth.turns if t.expansion_round < number])
        chosen = self._choose(before, number)
        wanted = Counter(sibling_parent(before, turn_id) for turn_id in chosen)
        wanted -= Counter(t.parent_id for t in self._heads(number))
        begun = self._tails(number)
        if self._leaving() and (wanted or not all(tail.is_leaf for tail in begun)):
            self.unfinished = True
            return
        async with asyncio.TaskGroup() as chains:
            for tail in begun:
                self._resume(chains, prompt, tail)
            for i, parent in enumerate(wanted.elements()):
                name = f"{self._lease.tree_id}/round-{number}-{i}"
                chains.create_task(self._chain(prompt, parent, number, None), name=name)

    def _choose(self, before: TurnTree, number: int) -> tuple[int, ...]:
        """The turns to branch at.  A strategy that fails costs the tree this round and those after it."""
        if self._expansion is None or self._without_branches:
            return ()
        try:
            return self._expansion.choose(before, count=self._budget.branches, rng=self._rng)
        except ExpansionFailed as exc:
            self._without_branches = True
            failure = BranchFailed(EXPANSION_FAILED, str(exc), kind=exc.kind)
            for _ in range(self._budget.branches - len(self._heads(number))):
                self._count(failure, "branch", source=self._expansion.setting)
            return ()

    def _resume(self, chains: asyncio.TaskGroup, prompt: np.ndarray, tail: Turn) -> None:
        if not tail.is_leaf:
            name = f"{self._lease.tree_id}/after-{tail.turn_id}"
            chains.create_task(self._chain(prompt, tail.turn_id, tail.expansion_round, None), name=name)

    def _heads(self, number: int) -> list[Turn]:
        """First turns of the chains of round ``number``."""
        round_of = {t.turn_id: t.expansion_round for t in self.growth.turns}
        return [
            t
            for t in self.growth.turns
            if t.expansion_round == number and round_of.get(t.parent_id, -1) != number
        ]  # fmt: skip

    def _tails(self, number: int) -> list[Turn]:
        """Last turns, so far, of the chains of round ``number``: leaves, or turns to go on from."""
        mine = [t for t in self.growth.turns if t.expansion_round == number]
        followed = {t.parent_id for t in mine}
        return [t for t in mine if t.turn_id not in followed]

    def _tree(self, prompt: np.ndarray, turns: Sequence[Turn]) -> TurnTree:
        return TurnTree(
            self._lease.tree_id, self._lease.task_index, prompt, tuple(turns), self.growth.failures.total()
        )  # fmt: skip

    # --- one chain ---------------------------------------------------------------------------------------------

    async def _chain(self, prompt: np.ndarray, parent_id: int, number: int, episode: Episode | None) -> None:
        """From ``parent_id`` on to an end.  A failure ends this chain only and is counted by its reason."""
        place: Place = "branch" if number else "chain"
        try:
            ended = await self._walk(prompt, parent_id, number, episode)
        except BranchFailed as failure:
            self._count(failure, place)
        else:
            if ended:
                self._chain_ended(place, None)

    def _count(self, failure: BranchFailed, place: Place, *, source: str = "") -> None:
        self.growth.failures[failure.reason] += 1
        self.growth.last_detail = f"{source}, {failure}" if source else str(failure)
        self._chain_ended(place, Fault(failure.reason, failure.kind, failure.detail, source))

    async def _walk(self, prompt: np.ndarray, parent_id: int, number: int, episode: Episode | None) -> bool:
        """Whether the chain came to its end; not, where the actor is asked to end first."""
        path = self._tree(prompt, self.growth.turns).path(parent_id)
        observation = NOTHING
        if episode is None:
            sibling = self._child_of(parent_id)
            following = None if sibling is None else sibling.observation
            episode, observation = await self._forks.episode_at(prompt, path, following)
        try:
            self._check_same(prompt, episode.prompt, parent_id, observation)
            context = np.concatenate([prompt, *(part for t in path for part in (t.observation, t.action))])
            while not self._leaving():
                context = np.concatenate([context, observation])
                turn, result = await self._turn(episode, context, observation, parent_id, number)
                self.growth.turns.append(turn)
                await self._emit(turn)
                waits.progress("turns")
                if turn.is_leaf:
                    return True
                await self._forks.keep(episode, turn, result.observation)
                context = np.concatenate([context, turn.action])
                observation, parent_id = result.observation, turn.turn_id
            self.unfinished = True
            return False
        finally:
            await episode.close()

    async def _turn(
        self, episode: Episode, context: np.ndarray, observation: np.ndarray, parent_id: int, number: int
    ) -> tuple[Turn, StepResult]:
        began = self._clock()
        generation = await self._generate(context)
        generated = self._clock()
        self.growth.actions += 1
        self.growth.cut_actions += generation.stop_reason == "length"
        result = await self._calls.step(episode, generation.token_ids)
        stepped = self._clock()
        end: EndReason = result.end
        reward, success = result.reward, result.success
        used = len(context) + len(generation.token_ids) + len(result.observation)
        if end == "continue" and used >= self._max_context:
            if 2 * len(result.observation) > self._max_context:
                raise self._observation_too_long(len(result.observation))
            # The policy wrote too much over its turns: an outcome, no failure.
            end, reward, success = "length_limit", self._truncated_reward, False
        gain = await self._gain(end, parent_id, context, generation.token_ids, result.observation)
        turn = Turn(
            run=self._run,
            tree_id=self._lease.tree_id,
            # A tree taken over may lack a turn that was refused: its number is not given again.
            turn_id=max((t.turn_id for t in self.growth.turns), default=ROOT) + 1,
            parent_id=parent_id,
            lease_epoch=self._lease.epoch,
            expansion_round=number,
            observation=observation,
            action=generation.token_ids,
            logprobs=generation.logprobs,
            spans=generation.spans,
            end=end,
            reward=reward,
            success=success,
            generate_s=generated - began,
            environment_s=stepped - generated,
            turn_reward=result.turn_reward + gain.reward,
            rewards=dict(result.rewards),
            fingerprint=result.fingerprint,
            state_value=result.state_value,
        )
        if self.gains is not None:
            self.gains.remember(turn.turn_id, gain)
        return turn, result

    async def _gain(self, end: EndReason, parent_id: int, *parts: np.ndarray) -> Gain:
        """What the turn told of the right answer; ``parts``: its context, its action and what followed it."""
        if self.gains is None or end != "continue":
            return NO_GAIN
        return await self.gains.of(parent_id, *parts)

    def _child_of(self, turn_id: int) -> Turn | None:
        return next((t for t in self.growth.turns if t.parent_id == turn_id), None)

    def _check_same(self, prompt: np.ndarray, shown: np.ndarray, parent_id: int, observation: np.ndarray) -> None:
        """Siblings are compared as answers to the same context: a chain that was shown another one is left out.

        Raises BranchFailed.
        """
        sibling = self._child_of(parent_id)
        field: Literal["prompt", "observation"]
        if not np.array_equal(prompt, shown):
            what, field = "prompt", "prompt"
        elif sibling is not None and not np.array_equal(sibling.observation, observation):
            what, field = f"observation after the actions of turn {parent_id}", "observation"
        else:
            return
        said = f"{self._calls.task}: another {what} than in the tree's first chain; {WAY_OUT}"
        raise BranchFailed(FORK_DIVERGED, said, kind=diverged_kind(field))

    def _observation_too_long(self, tokens: int) -> BranchFailed:
        """The failure of a chain that a single observation ended by filling most of the context: it gets no reward."""
        return BranchFailed(
            TOO_LONG,
            f"{self._calls.task}: an observation of {tokens} tokens leaves no space for an action "
            f"in model.max_context_tokens = {self._max_context}; cut it in the environment, or raise that",
            kind=f"value of observation: {TOO_LONG}",
        )

    async def _generate(self, context: np.ndarray) -> Generation:
        sampling = self._budget.sampling
        space = self._max_context - len(context)
        if space < 1:
            raise BranchFailed("no_room", f"a prompt of {len(context)} tokens leaves no space for an action")
        if space < sampling.max_tokens:
            sampling = replace(sampling, max_tokens=space)
        return await self._calls.generate(context, sampling)
