"""Hosts an environment so that its code cannot harm the actor nor, for long, the environment's other calls.

All calls of one environment run on one event loop in a thread of its own, with threads of its own for
``asyncio.to_thread``; the actor awaits their answers under ``search.step_timeout_s``.  What a call raises, exit() and a
leaked cancellation included, is that call's answer.  A call past its limit is cancelled, or interrupted where it holds
the loop, and its branch fails; where it does not return, its loop is abandoned, the environment is made anew on
another one, and the other episodes are replayed there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from actors.hosting import guard
from actors.hosting.caller import Caller
from actors.hosting.episode import HostedEpisode
from actors.hosting.kept import MOST_KEPT, Keeper, Kept
from actors.hosting.loops import MAX_LOST_LOOPS, Loops
from actors.hosting.reporting import Reporting
from atpo_async.core.errors import EnvironmentBroken
from atpo_async.environments.base import Environment, Split
from atpo_async.environments.checked import CheckedEnvironment
from atpo_async.environments.reference import Reference
from atpo_async.environments.replay import Past, PastTurn
from atpo_async.environments.team import Member
from atpo_async.status import waits
from atpo_async.status.facts import publish_facts
from atpo_async.status.wording import duration

GRACE_S = 1.0
"""How long a call past its limit has to end after it was cancelled, before its loop counts as lost."""

HELD_UP_S = 0.25
"""A loop that one call holds for longer is held up."""

CLOSE_S = 2.0
"""How long episodes have to be closed when the actor ends."""


class HostedEnvironment:
    """The environment with the interface of ``Environment``, for the actor's loop.

    Args:
        make: makes the environment; called on the loop that will run it, again for every loop that was lost.
        name: for errors: ``environment.name``, or of several the label.
        step_timeout_s: of ``start``, ``step`` and ``close``; a replay of n actions may take n + 1 times as long.
        doing: a file that names the call in progress, for the supervisor if the process dies.
        facts: the name that its state has in the actor's status.
        grace_s: as ``GRACE_S``.
        held_up_s: as ``HELD_UP_S``.
        max_lost_loops: as ``MAX_LOST_LOOPS``.
        most_kept: as ``MOST_KEPT``.
    """

    def __init__(
        self,
        make: Callable[[], Environment],
        *,
        name: str,
        step_timeout_s: float,
        doing: Path | None = None,
        facts: str = "environment",
        grace_s: float = GRACE_S,
        held_up_s: float = HELD_UP_S,
        max_lost_loops: int = MAX_LOST_LOOPS,
        most_kept: int = MOST_KEPT,
    ) -> None:
        self.name, self._published = name, facts
        self._held_up_s = held_up_s
        self.reporting = Reporting(name, doing)
        self.loops = Loops(name=name, grace_s=grace_s, held_up_s=held_up_s, max_lost=max_lost_loops)
        self.caller = Caller(
            make, name=name, step_timeout_s=step_timeout_s, grace_s=grace_s, held_up_s=held_up_s,
            loops=self.loops, reporting=self.reporting,
        )  # fmt: skip
        self.keeper = Keeper(self.caller, most=most_kept)
        self._taken: dict[str, int] = {}

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """As they were when the environment was made."""
        return self.caller.stop_token_ids

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """As ``stop_token_ids``; empty where the environment has none."""
        return self.caller.stop_strings

    async def open(self) -> Self:
        """Make the environment.  Raises what ``make`` raises: ConfigError, SetupError."""
        being_made = waits.waiting(f"environment {self.name!r}", "its being made", on=waits.ENVIRONMENT)
        with being_made, guard.put_back():
            await self.caller.current()
        publish_facts(self._published, self._facts)
        return self

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Let episodes that are being closed come to their end, for ``CLOSE_S`` at most."""
        self.caller.cancel()
        if closing := [call.ended for thread, _ in self.loops.made for call in thread.open_calls if call.closes]:
            await asyncio.wait(closing, timeout=CLOSE_S)
        self.loops.stop()
        self.reporting.close()
        self.loops.broken = EnvironmentBroken(f"environment {self.name!r} is closed")

    def num_tasks(self, split: Split) -> int | None:
        """As it was when the environment was made.  Raises what the environment raises."""
        found = self.caller.num_tasks[split]
        if isinstance(found, Exception):
            raise found
        return found

    async def reference(self, split: Split, task_index: int) -> Reference | None:
        """The task's right answer; None where the environment knows none.  Raises as ``start``."""

        async def work(environment: Environment) -> Reference | None:
            assert isinstance(environment, CheckedEnvironment)
            return await environment.reference(split, task_index)

        what = f"reference of task {task_index} ({split})"
        _, found = await self.caller.call(what, work, limit_s=self.caller.step_timeout_s)
        return found

    async def start(self, split: Split, task_index: int) -> HostedEpisode:
        """Raises EnvironmentTimeout; EnvironmentBroken; whatever the environment raises, as an ``Exception``."""
        return await HostedEpisode(self.caller, self.keeper, split, task_index).begin(Past())

    async def replay(self, split: Split, task_index: int, actions: tuple[np.ndarray, ...]) -> HostedEpisode:
        """As ``replayed``, where no observation is known."""
        return await self.replayed(split, task_index, Past(tuple(PastTurn(action, None) for action in actions)))

    async def replayed(self, split: Split, task_index: int, past: Past) -> HostedEpisode:
        """As ``start``; start and each action may take ``step_timeout_s``.  Raises ForkDiverged as well, where the
        episode is shown something else than recorded."""
        episode = await HostedEpisode(self.caller, self.keeper, split, task_index).begin(past)
        self.keeper.forks["replay"] += 1
        return episode

    async def member(self, split: Split, task_index: int, member: Member, past: Past) -> HostedEpisode:
        """As ``start``, or ``replayed`` where ``past`` has a turn, of a member of a team."""
        return await HostedEpisode(self.caller, self.keeper, split, task_index, member).begin(past)

    async def cue(self, split: Split, task_index: int, actions: tuple[np.ndarray, ...]) -> np.ndarray | None:
        """int32[C], the cue of a proposer's chain; None where it gave none.  Raises as ``start``."""

        async def work(environment: Environment) -> np.ndarray | None:
            assert isinstance(environment, CheckedEnvironment)
            return await environment.cue(split, task_index, actions)

        _, found = await self.caller.call(
            f"cue of task {task_index} ({split})", work, limit_s=self.caller.step_timeout_s
        )  # fmt: skip
        return found

    async def forked(self, split: Split, task_index: int, kept: Kept) -> HostedEpisode | None:
        """An episode in a state that was kept; None where it is lost or failed, and a replay has to take its place.

        Raises EnvironmentTimeout; EnvironmentBroken; ValueRefused for what is neither an episode nor a state.
        """
        episode = await HostedEpisode(self.caller, self.keeper, split, task_index).begin_at(kept)
        if episode is not None:
            self.keeper.forks[kept.way] += 1
        return episode

    def take_counts(self) -> dict[str, float]:
        """Metrics: what has happened since they were last taken, and what the environment itself has counted."""
        now = {
            "environment/calls_given_up": self.caller.given_up,
            "environment/threads_lost": self.loops.num_lost,
            "environment/closes_failed": self.reporting.failed_closes,
            "environment/replayed_steps": self.keeper.replayed_steps,
            "environment/snapshots_failed": self.keeper.failed,
            **{f"environment/forks/{way}": count for way, count in self.keeper.forks.items()},
        }
        since = {name: float(count - self._taken.get(name, 0)) for name, count in now.items()}
        self._taken = now
        return self.caller.collected.take() | {name: count for name, count in since.items() if count}

    def _facts(self) -> dict[str, object]:
        """For the actor's status."""
        facts: dict[str, object] = {"given_up": self.caller.given_up, "lost_loops": self.loops.num_lost}
        facts["kept"] = self.keeper.num_kept
        facts["calls"] = sum(len(thread.open_calls) for thread, _ in self.loops.made)
        facts["busy_threads"] = sum(thread.pool.busy_over(0.0) for thread, _ in self.loops.made)
        for thread, _ in self.loops.made:
            if (held := thread.holder()) is not None and held[1] > self._held_up_s:
                facts["held_up_by"] = f"{held[0].what} for {duration(held[1])}, in {thread.stack()}"
        return facts
