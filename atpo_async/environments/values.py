"""Rules for every value that an environment returns: converted where nothing is lost, else refused in one line.

An environment is a user's code, and what it returns goes into the engine, over the wire, into the journal and into
the loss.  Here every value becomes exactly what ``base.py`` specifies, or raises ``ValueRefused``, which names the
environment, the task, the field, the value, its type and the way out.

Arrays of numpy, torch and jax are understood without importing any of them but numpy.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import numbers
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, Literal, get_args

import numpy as np

from atpo_async.core.bounds import MAX_FINGERPRINT, MAX_NUMBER, MAX_REWARD_PARTS, MAX_SIZE, REWARD_NAME, is_reward_name
from atpo_async.core.errors import ConfigError
from atpo_async.core.texts import of_error, of_type, of_value
from atpo_async.core.vocabulary import EpisodeEnd, Split
from atpo_async.environments.base import StepResult

NOTHING = np.zeros(0, dtype=np.int32)

MAX_TOKEN_ID = 2**31 - 1
"""Where the model's own number of tokens is not known."""

Reason = Literal["environment_failed", "observation_too_long", "prompt_too_long"]
"""Why a branch failed whose environment returned a bad value; the name of its counter (``actor/failed/…``)."""

TOO_LONG: Final = "observation_too_long"
PROMPT_TOO_LONG: Final = "prompt_too_long"

ENDS: tuple[EpisodeEnd, ...] = get_args(EpisodeEnd)
_A_RESULT = "return StepResult(observation=…, done=…, reward=…, success=…, end=…) of atpo_async.environments.base"


class ValueRefused(Exception):
    """An environment returned a value that its field cannot have.

    Attributes:
        field: ``reward``, ``observation``, …; faults of one field are of one kind.
        reason: the counter that the failed branch goes to.
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


def refuse(where: str, field: str, value: object, expected: str, *, shown: str | None = None) -> ValueRefused:
    """What to raise: the value, its type, and what was expected instead."""
    seen = of_value(value) if shown is None else shown
    return ValueRefused(field, f"{where}: {field} is {seen} ({of_type(value)}); expected {expected}")


@contextlib.contextmanager
def reading(where: str, field: str, value: object) -> Iterator[None]:
    """Raises ValueRefused for whatever the value's own code raises (``__float__``, ``__array__``, ``__len__``, …)."""
    try:
        yield
    except ValueRefused:
        raise
    except Exception as exc:
        raise ValueRefused(
            field, f"{where}: {field} ({of_type(value)}) cannot be read, its own code raises {of_error(exc)}"
        ) from exc


# --- single values -----------------------------------------------------------------------------------------------


def plain_of(value: Any) -> Any:
    """A number that an array of one element holds, of any library; else ``value`` itself."""
    if isinstance(value, type):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "detach") and hasattr(value, "numel"):  # torch: numpy lacks some of its dtypes
        return value.item() if value.numel() == 1 else value
    array = _as_array(value)
    return array.item() if array is not None and array.size == 1 else value


def _as_array(value: Any) -> np.ndarray | None:
    """A numpy array of what any library's array holds; None for what is no array."""
    if isinstance(value, type) or not hasattr(value, "__array__") or isinstance(value, np.generic):
        return None
    if hasattr(value, "detach"):  # torch: it may need gradients, or lie on a GPU
        value = value.detach().cpu()
    if np.ma.is_masked(value):
        raise ValueError("elements of it are masked")
    return np.asarray(value)


_FINITE = "a finite number that fits float32"


def reward_of(value: Any, where: str) -> float:
    """The reward of a chain that ended: finite, within float32.  Raises ValueRefused."""
    expected = f"{_FINITE}; for a chain that cannot be judged raise NotJudged"
    if value is None:
        raise refuse(where, "reward", value, f"a number, since done is True: {expected}")
    return _number(value, "reward", where, expected)


def turn_reward_of(value: Any, where: str) -> float:
    """The reward of one turn: finite, within float32.  Raises ValueRefused."""
    return _number(value, "turn_reward", where, f"{_FINITE}, 0.0 where the turn earns nothing of its own")


def state_value_of(value: Any, where: str) -> float | None:
    """What a state is worth: finite, within float32, or None.  Raises ValueRefused."""
    expected = f"{_FINITE}, or None where the environment does not say"
    return None if value is None else _number(value, "state_value", where, expected)


