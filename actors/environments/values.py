"""What a task hands over, checked where it enters: converted where nothing is lost, else refused in one line.

An environment is somebody else's code, and what it returns travels far: into the engine, over the wire, into the
journal, into the loss.  Here every value becomes exactly what ``base.py`` promises, or raises ``ValueRefused``, which
names the environment, the task, the field, the value, its type and the way out.

Arrays of numpy, torch and jax are understood without importing any of them but numpy.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, Literal

import numpy as np

from actors.environments.base import Environment, Episode, Split, StepResult
from atpo_async.checks import MAX_NUMBER
from atpo_async.errors import ConfigError
from atpo_async.texts import of_error, of_value

NOTHING = np.zeros(0, dtype=np.int32)

MAX_TOKEN_ID = 2**31 - 1
"""Where the model's own number of tokens is not known."""

Reason = Literal["environment_failed", "observation_too_long", "prompt_too_long"]
"""What a branch is counted under that failed for a value."""

TOO_LONG: Final = "observation_too_long"
PROMPT_TOO_LONG: Final = "prompt_too_long"

EPISODE_PARTS = ("prompt", "step", "close")

_ENDS = ("done", "turn_limit")
_A_RESULT = "return StepResult(observation=…, done=…, reward=…, success=…, end=…) of actors.environments.base"


class ValueRefused(Exception):
    """A value that a task handed over is none that its field can have.

    Attributes:
        field: ``reward``, ``observation``, …: what faults of one kind have in common.
        reason: what the branch is counted under.
    """

    def __init__(self, field: str, text: str, *, reason: Reason = "environment_failed") -> None:
        super().__init__(text)
        self.field = field
        self.reason: Reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the model and the search allow."""

    vocab_size: int | None = None
    """Token ids are below it; None where the model does not say."""
    max_context_tokens: int = MAX_TOKEN_ID
    max_observation_tokens: int = 0
    """``search.max_observation_tokens``; 0 for as many as the context has."""

    @property
    def observation_tokens(self) -> int:
        return self.max_observation_tokens or self.max_context_tokens


def _refuse(where: str, field: str, value: object, expected: str, *, shown: str | None = None) -> ValueRefused:
    seen = of_value(value) if shown is None else shown
    return ValueRefused(field, f"{where}: {field} is {seen} ({type(value).__name__}); expected {expected}")


# --- single values -----------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """A number that an array of one element holds, of any library; else ``value`` itself."""
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "detach") and hasattr(value, "numel"):  # torch: numpy lacks some of its dtypes
        return value.item() if value.numel() == 1 else value
    array = _as_array(value)
    return array.item() if array is not None and array.size == 1 else value


def _as_array(value: Any) -> np.ndarray | None:
    """A numpy array of what any library's array holds; None for what is no array."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, type) or not hasattr(value, "__array__") or isinstance(value, np.generic):
        return None
    if hasattr(value, "detach"):  # torch: it may need gradients, or lie on a GPU
        value = value.detach().cpu()
    return np.asarray(value)


def reward_of(value: Any, where: str) -> float:
    """The reward of a chain that ended: finite, within float32.  Raises ValueRefused."""
    expected = "a finite number that fits float32; a chain that cannot be judged must raise instead"
    if value is None:
        raise _refuse(where, "reward", value, f"a number, since done is True: {expected}")
    plain = _plain(value)
    if not isinstance(plain, numbers.Real | Decimal):
        raise _refuse(where, "reward", value, expected)
    try:
        number = float(plain)
    except (OverflowError, ValueError):
        number = math.inf
    if not math.isfinite(number) or abs(number) > MAX_NUMBER:
        raise _refuse(where, "reward", value, expected)
    return number


def truth_of(value: Any, field: str, where: str, *, expected: str = "True or False") -> bool:
    """A truth value, also as 0 or 1 of any library.  Raises ValueRefused."""
    plain = _plain(value)
    if isinstance(plain, bool):
        return plain
    if isinstance(plain, numbers.Real) and plain in (0, 1):
        return bool(plain)
    raise _refuse(where, field, value, expected)


# --- token ids ---------------------------------------------------------------------------------------------------


