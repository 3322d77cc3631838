"""An episode that runs on its environment's loop, and is replayed on another loop where that one is lost."""

from __future__ import annotations

import asyncio
import functools
from typing import NamedTuple, Self

import numpy as np

from actors.hosting.caller import Caller
from actors.hosting.calls import LoopLost
from actors.hosting.loop_thread import LoopThread
from atpo_async.environments.base import Environment, Episode, Split, StepResult


class _Begun(NamedTuple):
    episode: Episode
    prompt: np.ndarray


class HostedEpisode:
    """One task in progress.  It has the interface of ``Episode``, for the actor's loop."""

    def __init__(self, caller: Caller, split: Split, task_index: int) -> None:
        self._caller = caller
        self._split: Split = split
        self._task = task_index
        self._actions: list[np.ndarray] = []
        self._plain: Episode | None = None
        self._thread: LoopThread | None = None
        self.prompt = np.zeros(0, dtype=np.int32)

    async def begin(self, actions: tuple[np.ndarray, ...]) -> Self:
        """Start, or replay, on the loop in use."""
        self._actions = list(actions)
        split, task = self._split, self._task

        async def work(environment: Environment) -> _Begun:
            if actions:
                episode = await environment.replay(split, task, actions)
            else:
                episode = await environment.start(split, task)
            try:
                return _Begun(episode, episode.prompt)
            except BaseException:
                await episode.close()
                raise

        async def discard(late: _Begun) -> None:
            await late.episode.close()

        what = f"replay of {len(actions)} steps" if actions else "start"
        self._thread, begun = await self._caller.call(
            f"{what} of task {task} ({split})",
            work,
            limit_s=(len(actions) + 1) * self._caller.step_timeout_s,
            discard=discard,
        )
        self._plain, self.prompt = begun.episode, begun.prompt
        return self

    async def step(self, action: np.ndarray) -> StepResult:
        """Raises what ``begin`` raises.  After the loss of its loop the episode is replayed first."""
        while True:
            if self._thread is None or self._thread.abandoned:
                await self.begin(tuple(self._actions))
            assert self._thread is not None
            assert self._plain is not None
            work = functools.partial(self._plain.step, action)
            what = f"step {len(self._actions) + 1} of task {self._task} ({self._split})"
            try:
                result = await self._caller.answer(self._thread, what, work, limit_s=self._caller.step_timeout_s)
            except LoopLost:
                self._leave()
                continue
            self._actions.append(action)
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
