"""A few trees of a run as text: how the learner writes them, and how the report and ``atpo trees`` read them.

``trees.jsonl`` in the run folder, one object a line:
``{"tree_id", "task", "environment", "step", "version", "prompt", "messages", "turns": [{"id", "parent", "entropy",
"value", "reward", "action", "observation", "round", "versions", "turn_reward", "rewards", "success", "end",
"fingerprint", "said", "heard"}]}``.  ``messages``, ``heard`` and ``said`` hold the prompt, a turn's observation and its
action as messages ``{"role", "text", "thinking", "tool_calls"}``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from atpo_async.core.tree import ROOT
from atpo_async.environments.messages.types import Shown
from atpo_async.run.files import Appended


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeTurn:
    """One turn, readable."""

    id: int
    parent: int
    """0 for a first turn."""
    entropy: float
    """H(n), nats a token."""
    value: float | None
    reward: float | None
    """None on inner turns."""
    action: str
    observation: str
    """What the environment returned before the action; empty for first turns."""
    round: int
    versions: tuple[int, ...]
    """Those that sampled its tokens, ascending."""
    turn_reward: float = 0.0
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Name -> value of the parts of a leaf's reward."""
    success: bool | None = None
    end: str = ""
    """Why the chain ended here; ``continue`` where it went on, empty where it was not recorded."""
    fingerprint: tuple[int, ...] = ()
    """Ids of what the action brought to light."""
    said: Shown | None = None
    """The action as a message; None in runs that recorded text only."""
    heard: tuple[Shown, ...] = ()
    """The observation as messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeSample:
    """One tree."""

    tree_id: str
    step: int
    """The learner's step that trained on it."""
    version: int
    """The learner's version then."""
    prompt: str
    turns: tuple[TreeTurn, ...]
    task: int | None = None
    """Index of the task; None where it was not recorded."""
    environment: str = ""
    """Label of its environment where the run has several."""
    messages: tuple[Shown, ...] = ()
    """The prompt as messages."""

    @property
    def leaves(self) -> tuple[TreeTurn, ...]:
        """Turns at which a chain ended."""
        return tuple(turn for turn in self.turns if turn.reward is not None)


def append_tree_sample(
    path: Path,
    *,
    tree_id: str,
    step: int,
    version: int,
    prompt: str,
    turns: Iterable[TreeTurn],
    task: int | None = None,
    environment: str = "",
    messages: Sequence[Shown] = (),
) -> None:
    """Append one tree to ``trees.jsonl``; a line is one write."""
    data = {
        "tree_id": tree_id,
        "task": task,
        "environment": environment,
        "step": step,
        "version": version,
        "prompt": prompt,
        "messages": [asdict(message) for message in messages],
        "turns": [asdict(turn) for turn in turns],
    }
    Appended(json.dumps(_finite(data), separators=(",", ":"), ensure_ascii=False).encode() + b"\n").write_to(path)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_tree_samples(path: Path) -> list[TreeSample]:
    """All that can be read; broken lines are left out."""
    try:
        lines = path.read_bytes().split(b"\n")  # text may hold other line ends
    except OSError:
        return []
    found = (_parse(line.decode(encoding="utf-8", errors="replace")) for line in lines if line)
    return [sample for sample in found if sample is not None]


def _parse(line: str) -> TreeSample | None:
    try:
        data: Any = json.loads(line)
        turns = tuple(_turn(turn) for turn in data["turns"])
        known = {ROOT} | {turn.id for turn in turns}
        if any(turn.parent not in known or turn.parent >= turn.id for turn in turns):
            return None
        return TreeSample(
            tree_id=str(data["tree_id"]),
            step=int(data["step"]),
            version=int(data["version"]),
            prompt=str(data["prompt"]),
            turns=turns,
            task=None if data.get("task") is None else int(data["task"]),
            environment=str(data.get("environment") or ""),
            messages=_messages(data.get("messages")),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _turn(turn: Any) -> TreeTurn:
    said = turn.get("said")
    return TreeTurn(
        id=int(turn["id"]),
        parent=int(turn["parent"]),
        entropy=float(turn["entropy"] or 0.0),
        value=None if turn.get("value") is None else float(turn["value"]),
        reward=None if turn.get("reward") is None else float(turn["reward"]),
        action=str(turn["action"]),
        observation=str(turn.get("observation") or ""),
        round=int(turn.get("round", 0)),
        versions=tuple(int(v) for v in turn.get("versions", ())),
        turn_reward=float(turn.get("turn_reward") or 0.0),
        rewards={str(name): float(value) for name, value in (turn.get("rewards") or {}).items() if value is not None},
        success=None if turn.get("success") is None else bool(turn["success"]),
        end=str(turn.get("end") or ""),
        fingerprint=tuple(int(found) for found in turn.get("fingerprint") or ()),
        said=None if said is None else _messages([said])[0],
        heard=_messages(turn.get("heard")),
    )


def _messages(found: Any) -> tuple[Shown, ...]:
    return tuple(
        Shown(
            role=str(message["role"]),
            text=str(message["text"]),
            thinking=str(message.get("thinking") or ""),
            tool_calls=tuple(str(call) for call in message.get("tool_calls") or ()),
        )
        for message in found or ()
    )


def choose(samples: Sequence[TreeSample], count: int = 2) -> list[TreeSample]:
    """An early and a late tree, rather ones that branch and whose leaves differ in reward.  Pure."""

    def interest(sample: TreeSample) -> tuple[bool, bool, bool]:
        rewards = {turn.reward for turn in sample.turns if turn.reward is not None}
        mixed_versions = any(len(turn.versions) > 1 for turn in sample.turns)
        return len(rewards) > 1, any(turn.round for turn in sample.turns), mixed_versions

    ordered = sorted(samples, key=lambda sample: (sample.step, sample.tree_id))
    chosen = []
    for part in range(count):
        piece = ordered[part * len(ordered) // count : (part + 1) * len(ordered) // count]
        if piece:
            chosen.append(max(piece, key=interest))
    return chosen
