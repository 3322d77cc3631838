"""Text to the ids of an action, and ids to text, for a task that a person plays."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atpo_async.core.errors import ConfigError
from atpo_async.core.texts import of_type, of_value
from atpo_async.environments.messages.chat_format import ChatFormat
from atpo_async.environments.messages.library import FastTokenizer, load_tokenizer
from atpo_async.environments.messages.types import Message

Said = str | Mapping[str, Any]
"""An action as it is given: text, or ``{"content", "tool_calls": [{"name", "arguments"}]}``."""

FORM = '{"content": "…", "tool_calls": [{"name": "…", "arguments": {…}}]}'


class Voice:
    """Writes and reads the tokens of one policy.

    Args:
        folder: of the policy.
        chat: of the environment, where it speaks in messages; without, an action is the ids of its text.
        stop_token_ids: of the environment; an action that ends in none of them gets the first.
        stop_strings: of the environment; an action that has one of them needs no stop token.
    """

    def __init__(
        self, folder: Path, chat: ChatFormat | None, stop_token_ids: Sequence[int], stop_strings: Sequence[str] = ()
    ) -> None:
        self.chat = chat
        self.stop_token_ids = tuple(stop_token_ids)
        self.stop_strings = tuple(stop_strings)
        self._tokenizer: FastTokenizer = load_tokenizer(folder)

    def text(self, ids: np.ndarray) -> str:
        """Text of ids, special tokens kept."""
        return self._tokenizer.decode(np.asarray(ids).tolist())

    def token(self, token_id: int) -> str:
        """Text of one token."""
        return self._tokenizer.decode([token_id])

    def action(self, said: Said, *, raw: bool = False) -> np.ndarray:
        """int32[T]: the ids of an action, as the policy would sample them.

        Args:
            said: as it was given.  A text ``/name {"argument": "value"}`` is a call of that tool.
            raw: the text is the action's own, special tokens by name.

        Raises ConfigError for an action that cannot be written.
        """
        if self.chat is None or raw:
            return self._ended(self._raw(said))
        message = assistant(_call(said) if isinstance(said, str) else said)
        return self._ended(self.chat.written(message))

    def _raw(self, said: Said) -> np.ndarray:
        if not isinstance(said, str):
            raise ConfigError(
                f"an action is {of_value(said)} ({of_type(said)}); expected text: this task has no messages"
            )
        return np.array(self._tokenizer.encode(said), dtype=np.int32)

    def _ended(self, ids: np.ndarray) -> np.ndarray:
        if ids.size and int(ids[-1]) in self.stop_token_ids:
            return ids
        if any(stop in self.text(ids) for stop in self.stop_strings):
            return ids
        return np.append(ids, np.int32(self.stop_token_ids[0]))


def _call(text: str) -> Said:
    """``/search {"query": "…"}`` as a tool call; any other text as it is."""
    if not text.startswith("/") or text.startswith("//"):
        return text.removeprefix("/") if text.startswith("//") else text
    name, _, words = text[1:].partition(" ")
    try:
        arguments = json.loads(words or "{}")
    except ValueError as exc:
        raise ConfigError(f'{text!r}: {exc}; a call is written /{name or "name"} {{"argument": "value"}}') from None
    return {"tool_calls": [{"name": name, "arguments": arguments}]}


def assistant(said: Said) -> Message:
    """An assistant's message.  Raises ConfigError where ``said`` has another form."""
    if isinstance(said, str):
        return {"role": "assistant", "content": said}
    if not isinstance(said, Mapping):
        raise ConfigError(f"an action is {of_value(said)} ({of_type(said)}); expected text, or {FORM}")
    if "name" in said and not set(said) - {"name", "arguments"}:  # one call alone
        said = {"tool_calls": [said]}
    unknown = sorted(set(said) - {"content", "tool_calls", "reasoning_content", "role"})
    if unknown:
        raise ConfigError(f"an action has {', '.join(unknown)}; expected {FORM}")
    message: Message = {"role": "assistant", "content": said.get("content") or ""}
    if said.get("reasoning_content"):
        message["reasoning_content"] = said["reasoning_content"]
    if calls := said.get("tool_calls"):
        message["tool_calls"] = [_function(call, number) for number, call in enumerate(calls)]
    return message


def _function(call: Any, number: int) -> dict[str, Any]:
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise ConfigError(f"tool_calls[{number}] is {of_value(call)}; expected {FORM}")
    arguments = inner.get("arguments", {})
    if not isinstance(arguments, Mapping):
        raise ConfigError(f"tool_calls[{number}]: arguments is {of_value(arguments)}; expected an object")
    return {
        "id": f"call_{number}",
        "type": "function",
        "function": {"name": inner["name"], "arguments": dict(arguments)},
    }
