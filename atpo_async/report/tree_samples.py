"""A few trees of a run for its report: how the learner writes them, and which of them the report shows.

``trees.jsonl`` in the run folder, one object a line:
``{"tree_id", "step", "version", "prompt", "turns": [{"id", "parent", "entropy", "value", "reward", "action",
"observation", "round", "versions"}]}``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from atpo_async.core.tree import ROOT
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


def append_tree_sample(
    path: Path, *, tree_id: str, step: int, version: int, prompt: str, turns: Iterable[TreeTurn]
) -> None:
    """Append one tree to ``trees.jsonl``; a line is one write."""
    data = {
        "tree_id": tree_id,
        "step": step,
        "version": version,
        "prompt": prompt,
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
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [sample for line in lines if (sample := _parse(line)) is not None]


def _parse(line: str) -> TreeSample | None:
    try:
        data: Any = json.loads(line)
        turns = tuple(
            TreeTurn(
                id=int(turn["id"]),
                parent=int(turn["parent"]),
                entropy=float(turn["entropy"] or 0.0),
                value=None if turn.get("value") is None else float(turn["value"]),
                reward=None if turn.get("reward") is None else float(turn["reward"]),
                action=str(turn["action"]),
                observation=str(turn.get("observation") or ""),
                round=int(turn.get("round", 0)),
                versions=tuple(int(v) for v in turn.get("versions", ())),
            )
            for turn in data["turns"]
        )
        known = {ROOT} | {turn.id for turn in turns}
        if any(turn.parent not in known or turn.parent >= turn.id for turn in turns):
            return None
        return TreeSample(
            tree_id=str(data["tree_id"]),
            step=int(data["step"]),
            version=int(data["version"]),
            prompt=str(data["prompt"]),
            turns=turns,
        )
    except (ValueError, KeyError, TypeError):
        return None


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
