"""Scripted trees: what the tree of a task looks like, as a function of (seed, task), and its messages and hashes.

Whatever reaches the learner can be checked to the byte, by whom and in how many attempts it was made.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from atpo_async.core.tree import ROOT, Turn, TurnTree, VersionSpan
from atpo_async.wire.messages import (
    Lease,
    TreeClosed,
    TreeOpened,
)

Kind = Literal["plain", "dull", "barren"]
"""A tree to learn from; one whose leaves all earn the same; a task that cannot be started."""

NOTHING = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Part:
    """One turn of a scripted tree."""

    turn_id: int
    parent_id: int
    expansion_round: int
    observation: np.ndarray
    action: np.ndarray
    logprobs: np.ndarray
    reward: float | None

    @property
    def is_leaf(self) -> bool:
        return self.reward is not None


@dataclass(frozen=True, slots=True)
class Planned:
    """The tree of one task, whoever grows it."""

    kind: Kind
    prompt: np.ndarray
    parts: tuple[Part, ...]
    failed_branches: int


@functools.cache
def planned(seed: int, task: int) -> Planned:
    """Three or four chains of up to three turns, interleaved; a branch from a turn within; now and then a chain that
    ends in the middle, as a failed one does."""
    rng = np.random.default_rng([seed, task])
    kind: Kind = "barren" if task % 13 == 12 else "dull" if task % 11 == 7 else "plain"
    prompt = rng.integers(0, 500, size=int(rng.integers(2, 9)), dtype=np.int32)
    if kind == "barren":
        return Planned(kind, prompt, (), 1)
    lengths = [int(n) for n in rng.integers(1, 4, size=int(rng.integers(3, 5)))]
    fails = lengths.index(max(lengths)) if max(lengths) > 1 and rng.random() < 0.3 else -1
    last = [ROOT] * len(lengths)
    depth = [0] * len(lengths)
    parts: list[Part] = []
    leaves = 0

    def grow(chain: int, parent: int, number: int, ends: bool) -> None:
        nonlocal leaves
        size = int(rng.integers(2, 13))
        reward = None
        if ends:
            # Two leaves that differ come first: a tree cut short after them is one to learn from too.
            reward = 0.5 if kind == "dull" else float(leaves % 2) if leaves < 2 else float(np.round(rng.random(), 3))
            leaves += 1
        parts.append(
            Part(
                turn_id=len(parts) + 1,
                parent_id=parent,
                expansion_round=number,
                observation=NOTHING if parent == ROOT else rng.integers(0, 500, size=size, dtype=np.int32),
                action=rng.integers(0, 500, size=size, dtype=np.int32),
                logprobs=-rng.random(size, dtype=np.float32),
                reward=reward,
            )
        )
        last[chain] = len(parts)

    while open_chains := [c for c, n in enumerate(lengths) if depth[c] < n - (c == fails)]:
        chain = int(rng.choice(open_chains))
        depth[chain] += 1
        grow(chain, last[chain], 0, ends=depth[chain] == lengths[chain])
    inner = [part.turn_id for part in parts if not part.is_leaf]
    if inner:
        grow(0, int(rng.choice(inner)), 1, ends=True)
    return Planned(kind, prompt, tuple(parts), int(fails >= 0))


def turn_of(part: Part, *, run: str, tree_id: str, epoch: int, version: int) -> Turn:
    return Turn(
        run=run,
        tree_id=tree_id,
        turn_id=part.turn_id,
        parent_id=part.parent_id,
        lease_epoch=epoch,
        expansion_round=part.expansion_round,
        observation=part.observation,
        action=part.action,
        logprobs=part.logprobs,
        spans=(VersionSpan(version, 0, len(part.action)),),
        end="done" if part.is_leaf else "continue",
        reward=part.reward,
        success=None if part.reward is None else part.reward > 0.5,
        generate_s=0.0,
        environment_s=0.0,
    )


def messages_of(lease: Lease, plan: Planned, *, run: str, version: int) -> list[TreeOpened | Turn | TreeClosed]:
    """All that an actor sends for a lease, in order, less the turns that were committed before it."""
    keys: dict[str, Any] = {"run": run, "tree_id": lease.tree_id}
    there = {turn.turn_id for turn in lease.committed}
    found: list[TreeOpened | Turn | TreeClosed] = []
    if plan.kind != "barren":
        found.append(TreeOpened(**keys, lease_epoch=lease.epoch, prompt=plan.prompt))
    found += [
        turn_of(part, **keys, epoch=lease.epoch, version=version) for part in plan.parts if part.turn_id not in there
    ]
    failures = {"environment_failed": plan.failed_branches} if plan.failed_branches else {}
    found.append(
        TreeClosed(
            **keys,
            lease_epoch=lease.epoch,
            num_turns=len(plan.parts),
            failed_branches=plan.failed_branches,
            failures=failures,
        )
    )
    return found


def hash_of(turn: Turn | Part) -> str:
    """Of all that the script decides: not of who made it, when, and under which version."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(repr((turn.turn_id, turn.parent_id, turn.expansion_round, turn.reward)).encode())
    for array in (turn.observation, turn.action, turn.logprobs):
        digest.update(f"{array.dtype.str}{len(array)}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def tree_hashes(prompt: np.ndarray, turns: Iterable[Turn | Part]) -> list[str]:
    first = hashlib.blake2b(np.ascontiguousarray(prompt, dtype=np.int32).tobytes(), digest_size=12).hexdigest()
    return [first, *(hash_of(turn) for turn in turns)]


@functools.cache
def possible_trees(seed: int, task: int) -> dict[tuple[str, ...], int]:
    """What a batch may hold of a task: its hashes -> turns it lacks.

    A tree whose holder was lost is served without the chains it had open, once it has two leaves; nothing else is.
    """
    plan = planned(seed, task)
    found: dict[tuple[str, ...], int] = {}
    for count in range(1, len(plan.parts) + 1):
        turns = [turn_of(p, run="r", tree_id="t", epoch=0, version=0) for p in plan.parts[:count]]
        tree = TurnTree("t", task, plan.prompt, tuple(turns)).pruned()
        if len(tree.leaves()) >= 2:
            found[tuple(tree_hashes(plan.prompt, tree))] = len(plan.parts) - count
    return found
