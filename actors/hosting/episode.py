"""An episode that runs on its environment's loop, and is replayed on another loop where that one is lost."""

from __future__ import annotations

import asyncio
import functools
from typing import NamedTuple, Self

import numpy as np

from actors.hosting.caller import Caller
from actors.hosting.calls import LoopLost
from actors.hosting.loop_thread import LoopThread
from atpo_async.core.texts import counted
from atpo_async.environments.base import Environment, Episode, Split, StepResult
from atpo_async.environments.replay import NOTHING, Past, PastTurn, replayed


class _Begun(NamedTuple):
    episode: Episode
    prompt: np.ndarray
    observation: np.ndarray = NOTHING


class HostedEpisode:
    """One task in progress.  It has the interface of ``Episode``, for the actor's loop."""

    def __init__(self, caller: Caller, split: Split, task_index: int) -> None:
        self._caller = caller
        self._split: Split = split
        self._task = task_index
        self._turns: list[PastTurn] = []
        self._plain: Episode | None = None
        self._thread: LoopThread | None = None
        self.prompt = NOTHING
        """int32[P]."""
        self.observation = NOTHING
        """int32[O]: what followed the last turn of a replay."""

    async def begin(self, past: Past) -> Self:
        """Start, or replay, on the loop in use.  Raises ForkDiverged where the replay shows something else."""
        self._turns = list(past.turns)
        split, task, name = self._split, self._task, self._caller.name

        async def work(environment: Environment) -> _Begun:
            if past.turns:
                episode, observation = await replayed(environment, split, task, past, name=name)
            else:
                episode, observation = await environment.start(split, task), NOTHING
            try:
                return _Begun(episode, episode.prompt, observation)
            except BaseException:
                await episode.close()
                raise

        async def discard(late: _Begun) -> None:
            await late.episode.close()

        num_steps = len(past.turns)
        what = f"replay of {counted(num_steps, 'step')}" if num_steps else "start"
        self._thread, begun = await self._caller.call(
            f"{what} of task {task} ({split})",
            work,
            limit_s=(num_steps + 1) * self._caller.step_timeout_s,
            discard=discard,
        )
        self._plain, self.prompt, self.observation = begun
        return self

    async def step(self, action: np.ndarray) -> StepResult:
        """Raises what ``begin`` raises.  After the loss of its loop the episode is replayed first, and checked."""
        while True:
            if self._thread is None or self._thread.abandoned:
                await self.begin(Past(tuple(self._turns), self.prompt))
            assert self._thread is not None
            assert self._plain is not None
            work = functools.partial(self._plain.step, action)
            what = f"step {len(self._turns) + 1} of task {self._task} ({self._split})"
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
            thread.submit(f"close of task {self._task} ({self._split})", plain.close, closes=True).leave_alone()

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
        what = f"close of task {self._task} ({self._split})"
        try:
            await self._caller.answer(thread, what, plain.close, limit_s=self._caller.step_timeout_s, closes=True)
        except LoopLost:
            pass
        except Exception as exc:
            self._caller.reporting.failed_close(what, exc)
