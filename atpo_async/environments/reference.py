"""The right answer of a task as tokens, and the tokens that open it: what an information gain is measured on.

Source: IGPO (arXiv 2510.14967): the policy's probability of the right answer, behind a forced prefix that closes its
thinking and opens the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from atpo_async.core.errors import ConfigError
from atpo_async.core.texts import of_type, of_value
from atpo_async.environments.values import NOTHING, Limits, ValueRefused, refuse, token_ids

PLACE = "{answer}"
"""In a template, where the answer stands."""

Encode = Callable[[str], Sequence[int] | np.ndarray]
"""A text that goes on where another ended, as ids of the policy's tokenizer."""


class Reference(NamedTuple):
    """A task's right answer."""

    answer: np.ndarray
    """int32[T], T >= 1: what is scored."""
    prefix: np.ndarray = NOTHING
    """int32[P]: read before it, after the context, and not scored."""


class AnswerTemplate:
    """How an answer is written: ``<answer>{answer}`` scores the answer behind ``<answer>``.

    What a template has behind the answer is not read.

    Args:
        template: with ``{answer}`` once.
        field: its name, for the error.

    Raises:
        ConfigError: it is none.
    """

    def __init__(self, template: object, *, field: str) -> None:
        if not isinstance(template, str) or template.count(PLACE) != 1:
            raise ConfigError(
                f"{field} is {of_value(template)} ({of_type(template)}); expected a text with {PLACE} in it once, such "
                f"as '<answer>{PLACE}</answer>'"
            )
        self.template = template
        self._before = template.partition(PLACE)[0]

    def reference(self, answer: str, encode: Encode) -> Reference | None:
        """None where the answer has no token.

        The prefix ends where its own tokens do.  Where the two together have other tokens at their border, each is
        encoded alone.
        """
        before = [int(i) for i in encode(self._before)] if self._before else []
        whole = [int(i) for i in encode(self._before + answer)]
        after = whole[len(before) :] if whole[: len(before)] == before else [int(i) for i in encode(answer)]
        return Reference(np.array(after, dtype=np.int32), np.array(before, dtype=np.int32)) if after else None


def answer_text(value: object) -> str | None:
    """What a row's answer says: a text, a number, or of several right ones the first; None where there is none."""
    if isinstance(value, list | tuple):
        value = next(iter(value), None)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return str(value).strip() or None


def checked_reference(said: Any, where: str, limits: Limits) -> Reference:
    """What ``reference()`` returned, as arrays of the protocol's types.  Raises ValueRefused."""
    form = "a Reference, or (answer ids, prefix ids), or None where the task has no answer"
    if not isinstance(said, tuple) or len(said) != len(Reference._fields):
        raise refuse(where, "what reference() returned", said, form)
    parts = [
        token_ids(
            value, f"reference().{name}", where, limits,
            most=limits.max_context_tokens, reason="environment_failed",
        )
        for name, value in zip(Reference._fields, said, strict=True)
    ]  # fmt: skip
    if not len(parts[0]):
        raise ValueRefused(
            "reference().answer", f"{where}: reference().answer is empty; return None where a task has no answer"
        )
    return Reference(*parts)
