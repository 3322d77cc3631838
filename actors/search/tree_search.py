"""One tree, grown concurrently: chains from the prompt and branches, as its plan has them begin.

Every finished turn is emitted at once.  A chain that fails ends alone and is counted; it never becomes a reward.
A tree that an earlier actor left unfinished goes on from the turns it had committed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from actors.engines.base import Engine, Generation
from actors.expansion.expansion import Expansion, ExpansionFailed
from actors.expansion.overlap import found_before
from actors.faults.fault import EXPANSION_FAILED, Fault, Place
from actors.search.budget import budget_of
from actors.search.calls import FORK_DIVERGED, BranchCalls, BranchFailed, diverged_kind
from actors.search.forks import Forks
from actors.search.growth import Chain, Growth
from actors.search.plans.base import Ground
from actors.search.plans.choosing import plan_of
from actors.search.rewards.gains import NO_GAIN, Gain, InformationGains
from atpo_async.config import SearchConfig
from atpo_async.core.credit.overlong import overlong_penalty, overlong_range
from atpo_async.core.tree import ROOT, Turn, TurnTree
from atpo_async.core.vocabulary import EndReason
from atpo_async.environments.base import Environment, Episode, StepResult
from atpo_async.environments.replay import NOTHING, WAY_OUT
from atpo_async.environments.values import TOO_LONG
from atpo_async.status import waits
from atpo_async.wire.messages import Lease, TreeClosed, TreeOpened

OVERLONG = "overlong"
"""The part of a chain's reward that its length costs it (``search.overlong_buffer``)."""
Emit = Callable[[TreeOpened | Turn | TreeClosed], Awaitable[None]]
ChainEnded = Callable[[Place, Fault | None], None]


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
        self._forks = Forks(self._calls)
        self._max_context = max_context_tokens
        self._truncated_reward = search.truncated_reward
        shaped = search.overlong_buffer if lease.kind == "train" else 0.0
        self._overlong = overlong_range(shaped, search.overlong_tokens, max_context_tokens)
        """(L, B) of what a long chain's reward is shaped by; None: by nothing."""
        self._emit = emit
        self._chain_ended = chain_ended
        self._leaving = leaving
        self._clock = clock
        self.growth = Growth(lease.tree_id, lease.task_index, lease.committed)
        self._search = search
        self._plan = plan_of(
            Ground(
                growth=self.growth,
                budget=self._budget,
                expansion=expansion,
                seed=lease.seed,
                begin=self._begin,
                lost=self._lost,
                leaving=leaving,
                keep_open=self._forks.close_waiting,
            )
        )

    @property
    def unfinished(self) -> bool:
        """The tree was left as it is, since the actor is asked to end: it is not closed."""
        return self.growth.unfinished

    async def grow(self) -> TurnTree:
        """Grow to the end and close the tree, unless the actor is asked to end.

        Waits for: every chain.  Unblocked by: the engine, the environment, their time limits, and space in the window
        of messages that the buffer has not acknowledged.
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
            self.growth.tree.prompt = prompt
            try:
                await self._plan.grow(first)
            finally:
                await self._forks.release()
        tree = self.growth.tree.frozen(failed_branches=self.growth.failures.total())
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

    # --- one chain ---------------------------------------------------------------------------------------------

    def _begin(self, chains: asyncio.TaskGroup, chain: Chain, name: str, episode: Episode | None) -> None:
        chains.create_task(self._chain(chain, episode), name=name)

    async def _chain(self, chain: Chain, episode: Episode | None) -> None:
        """On to an end.  A failure ends this chain only and is counted by its reason."""
        place: Place = "branch" if chain.round else "chain"
        try:
            ended = await self._walk(chain, episode)
        except BranchFailed as failure:
            self._count(failure, place)
        else:
            if ended:
                self._chain_ended(place, None)

    def _lost(self, exc: ExpansionFailed, branches: int) -> None:
        """So many branches that the strategy's failure has cost."""
        assert self._plan.expansion is not None
        failure = BranchFailed(EXPANSION_FAILED, str(exc), kind=exc.kind)
        for _ in range(branches):
            self._count(failure, "branch", source=self._plan.expansion.setting)

    def _count(self, failure: BranchFailed, place: Place, *, source: str = "") -> None:
        self.growth.failures[failure.reason] += 1
        self.growth.last_detail = f"{source}, {failure}" if source else str(failure)
        self._chain_ended(place, Fault(failure.reason, failure.kind, failure.detail, source))

    async def _walk(self, chain: Chain, episode: Episode | None) -> bool:
        """Whether the chain came to its end; not, where it stops, or the actor is asked to end first."""
        tree, parent_id = self.growth.tree, chain.parent_id
        path, observation, waits_on = tree.path(parent_id), NOTHING, False
        if episode is None:
            sibling = tree.first_child(parent_id)
            following = None if sibling is None else sibling.observation
            episode, observation = await self._forks.episode_at(tree.prompt, path, following)
        try:
            self._check_same(tree.prompt, episode.prompt, parent_id, observation)
            context = tree.context(parent_id)
            taken = 0
            while not self._leaving():
                context = np.concatenate([context, observation])
                turn, result = await self._turn(episode, context, observation, parent_id, chain.round)
                self.growth.add(turn)
                further = self._plan.after(turn)
                await self._emit(turn)
                waits.progress("turns")
                if turn.end != "continue":
                    self._start(further)
                    return True
                if self._plan.may_branch_after(turn) or any(chain.parent_id == turn.turn_id for chain in further):
                    await self._forks.keep(episode, turn, result.observation)
                self._start(further)
                taken += 1
                if taken == chain.most:
                    self._forks.wait(episode, turn, result.observation)
                    waits_on = True
                    return False
                context = np.concatenate([context, turn.action])
                observation, parent_id = result.observation, turn.turn_id
            self.growth.unfinished = True
            return False
        finally:
            if not waits_on:
                await episode.close()

    def _start(self, further: Sequence[Chain]) -> None:
        for chain in further:
            self._plan.start(chain)

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
            answer = len(result.observation) if result.longest_answer is None else result.longest_answer
            if 2 * answer > self._max_context:
                raise self._observation_too_long(answer)
            # The policy wrote, or asked for, too much: an outcome, no failure.
            end, reward, success = "length_limit", self._truncated_reward, False
        parts = dict(result.rewards)
        if reward is not None and self._overlong is not None:
            parts[OVERLONG] = self._cost_of_length(*self._overlong, parent_id, len(generation.token_ids))
            reward += parts[OVERLONG]
        gain = await self._gain(end, parent_id, context, generation.token_ids, result.observation)
        # After the last wait: of two branches that found the same, the later turn is closed.
        if end == "continue" and self._repeats(parent_id, number, result.fingerprint):
            end = "pruned"
        turn = Turn(
            run=self._run,
            tree_id=self._lease.tree_id,
            # A tree taken over may lack a turn that was refused: its number is not given again.
            turn_id=self.growth.tree.next_id,
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
            rewards=parts,
            fingerprint=result.fingerprint,
            state_value=result.state_value,
        )
        if self.gains is not None:
            self.gains.remember(turn.turn_id, gain)
        return turn, result

    def _cost_of_length(self, limit: int, buffer: int, parent_id: int, num_tokens: int) -> float:
        """What its length costs a chain that ends with an action of so many tokens."""
        above = sum(len(turn.action) for turn in self.growth.tree.path(parent_id)) if parent_id != ROOT else 0
        return overlong_penalty(above + num_tokens, limit=limit, buffer=buffer, factor=self._search.overlong_penalty)

    async def _gain(self, end: EndReason, parent_id: int, *parts: np.ndarray) -> Gain:
        """What the turn told of the right answer; ``parts``: its context, its action and what followed it."""
        if self.gains is None or end != "continue":
            return NO_GAIN
        return await self.gains.of(parent_id, *parts)

    def _repeats(self, parent_id: int, number: int, fingerprint: tuple[int, ...]) -> bool:
        """Whether a branch has found with its first action what a sibling had, and so is closed."""
        search, tree = self._search, self.growth.tree
        if not search.prune_duplicates or number == tree.round_of(parent_id):
            return False
        return found_before(tree, parent_id, fingerprint, at=search.duplicate_at)

    def _check_same(self, prompt: np.ndarray, shown: np.ndarray, parent_id: int, observation: np.ndarray) -> None:
        """Siblings are compared as answers to the same context: a chain that was shown another one is left out.

        Raises BranchFailed.
        """
        sibling = self.growth.tree.first_child(parent_id)
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
