"""Runs reward functions, checks what each returns, and adds them up by weight."""

from __future__ import annotations

import asyncio
import math
import numbers
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from atpo_async.core.bounds import MAX_NUMBER
from atpo_async.core.errors import EnvironmentBroken
from atpo_async.core.texts import of_error, of_type, of_value
from atpo_async.environments.base import NotJudged
from atpo_async.environments.rewards.functions import RewardFunction
from atpo_async.environments.tools import running
from atpo_async.environments.tools.faults import TIMEOUT, ToolFailed
from atpo_async.environments.values import ValueRefused, plain_of, reading


class Judged(NamedTuple):
    total: float
    """Sum of weight times value."""
    values: dict[str, float]
    """Name -> value, without the weight."""


async def judged(
    functions: Sequence[RewardFunction],
    arguments: Mapping[str, Any],
    *,
    where: str,
    timeout_s: float,
    what: str = "reward",
) -> Judged:
    """What the functions say, all run at once.

    Args:
        functions: of the task.
        arguments: that they may ask for.
        where: task and row, for the messages of what is refused.
        timeout_s: of each.
        what: ``reward``, or ``reward of a turn``, for messages.

    Raises:
        NotJudged: one returned None.
        ValueRefused: one returned no finite number; names the function, the row and the value.
        ToolFailed: one raised, or took too long.
    """
    if not functions:
        return Judged(0.0, {})
    found = await asyncio.gather(
        *(_called(function, arguments, timeout_s, what) for function in functions)
    )  # fmt: skip
    values: dict[str, float] = {}
    for function, value in zip(functions, found, strict=True):
        values[function.name] = _number(value, function.name, where, what)
    total = math.fsum(function.weight * values[function.name] for function in functions)
    if abs(total) > MAX_NUMBER:
        raise ValueRefused("reward", f"{where}: the weighted sum of the rewards is {total}, which no float32 can hold")
    return Judged(total, values)


async def _called(function: RewardFunction, arguments: Mapping[str, Any], timeout_s: float, what: str) -> Any:
    who = f"{what} {function.name!r}"
    try:
        return await running.run(
            function.function, function.arguments(arguments), is_async=function.is_async, limit_s=timeout_s, what=who
        )
    except (NotJudged, EnvironmentBroken):
        raise
    except running.TookTooLong as late:
        raise ToolFailed(
            f"{who} took over {timeout_s:g} s (reward_timeout_s){late.advice}", kind=f"timeout of {who}", reason=TIMEOUT
        ) from None
    except Exception as exc:
        raise ToolFailed(f"{who} raised {of_error(exc)}{_hint(exc)}", kind=f"{of_type(exc)} in {who}") from exc


def _hint(exc: Exception) -> str:
    """For a column that a row lacks, the commonest fault."""
    return " (a column that this row lacks?)" if isinstance(exc, KeyError) else ""


def _number(value: Any, name: str, where: str, what: str) -> float:
    """Raises NotJudged, ValueRefused."""
    field = f"{what} {name!r}"
    if value is None:
        raise NotJudged(f"{where}: {field} returned None, which means that it cannot judge; is a return missing?")
    with reading(where, field, value):
        plain = plain_of(value)
        if isinstance(plain, numbers.Real | Decimal):
            number = float(plain)
            if math.isfinite(number) and abs(number) <= MAX_NUMBER:
                return number
    raise ValueRefused(
        field,
        f"{where}: {field} returned {of_value(value)} ({of_type(value)}); expected a finite number, or None for an "
        "answer that cannot be judged",
    )
