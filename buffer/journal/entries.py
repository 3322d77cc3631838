"""The journal's entries beside the records of turns: trees, batches, evaluations, cursor, counters.  Pure.

Every value is msgpack of one of these structs, under a key that names its kind.  No field is a point in time:
monotonic clocks mean nothing to the process that reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from atpo_async.core.errors import SetupError
from atpo_async.core.tree import LeafReward
from atpo_async.core.vocabulary import Split

T = TypeVar("T")

TREE, BATCH, EVALUATION, MOMENTS = b"tree/", b"batch/", b"evaluation/", b"moments/"
RUN, COUNTS, DELAY_LINE = b"rest", b"since", b"line"
ALL_EVALUATIONS = b"evaluations"
"""Earlier programs have all of them in one value, under this key."""

KEEP = "keep its folder, turns that were acknowledged are in it, and put a copy of it that is whole in its place"


class _Entry(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    pass


class LeaseEntry(_Entry):
    """The lease of a tree."""

    holder: str
    seed: int
    epoch: int
    min_version: int
    lost: int
    waiting: bool
    eval_step: int


class ClosingEntry(_Entry):
    """The closing message of a tree some of whose turns are still missing."""

    lease_epoch: int
    num_turns: int
    failed_branches: int
    failures: dict[str, int]
    leaf_rewards: tuple[LeafReward, ...] | msgspec.UnsetType = msgspec.UNSET
    """Left out of what is written where there are none, so that an earlier program reads it."""


class PoolEntry(_Entry):
    """The pool's state of a tree, besides its turns."""

    priority: float
    uses: int
    limit: int
    entered: int


class ImitationEntry(_Entry):
    """One leaf of a tree that is kept to be imitated."""

    leaf: int
    reward: float
    entered: int
    uses: int
    spent_at: int | None
    """Step of the batch that used it up; it stays for a learner that falls back."""


class TreeStateEntry(_Entry):
    """One tree.  At most one of ``growing``, ``late`` and ``spent_at`` is set."""

    number: int
    task_index: int
    kind: Split
    failed_branches: int = 0
    attempts: int = 0
    lease: LeaseEntry | None = None
    growing: bool = False
    epoch: int = 0
    """Turns of this lease epoch are taken."""
    closed: ClosingEntry | None = None
    partial: tuple[int, int] | None = None
    """(uses, leaves) when it was last served before it had ended."""
    late: bool = False
    """It ended while the learner had an earlier state of it."""
    pool: PoolEntry | None = None
    """Ready, or with the learner."""
    spent_at: int | None = None
    """Step of the batch that used it up; the tree stays for a learner that falls back, with ``pool`` as it was."""
    imitated: tuple[ImitationEntry, ...] | msgspec.UnsetType = msgspec.UNSET
    """Its leaves that are kept to be imitated; with nothing else set, only the turns on their paths are there."""
    leaf_rewards: tuple[LeafReward, ...] | msgspec.UnsetType = msgspec.UNSET
    """Of a tree that was closed: in place of those in its turns.  Left out where there are none."""


class DrawnEntry(_Entry):
    """One tree of a batch."""

    tree_id: str
    task_index: int
    probability: float
    weight: float
    uses: int
    turn_ids: tuple[int, ...] | None = None
    """Those served, of a tree that still grew; None for all."""


class ServedRowEntry(_Entry):
    """One row for imitation of a batch."""

    tree_id: str
    leaf: int
    task_index: int
    advantage: float
    uses: int


class TreeSetEntry(_Entry):
    version: int
    tree_ids: tuple[str, ...]


class BatchEntry(_Entry):
    """One batch that was served to the learner."""

    batch_id: int
    step: int
    version: int
    num_ranks: int
    metrics: dict[str, float]
    drawn: tuple[DrawnEntry, ...]
    trained: tuple[int, ...]
    priorities: dict[str, float]
    confirmed: bool
    exact: TreeSetEntry | None = None
    means: dict[str, float] | msgspec.UnsetType = msgspec.UNSET
    """Only of a part of a batch, which a shard has."""
    rows: tuple[ServedRowEntry, ...] | msgspec.UnsetType = msgspec.UNSET
    """For imitation; left out of what is written where there are none."""


class RetryEntry(_Entry):
    task_index: int
    attempts: int


class RunEntry(_Entry):
    """Cursor, counters, versions."""

    incarnation: int = 0
    """How often the buffer of this run was started; part of tree ids, so that none is ever given twice."""
    next_task: int = 0
    next_number: int = 1
    next_batch: int = 1
    again: tuple[RetryEntry, ...] = ()
    given_up: int = 0
    published: int | None = None
    next_version: int = 0
    step: int = 0
    version: int = 0
    weights_endpoint: str = ""
    announce_endpoint: str = ""
    highest_priority: float = 1.0
    saved_step: int = 0
    tasks: dict[str, int] = {}
    retired: tuple[str, ...] = ()
    spreads: tuple[tuple[float, bool], ...] | msgspec.UnsetType = msgspec.UNSET
    """Of the trees that ended lately, and whether each was kept (``buffer.keep_share``); only where some are not."""
    promotions: int | msgspec.UnsetType = msgspec.UNSET
    """How often a copy of this journal took its place; part of tree ids, for the buffer that was lost may have been
    started more often than the copy knows.  Left out of what is written where there was none."""


class CountsEntry(_Entry):
    """Counted since the last batch."""

    produced: int = 0
    turns: int = 0
    counts: dict[str, int] = {}
    means: dict[str, tuple[float, float]] = {}


class EvaluationEntry(_Entry):
    step: int
    version: int
    num_tasks: int
    blocking: bool
    next_task: int
    results: dict[int, float | None]
    turns: int
    unknown: tuple[int, ...] = ()
    versions: tuple[int, int] | None = None
    parts: dict[str, tuple[float, int]] | msgspec.UnsetType = msgspec.UNSET
    """Left out of what is written where there is nothing, so that an earlier program reads it."""
    unjudged: int | msgspec.UnsetType = msgspec.UNSET


class DelayLineEntry(_Entry):
    """The delay line of ``staleness.exact_lag``."""

    whole: tuple[TreeSetEntry, ...]
    growing: tuple[int, int, tuple[str, ...], int] | None
    """(version, sets, trees, produced)."""
    version: int | None
    served: bool


def read_all(state: Mapping[bytes, bytes], prefix: bytes, kind: type[T]) -> dict[str, T]:
    """The values under all keys that begin with ``prefix``, by the rest of the key, in its order."""
    found = {}
    for key in sorted(key for key in state if key.startswith(prefix)):
        value = read(state, key, kind)
        assert value is not None
        found[key.removeprefix(prefix).decode()] = value
    return found


def dump(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


def read(state: Mapping[bytes, bytes], key: bytes, kind: type[T]) -> T | None:
    """The value under ``key``; None if there is none.  Raises SetupError if it is no ``kind``."""
    data = state.get(key)
    if data is None:
        return None
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise SetupError(
            f"the journal is damaged: {key.decode(errors='replace')!r} is no {kind.__name__} ({exc}); {KEEP}"
        ) from exc
