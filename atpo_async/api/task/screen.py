"""What ``atpo task`` prints: the task as messages, the ids, the stop tokens, and what each reward says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from atpo_async.api.task.voice import Voice
from atpo_async.core.vocabulary import Split
from atpo_async.environments.base import StepResult
from atpo_async.environments.checked import CheckedEnvironment
from atpo_async.environments.messages.types import Message
from atpo_async.report.conversation import STYLES

MOST_IDS = 2000
"""Ids printed of one part of a conversation."""


class Screen:
    """Prints a played task.

    Args:
        console: where to.
        voice: for the text of stop tokens.
        with_ids: the ids of every part as well.
    """

    def __init__(self, console: Console, voice: Voice, *, with_ids: bool) -> None:
        self._console = console
        self._voice = voice
        self._with_ids = with_ids
        self._earned = 0.0
        """What the turns have earned of their own so far."""

    def headline(self, label: str, environment: CheckedEnvironment, split: Split, index: int) -> None:
        """What is played, how many tasks there are, and what ends an action."""
        counts = ", ".join(f"{_count(environment.num_tasks(name))} {name}" for name in _splits(environment))
        self._console.print(Text(f"{label}, task {index} ({split}); tasks: {counts}", style="bold underline"))
        stops = ", ".join(f"{token} {self._voice.token(token)!r}" for token in self._voice.stop_token_ids)
        self._line("stop tokens", stops)
        if self._voice.stop_strings:
            self._line("stop texts", ", ".join(map(repr, self._voice.stop_strings)))
        if (chat := self._voice.chat) is not None:
            self._line("chat format", chat.name)
            for tool in chat.tools:
                inner: Mapping[str, Any] = tool.get("function", tool)
                properties: Mapping[str, Any] = inner.get("parameters", {}).get("properties", {})
                parameters = ", ".join(f"{each}{_kind(about)}" for each, about in properties.items())
                self._line("tool", f"{inner['name']}({parameters}): {inner.get('description', '')}")

    def example_call(self) -> str:
        """How a call of one of the task's tools is typed."""
        tools = self._voice.chat.tools if self._voice.chat is not None else ()
        inner: Mapping[str, Any] = tools[0].get("function", tools[0]) if tools else {}
        names = list(inner.get("parameters", {}).get("properties", {})) or ["argument"]
        return f'/{inner.get("name", "name")} {{"{names[0]}": …}}'

    def opened(self, messages: Sequence[Message], prompt: np.ndarray) -> None:
        for message in messages:
            self._message(message)
        self._ids("prompt", prompt)

    def acted(self, message: Message, ids: np.ndarray) -> None:
        self._message(message)
        self._ids("action", ids)

    def answered(self, messages: Sequence[Message], result: StepResult) -> None:
        for message in messages:
            self._message(message)
        self._ids("observation", result.observation)
        if result.fingerprint:
            self._line("fingerprint", ", ".join(map(str, result.fingerprint)))
        self._earns(result)

    def _earns(self, result: StepResult) -> None:
        if result.turn_reward:
            self._earned += result.turn_reward
            self._line("turn reward", f"{result.turn_reward:g}")

    def ended(self, result: StepResult) -> None:
        """The rewards, each by its name."""
        self._earns(result)
        for name, value in result.rewards.items():
            self._line(f"reward/{name}", f"{value:g}")
        success = "unknown" if result.success is None else "yes" if result.success else "no"
        self._line("reward", f"{result.reward:g} for the outcome", style="bold")
        if self._earned:
            self._line("turn rewards", f"{self._earned:g} together, which come on top of it")
        self._line("success", success)
        self._line("end", result.end.replace("_", " "))

    def note(self, line: str) -> None:
        self._line("note", line, style="yellow")

    def failed(self, text: str, where: str) -> None:
        """As the terminal of a run names it: there it costs this branch."""
        self._line("failed", text, style="red")
        if where:
            self._line("at", where, style="red")
        self.note("in training this branch is left out and counted; a fault in every task stops the run")

    def _message(self, message: Message) -> None:
        role = message.get("role") or "tokens"
        if thinking := message.get("reasoning_content"):
            self._line(f"{role} thinks", str(thinking), style="dim italic")
        content = message.get("content")
        calls = message.get("tool_calls") or []
        if content or not (calls or thinking):
            self._line(role, content if isinstance(content, str) else json.dumps(content), style=STYLES.get(role, ""))
        for call in calls:
            inner = call.get("function", call)
            arguments = json.dumps(inner.get("arguments", {}), ensure_ascii=False)
            self._line(f"{role} calls", f"{inner.get('name', '')}({arguments})", style=STYLES.get(role, ""))

    def _ids(self, name: str, ids: np.ndarray) -> None:
        if self._with_ids:
            shown = " ".join(map(str, ids[:MOST_IDS].tolist()))
            more = f" … and {len(ids) - MOST_IDS} more" if len(ids) > MOST_IDS else ""
            self._line(f"{name} ids", f"({len(ids)}) {shown}{more}", style="dim")

    def _line(self, name: str, text: str, *, style: str = "") -> None:
        line = Text(f"{name}: ", style="magenta")
        line.append(text, style=style)
        self._console.print(line)


def _splits(environment: CheckedEnvironment) -> tuple[Split, ...]:
    """Those that the environment has; one without held-out tasks raises for them."""
    found: list[Split] = ["train"]
    try:
        environment.num_tasks("eval")
    except Exception:
        return tuple(found)
    return (*found, "eval")


def _count(number: int | None) -> str:
    return "endless" if number is None else f"{number:,}"


def _kind(about: Any) -> str:
    """``: string``, or the values that a parameter may have; empty where the schema does not say."""
    if not isinstance(about, Mapping):
        return ""
    if isinstance(values := about.get("enum"), list):
        return ": " + " | ".join(json.dumps(value, ensure_ascii=False) for value in values)
    return f": {about['type']}" if isinstance(about.get("type"), str) else ""
