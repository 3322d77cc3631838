"""One row of published data as a question: FlashRAG's JSONL, and the parquet files of AT2PO, Search-R1 and verl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atpo_async.core.texts import of_type, of_value
from atpo_async.environments.messages.types import Message
from atpo_async.environments.values import ValueRefused

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One task."""

    question: str
    """Empty where the row has a ready prompt."""
    prompt: tuple[Message, ...] = ()
    """A ready prompt, taken as it is."""
    golden: tuple[str, ...]
    """Answers, each of which is right; at least one."""
    where: str
    """For messages: ``train.jsonl, line 7``."""


def question_of(row: Mapping[str, Any], where: str) -> Question:
    """Raises ValueRefused naming the row and the column: no question, or no golden answer."""
    return Question(
        question=_question(row, where), prompt=_prompt(row, where), golden=golden_answers(row, where), where=where
    )


def golden_answers(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Of ``golden_answers``, ``reward_model.ground_truth.target``, ``answers`` or ``answer``, the first that is there.

    Raises ValueRefused where there is none, or nothing that could be right.
    """
    for name, value in _places(row):
        if value is None:
            continue
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, Sequence) or not all(isinstance(each, str) for each in found):
            raise _refused(where, name, value, "a text, or a list of texts")
        kept = tuple(dict.fromkeys(each for each in found if each.strip()))
        if not kept:
            raise _refused(where, name, value, "at least one answer that is not empty: remove the row")
        return kept
    raise ValueRefused(
        "golden_answers",
        f"{where}: it has no golden_answers, reward_model.ground_truth.target, answers or answer; it has: "
        f"{', '.join(map(str, row)) or 'nothing'}",
    )


def _places(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
    model = row.get("reward_model")
    truth = model.get("ground_truth") if isinstance(model, Mapping) else None
    target = truth.get("target") if isinstance(truth, Mapping) else truth
    return [
        ("golden_answers", row.get("golden_answers")),
        ("reward_model.ground_truth.target", target),
        ("answers", row.get("answers")),
        ("answer", row.get("answer")),
    ]


def _question(row: Mapping[str, Any], where: str) -> str:
    value = row.get("question")
    if value is None and row.get("prompt") is not None:
        return ""
    if not isinstance(value, str) or not value.strip():
        raise _refused(where, "question", value, "a text that is not empty (or a column prompt with messages)")
    return value


def _prompt(row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    value = row.get("prompt")
    if value is None:
        return ()
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    expected = f"a list of messages, {{role, content}} each, role one of {', '.join(ROLES)}"
    if not isinstance(value, Sequence) or not value:
        raise _refused(where, "prompt", value, expected)
    for message in value:
        known = isinstance(message, Mapping) and message.get("role") in ROLES
        if not known or not isinstance(message.get("content"), str):
            raise _refused(where, "prompt", message, expected)
    return tuple({"role": message["role"], "content": message["content"]} for message in value)


def _refused(where: str, name: str, value: object, expected: str) -> ValueRefused:
    return ValueRefused(name, f"{where}: {name} is {of_value(value)} ({of_type(value)}); expected {expected}")
