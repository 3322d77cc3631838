"""A scripted team: its task, its engine, and trees of groups as a learner is served them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from atpo_async.core.tree import LeafReward, Turn, spans_of
from atpo_async.core.vocabulary import Role, Split
from atpo_async.environments.base import ReplayFork, StepResult
from atpo_async.wire.messages import BatchTree
from atpo_async.wire.records import TurnRecords
from tests.actor_support import NOTHING, STOP, ints

VOCAB = 31
"""Of the small policies of ``tests.learner_support``."""

PROPOSE, SYNTHESIZE, THINK = 10, 11, 9


class ClueEpisode:
    """One member: a proposer looks once and then proposes, a synthesizer answers at once."""

    def __init__(self, prompt: np.ndarray, right: int, *, looks: bool) -> None:
        self.prompt, self._right, self._looks = prompt, right, looks

    async def step(self, action: np.ndarray) -> StepResult:
        if self._looks:
            self._looks = False
            return StepResult(observation=ints(5, 6), done=False, reward=None, success=None, end="continue")
        right = self._right in action.tolist()
        return StepResult(observation=NOTHING, done=True, reward=float(right), success=right, end="done")

    async def close(self) -> None: ...


class ClueTask(ReplayFork):
    """Task t: a proposer is right where its last action holds 20 + t, a synthesizer where its action does.

    A cue is the last action without stop token and without what is thought (tokens below 10).
    """

    stop_token_ids = (STOP,)

    def __init__(self, *, looks: bool = False, seats: bool = True) -> None:
        self.looks = looks
        self.read: list[tuple[tuple[int, ...], ...]] = []
        """The cues of every synthesizer that was begun."""
        if not seats:
            self.start_proposer = None  # type: ignore[assignment]

    def num_tasks(self, split: Split) -> int | None:
        return None

    async def start(self, split: Split, task_index: int) -> ClueEpisode:
        return ClueEpisode(ints(PROPOSE, 12 + task_index), 20 + task_index, looks=self.looks)

    async def start_proposer(self, split: Split, task_index: int, seat: int) -> ClueEpisode:
        return ClueEpisode(ints(PROPOSE, 12 + task_index, 14 + seat), 20 + task_index, looks=self.looks)

    def cue(self, split: Split, task_index: int, actions: tuple[np.ndarray, ...]) -> list[int] | None:
        return [token for token in actions[-1].tolist() if token >= 10] or None

    async def start_synthesizer(self, split: Split, task_index: int, cues: tuple[np.ndarray, ...]) -> ClueEpisode:
        self.read.append(tuple(tuple(cue.tolist()) for cue in cues))
        shown = [part for cue in cues for part in (*cue.tolist(), 8)]
        return ClueEpisode(ints(SYNTHESIZE, 12 + task_index, *shown), 20 + task_index, looks=False)


def group(
    tree_id: str, rng: np.random.Generator, *, proposers: int = 4, teams: int = 2, version: int = 0, late: bool = True
) -> BatchTree:
    """A group as the buffer serves it: proposers of two turns under one prompt, synthesizers under a prompt each."""

    def tokens(count: int) -> np.ndarray:
        return rng.integers(0, VOCAB, count).astype(np.int32)

    def turn(turn_id: int, parent: int, shown: np.ndarray, role: Role, number: int, reward: float | None) -> Turn:
        length = int(rng.integers(1, 6))
        return Turn(
            run="run", tree_id=tree_id, turn_id=turn_id, parent_id=parent, lease_epoch=0, expansion_round=number,
            observation=shown, action=tokens(length), logprobs=-rng.uniform(1.5, 5.0, length).astype(np.float32),
            spans=spans_of(np.sort(rng.integers(max(0, version - 2), version + 1, length))),
            end="continue" if reward is None else "done", reward=reward,
            success=None if reward is None else reward > 0, generate_s=0.0, environment_s=0.0, role=role,
        )  # fmt: skip

    prompt, turns = tokens(5), []
    for number in range(proposers):
        turns.append(turn(2 * number + 1, 0, prompt, "proposer", number, None))
        turns.append(turn(2 * number + 2, 2 * number + 1, tokens(2), "proposer", number, float(number % 2)))
    for number in range(proposers, proposers + teams):
        turns.append(turn(proposers + number + 1, 0, tokens(7), "synthesizer", number, float(number % 2)))
    rewards = tuple(LeafReward(2 * number + 2, number / proposers) for number in range(proposers)) if late else ()
    tree = BatchTree(
        tree_id=tree_id, task_index=0, prompt=NOTHING, turns=TurnRecords.of(()), failed_branches=0, probability=0.1,
        weight=float(rng.uniform(0.3, 1.0)), uses=1, leaf_rewards=rewards,
    )  # fmt: skip
    return msgspec.structs.replace(tree, turns=tuple(turns))


def groups(count: int = 3, *, seed: int = 0, **made: Any) -> tuple[BatchTree, ...]:
    rng = np.random.default_rng(seed)
    return tuple(group(f"group-{i}", rng, **made) for i in range(count))


def said(*tokens: int) -> np.ndarray:
    """An action."""
    return ints(*tokens, STOP)


def roles(turns: Sequence[Turn]) -> list[str]:
    return [turn.role for turn in turns]