def fingerprint_of(value: Any, where: str) -> tuple[int, ...]:
    """The ids of what an action brought to light, each once, in the order given.  Raises ValueRefused."""
    if type(value) is tuple and not value:
        return ()
    with reading(where, "fingerprint", value):
        array = _as_array(value)
        items = value if array is None else array.tolist()
        if isinstance(items, _NO_IDS) or not isinstance(items, Sequence | Set):
            raise refuse(where, "fingerprint", value, f"a tuple of {_AN_ID}")
        if len(items) > MAX_FINGERPRINT:
            fact = f"fingerprint has {len(items)} ids; expected {MAX_FINGERPRINT} at most"
            raise ValueRefused("fingerprint", f"{where}: {fact}")
        ordered = sorted(items) if isinstance(items, Set) else items
        return tuple(dict.fromkeys(_whole_number(item, "an id of fingerprint", where, _AN_ID) for item in ordered))


_AN_ID = "whole numbers of 0 to 2**63 - 1; of texts: environments.fingerprints.fingerprint_of(texts)"
_TOKENS = "tokens, a whole number from 0 on, or None where the observation is one answer"


def _whole_number(value: Any, field: str, where: str, expected: str) -> int:
    plain = plain_of(value)
    whole = isinstance(plain, numbers.Integral) and not isinstance(plain, bool)
    if not whole or not 0 <= int(plain) <= MAX_SIZE:
        raise refuse(where, field, value, expected)
    return int(plain)


def _number(value: Any, field: str, where: str, expected: str) -> float:
    """A number of any library as a float.  Raises ValueRefused."""
    if type(value) is float and -MAX_NUMBER <= value <= MAX_NUMBER:
        return value
    with reading(where, field, value):
        plain = plain_of(value)
        if not isinstance(plain, numbers.Real | Decimal):
            raise refuse(where, field, value, expected)
        try:
            number = float(plain)
        except (OverflowError, ValueError):
            number = math.inf
        if not math.isfinite(number) or abs(number) > MAX_NUMBER:
            raise refuse(where, field, value, expected)
        return number


def parts_of(value: Any, where: str) -> dict[str, float]:
    """The named parts of a reward: few, with short names, each finite and within float32.  Raises ValueRefused."""
    if value is None:
        return {}
    with reading(where, "rewards", value):
        if not isinstance(value, Mapping):
            raise refuse(where, "rewards", value, "a mapping of names to numbers")
        if len(value) > MAX_REWARD_PARTS:
            fact = f"rewards has {len(value)} names; expected {MAX_REWARD_PARTS} at most"
            raise ValueRefused("rewards", f"{where}: {fact}")
        found: dict[str, float] = {}
        for name, part in itertools.islice(value.items(), MAX_REWARD_PARTS):
            if not isinstance(name, str) or not is_reward_name(name):
                raise refuse(where, "rewards", name, REWARD_NAME, shown=f"named {of_value(name)}")
            found[str.__str__(name)] = _number(part, f"rewards[{name!r}]", where, _FINITE)
        return found


def truth_of(value: Any, field: str, where: str, *, expected: str = "True or False") -> bool:
    """A truth value, also as 0 or 1 of any library.  Raises ValueRefused."""
    if type(value) is bool:
        return value
    with reading(where, field, value):
        plain = plain_of(value)
        if isinstance(plain, bool):
            return plain
        if isinstance(plain, numbers.Real) and plain in (0, 1):
            return bool(plain)
        raise refuse(where, field, value, expected)


def end_of(value: Any, where: str) -> EpisodeEnd:
    """An end that is known, as a plain str; an Enum's value counts.  Raises ValueRefused."""
    with reading(where, "end", value):
        for known in ENDS:
            if isinstance(value, str) and str.__eq__(value, known) is True:
                return known
        raise refuse(where, "end", value, f"one of {', '.join(ENDS)}")


# --- token ids ---------------------------------------------------------------------------------------------------


def token_ids(value: Any, field: str, where: str, limits: Limits, *, most: int, reason: Reason) -> np.ndarray:
    """int32[N], a copy: token ids of the model.

    Args:
        value: an array of one dimension of any library, a list or another sequence, of whole numbers.
        most: longer ones are refused, before they are looked at.
        reason: what a longer one is counted under.

    Raises:
        ValueRefused: anything else, an id that the model has no embedding for, or more than ``most``.
    """
    with reading(where, field, value):
        array = _as_array(value)
        if array is None and (isinstance(value, _NO_IDS) or not isinstance(value, Sequence)):
            raise refuse(where, field, value, "int32[N], token ids (an array, a list or a tuple)" + _hint(value))
        if array is not None and array.ndim != 1:
            raise refuse(
                where, field, value, "one dimension: ids[0] of a batch of one", shown=f"of shape {array.shape}"
            )  # fmt: skip
        length = len(value if array is None else array)
        if length > most:
            raise ValueRefused(field, f"{where}: {field} has {length} tokens; {_way_out(field, most)}", reason=reason)
        if not length:
            return NOTHING
        if array is None or array.dtype.kind == "O":
            array = _whole_numbers(list(value) if array is None else array.tolist(), value, field, where)
        elif array.dtype.kind not in "iu":
            shown = f"{of_value(array[:4].tolist())} of dtype {array.dtype}"
            raise refuse(where, field, value, _WHOLE, shown=shown)
        _check_known(array, value, field, where, limits)
        # A copy: an environment may fill the same array again at its next step.
        return np.array(array, dtype=np.int32)


