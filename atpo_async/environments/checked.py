"""An environment whose every value is checked (``values.py``) before the search sees it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Mapping
from typing import Any, Literal, TypeVar

import numpy as np

from atpo_async.core.errors import ConfigError
from atpo_async.core.texts import of_error
from atpo_async.environments import team
from atpo_async.environments.base import Environment, Episode, Split, StepResult
from atpo_async.environments.reference import Reference, checked_reference
from atpo_async.environments.values import (
    PROMPT_TOO_LONG,
    Limits,
    ValueRefused,
    number_of_tasks,
    reading,
    refuse,
    step_result,
    stop_ids,
    stop_strings,
    token_ids,
)

log = logging.getLogger("atpo.actor.environment")

T = TypeVar("T")

EPISODE_PARTS = ("prompt", "step", "close")

OPTIONAL_PARTS = {"replay_step": ("action", "observation"), "snapshot": (), "restore": ("snapshot",), "fork": ()}
"""Methods that an episode may have, and what they are called with."""

Way = Literal["fork", "snapshot"]
WAYS: tuple[Way, ...] = ("fork", "snapshot")

_HOW_TO_FORK = 'see docs/extending.md, "Environment"'
_HOW_TO_TEAM = 'see docs/extending.md, "Teams"'


class CheckedEnvironment:
    """An environment that returns only what the protocol allows.

    Args:
        plain: the user's.
        name: ``environment.name``, for the errors.
        limits: of the model and the search.

    Raises:
        ConfigError: stop ids, stop strings or a number of tasks that cannot be; the environment is not used then.
    """

    def __init__(self, plain: Environment, *, name: str, limits: Limits) -> None:
        self.plain = plain
        self.limits = limits
        self._label = f"environment {name!r}"
        self.stop_token_ids = stop_ids(_read(plain, "stop_token_ids", self._label), self._label, limits)
        self.stop_strings = stop_strings(_read(plain, "stop_strings", self._label, absent=()), self._label)
        self._num_tasks: dict[Split, int | None] = {}
        self.num_tasks("train")  # not every environment has the other split

    def num_tasks(self, split: Split) -> int | None:
        """The user's ``num_tasks``, called once for each split.  Raises ConfigError."""
        if split not in self._num_tasks:
            try:
                value = self.plain.num_tasks(split)
            except Exception as exc:
                raise ConfigError(f"{self._label}: num_tasks({split!r}) failed: {of_error(exc)}") from exc
            self._num_tasks[split] = number_of_tasks(value, split, self._label)
        return self._num_tasks[split]

    def take_counts(self) -> Mapping[str, float]:
        """What the environment has counted since this was last called, where it counts.  Raises what that raises."""
        take = getattr(self.plain, "take_counts", None)
        found: Mapping[str, float] = take() if callable(take) else {}
        return found

    @property
    def has_references(self) -> bool:
        """Whether the environment tells right answers at all."""
        return _has(self.plain, "reference") and getattr(self.plain, "has_references", True) is not False

    async def reference(self, split: Split, task_index: int) -> Reference | None:
        """The task's right answer; None where it has none.  Raises as ``start``."""
        if not self.has_references:
            return None
        where = f"{self._label}, task {task_index} ({split})"
        check_call(self.plain, where, "reference", ("split", "task_index"))
        plain: Any = self.plain
        said = await _settled(plain.reference(split, task_index))
        return None if said is None else checked_reference(said, where, self.limits)

    async def start(self, split: Split, task_index: int) -> CheckedEpisode:
        """Raises ValueRefused for an episode or a prompt that is none; whatever else the environment raises."""
        where = f"{self._label}, task {task_index} ({split})"
        plain = await _awaited(self.plain.start(split, task_index), "start", where)
        return await checked_episode(plain, where, "start", self.limits, steps=0)

    def check_team(self, setting: str) -> None:
        """Raises ConfigError where teams cannot solve its tasks; ``setting`` is what asks for teams."""
        lacks = [name for name in team.NEEDED if not callable(getattr(self.plain, name, None))]
        if lacks:
            raise ConfigError(
                f"{setting} needs an environment whose tasks teams can solve, and {self._label} lacks "
                f"{', '.join(lacks)}: {_HOW_TO_TEAM}, or set team.proposers to 0"
            )
        for name, called_with in {**team.NEEDED, **team.OPTIONAL}.items():
            if _has(self.plain, name):
                try:
                    check_call(self.plain, self._label, name, called_with, _HOW_TO_TEAM)
                except ValueRefused as exc:
                    raise ConfigError(str(exc)) from None

    async def start_member(self, split: Split, task_index: int, member: team.Member) -> CheckedEpisode:
        """As ``start``, for a member of a team."""
        where = f"{self._label}, task {task_index} ({split}), {member.role}"
        plain = await _awaited(team.begin(self.plain, split, task_index, member), member.starts, where)
        return await checked_episode(plain, where, member.starts, self.limits, steps=0)

    async def cue(self, split: Split, task_index: int, actions: tuple[np.ndarray, ...]) -> np.ndarray | None:
        """int32[C], the cue of a proposer's chain; None where it gave none.  Raises as ``start``."""
        where = f"{self._label}, task {task_index} ({split})"
        plain: Any = self.plain
        found = await _settled(plain.cue(split, task_index, actions))
        if found is None:
            return None
        return token_ids(
            found, "cue", where, self.limits, most=self.limits.max_context_tokens, reason="environment_failed"
        )

    async def replay(self, split: Split, task_index: int, actions: tuple[np.ndarray, ...]) -> CheckedEpisode:
        """As ``start``."""
        where = f"{self._label}, task {task_index} ({split})"
        plain = await _awaited(self.plain.replay(split, task_index, actions), "replay", where)
        return await checked_episode(plain, where, "replay", self.limits, steps=len(actions))


