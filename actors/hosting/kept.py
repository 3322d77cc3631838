"""States of episodes that branches may begin at: how many are kept, and how each is made, used and given back."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass

from actors.hosting.caller import Caller
from actors.hosting.calls import LoopLost
from actors.hosting.loop_thread import LoopThread
from atpo_async.core.errors import EnvironmentBroken
from atpo_async.core.texts import counted
from atpo_async.environments.base import Environment
from atpo_async.environments.checked import CheckedEpisode, Way
from atpo_async.environments.replay import Past
from atpo_async.environments.values import ValueRefused

log = logging.getLogger("atpo.actor.environment")

MOST_KEPT = 512
"""Snapshots and copies of one actor at the same time, over all its trees; beyond it branches are replayed."""

MOST_FAILED = 8
"""Snapshots in a row that may fail before no more are made: one that hangs costs its chain a time limit."""


@dataclass(slots=True)
class Kept:
    """The state of an episode after a step."""

    task: str
    """For messages."""
    thread: LoopThread
    environment: Environment
    """Made on ``thread``; it restores the snapshot."""
    past: Past
    """Of the episode."""
    way: Way = "snapshot"
    state: object = None
    """The snapshot, or the copy of the episode (CheckedEpisode)."""
    refused: ValueRefused | None = None
    """Why the state is none that can be used: raised to the branch that would begin at it."""


class Keeper:
    """Keeps the states of one environment's episodes.

    Args:
        caller: of the environment.
        most: as ``MOST_KEPT``.
    """

    def __init__(self, caller: Caller, *, most: int = MOST_KEPT) -> None:
        self._caller = caller
        self._most = most
        self.num_kept = 0
        """That are kept now, or being made."""
        self.failed = 0
        """Calls of snapshot, restore and fork that raised or took too long."""
        self.forks: Counter[str] = Counter()
        """Branches by the way in which they came to their turn: ``replay``, ``snapshot``, ``fork``."""
        self.replayed_steps = 0
        """Of replays that came to their end."""
        self._failed_in_a_row = 0
        self._full_logged = False

    async def fill(self, kept: Kept, plain: CheckedEpisode) -> bool:
        """Takes the state of ``plain``; whether it is kept, until ``release``.  Raises EnvironmentBroken."""
        if self._failed_in_a_row >= MOST_FAILED or not self._has_space():
            return False
        self.num_kept += 1
        try:
            filled = await self._fill(kept, plain)
        except BaseException:
            self.num_kept -= 1
            raise
        self.num_kept -= not filled
        return filled

    async def _fill(self, kept: Kept, plain: CheckedEpisode) -> bool:
        what = f"{plain.ways[0]} of {kept.task} after {counted(len(kept.past.turns), 'step')}"
        try:
            taken = await self._caller.answer(
                kept.thread, what, plain.state, limit_s=self._caller.step_timeout_s, discard=_close_copy
            )
        except EnvironmentBroken:
            raise
        except LoopLost:
            return False
        except ValueRefused as exc:
            kept.refused = exc
            return True
        except Exception as exc:
            self.count_failed(what, exc)
            return False
        self._failed_in_a_row = 0
        if taken is None:
            return False
        kept.way, kept.state = taken
        return True

    def count_failed(self, what: str, error: Exception) -> None:
        """A snapshot, a restore or a fork failed: a replay takes its place."""
        self.failed += 1
        self._failed_in_a_row += 1
        given_up = self._failed_in_a_row == MOST_FAILED
        self._caller.reporting.failed_snapshot(what, error, count=self.failed, given_up=given_up)

    def release(self, kept: Kept) -> None:
        """Give a state back.  A copy is closed, which is not waited for."""
        self.num_kept -= 1
        if isinstance(kept.state, CheckedEpisode):
            self._caller.close_later(kept.thread, f"close of a copy of {kept.task}", kept.state)
        kept.state = None

    def _has_space(self) -> bool:
        if self.num_kept < self._most:
            return True
        if not self._full_logged:
            self._full_logged = True
            log.warning(
                "environment %r: %d snapshots and copies of episodes are kept, and no more at the same time; "
                "other branches are replayed",
                self._caller.name,
                self.num_kept,
            )
        return False


async def _close_copy(late: tuple[Way, object] | None) -> None:
    if late is not None and isinstance(late[1], CheckedEpisode):
        await late[1].close()
