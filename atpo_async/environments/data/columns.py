"""Which columns hold the question, the answer and what groups rows; their values as messages."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atpo_async.core.errors import ConfigError
from atpo_async.core.texts import of_type, of_value
from atpo_async.environments.data.faults import RowRefused, among, meant, refuse_value
from atpo_async.environments.data.rows import Row
from atpo_async.environments.messages.types import Message

QUESTIONS = ("messages", "prompt", "question")
"""Columns that a question is looked for in, the first that there is: a text, or a list of messages."""

ANSWERS = ("answer", "golden_answers", "answers", "ground_truth", "target", "reward_model")
"""Of ``reward_model``, verl's, its ``ground_truth``, and of that, where it is a mapping, its ``target``."""

ROLES = ("system", "developer", "user", "assistant", "tool")
PARTS = ("question", "prompt", "messages", "answer", "group")
"""What ``columns`` may name a column for; the first three are one and the same."""

_MISSING: Any = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The columns of one source that mean something; a dotted name leads into a mapping: ``extra_info.answer``."""

    question: str
    answer: str | None = None
    group: str | None = None
    """Rows with one value are never both trained on and held out; None: rows with the same question."""

    @classmethod
    def find(cls, known: Sequence[str], given: Mapping[str, str] | str | None, name: str) -> Columns:
        """The columns of a source that has ``known``.

        Args:
            known: its columns.
            given: the user's ``columns``.
            name: the source's, for messages.

        Raises ConfigError for a column that is not there, or where none holds a question.
        """
        mapped = _checked(given)
        for part, column in mapped.items():
            if column.partition(".")[0] not in known and column not in known:
                raise ConfigError(
                    f"{name}: there is no column {column!r}, which columns names as the {part}; it has: {among(known)}"
                    f"{meant(column, known)}"
                )
        questions = [mapped[part] for part in PARTS[:3] if part in mapped] or [q for q in QUESTIONS if q in known]
        if not questions:
            raise ConfigError(
                f"{name}: no column {', '.join(map(repr, QUESTIONS[:-1]))} or {QUESTIONS[-1]!r}; it has: "
                f"{among(known)}; say which holds the question: columns = {{question = {_likeliest(known)!r}}}"
            )
        answer = mapped.get("answer") or next((each for each in ANSWERS if each in known), None)
        return cls(question=questions[0], answer=answer, group=mapped.get("group"))

    @property
    def names(self) -> tuple[str, ...]:
        """Those that decide which rows are held out."""
        return tuple(name.partition(".")[0] for name in (self.question, self.group) if name)

    def messages(self, row: Row, where: str) -> list[Message]:
        """What the policy is shown first.  Raises RowRefused."""
        value = reached(row, self.question)
        if value is _MISSING:
            raise RowRefused(
                f"column {self.question!r}",
                f"{where}: there is no column {self.question!r}, which holds the question; it has: {among(row)}"
                f"{meant(self.question, row)}",
            )
        if isinstance(value, str):
            if not value.strip():
                raise refuse_value(where, self.question, value, "a text that is not empty")
            return [{"role": "user", "content": value}]
        if not isinstance(value, list) or not value:
            raise refuse_value(where, self.question, value, "a text, or a list of messages, {role, content} each")
        messages = [_message(each, f"{self.question}[{at}]", where) for at, each in enumerate(value)]
        # AT2PO's data have the question in the system's message, and no other.
        if messages[-1]["role"] == "assistant" or (len(messages) > 1 and messages[-1]["role"] in ROLES[:2]):
            raise refuse_value(
                where, f"{self.question}[{len(value) - 1}].role", messages[-1]["role"],
                "'user': the policy answers to the last message",
            )  # fmt: skip
        return messages

    def answer_of(self, row: Row) -> Any:
        """The value as it is; None where the row has none."""
        value = reached(row, self.answer) if self.answer is not None else None
        if self.answer == "reward_model" and isinstance(value, dict):
            value = value.get("ground_truth")
            if isinstance(value, dict) and "target" in value:
                value = value["target"]
        return None if value is _MISSING else value

    def key(self, row: Row, where: str) -> int:
        """64 bits that rows have in common which must be on one side of a split.  Raises RowRefused.

        By default the question's text, in lower case, blanks squeezed.
        """
        messages = self.messages(row, where)
        if self.group is None:
            text = "\n".join(f"{m['role']}\t{m['content']}" for m in messages)
            text = " ".join(text.casefold().split())
        else:
            value = reached(row, self.group)
            if value is _MISSING or value is None:
                raise refuse_value(where, self.group, None, "the value that rows of one group have in common")
            text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def reached(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column; of a dotted name that is no column, what lies inside; ``_MISSING`` where nothing does."""
    if name in row:
        return row[name]
    found: Any = row
    for part in name.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return _MISSING
        found = found[part]
    return found


def _checked(given: Mapping[str, str] | str | None) -> dict[str, str]:
    """Raises ConfigError for a ``columns`` that names no part, or no column.

    An option of a configuration is a text: there it is a TOML table, ``{question = 'q'}``.
    """
    if given is None:
        return {}
    if isinstance(given, str):
        try:
            given = tomllib.loads(f"columns = {given}")["columns"]
        except tomllib.TOMLDecodeError:
            given = str(given)
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"columns is {of_value(given)} ({of_type(given)}); expected a mapping, {{question = 'q', answer = 'a'}}; "
            "on a command line --environment.options.columns \"{question = 'q', answer = 'a'}\""
        )
    for part, column in given.items():
        if part not in PARTS:
            raise ConfigError(f"columns.{part} means nothing; known: {', '.join(PARTS)}{meant(str(part), PARTS)}")
        if not isinstance(column, str) or not column:
            raise ConfigError(f"columns.{part} is {of_value(column)} ({of_type(column)}); expected a column's name")
    if len(both := [part for part in PARTS[:3] if part in given]) > 1:
        raise ConfigError(f"columns.{both[0]} and columns.{both[1]} both name the question: leave one out")
    return dict(given)


def _likeliest(known: Sequence[str]) -> str:
    """The column that most likely holds the question, for a message."""
    usual = ("problem", "query", "input", "instruction", "text", "q")
    return next((name for name in usual if name in known), known[0] if known else "…")


def _message(given: Any, column: str, where: str) -> Message:
    """One message of a row; fields without a value, which tables have, are left out.  Raises RowRefused."""
    if not isinstance(given, Mapping):
        raise refuse_value(where, column, given, "a message, {role, content}")
    role, content = given.get("role"), given.get("content")
    if role not in ROLES:
        raise refuse_value(where, f"{column}.role", role, f"one of {', '.join(ROLES)}")
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    calls = role == "assistant" and bool(given.get("tool_calls"))
    if not isinstance(content, str) and not (calls and content is None):
        raise refuse_value(where, f"{column}.content", content, "a text")
    if not calls and not str(content).strip():
        raise refuse_value(where, f"{column}.content", content, "a text that is not empty")
    message = {key: value for key, value in given.items() if value is not None}
    return message | {"content": content or ""}