def token_ids(value: Any, field: str, where: str, limits: Limits, *, most: int, reason: Reason) -> np.ndarray:
    """int32[N], a copy: token ids of the model.

    Args:
        value: an array of one dimension of any library, a list, a tuple or a range, of whole numbers.
        most: longer ones are refused, before they are looked at.
        reason: what a longer one is counted under.

    Raises:
        ValueRefused: anything else, an id that the model has no embedding for, or more than ``most``.
    """
    array = _id_array(value, field, where)
    if array.ndim != 1:
        raise _refuse(where, field, value, "one dimension: ids[0] of a batch of one", shown=f"of shape {array.shape}")
    if len(array) > most:
        raise ValueRefused(field, f"{where}: {field} has {len(array)} tokens; {_way_out(field, most)}", reason=reason)
    if array.size and array.dtype.kind not in "iu":
        raise _refuse(
            where, field, value, "whole numbers, token ids of the policy's tokenizer",
            shown=f"{of_value(array.tolist()[:4])} of dtype {array.dtype}",
        )  # fmt: skip
    top = limits.vocab_size or MAX_TOKEN_ID
    if array.size:
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= top:
            bad = low if low < 0 else high
            at = int(np.flatnonzero(array == bad)[0])
            raise ValueRefused(
                field,
                f"{where}: {field}[{at}] is {bad} ({type(value).__name__}); expected token ids of 0 to {top - 1}, as "
                "many as the policy's model has; encode with the tokenizer of the policy's own folder",
            )
    # A copy: an environment may fill the same array again at its next step.
    return np.array(array, dtype=np.int32)


def _way_out(field: str, most: int) -> str:
    if field == "prompt":
        return f"expected below {most + 1}: raise model.max_context_tokens, or shorten the task"
    return (
        f"expected at most {most} (search.max_observation_tokens, or what model.max_context_tokens leaves): cut it in "
        "the environment"
    )


def _id_array(value: Any, field: str, where: str) -> np.ndarray:
    array = _as_array(value)
    if array is not None:
        return array
    if isinstance(value, list | tuple | range):
        if not value:
            return NOTHING
        if any(isinstance(item, bool | np.bool_ | str | float) for item in value[:8]):
            raise _refuse(where, field, value, "whole numbers, token ids of the policy's tokenizer")
        try:
            return np.asarray(value)
        except (ValueError, OverflowError, TypeError):
            raise _refuse(where, field, value, "a flat list of whole numbers") from None
    hint = {str: "encode the text first: tokenizer.encode(text)", dict: "take its input_ids"}
    way_out = next((said for kind, said in hint.items() if isinstance(value, kind)), "")
    if hasattr(value, "input_ids"):
        way_out = hint[dict]
    raise _refuse(
        where, field, value, "int32[N], token ids (an array, a list or a tuple)" + (f"; {way_out}" if way_out else "")
    )


def stop_ids(value: Any, where: str, limits: Limits) -> tuple[int, ...]:
    """Tokens that end an action, each once, in the order given; one number is one of them.  Raises ConfigError."""
    found = value
    if isinstance(value, set | frozenset):
        found = sorted(value, key=repr)
    elif isinstance(value, numbers.Integral) and not isinstance(value, bool):
        found = [int(value)]
    elif (array := _as_array(value)) is not None and array.ndim == 0:
        found = array.reshape(1)
    elif isinstance(value, Iterable) and not isinstance(value, list | tuple | range | str | bytes | dict):
        found = value if _as_array(value) is not None else list(value)
    try:
        ids = token_ids(found, "stop_token_ids", where, limits, most=MAX_TOKEN_ID, reason="environment_failed")
    except ValueRefused as refused:
        raise ConfigError(str(refused)) from None
    if not ids.size:
        raise ConfigError(
            f"{where}: stop_token_ids is {of_value(value)}; expected at least one token that ends an action, for "
            "instance the tokenizer's end of a turn: without one every action runs to search.max_action_tokens"
        )
    return tuple(dict.fromkeys(ids.tolist()))


def number_of_tasks(value: Any, split: Split, where: str) -> int | None:
    """How many tasks a split has.  Raises ConfigError unless it is a whole number of at least 1, or None."""
    if value is None:
        return None
    plain = _plain(value)
    if isinstance(plain, numbers.Integral) and not isinstance(plain, bool) and int(plain) >= 1:
        return int(plain)
    raise ConfigError(
        f"{where}: num_tasks({split!r}) is {of_value(value)} ({type(value).__name__}); expected a whole number of at "
        "least 1, or None for a split without end"
    )


# --- what a step says --------------------------------------------------------------------------------------------


def step_result(said: Any, where: str, limits: Limits) -> StepResult:
    """As ``StepResult`` promises.  Raises ValueRefused.

    What carries nothing is taken for nothing: on a chain that goes on a reward of 0 and ``success=False``, on one that
    ended an observation, which nobody would see.
    """
    if not isinstance(said, StepResult):
        raise _refuse(where, "what step() returned", said, f"a StepResult: {_A_RESULT}")
    done = truth_of(said.done, "done", where)
    end = said.end
    if not isinstance(end, str) or end not in ("continue", *_ENDS):
        raise _refuse(where, "end", end, f"one of continue, {', '.join(_ENDS)}")
    if done:
        if end == "continue":
            raise _refuse(where, "end", end, f"one of {', '.join(_ENDS)}, since done is True")
        success = None if said.success is None else truth_of(
            said.success, "success", where, expected="True, False, or None where nobody can say"
        )  # fmt: skip
        closing: Any = str(end)
        return StepResult(
            observation=NOTHING, done=True, reward=reward_of(said.reward, where), success=success, end=closing
        )
    if end != "continue":
        raise _refuse(where, "end", end, "continue, since done is False; or done=True with a reward")
    _nothing_yet(said, where)
    observation = token_ids(
        said.observation, "observation", where, limits, most=limits.observation_tokens, reason=TOO_LONG
    )
    return StepResult(observation=observation, done=False, reward=None, success=None, end="continue")