_NO_IDS = (str, bytes, bytearray, memoryview)
_WHOLE = "whole numbers, token ids of the policy's tokenizer"


def _whole_numbers(items: list[Any], value: object, field: str, where: str) -> np.ndarray:
    """int64[N], or objects where one is larger, which the model cannot know.  Raises ValueRefused."""
    ids = (
        items
        if set(map(type, items)) == {int}
        else [_whole(items, at, value, field, where) for at in range(len(items))]
    )
    return np.array(ids, dtype=np.int64 if max(map(abs, ids)) <= MAX_SIZE else object)


def _whole(items: list[Any], at: int, value: object, field: str, where: str) -> int:
    """``items[at]``, of any library's integer type.  Raises ValueRefused."""
    item = items[at]
    is_truth = "bool" in str(getattr(item, "dtype", type(item).__name__))
    if not is_truth and not getattr(item, "ndim", 0) and hasattr(item, "__index__"):
        with contextlib.suppress(TypeError):  # every tensor has that, also one of fractions
            return operator.index(item)
    expected = f"a flat list of {_WHOLE}" if isinstance(item, Sequence) and not isinstance(item, str) else _WHOLE
    seen = f"{of_value(item)} ({of_type(item)} in {of_type(value)})"
    raise ValueRefused(field, f"{where}: {field}[{at}] is {seen}; expected {expected}")


def _check_known(array: np.ndarray, value: object, field: str, where: str, limits: Limits) -> None:
    """Raises ValueRefused for an id that the model has no embedding for."""
    top = limits.vocab_size or MAX_TOKEN_ID
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= top:
        bad = low if low < 0 else high
        at = int(np.flatnonzero(array == bad)[0])
        raise ValueRefused(
            field,
            f"{where}: {field}[{at}] is {of_value(bad)} ({of_type(value)}); expected token ids of 0 to {top - 1}, as "
            "many as the policy's model has; encode with the tokenizer of the policy's own folder",
        )


def _way_out(field: str, most: int) -> str:
    if field == "prompt":
        return f"expected below {most + 1}: raise model.max_context_tokens, or shorten the task"
    if field == _STOPS:
        return f"expected at most {most}"
    if field == "cue":
        return f"expected at most {most} (model.max_context_tokens): a cue is short"
    return (
        f"expected at most {most} (search.max_observation_tokens, or what model.max_context_tokens leaves): cut it in "
        "the environment"
    )


def _hint(value: object) -> str:
    """A guess at what was meant by a value that is no sequence of ids, for the message."""
    if isinstance(value, str):
        return "; encode the text first: tokenizer.encode(text)"
    if isinstance(value, dict) or hasattr(value, "input_ids"):
        return "; take its input_ids"
    return "; list(…) of it" if isinstance(value, Iterator) else ""


_STOPS = "stop_token_ids"
MOST_STOPS = 1 << 16
"""At most so many stop tokens are read, so that an iterator without end does no harm."""


def stop_ids(value: Any, where: str, limits: Limits) -> tuple[int, ...]:
    """Tokens that end an action, each once, in the order given; one number is one of them.  Raises ConfigError."""
    try:
        with reading(where, _STOPS, value):
            found = plain_of(value)
            if isinstance(found, numbers.Integral) and not isinstance(found, bool):
                found = [found]
            elif isinstance(value, set | frozenset):
                found = sorted(value, key=repr)
            elif isinstance(value, Iterable) and not isinstance(value, (*_NO_IDS, dict, Sequence)):
                found = value if _as_array(value) is not None else list(itertools.islice(value, MOST_STOPS + 1))
            else:
                found = value
        ids = token_ids(found, _STOPS, where, limits, most=MOST_STOPS, reason="environment_failed")
    except ValueRefused as refused:
        raise ConfigError(str(refused)) from None
    if not ids.size:
        raise ConfigError(
            f"{where}: {_STOPS} is {of_value(value)}; expected at least one token that ends an action, for "
            "instance the tokenizer's end of a turn: without one every action runs to search.max_action_tokens"
        )
    return tuple(dict.fromkeys(ids.tolist()))


