"""How the chains of one tree come by their episodes: a fresh start, a state that was kept, or a replay."""

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


class _KeptTurn(NamedTuple):
    state: Kept
    observation: np.ndarray
    """int32[O]: what followed the turn."""


class Forks:
    """Of one tree.

    Args:
        calls: of the tree, into the environment.
        rounds: of branches; 0 where none is ever taken.
    """

    def __init__(self, calls: BranchCalls, *, rounds: int) -> None:
        self._calls = calls
        self._rounds = rounds
        self._kept: dict[int, _KeptTurn] = {}

    async def keep(self, episode: Episode, turn: Turn, observation: np.ndarray) -> None:
        """Keep the state after ``turn``, which ``observation`` follows, where a later round may branch there."""
        if turn.expansion_round < self._rounds and isinstance(episode, HostedEpisode):
            state = await self._calls.keep(episode)
            if state is not None:
                self._kept[turn.turn_id] = _KeptTurn(state, observation)

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
        kept = self._kept.get(path[-1].turn_id)
        if kept is not None and (episode := await self._calls.fork(kept.state)) is not None:
            return episode, kept.observation
        after = [*(turn.observation for turn in path[1:]), following]
        turns = tuple(PastTurn(turn.action, shown) for turn, shown in zip(path, after, strict=True))
        return await self._calls.replay(Past(turns, prompt))

    def release(self) -> None:
        """Give back what is kept."""
        for kept in self._kept.values():
            self._calls.release(kept.state)
        self._kept.clear()
