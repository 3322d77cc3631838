"""The Environment protocol.  Tokens in, tokens out: an action is never decoded and encoded again for the policy.

Where an environment's code runs (``actors/hosting``):

- All of it, from the factory on, runs on one event loop in one thread, which is not the actor's: what is bound to a
  loop or a thread (an aiohttp session, a connection to SQLite) may be made in the factory and used ever after.
- All chains share that loop.  What blocks (``requests``, ``time.sleep``, much computing) holds the others up, though it
  takes nothing from their time limits: put it into ``await asyncio.to_thread(…)``, which has threads enough.
- ``start``, ``step`` and ``close`` may take ``search.step_timeout_s`` each, a replay of n actions n + 1 times as long,
  ``snapshot`` and ``fork`` once, a ``restore`` with the ``start`` before it twice.
  Past that the call is cancelled and its branch is left out; a call that blocks is interrupted, and where it does not
  return, its thread is abandoned and the factory is called again, on a new loop.  Threads that never return add up, and
  too many end the run: give every request a time limit of its own.
- Whatever a call raises, exit() and a cancellation included, ends its branch alone.  Signal handlers can be set in a
  process's main thread only: time limits by ``signal.alarm`` do not work in tools.  ``os._exit`` and a crash of the
  interpreter end the actor; it is started again, and its log names the step that the environment was in.

How a branch comes to the turn that it forks at:

- By default by replay (``ReplayFork``): a fresh episode is stepped through the recorded actions, and each observation
  must be the recorded one, else the branch is left out and counted as ``fork_diverged``.  An episode that has
  ``replay_step`` (``ReplaysSteps``) is handed the recorded observations and need not run its tools again.
- An environment whose own ``replay`` does the stepping is held to its last observation.  One with ``replay = None`` is
  never replayed.
- Episodes that have ``snapshot`` and ``restore`` (``Snapshots``), or ``fork`` (``Forks``, which is preferred), are kept
  at each inner turn that may be branched at, until their tree ends.  A branch is replayed all the same where nothing is
  kept: in a tree that another actor began, after the environment's loop was lost, beyond the limit on how many are
  kept (``actors/hosting/kept.py``), and where a snapshot failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from atpo_async.core.vocabulary import EpisodeEnd, Split

__all__ = [
    "Environment",
    "Episode",
    "ForkDiverged",
    "Forks",
    "NotJudged",
    "ReplayFork",
    "ReplaysSteps",
    "Snapshots",
    "Split",
    "StepResult",
]


class NotJudged(Exception):
    """Raised by ``step``: the chain ended and has no reward.  It is left out, and counted as ``not_judged``."""


class ForkDiverged(Exception):
    """A replayed episode shows something else than its tree has.  The branch is left out, and counted as
    ``fork_diverged``; an episode may raise it as well, where it notices first.

    Attributes:
        field: what differs, ``prompt`` or ``observation``.
    """

    def __init__(self, text: str, *, field: Literal["prompt", "observation"] = "observation") -> None:
        super().__init__(text)
        self.field: Literal["prompt", "observation"] = field


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
    fingerprint: tuple[int, ...] = ()
    """Ids of what this action brought to light, such as the passages that it retrieved: whole numbers from 0 on, at
    most ``core.bounds.MAX_FINGERPRINT``; of texts by ``environments.fingerprints.fingerprint_of``.  By them a search
    knows branches that found the same (``search.strategy = "diverse"``, ``search.prune_duplicates``)."""
    state_value: float | None = None
    """What the state after this action is worth, a finite number; None where the environment does not say.  It guides
    the search alone (``search.strategy = "resample"``): a chain's reward is ``reward``."""
    longest_answer: int | None = None
    """Tokens of the longest of the several answers that ``observation`` holds, to an action that asked for several at
    once; None where it is one.  One answer that fills the context is the tool's fault, many that do so together are the
    policy's."""


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


class ReplaysSteps(Episode, Protocol):
    """Optional: an episode whose replay needs the recorded observations."""

    async def replay_step(self, action: np.ndarray, observation: np.ndarray) -> StepResult:
        """As ``step``, for an action int32[T] that was followed by ``observation`` int32[O] when it was first taken.

        The ids are all there is: the turn may have been taken in another process.  A tool without side effects need
        not run again: its answer can be read from ``observation``.  What is returned is compared with it all the same.
        Called in place of ``step`` for every turn of a replay but one: ``step`` is called for the last turn of a tree
        that was taken over, whose observation its first actor did not send.
        """


class Snapshots(Episode, Protocol):
    """Optional: an episode whose state can be taken and put back.  Both may be plain functions or coroutines."""

    def snapshot(self) -> Any:
        """The state after the latest step, any object but None; None where it cannot be had here: the branch is
        replayed.  Later steps must not change it."""

    def restore(self, snapshot: Any) -> Any:
        """Bring this episode, fresh from ``start`` of the same task, into that state.  Called with the same snapshot
        once for each branch, so that what a step will change must be copied.  Returns nothing."""


class Forks(Episode, Protocol):
    """Optional: an episode that copies itself."""

    def fork(self) -> Any:
        """Another episode in the same state, which shares nothing with this one that a step changes; None where there
        can be none.  A plain function or a coroutine.  A copy is stepped, or kept to be forked again, several times
        at once maybe; either way it is closed."""


class Environment(Protocol):
    """Tasks by index.  Deterministic: the same split, index and actions give the same prompt and observations; a chain
    that was shown others is left out, and counted (``fork_diverged``).

    Attributes that may be left out: ``stop_strings: tuple[str, ...]``, texts that end an action where no single token
    does, such as ``</search>``; the action is what was sampled: its last token may reach beyond such a text.
    ``decode(ids) -> str``, by which messages show an observation as text.  ``take_counts() -> {name: number}``, what it
    has counted since it was last asked, such as ``{"tool/lookup/calls": 3}``: read when an episode was closed, and
    added up in the actor's metrics.  ``reference(split, task_index) -> (answer ids, prefix ids)`` or None, plain or
    async: the task's right answer, behind the tokens that open it (``reference.py``); asked once a training tree where
    ``search.turn_reward`` is ``information-gain``.
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
