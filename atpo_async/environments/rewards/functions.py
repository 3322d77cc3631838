"""Reward functions as a user gives them: their names, their weights, and the arguments that they ask for by name."""

from __future__ import annotations

import copy
import inspect
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atpo_async.core.calls import is_async
from atpo_async.core.errors import ConfigError
from atpo_async.core.texts import of_type, of_value

AT_THE_END = {
    "answer": "text of the last action, without thinking; empty where the turns ran out",
    "row": "the task's row of the data",
    "target": "the row's right answer, from whichever column has it; None without",
    "messages": "the whole conversation, the policy's messages and the tools' answers included",
    "info": "the episode's dict, which tools may fill",
    "prompt": "the messages that the policy was shown first",
    "turns": "how many actions the policy took",
    "end": "'done', or 'turn_limit'",
}
"""Arguments that a reward may ask for -> what they are."""

AFTER_A_TURN = {
    "action": "the action, parsed: action.content, .thinking, .tool_calls, .complete",
    "answers": "texts of the tools' answers to it, in order",
    "row": "as for rewards",
    "target": "as for rewards",
    "messages": "the conversation so far, this turn included",
    "info": "as for rewards",
    "turns": "how many actions the policy took so far, this one included",
    "done": "whether the conversation ended with it",
}
"""Arguments that a reward of a turn may ask for -> what they are."""

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


SHARED = frozenset({"info", "answer", "turns", "end", "done"})
"""Arguments that every function is given as they are: the episode's dict, and what cannot be changed."""

MAX_WEIGHT = 1e18
"""A sum of rewards by larger weights may not fit a float32."""


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """One function with its weight."""

    function: Callable[..., Any]
    name: str
    weight: float
    wants: tuple[str, ...]
    """Names of the arguments that it asks for."""
    is_async: bool

    def arguments(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """What it asks for; a copy for it alone of what is not its to change: ``info`` may be filled."""
        return {name: known[name] if name in SHARED else copy.deepcopy(known[name]) for name in self.wants}


def reward_functions(found: Any, *, field: str, known: Mapping[str, str], needed: bool) -> tuple[RewardFunction, ...]:
    """The functions of a task.

    Args:
        found: ``[correct, (brief, 0.2)]``: functions, each alone or with its weight; one function alone counts too.
        field: what the list is called.
        known: arguments that there are.
        needed: at least one must be given.

    Raises:
        ConfigError: naming the function and what is wrong with it.
    """
    if callable(found):
        found = [found]
    if isinstance(found, str | Mapping) or not isinstance(found, Sequence):
        raise ConfigError(
            f"{field} is {of_value(found)} ({of_type(found)}); expected a list of functions: {field}=[correct], or "
            f"with weights {field}=[correct, (brief, 0.2)]"
        )
    if needed and not found:
        raise ConfigError(f"{field} is empty; expected at least one function that judges an answer: {field}=[correct]")
    made: dict[str, RewardFunction] = {}
    for at, one in enumerate(found):
        function = _function(one, f"{field}[{at}]", known)
        if function.name in made:
            raise ConfigError(f"{field}: two functions are called {function.name!r}; rename one")
        made[function.name] = function
    return tuple(made.values())


def _function(one: Any, where: str, known: Mapping[str, str]) -> RewardFunction:
    weight: Any = 1.0
    if isinstance(one, tuple | list):
        if len(one) != 2:
            raise ConfigError(f"{where} is {of_value(one)}; expected a function, or (function, weight)")
        one, weight = one
    if not callable(one) or inspect.isclass(one):
        called = "; it is what the function returned: leave the () away" if isinstance(one, int | float) else ""
        raise ConfigError(f"{where} is {of_value(one)} ({of_type(one)}); expected a function{called}")
    name = getattr(one, "__name__", None)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        what = "a lambda" if name == "<lambda>" else f"of type {of_type(one)}"
        raise ConfigError(f"{where} is {what}, without a name for its metric; write def correct(answer, row): …")
    is_number = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
    if not is_number or not math.isfinite(weight) or abs(weight) > MAX_WEIGHT:
        raise ConfigError(
            f"{where}: the weight of {name!r} is {of_value(weight)} ({of_type(weight)}); expected a number"
        )
    return RewardFunction(one, name, float(weight), _wants(one, name, where, known), is_async(one))


def _wants(function: Callable[..., Any], name: str, where: str, known: Mapping[str, str]) -> tuple[str, ...]:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise ConfigError(
            f"{where}: the signature of {name!r} cannot be read; wrap it: def {name}(answer): …"
        ) from None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return tuple(known)
    wants = []
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise ConfigError(f"{where}: {name} takes {parameter}, but arguments are given by name: {', '.join(known)}")
        if parameter.name in known:
            wants.append(parameter.name)
        elif parameter.default is parameter.empty:
            raise ConfigError(
                f"{where}: {name} asks for {parameter.name!r}, which there is not; a reward may ask for "
                f"{', '.join(known)} (columns of the data are in row: row[{parameter.name!r}])"
            )
    return tuple(wants)
