"""Turn trees: parents, leaves, paths, versions.

Source: AT2PO (arXiv 2601.04767), section 3.  A turn is one (observation, action) pair; the root is the
prompt and is no turn.  Shapes: O observation tokens, T action tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from atpo_async.core.bounds import Fingerprint, Id, Logprobs, Name, Number, Seconds, Tokens, TurnId, Version
from atpo_async.core.vocabulary import EndReason, Role

ROOT = 0
"""The turn id that stands for the prompt.  Turns of a tree are numbered from 1 in the order they finished."""


class VersionSpan(msgspec.Struct, frozen=True, array_like=True):
    """Action tokens ``start:end`` (end exclusive) were sampled by the weights ``version``."""

    version: Version
    start: Id
    end: Id


class Turn(msgspec.Struct, frozen=True, kw_only=True, tag="turn", forbid_unknown_fields=True, eq=False):
    """One finished turn as its actor recorded it.  Produced by actors, stored by the buffer, read by the learner.

    The key is ``(run, tree_id, turn_id)``: the same bytes again change nothing, other bytes are a conflict.
    """

    run: Name
    tree_id: Name
    turn_id: TurnId
    """1, 2, … in the order the turns of this tree finished; a parent's id is below its children's."""
    parent_id: Id
    """``ROOT`` for a first turn."""
    lease_epoch: Id
    expansion_round: Id
    """0 for the initial rollouts, r for a turn grown in the r-th round of branches; in a group the member's number."""
    observation: Tokens
    """int32[O]: what the environment returned since the parent turn; empty for first turns, in a group their prompt."""
    action: Tokens
    """int32[T], T >= 1: what the policy generated, stop token included."""
    logprobs: Logprobs
    """float32[T]: log-probability of each action token under the distribution that sampled it."""
    spans: tuple[VersionSpan, ...]
    """Ascending, without gaps, covering 0:T."""
    end: EndReason
    reward: Number | None
    """Set on leaves, ``None`` on inner turns."""
    success: bool | None
    generate_s: Seconds
    environment_s: Seconds
    turn_reward: Number = 0.0
    """Of this turn alone, beside what its chain earns at its end (ALGORITHM, section 2); on any turn."""
    rewards: dict[Name, Number] = {}
    """Name -> value of the parts that ``reward`` was made of; on leaves only, and only for metrics."""
    fingerprint: Fingerprint = ()
    """Ids of what the action brought to light, such as passages that it retrieved, each once; only for expansion."""
    state_value: Number | None = None
    """What the environment holds the state after the action to be worth; only for expansion, never for credit."""
    role: Role = ""
    """In a group: of the chain that the turn belongs to.  A group is stored as one tree with an empty prompt: its trees
    are the first turns that share an observation, which is their prompt, and what follows them."""

    @property
    def entropy(self) -> float:
        """H(n), nats: mean negative behaviour log-probability over the action's tokens (ALGORITHM, section 1)."""
        # What np.mean computes, in half of its time; it is asked for of every turn, several times.
        return float(-(np.add.reduce(self.logprobs, dtype=np.float64) / len(self.logprobs)))

    @property
    def is_leaf(self) -> bool:
        return self.end != "continue" and self.end != "pruned"

    @property
    def oldest_version(self) -> int:
        return min(span.version for span in self.spans)

    @property
    def newest_version(self) -> int:
        return max(span.version for span in self.spans)

    def token_versions(self) -> np.ndarray:
        """int64[T]: the version that sampled each action token."""
        return np.repeat(
            np.array([s.version for s in self.spans], dtype=np.int64), [s.end - s.start for s in self.spans]
        )


class LeafReward(msgspec.Struct, frozen=True, array_like=True):
    """What a leaf earned, known only when its tree was closed: in place of ``Turn.reward``."""

    turn_id: TurnId
    reward: Number


@dataclass(frozen=True, slots=True)
class TurnTree:
    """A prompt and its turns.  Immutable; turns are kept sorted by id, so a parent comes before its children."""

    tree_id: str
    task_index: int
    prompt: np.ndarray
    """int32[P]."""
    turns: tuple[Turn, ...]
    failed_branches: int = 0
    _by_id: dict[int, Turn] = field(init=False, repr=False, compare=False)
    _children: dict[int, tuple[int, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.turns, key=lambda t: t.turn_id))
        object.__setattr__(self, "turns", ordered)
        object.__setattr__(self, "_by_id", {t.turn_id: t for t in ordered})
        children: dict[int, list[int]] = {ROOT: []}
        for turn in ordered:
            children.setdefault(turn.turn_id, [])
            children.setdefault(turn.parent_id, []).append(turn.turn_id)
        object.__setattr__(self, "_children", {k: tuple(v) for k, v in children.items()})

    def __iter__(self) -> Iterator[Turn]:
        return iter(self.turns)

    def __len__(self) -> int:
        return len(self.turns)

    def __getitem__(self, turn_id: int) -> Turn:
        return self._by_id[turn_id]

    def __contains__(self, turn_id: object) -> bool:
        return turn_id in self._by_id

    def children(self, turn_id: int) -> tuple[int, ...]:
        return self._children.get(turn_id, ())

    def siblings(self, turn_id: int) -> tuple[int, ...]:
        """Other turns with the same parent."""
        return tuple(t for t in self._children[self._by_id[turn_id].parent_id] if t != turn_id)

    def leaves(self) -> tuple[Turn, ...]:
        return tuple(t for t in self.turns if t.is_leaf)

    def path(self, turn_id: int) -> tuple[Turn, ...]:
        """From the first turn down to ``turn_id``, both included; empty for the root."""
        steps: list[Turn] = []
        while turn_id != ROOT:
            turn = self._by_id[turn_id]
            steps.append(turn)
            turn_id = turn.parent_id
        return tuple(reversed(steps))

    def context(self, turn_id: int) -> np.ndarray:
        """int32: all tokens up to and including the action of ``turn_id`` (the prompt alone for the root)."""
        parts = [self.prompt]
        for turn in self.path(turn_id):
            parts += [turn.observation, turn.action]
        tokens: np.ndarray = np.concatenate(parts).astype(np.int32, copy=False)
        return tokens

    def pruned(self) -> TurnTree:
        """Without turns that lead to no finished leaf (failed branches, chains still growing)."""
        keep = {t.turn_id for leaf in self.leaves() for t in self.path(leaf.turn_id)}
        return TurnTree(
            self.tree_id, self.task_index, self.prompt, tuple(t for t in self.turns if t.turn_id in keep),
            self.failed_branches,
        )  # fmt: skip


def is_fresh(turn: Turn, *, current: int, max_lag: int) -> bool:
    """Whether the oldest token of ``turn`` is at most ``max_lag`` versions older than ``current``."""
    return current - turn.oldest_version <= max_lag


def lag_versions(turn: Turn, *, current: int) -> int:
    """Version lag: the learner's version when the batch is consumed minus the oldest version in the turn."""
    return current - turn.oldest_version


def spans_of(token_versions: Sequence[int] | np.ndarray) -> tuple[VersionSpan, ...]:
    """Run-length form of one version per token."""
    spans: list[VersionSpan] = []
    for i, version in enumerate(int(v) for v in token_versions):
        if spans and spans[-1].version == version:
            spans[-1] = VersionSpan(version, spans[-1].start, i + 1)
        else:
            spans.append(VersionSpan(version, i, i + 1))
    return tuple(spans)