MOST_STRINGS = 64


def stop_strings(value: Any, where: str) -> tuple[str, ...]:
    """Texts that end an action, each once; one text is one of them.  Raises ConfigError."""
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, list | tuple | set | frozenset) or not all(isinstance(text, str) for text in found):
        fault = f"{of_value(value)} ({of_type(value)})"
    elif "" in found:
        fault = f"{of_value(value)}, with an empty text, which would end every action at its first token"
    elif len(found) > MOST_STRINGS:
        fault = f"{len(found)} texts"
    else:
        return tuple(dict.fromkeys(sorted(found) if isinstance(found, set | frozenset) else found))
    raise ConfigError(
        f"{where}: stop_strings is {fault}; expected a tuple of at most {MOST_STRINGS} texts, for instance "
        "('</search>', '</answer>'), or no such attribute"
    )


def number_of_tasks(value: Any, split: Split, where: str) -> int | None:
    """How many tasks a split has.  Raises ConfigError unless it is a whole number of at least 1, or None."""
    if value is None:
        return None
    field = f"num_tasks({split!r})"
    try:
        with reading(where, field, value):
            plain = plain_of(value)
            if isinstance(plain, numbers.Integral) and not isinstance(plain, bool):
                found = operator.index(plain)
                if 1 <= found <= MAX_SIZE:
                    return found
            raise refuse(
                where, field, value, "a whole number of at least 1, or None for a split without end"
            )  # fmt: skip
    except ValueRefused as refused:
        raise ConfigError(str(refused)) from None


# --- results of a step-----------------------------------------------------------------------------------------


def step_result(said: Any, where: str, limits: Limits) -> StepResult:
    """As ``StepResult`` promises.  Raises ValueRefused.

    Values without meaning are dropped: a reward of 0 and ``success=False`` on a chain that goes on, and an observation
    on one that ended, which the policy would never see.
    """
    with reading(where, "what step() returned", said):
        if not isinstance(said, StepResult):
            raise refuse(where, "what step() returned", said, f"a StepResult: {_A_RESULT}")
        done, end, observation = truth_of(said.done, "done", where), end_of(said.end, where), said.observation
        reward, success = said.reward, said.success
        turn_reward, rewards = turn_reward_of(said.turn_reward, where), said.rewards
        fingerprint, state_value = fingerprint_of(said.fingerprint, where), state_value_of(said.state_value, where)
        told = said.longest_answer
        longest = None if told is None else _whole_number(told, "longest_answer", where, _TOKENS)
    if done:
        if end == "continue":
            raise refuse(where, "end", end, f"one of {', '.join(ENDS[1:])}, since done is True")
        if success is not None:
            success = truth_of(success, "success", where, expected="True, False, or None where it cannot be decided")
        return StepResult(
            observation=NOTHING, done=True, reward=reward_of(reward, where), success=success, end=end,
            turn_reward=turn_reward, rewards=parts_of(rewards, where), fingerprint=fingerprint, state_value=state_value,
        )  # fmt: skip
    if end != "continue":
        raise refuse(where, "end", end, "continue, since done is False; or done=True with a reward")
    _nothing_yet(
        reward, "reward", where,
        "None, since done is False: what a turn earns of its own is its turn_reward, reward is the chain's, at its end",
    )  # fmt: skip
    _nothing_yet(success, "success", where, "None, since done is False")
    with reading(where, "rewards", rewards):
        if rewards:
            raise refuse(
                where, "rewards", rewards, "none, since done is False: they are the parts of the chain's reward"
            )
    most = limits.observation_tokens
    if longest is not None and longest <= most:
        # Each of the answers is within the limit.  What the context cannot hold is not shown: the chain ends there.
        most = limits.max_context_tokens
        with reading(where, "observation", observation):
            observation = observation[:most]
    ids = token_ids(observation, "observation", where, limits, most=most, reason=TOO_LONG)
    return StepResult(
        observation=ids, done=False, reward=None, success=None, end="continue", turn_reward=turn_reward,
        fingerprint=fingerprint, state_value=state_value, longest_answer=longest,
    )  # fmt: skip


def _nothing_yet(value: Any, field: str, where: str, expected: str) -> None:
    """A chain that goes on has neither reward nor success: None, or 0 of any library."""
    with reading(where, field, value):
        plain = plain_of(value)
        if plain is not None and not (isinstance(plain, numbers.Real) and plain == 0):
            raise refuse(where, field, value, expected)
