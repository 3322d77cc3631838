"""Texts and messages as token ids of the policy, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.core.texts import of_error
from atpo_async.environments.messages.controls import Controls
from atpo_async.environments.messages.types import Message
from atpo_async.models.tokenizers import decode, load_tokenizer

STYLES = ("auto", "chat", "plain")


class Tokens:
    """The tokenizer of one policy.

    Args:
        folder: of the policy.
        style: of prompts: ``chat`` by the tokenizer's template, ``plain`` the messages' texts alone, for base models,
            ``auto``: by the template where there is one.
        template_options: passed to the chat template, such as ``enable_thinking``.

    Raises:
        SetupError: there is no tokenizer, or ``chat`` is asked for and it has no template.
        ConfigError: there is no such style.
    """

    def __init__(self, folder: Path, *, style: str = "auto", template_options: Mapping[str, Any] | None = None) -> None:
        if style not in STYLES:
            raise ConfigError(f"environment.options.prompt_style must be one of {', '.join(STYLES)}; got {style!r}")
        self._tokenizer = load_tokenizer(folder)
        self._template_options = dict(template_options or {})
        has_template = bool(getattr(self._tokenizer, "chat_template", None))
        if style == "chat" and not has_template:
            raise SetupError(
                f"environment.options.prompt_style = 'chat': the tokenizer of {folder} has no chat template; use "
                "prompt_style = 'plain' for a base model"
            )
        self._chats = has_template and style != "plain"
        self.controls = Controls(self._tokenizer.get_added_vocab())
        self.stop_token_ids = ends_of_turn(folder, self._tokenizer.eos_token_id)

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """int32[P], ending where the policy goes on.  Raises ValueError where the chat template refuses them."""
        if self._chats:
            try:
                ids = self._tokenizer.apply_chat_template(
                    list(messages), add_generation_prompt=True, tokenize=True, return_dict=False,
                    **self._template_options,
                )  # fmt: skip
            except Exception as exc:  # a template raises what it likes
                raise ValueError(f"the chat template refuses the prompt: {of_error(exc)}") from exc
        else:
            ids = self._tokenizer.encode("\n".join(message["content"] for message in messages))
        return np.array(ids, dtype=np.int32)

    def encode(self, text: str) -> np.ndarray:
        """int32[N] of a text that goes on where another ended."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """Special tokens keep their texts."""
        return decode(self._tokenizer, np.asarray(ids).tolist())

    def action_text(self, ids: np.ndarray) -> str:
        """Of an action, without the token that ended the turn."""
        action = np.asarray(ids).tolist()
        if action and action[-1] in self.stop_token_ids:
            action = action[:-1]
        return decode(self._tokenizer, action)


def ends_of_turn(folder: Path, eos_token_id: int | None) -> tuple[int, ...]:
    """The tokens that end a turn, by the tokenizer and by the model's generation_config.json and config.json.

    Raises SetupError where none of them names one.
    """
    found: list[int] = [] if eos_token_id is None else [int(eos_token_id)]
    for name in ("generation_config.json", "config.json"):
        try:
            said = json.loads((folder / name).read_text(encoding="utf-8"))
            value = said.get("eos_token_id", said.get("text_config", {}).get("eos_token_id"))
        except (OSError, ValueError, AttributeError):
            continue
        found += [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
    if not found:
        raise SetupError(
            f"neither the tokenizer of {folder} nor its generation_config.json or config.json names an eos_token_id, "
            "the token that ends a turn"
        )
    return tuple(dict.fromkeys(found))
