"""The Environment protocol.  Tokens in, tokens out: an action is never decoded and encoded again for the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

Split = Literal["train", "eval"]
"""``eval`` holds the held-out tasks; the two never share a task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What the environment said to one action.  Checked, and converted where nothing is lost (``values.py``)."""

    observation: np.ndarray
    """int32[O], token ids of the policy's tokenizer; empty when done."""
    done: bool
    reward: float | None
    """Set when done: finite.  A chain that cannot be judged raises instead: it is left out, and counted."""
    success: bool | None
    """None where nobody can say; it is not guessed from the reward."""
    end: Literal["continue", "done", "turn_limit"]
    """``continue`` exactly while not done."""


class Episode(Protocol):
    """One task under way.  ``step`` may call tools; the caller sets the time limit."""

    @property
    def prompt(self) -> np.ndarray:
        """int32[P]: what the policy sees first."""

    async def step(self, action: np.ndarray) -> StepResult:
        """int32[T] in.  Whatever the action says, a malformed one included, gets an answer; an exception means the
        tool itself failed and ends this branch."""

    async def close(self) -> None: ...


class Environment(Protocol):
    """Tasks by index.  Deterministic: the same split, index and actions give the same observations."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an action."""

    def num_tasks(self, split: Split) -> int | None:
        """How many tasks the split has, at least 1; None when there is no end.  Training repeats a finite split."""

    async def start(self, split: Split, task_index: int) -> Episode: ...

    async def replay(self, split: Split, task_index: int, actions: tuple[np.ndarray, ...]) -> Episode:
        """A fresh episode brought to where ``actions`` led: how a branch forks (the default of every environment)."""


class ReplayFork:
    """Mixin: fork by starting again and replaying the actions (right for every deterministic environment)."""

    async def start(self, split: Split, task_index: int) -> Episode:
        raise NotImplementedError

    async def replay(self, split: Split, task_index: int, actions: tuple[np.ndarray, ...]) -> Episode:
        episode = await self.start(split, task_index)
        try:
            for action in actions:
                await episode.step(action)
        except BaseException:
            await episode.close()
            raise
        return episode
