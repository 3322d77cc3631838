"""What passes between the policy and a task that speaks in messages: actions, tool calls, replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

Message = dict[str, Any]
"""As of the OpenAI chat format: ``role`` and ``content``; an assistant's also ``reasoning_content`` and ``tool_calls``,
a tool's ``tool_call_id`` and ``name``."""

ToolSchema = dict[str, Any]
"""``name``, ``description`` and ``parameters`` (JSON schema) of one tool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One tool call that an action asked for, well formed or not."""

    id: str
    """The model's own where its format has one, else ``call_<n>``."""
    name: str
    """Empty where it could not be read."""
    arguments: dict[str, Any]
    raw: str
    """Text of the call as the policy wrote it."""
    fault: str = ""
    """What is wrong with the form of the call, for the policy to read; empty for a well-formed one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One action of the policy, parsed.  ``ids`` are what was sampled, and go on into the context as they are."""

    ids: np.ndarray
    """int32[T]."""
    content: str
    thinking: str
    """Empty where there is none."""
    tool_calls: tuple[ToolCall, ...] = ()
    complete: bool = True
    """False for an action that no stop token ended."""

    @property
    def message(self) -> Message:
        """As an assistant's message, for rewards and for people; never rendered for the policy."""
        said: Message = {"role": "assistant", "content": self.content}
        if self.thinking:
            said["reasoning_content"] = self.thinking
        if self.tool_calls:
            said["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in self.tool_calls
            ]
        return said


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One message, as a person reads it."""

    role: str
    """``system``, ``user``, ``assistant``, ``tool``; empty where the tokens do not tell."""
    text: str
    thinking: str = ""
    tool_calls: tuple[str, ...] = ()
    """``name(argument="value")`` each, or the text of a malformed one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a task answers to an action: messages, or the end of the conversation with its reward."""

    messages: Sequence[Message] = ()
    """Of the tools and the user; none when done."""
    done: bool = False
    reward: float | None = None
    """Set when done.  A conversation that cannot be judged raises ``NotJudged`` instead."""
    success: bool | None = None
    turn_reward: float = 0.0
    """Of this turn alone, on any turn (docs/ALGORITHM.md, section 2)."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Name -> value of the parts that ``reward`` was made of: metrics ``reward/<name>``."""
    turn_limit: bool = False
    """Done because the turns ran out."""
    fingerprint: Sequence[int] = ()
    """Ids of what the action brought to light (``StepResult.fingerprint``)."""
    state_value: float | None = None
    """What the conversation is worth now, for the search alone (``StepResult.state_value``)."""


class MessageEpisode(Protocol):
    """One conversation in progress."""

    messages: Sequence[Message]
    """What the policy is shown first."""

    async def reply(self, action: Action) -> Reply:
        """Answers every action, a malformed one included; an exception ends this branch."""

    async def close(self) -> None:
        """Called once, however the conversation ended."""
