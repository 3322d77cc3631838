"""Replay: a fresh episode is stepped through a recorded path, and held to every observation that was recorded."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from atpo_async.core.texts import counted, of_error, of_value, shortened
from atpo_async.environments.base import Environment, Episode, ForkDiverged, ReplayFork, Split, StepResult
from atpo_async.environments.checked import CheckedEnvironment

log = logging.getLogger("atpo.actor.environment")

NOTHING = np.zeros(0, dtype=np.int32)

SHOWN_BEFORE, SHOWN_AFTER = 4, 8
"""Tokens around the first one that differs, in a message."""

WAY_OUT = (
    "the same split, index and actions must give the same: seed what is random by them, keep what a tool answered "
    "(@tool(read_only=True), or replay_step), or give the episode snapshot() and restore(), or fork()"
)


@dataclass(frozen=True, slots=True)
class PastTurn:
    """One turn to replay."""

    action: np.ndarray
    """int32[T]."""
    observation: np.ndarray | None
    """int32[O], what followed; None where it is not known."""


@dataclass(frozen=True, slots=True)
class Past:
    """What an episode has behind it."""

    turns: tuple[PastTurn, ...] = ()
    prompt: np.ndarray | None = None
    """int32[P]; None where it is not known."""


class Replayed(NamedTuple):
    episode: Episode
    observation: np.ndarray
    """int32[O]: what followed the last turn."""


class CannotReplay(Exception):
    """The environment has ``replay = None``."""


async def replayed(environment: Environment, split: Split, task_index: int, past: Past, *, name: str = "") -> Replayed:
    """A fresh episode brought to the end of ``past``, which has a turn at least.

    Each turn goes through ``step``, or ``replay_step`` where the episode has it and the observation is known.  Of an
    environment with a ``replay`` of its own, all turns but the last go through that.

    Args:
        environment: the task's, checked or plain.
        name: ``environment.name``, for messages.

    Raises:
        ForkDiverged: another prompt or observation than recorded, or an end where the tree went on.
        CannotReplay: the environment does not allow it.
        Exception: whatever the environment raises.
    """
    where = f"{f'environment {name!r}, ' if name else ''}task {task_index} ({split})"
    plain = environment.plain if isinstance(environment, CheckedEnvironment) else environment
    replay = getattr(plain, "replay", ReplayFork.replay)
    if replay is None:
        raise CannotReplay("the environment's replay is None, and no snapshot or copy of the episode is kept")
    by_itself = 0 if getattr(replay, "__func__", replay) is ReplayFork.replay else len(past.turns) - 1
    if by_itself:
        episode = await environment.replay(split, task_index, tuple(t.action for t in past.turns[:by_itself]))
    else:
        episode = await environment.start(split, task_index)
    try:
        if past.prompt is not None and not np.array_equal(past.prompt, episode.prompt):
            differs = _difference("prompt", past.prompt, episode.prompt, plain)
            raise ForkDiverged(f"{where}: replayed, {differs}; {WAY_OUT}", field="prompt")
        observation = NOTHING
        for number, turn in enumerate(past.turns[by_itself:], start=by_itself + 1):
            result = await _step(episode, turn)
            _compare(turn, result, f"{where}, step {number}: replayed", plain)
            observation = result.observation
    except BaseException:
        await close_quietly(episode, where)
        raise
    return Replayed(episode, observation)


async def _step(episode: Episode, turn: PastTurn) -> StepResult:
    replay_step = getattr(episode, "replay_step", None)
    if turn.observation is None or replay_step is None:
        return await episode.step(turn.action)
    found: StepResult = await replay_step(turn.action, turn.observation)
    return found


def _compare(turn: PastTurn, result: StepResult, where: str, plain: object) -> None:
    """Raises ForkDiverged."""
    if result.done:
        raise ForkDiverged(
            f"{where}, the episode ended ({result.end}), and its tree went on after this step; {WAY_OUT}"
        )
    if turn.observation is not None and not np.array_equal(turn.observation, result.observation):
        raise ForkDiverged(
            f"{where}, {_difference('observation', turn.observation, result.observation, plain)}; {WAY_OUT}"
        )


def _difference(what: str, recorded: np.ndarray, shown: Any, plain: object) -> str:
    """``the observation (5 tokens) differs from the recorded one (7) from token 3 on: … in place of …``."""
    found = np.asarray(shown)
    common = min(len(recorded), len(found))
    unequal = np.flatnonzero(recorded[:common] != found[:common])
    at = int(unequal[0]) if len(unequal) else common
    part = slice(max(at - SHOWN_BEFORE, 0), at + SHOWN_AFTER)
    return (
        f"the {what} ({counted(len(found), 'token')}) differs from the recorded one ({len(recorded)}) from token {at} "
        f"on: {_shown(found[part], plain)} in place of {_shown(recorded[part], plain)}"
    )


def _shown(ids: np.ndarray, plain: object) -> str:
    """As text where the environment decodes, else as ids."""
    decode = getattr(plain, "decode", None)
    if callable(decode):
        with contextlib.suppress(Exception):
            text = decode(ids)
            if isinstance(text, str):
                return shortened(repr(text), 160)
    return of_value(ids.tolist(), 120)


async def close_quietly(episode: Episode, where: str) -> None:
    """Of an episode that is given up: what its close() raises beside that is in the log."""
    try:
        await episode.close()
    except Exception as exc:
        log.warning("%s: close() of an episode that is given up failed: %s", where, of_error(exc))