class CheckedEpisode:
    """One task under way, of a ``CheckedEnvironment``."""

    def __init__(self, plain: Episode, prompt: np.ndarray, where: str, limits: Limits, steps: int) -> None:
        self.prompt = prompt
        """int32[P], P >= 1."""
        self._plain = plain
        self._where = where
        self._limits = limits
        self._steps = steps
        self.ways: tuple[Way, ...] = tuple(way for way in WAYS if _has(plain, way))
        """By which its state can be kept, the first one if it can; none where only a replay leads to it."""

    async def step(self, action: np.ndarray) -> StepResult:
        """Raises ValueRefused; whatever else the environment raises."""
        self._steps += 1
        where = f"{self._where}, step {self._steps}"
        said = await _awaited(self._plain.step(action), "step", where)
        return step_result(said, where, self._limits)

    async def replay_step(self, action: np.ndarray, observation: np.ndarray) -> StepResult:
        """As ``step``, by the episode's own ``replay_step`` where it has one."""
        own = getattr(self._plain, "replay_step", None)
        if own is None:
            return await self.step(action)
        self._steps += 1
        where = f"{self._where}, step {self._steps}"
        said = await _awaited(own(action, observation), "replay_step", where)
        return step_result(said, where, self._limits)

    async def state(self) -> tuple[Way, object] | None:
        """What branches can begin at: a copy of the episode if it makes one, else a snapshot; None if it has neither.

        Raises as ``step``.
        """
        for way in self.ways:
            found = await (self.fork() if way == "fork" else self.snapshot())
            if found is not None:
                return way, found
        return None

    async def fork(self) -> CheckedEpisode | None:
        """A copy in the same state; None where the episode makes none.  Raises as ``step``."""
        where = f"{self._where}, after step {self._steps}"
        plain: Any = self._plain
        found = await _settled(plain.fork())
        if found is None:
            return None
        if found is plain:
            raise refuse(where, "what fork() returned", found, "another episode than the one that is forked, or None")
        return await checked_episode(found, self._where, "fork", self._limits, steps=self._steps)

    async def snapshot(self) -> object:
        """The episode's state, or None where it has none to give.  Raises what the episode raises."""
        plain: Any = self._plain
        return await _settled(plain.snapshot())

    async def restore(self, snapshot: object, *, steps: int) -> None:
        """Into the state after ``steps`` actions.  Raises as ``step``."""
        plain: Any = self._plain
        found = await _settled(plain.restore(snapshot))
        if found is not None and found is not plain:
            where = f"{self._where}, after step {steps}"
            raise refuse(where, "what restore() returned", found, "nothing: restore changes the episode it belongs to")
        self._steps = steps

    async def close(self) -> None:
        await _awaited(self._plain.close(), "close", self._where)


