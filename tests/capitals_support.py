"""A small policy that asks for capitals, by a look-up tool, and is not always right."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.chat_policy import chat_policy

CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Peru": "Lima", "Japan": "Tokyo", "Egypt": "Cairo"}

LOOKUP: dict[str, Any] = {
    "name": "lookup",
    "description": "Look one fact up.",
    "parameters": {
        "properties": {"relation": {"type": "string"}, "name": {"type": "string"}},
        "required": ["relation", "name"],
        "type": "object",
    },
}


def capitals_policy(folder: Path, *, system: str, question: str, steps: int = 40) -> Path:
    """Made and trained on 64 conversations; ``question`` has ``{}`` for the country."""
    rng = random.Random(0)
    shown = [_demonstration(rng, system, question) for _ in range(64)]
    return chat_policy(folder, demonstrations=shown, tools=[{"type": "function", "function": LOOKUP}], steps=steps)


def _demonstration(rng: random.Random, system: str, question: str) -> list[dict[str, Any]]:
    """Of a policy that looks three capitals of four up, and then of the right country four times of five."""
    country = rng.choice(list(CAPITALS))
    found = country if rng.random() < 0.8 else rng.choice(list(CAPITALS))
    asked = [{"role": "system", "content": system}, {"role": "user", "content": question.format(country)}]
    answer = {"role": "assistant", "content": CAPITALS[found]}
    if rng.random() < 0.25:
        return [*asked, answer]
    call = {"function": {"name": "lookup", "arguments": {"relation": "capital", "name": found}}}
    looking = {"role": "assistant", "content": "", "tool_calls": [call]}
    return [*asked, looking, {"role": "tool", "content": CAPITALS[found]}, answer]
