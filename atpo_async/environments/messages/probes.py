"""The conversations by which a chat template is known: what it writes for each, and where two texts first differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from atpo_async.environments.messages.types import Message, ToolSchema

TOOLS: tuple[ToolSchema, ...] = (
    {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name."},
                "days": {"type": "integer"},
                "units": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["city"],
        },
    },
    {"name": "clock", "description": "The time.", "parameters": {"type": "object", "properties": {}}},
)

CITY = {"city": "Örebro", "days": 3, "units": ["°C", "m/s"]}


@dataclass(frozen=True, slots=True)
class Probe:
    """One conversation to write."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSchema, ...] = ()
    opens: bool = True
    """The assistant is to speak next."""
    looks_back: bool = False
    """An answer without tools comes before a later question: some renderers keep there what their template drops."""


def enveloped(tools: tuple[ToolSchema, ...] | list[ToolSchema]) -> list[ToolSchema] | None:
    """As chat templates are given tools: ``{"type": "function", "function": …}``; None for none."""
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools] or None


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def tool(text: str, name: str, number: int = 0) -> Message:
    return {"role": "tool", "content": text, "name": name, "tool_call_id": f"functions.{name}:{number}"}


def assistant(text: str, *calls: tuple[str, Mapping[str, Any]], thinking: str = "") -> Message:
    said: Message = {"role": "assistant", "content": text}
    if thinking:
        said["reasoning_content"] = thinking
    if calls:
        said["tool_calls"] = [
            {"id": f"functions.{name}:{n}", "type": "function", "function": {"name": name, "arguments": dict(given)}}
            for n, (name, given) in enumerate(calls)
        ]
    return said


def probes() -> Iterator[Probe]:
    """Openings, tool cycles and answers, in the order of how much they tell families apart."""
    ask, rules = user("What is the weather in Örebro?"), system("Answer briefly.\nUse tools.")
    call = assistant("Let me look.", ("weather", CITY), thinking="I need the weather.")
    calls = assistant("", ("weather", CITY), ("clock", {}))
    results = (tool("-2 °C", "weather"), tool('{"hour": 7}', "clock", 1))
    yield Probe((rules, ask), TOOLS)
    yield Probe((ask,))
    yield Probe((rules, ask))
    yield Probe((ask,), TOOLS)
    yield Probe((rules, ask, call, results[0]), TOOLS)
    yield Probe((ask, calls, *results), TOOLS)
    yield Probe((ask, assistant("-2 °C", thinking="Cold.")), opens=False)
    yield Probe((rules, ask, call, results[0], assistant("Cold.")), TOOLS, opens=False)
    yield Probe((ask, assistant("Cold."), user("And tomorrow?")), looks_back=True)


def difference(one: str, other: str, around: int = 40) -> str:
    """The first place where two texts differ, as ``'…a' where … '…b'``."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(0, at - around // 2)
    return f"{one[start : at + around]!r} and then {other[start : at + around]!r}"