def _nothing_yet(said: StepResult, where: str) -> None:
    """A chain that goes on has neither reward nor success."""
    reward, success = _plain(said.reward), _plain(said.success)
    if reward is not None and not (isinstance(reward, numbers.Real) and reward == 0):
        raise _refuse(
            where, "reward", said.reward, "None, since done is False: a chain has one reward, with its last step; sum "
            "those of its steps in the environment",
        )  # fmt: skip
    if success is not None and not (isinstance(success, numbers.Real) and success == 0):
        raise _refuse(where, "success", said.success, "None, since done is False")


# --- the environment as the search sees it ------------------------------------------------------------------------


class CheckedEnvironment:
    """An environment that hands over only what the protocol promises.

    Args:
        plain: the user's.
        name: ``environment.name``, for the errors.
        limits: of the model and the search.

    Raises:
        ConfigError: stop ids or a number of tasks that cannot be; the environment is not used then.
    """

    def __init__(self, plain: Environment, *, name: str, limits: Limits) -> None:
        self.plain = plain
        self.limits = limits
        self._label = f"environment {name!r}"
        self.stop_token_ids = stop_ids(_read(plain, "stop_token_ids", self._label), self._label, limits)
        self._num_tasks: dict[Split, int | None] = {}
        self.num_tasks("train")  # the other split is not everybody's

    def num_tasks(self, split: Split) -> int | None:
        """Asked for once.  Raises ConfigError."""
        if split not in self._num_tasks:
            try:
                value = self.plain.num_tasks(split)
            except Exception as exc:
                raise ConfigError(f"{self._label}: num_tasks({split!r}) failed: {of_error(exc)}") from exc
            self._num_tasks[split] = number_of_tasks(value, split, self._label)
        return self._num_tasks[split]

    async def start(self, split: Split, task_index: int) -> CheckedEpisode:
        """Raises ValueRefused for an episode or a prompt that is none; whatever else the environment raises."""
        where = f"{self._label}, task {task_index} ({split})"
        return await self._episode(await self.plain.start(split, task_index), where, "start", steps=0)

    async def replay(self, split: Split, task_index: int, actions: tuple[np.ndarray, ...]) -> CheckedEpisode:
        """As ``start``."""
        where = f"{self._label}, task {task_index} ({split})"
        plain = await self.plain.replay(split, task_index, actions)
        return await self._episode(plain, where, "replay", steps=len(actions))

    async def _episode(self, plain: Any, where: str, what: str, *, steps: int) -> CheckedEpisode:
        try:
            missing = [part for part in EPISODE_PARTS if not _has(plain, part)]
            if missing:
                raise _refuse(
                    where, f"what {what}() returned", plain, f"an Episode: it lacks {', '.join(missing)}"
                )  # fmt: skip
            limits = self.limits
            prompt = token_ids(
                plain.prompt, "prompt", where, limits, most=limits.max_context_tokens - 1, reason=PROMPT_TOO_LONG
            )
            if not len(prompt):
                raise ValueRefused("prompt", f"{where}: prompt is empty; expected at least one token")
        except BaseException:
            if callable(getattr(plain, "close", None)):
                await plain.close()
            raise
        return CheckedEpisode(plain, prompt, where, limits, steps)


class CheckedEpisode:
    """One task under way, of a ``CheckedEnvironment``."""

    def __init__(self, plain: Episode, prompt: np.ndarray, where: str, limits: Limits, steps: int) -> None:
        self.prompt = prompt
        """int32[P], P >= 1."""
        self._plain = plain
        self._where = where
        self._limits = limits
        self._steps = steps

    async def step(self, action: np.ndarray) -> StepResult:
        """Raises ValueRefused; whatever else the environment raises."""
        self._steps += 1
        said = await self._plain.step(action)
        return step_result(said, f"{self._where}, step {self._steps}", self._limits)

    async def close(self) -> None:
        await self._plain.close()


def _has(plain: object, part: str) -> bool:
    return hasattr(plain, part) and (part == "prompt" or callable(getattr(plain, part)))


def _read(plain: object, name: str, label: str) -> Any:
    try:
        return getattr(plain, name)
    except Exception as exc:
        raise ConfigError(f"{label}: {name} cannot be read: {of_error(exc)}") from exc
