"""An episode that runs on its environment's loop, and is replayed on another loop where that one is lost."""

from __future__ import annotations

import asyncio
import functools
from typing import NamedTuple, Self

import numpy as np

from actors.hosting.caller import Caller
from actors.hosting.calls import EnvironmentTimeout, LoopLost
from actors.hosting.kept import Keeper, Kept
from actors.hosting.loop_thread import LoopThread
from atpo_async.core.errors import EnvironmentBroken
from atpo_async.core.texts import counted
from atpo_async.environments.base import Environment, Episode, Split, StepResult
from atpo_async.environments.checked import CheckedEpisode
from atpo_async.environments.replay import NOTHING, Past, PastTurn, close_quietly, replayed
from atpo_async.environments.team import AsMember, Member
from atpo_async.environments.values import ValueRefused


class _Begun(NamedTuple):
    episode: Episode
    prompt: np.ndarray
    environment: Environment
    observation: np.ndarray = NOTHING


class HostedEpisode:
    """One task in progress.  It has the interface of ``Episode``, for the actor's loop."""

    def __init__(
        self, caller: Caller, keeper: Keeper, split: Split, task_index: int, member: Member | None = None
    ) -> None:
        self._caller, self._keeper = caller, keeper
        self._split: Split = split
        self._task = task_index
        self._member = member
        self._name = f"task {task_index} ({split})" + ("" if member is None else f", {member.role}")
        self._turns: list[PastTurn] = []
        self._plain: Episode | None = None
        self._thread: LoopThread | None = None
        self._environment: Environment | None = None
        """Made on ``_thread``; ``_plain`` is an episode of it."""
        self.prompt = NOTHING
        """int32[P]."""
        self.observation = NOTHING
        """int32[O]: what followed the last turn of a replay."""

    async def begin(self, past: Past) -> Self:
        """Start, or replay, on the loop in use.  Raises ForkDiverged where the replay shows something else."""
        self._turns = list(past.turns)
        split, task, environment_name, member = self._split, self._task, self._caller.name, self._member

        async def work(environment: Environment) -> _Begun:
            if member is not None:
                environment = AsMember(environment, member)
            if past.turns:
                episode, observation = await replayed(environment, split, task, past, name=environment_name)
            else:
                episode, observation = await environment.start(split, task), NOTHING
            return await _begun(episode, environment, observation)

        num_steps = len(past.turns)
        what = f"replay of {counted(num_steps, 'step')}" if num_steps else "start"
        self._thread, begun = await self._caller.call(
            f"{what} of {self._name}", work, limit_s=(num_steps + 1) * self._caller.step_timeout_s, discard=_discard
        )
        self._plain, self.prompt, self._environment, self.observation = begun
        self._keeper.replayed_steps += num_steps
        return self

    async def begin_at(self, kept: Kept) -> Self | None:
        """Begin at a state that was kept; None where that is lost, or fails.  Raises EnvironmentTimeout; ValueRefused
        for a state that is none."""
        if kept.refused is not None:
            raise kept.refused
        if kept.thread.abandoned:
            return None
        copies = kept.way == "fork"
        work = functools.partial(_forked if copies else self._restored, kept)
        what = f"{'fork' if copies else 'restore'} of {self._name} after {counted(len(kept.past.turns), 'step')}"
        limit_s = (1 if copies else 2) * self._caller.step_timeout_s
        try:
            begun = await self._caller.answer(kept.thread, what, work, limit_s=limit_s, discard=_discard)
        except LoopLost:
            return None
        except (EnvironmentBroken, EnvironmentTimeout, ValueRefused):
            raise
        except Exception as exc:
            self._keeper.count_failed(what, exc)
            return None
        if begun is None:
            return None
        self._thread, self._turns = kept.thread, list(kept.past.turns)
        self._plain, self.prompt, self._environment, _ = begun
        return self

    async def _restored(self, kept: Kept) -> _Begun | None:
        episode = await kept.environment.start(self._split, self._task)
        try:
            assert isinstance(episode, CheckedEpisode)
            await episode.restore(kept.state, steps=len(kept.past.turns))
        except BaseException:
            await close_quietly(episode, self._name)
            raise
        return await _begun(episode, kept.environment)

    async def keep(self) -> Kept | None:
        """The present state, for branches to begin at; None where it cannot be kept.  Raises EnvironmentBroken."""
        plain, thread, environment = self._plain, self._thread, self._environment
        if not isinstance(plain, CheckedEpisode) or not plain.ways or environment is None:
            return None
        if thread is None or thread.abandoned:
            return None
        past = Past(tuple(self._turns), self.prompt)
        kept = Kept(self._name, thread, environment, past)
        return kept if await self._keeper.fill(kept, plain) else None

    async def step(self, action: np.ndarray) -> StepResult:
        """Raises what ``begin`` raises.  After the loss of its loop the episode is replayed first, and checked."""
        while True:
            if self._thread is None or self._thread.abandoned:
                await self.begin(Past(tuple(self._turns), self.prompt))
            assert self._thread is not None
            assert self._plain is not None
            work = functools.partial(self._plain.step, action)
            what = f"step {len(self._turns) + 1} of {self._name}"
            try:
                result = await self._caller.answer(self._thread, what, work, limit_s=self._caller.step_timeout_s)
            except LoopLost:
                self._leave()
                continue
            self._turns.append(PastTurn(action, result.observation))
            return result

    def _leave(self) -> None:
        """Leave the loop, so that the next step replays on another; the old episode is closed when the loop is free."""
        thread, plain, self._thread, self._plain = self._thread, self._plain, None, None
        if thread is not None and plain is not None and not thread.abandoned:
            thread.submit(f"close of {self._name}", plain.close, closes=True).leave_alone()

    async def close(self) -> None:
        """Never raises: no chain's result depends on it.  A caller that is being cancelled does not wait."""
        thread, plain = self._thread, self._plain
        if thread is None or plain is None or thread.abandoned:
            return
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            self._leave()
            return
        self._plain = None
        await self._caller.close(thread, f"close of {self._name}", plain)


async def _begun(episode: Episode, environment: Environment, observation: np.ndarray = NOTHING) -> _Begun:
    """Reads the prompt, which is code as well."""
    try:
        return _Begun(episode, episode.prompt, environment, observation)
    except BaseException:
        await episode.close()
        raise


async def _forked(kept: Kept) -> _Begun | None:
    assert isinstance(kept.state, CheckedEpisode)
    copy = await kept.state.fork()
    return None if copy is None else await _begun(copy, kept.environment)


async def _discard(late: _Begun | None) -> None:
    if late is not None:
        await late.episode.close()