async def checked_episode(plain: Any, where: str, what: str, limits: Limits, *, steps: int) -> CheckedEpisode:
    """What ``what`` returned, as an episode after ``steps`` actions.  Raises ValueRefused, and closes what it is."""
    try:
        with reading(where, "prompt", plain):
            _check_parts(plain, where, what)
            prompt = token_ids(
                plain.prompt, "prompt", where, limits, most=limits.max_context_tokens - 1, reason=PROMPT_TOO_LONG
            )
            if not len(prompt):
                raise ValueRefused("prompt", f"{where}: prompt is empty; expected at least one token")
            return CheckedEpisode(plain, prompt, where, limits, steps)
    except BaseException:
        await _close(plain, where)
        raise


async def _settled(said: Any) -> Any:
    """What a plain function or a coroutine returns."""
    return await said if inspect.isawaitable(said) else said


async def _awaited(said: Awaitable[T], what: str, where: str) -> T:
    """Raises ValueRefused where ``what`` is a plain function, the likeliest slip in a first environment."""
    if not inspect.isawaitable(said):
        raise ValueRefused(what, f"{where}: {what}() is no coroutine: write async def {what}(…)")
    return await said


def _check_parts(plain: Any, where: str, what: str) -> None:
    """Raises ValueRefused where an episode lacks a part; a property that fails is there all the same."""
    missing = [part for part in EPISODE_PARTS if not (hasattr(type(plain), part) or hasattr(plain, part))]
    missing += [part for part in EPISODE_PARTS[1:] if part not in missing and not callable(getattr(plain, part))]
    if missing:
        raise refuse(where, f"what {what}() returned", plain, f"an Episode: it lacks {', '.join(missing)}")
    check_optional(plain, where, OPTIONAL_PARTS)


def check_optional(plain: object, where: str, parts: Mapping[str, tuple[str, ...]]) -> None:
    """Raises ValueRefused where one of ``parts`` is there and cannot be called with its arguments."""
    for part, called_with in parts.items():
        if _has(plain, part):
            check_call(plain, where, part, called_with)
    if _has(plain, "snapshot") != _has(plain, "restore"):
        has, lacks = ("snapshot", "restore") if _has(plain, "snapshot") else ("restore", "snapshot")
        raise ValueRefused(lacks, f"{where}: an episode with {has}() needs {lacks}() as well: {_HOW_TO_FORK}")


def _has(plain: object, part: str) -> bool:
    """An optional part that is None is none."""
    return getattr(plain, part, None) is not None


def check_call(plain: object, where: str, part: str, called_with: tuple[str, ...], way_out: str = _HOW_TO_FORK) -> None:
    """Raises ValueRefused where an optional part is no method that takes ``called_with``."""
    method = getattr(plain, part)
    call = f"{part}({', '.join(called_with)})"
    if not callable(method):
        raise refuse(where, part, method, f"a method {call}, or no attribute of that name: {way_out}")
    try:
        signature = inspect.signature(method)
    except (ValueError, TypeError):
        return  # built-ins have none; the call itself raises what is wrong
    try:
        signature.bind(*called_with)
    except TypeError as exc:
        raise ValueRefused(part, f"{where}: {part}{signature} is called as {call}: {exc}; {way_out}") from None


async def _close(plain: Any, where: str) -> None:
    """Of an episode that is refused: what its close() raises beside that is in the log."""
    try:
        if callable(getattr(plain, "close", None)):
            await _awaited(plain.close(), "close", where)
    except Exception as exc:
        log.warning("%s: close() of a refused episode failed: %s", where, of_error(exc))


_NEEDED = object()


def _read(plain: object, name: str, label: str, absent: Any = _NEEDED) -> Any:
    """``absent`` where there is no such attribute; one whose code fails is there all the same."""
    if absent is not _NEEDED and name not in dir(plain):
        return absent
    try:
        return getattr(plain, name)
    except Exception as exc:
        raise ConfigError(f"{label}: {name} cannot be read: {of_error(exc)}") from exc
