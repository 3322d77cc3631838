"""How the chains of one tree come by their episodes: a fresh start, one that waits, a kept state, or a replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from actors.hosting.episode import HostedEpisode
from actors.hosting.kept import Kept
from actors.search.calls import BranchCalls
from atpo_async.core.tree import Turn
from atpo_async.environments.base import Episode
from atpo_async.environments.replay import NOTHING, Past, PastTurn


class _Waiting(NamedTuple):
    episode: Episode
    observation: np.ndarray
    """int32[O]: what followed the turn."""


class Forks:
    """Of one tree.

    Args:
        calls: of the tree, into the environment.
    """

    def __init__(self, calls: BranchCalls) -> None:
        self._calls = calls
        self._kept: dict[int, Kept] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._followed: dict[int, np.ndarray] = {}
        """Turn -> int32[O], what followed it."""

    async def keep(self, episode: Episode, turn: Turn, observation: np.ndarray) -> None:
        """Keep the state after ``turn``, which ``observation`` follows, for branches that may begin there later."""
        self._followed[turn.turn_id] = observation
        if isinstance(episode, HostedEpisode):
            state = await self._calls.keep(episode)
            if state is not None:
                self._kept[turn.turn_id] = state

    def wait(self, episode: Episode, turn: Turn, observation: np.ndarray) -> None:
        """The episode of a chain that stopped after ``turn``: it serves the next chain that begins there."""
        self._waiting[turn.turn_id] = _Waiting(episode, observation)

    async def episode_at(
        self, prompt: np.ndarray, path: Sequence[Turn], following: np.ndarray | None
    ) -> tuple[Episode, np.ndarray]:
        """An episode at the end of ``path``, and the observation that follows it.

        Args:
            prompt: int32[P], of the tree.
            path: turns from the prompt on; none for the prompt itself.
            following: int32[O], the recorded observation; None where the path's last turn has no child yet.
        """
        if not path:
            return await self._calls.start(), NOTHING
        last = path[-1].turn_id
        if (waiting := self._waiting.pop(last, None)) is not None:
            return waiting.episode, waiting.observation
        known = self._followed.get(last, following)
        kept = self._kept.get(last)
        if kept is not None and known is not None and (episode := await self._calls.fork(kept)) is not None:
            return episode, known
        after = [*(turn.observation for turn in path[1:]), known]
        turns = tuple(PastTurn(turn.action, shown) for turn, shown in zip(path, after, strict=True))
        return await self._calls.replay(Past(turns, prompt))

    async def close_waiting(self, but: set[int]) -> None:
        """Close the episodes that wait after other turns than these."""
        for turn_id in self._waiting.keys() - but:
            await self._waiting.pop(turn_id).episode.close()

    async def release(self) -> None:
        """Give back what is kept."""
        for kept in self._kept.values():
            self._calls.release(kept)
        self._kept.clear()
        await self.close_waiting(set())
