"""The Environment protocol.  Tokens in, tokens out: an action is never decoded and encoded again for the policy.

Where an environment's code runs (``actors/hosting``):

- All of it, from the factory on, runs on one event loop in one thread, which is not the actor's: what is bound to a
  loop or a thread (an aiohttp session, a connection to SQLite) may be made in the factory and used ever after.
- All chains share that loop.  What blocks (``requests``, ``time.sleep``, much computing) holds the others up, though it
  takes nothing from their time limits: put it into ``await asyncio.to_thread(…)``, which has threads enough.
- ``start``, ``step`` and ``close`` may take ``search.step_timeout_s`` each, a replay of n actions n + 1 times as long.
  Past that the call is cancelled and its branch is left out; a call that blocks is interrupted, and where it does not
  return, its thread is abandoned and the factory is called again, on a new loop.  Threads that never return add up, and
  too many end the run: give every request a time limit of its own.
- Whatever a call raises, exit() and a cancellation included, ends its branch alone.  Signal handlers can be set in a
  process's main thread only: time limits by ``signal.alarm`` do not work in tools.  ``os._exit`` and a crash of the
  interpreter end the actor; it is started again, and its log names the step that the environment was in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from atpo_async.core.vocabulary import EpisodeEnd, Split

__all__ = ["Environment", "Episode", "NotJudged", "ReplayFork", "Split", "StepResult"]


class NotJudged(Exception):
    """Raised by ``step``: the chain ended and has no reward.  It is left out, and counted as ``not_judged``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What the environment returned for one action.  Checked, and converted where nothing is lost (``values.py``)."""

    observation: np.ndarray
    """int32[O], token ids of the policy's tokenizer; empty when done."""
    done: bool
    reward: float | None
    """Set when done: finite.  A chain that cannot be judged raises instead: it is left out, and counted."""
    success: bool | None
    """None where the environment cannot decide it; it is not guessed from the reward."""
    end: EpisodeEnd
    """``continue`` exactly while not done."""
    turn_reward: float = 0.0
    """Of this turn alone, on any turn, the last one too: finite (docs/ALGORITHM.md, section 2)."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Name -> value of the parts that ``reward`` was made of, when done: metrics ``reward/<name>``."""


class Episode(Protocol):
    """One task under way.  ``step`` may call tools; the caller sets the time limit."""

    @property
    def prompt(self) -> np.ndarray:
        """int32[P]: what the policy sees first."""

    async def step(self, action: np.ndarray) -> StepResult:
        """Takes an action, int32[T].  Every action gets a result, a malformed one included; an exception means that the
        tool itself failed, and ends this branch."""

    async def close(self) -> None:
        """Called once, however the episode ended.  An exception is counted and has no other effect."""


class Environment(Protocol):
    """Tasks by index.  Deterministic: the same split, index and actions give the same prompt and observations; a chain
    that was shown others is left out, and counted (``replay_diverged``).

    An attribute that may be left out: ``stop_strings: tuple[str, ...]``, texts that end an action where no single token
    does, such as ``</search>``.  The action is what was sampled: its last token may reach beyond such a text.
    """

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an action."""

    def num_tasks(self, split: Split) -> int | None:
        """How many tasks the split has, at least 1; None when there is no end.  Training repeats a finite split."""

    async def start(self, split: Split, task_index: int) -> Episode: ...

    async def replay(self, split: Split, task_index: int, actions: tuple[np.ndarray, ...]) -> Episode:
        """A fresh episode in the state that ``actions`` led to: how a branch forks, by default in every environment."""


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
