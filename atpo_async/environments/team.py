"""The protocol of tasks that a team solves: proposers write cues, a synthesizer answers from the task and the cues.

Source: Rhombus (Findings of ACL 2026, 1956).  ``[team]`` says how many there are; what each of them is shown, what of a
proposer's chain is its cue, and what either is worth, is the environment's.  A member's chain is an ordinary one: it
may have several turns and call tools.
"""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from atpo_async.core.vocabulary import Role
from atpo_async.environments.base import Environment, Episode, ReplayFork, Split

NEEDED = {"cue": ("split", "task_index", "actions"), "start_synthesizer": ("split", "task_index", "cues")}
"""Methods that an environment needs for teams, and what they are called with."""
OPTIONAL = {"start_proposer": ("split", "task_index", "seat")}


class TeamEnvironment(Environment, Protocol):
    """An environment whose tasks a team can solve.  ``start`` begins a proposer's episode; the reward at its end is the
    proposer's own: of its own answer, where it commits to one.

    May also have ``async start_proposer(split, task_index, seat) -> Episode``, in place of ``start``, where proposers
    are not all shown the same: ``seat`` is 0 to N - 1, and every team has one proposer of each seat.
    """

    def cue(self, split: Split, task_index: int, actions: tuple[np.ndarray, ...]) -> Any:
        """Token ids of what the synthesizer is shown of a proposer's chain, or None where it gave no cue.

        A plain function or a coroutine, and a pure function of its arguments: int32[T] for each action of the chain,
        stop tokens included.  Thinking is left out here; what is longer than ``team.cue_tokens`` is cut afterwards.
        """

    async def start_synthesizer(self, split: Split, task_index: int, cues: tuple[np.ndarray, ...]) -> Episode:
        """The episode of a synthesizer: its prompt is made of the task and of ``cues``, int32[C] by seat, empty where a
        proposer gave none.  The reward at its end is the team's, its success the task's."""


@dataclass(frozen=True, slots=True)
class Member:
    """A place in a team."""

    role: Role
    seat: int = 0
    """Of a proposer: 0 to N - 1."""
    cues: tuple[np.ndarray, ...] = field(default=())
    """Of a synthesizer."""

    @property
    def starts(self) -> str:
        """What begins its episode, for messages."""
        return "start_synthesizer" if self.role == "synthesizer" else "start_proposer"


def begin(environment: Any, split: Split, task_index: int, member: Member) -> Awaitable[Episode]:
    """The episode of a member, of an environment that is checked or plain."""
    own = getattr(environment, "start_member", None)
    found: Awaitable[Episode]
    if own is not None:
        found = own(split, task_index, member)
    elif member.role == "synthesizer":
        found = environment.start_synthesizer(split, task_index, member.cues)
    elif getattr(environment, "start_proposer", None) is not None:
        found = environment.start_proposer(split, task_index, member.seat)
    else:
        found = environment.start(split, task_index)
    return found


class AsMember(ReplayFork):
    """An environment as one member of a team has it: ``start`` begins that member's episode, also for a replay."""

    def __init__(self, environment: Environment, member: Member) -> None:
        self._environment, self._member = environment, member
        self.stop_token_ids = environment.stop_token_ids
        decode = getattr(getattr(environment, "plain", environment), "decode", None)
        if decode is not None:
            self.decode = decode

    def num_tasks(self, split: Split) -> int | None:
        return self._environment.num_tasks(split)

    async def start(self, split: Split, task_index: int) -> Episode:
        return await begin(self._environment, split, task_index, self._member)
