"""Batches that were served to the learner, until a checkpoint of it covers them.  Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import msgspec
import numpy as np
from msgspec import UNSET

from atpo_async.wire import codec
from atpo_async.wire.messages import Batch, BatchRow, BatchTree, TreeOpened
from atpo_async.wire.records import TurnRecords, unpack
from buffer.batches.delay_line import TreeSet
from buffer.imitation.store import RowKey
from buffer.journal.entries import BatchEntry, DrawnEntry, ServedRowEntry
from buffer.trees.index import Place, TreeEntry, places_of


@dataclass(slots=True)
class ServedTree:
    """One tree of a batch that was served to the learner."""

    tree_id: str
    task_index: int
    probability: float
    weight: float
    uses: int
    """This time included."""
    turn_ids: tuple[int, ...] | None
    """Those served, of a tree that still grew; None for all."""

    def snapshot(self) -> DrawnEntry:
        return DrawnEntry(
            tree_id=self.tree_id, task_index=self.task_index, probability=self.probability, weight=self.weight,
            uses=self.uses, turn_ids=self.turn_ids,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ServedRow:
    """One row for imitation of a batch."""

    key: RowKey
    task_index: int
    advantage: float
    """As the medians were when the batch was made."""
    uses: int
    """This time included."""

    def snapshot(self) -> ServedRowEntry:
        tree_id, leaf = self.key
        return ServedRowEntry(
            tree_id=tree_id, leaf=leaf, task_index=self.task_index, advantage=self.advantage, uses=self.uses
        )


@dataclass(slots=True)
class ServedBatch:
    """One batch that was served to the learner, held until a checkpoint covers it."""

    batch_id: int
    step: int
    version: int
    drawn: tuple[ServedTree, ...]
    metrics: dict[str, float]
    num_ranks: int
    exact: TreeSet | None = None
    """The set it was made of, with ``staleness.exact_lag``."""
    trained: set[int] = field(default_factory=set)
    """Ranks that have confirmed their share."""
    priorities: dict[str, float] = field(default_factory=dict)
    """New ones, of those ranks' trees."""
    confirmed: bool = False
    """All ranks have."""
    means: dict[str, float] = field(default_factory=dict)
    """Of a part of a batch: over how many values each mean in ``metrics`` is taken."""
    rows: tuple[ServedRow, ...] = ()
    """For imitation."""

    @property
    def tree_ids(self) -> list[str]:
        return [each.tree_id for each in self.drawn]

    @property
    def row_keys(self) -> list[RowKey]:
        return [each.key for each in self.rows]

    def snapshot(self) -> BatchEntry:
        exact = self.exact
        return BatchEntry(
            batch_id=self.batch_id,
            step=self.step,
            version=self.version,
            num_ranks=self.num_ranks,
            metrics=self.metrics,
            drawn=tuple(each.snapshot() for each in self.drawn),
            trained=tuple(sorted(self.trained)),
            priorities=self.priorities,
            confirmed=self.confirmed,
            exact=None if exact is None else exact.snapshot(),
            means=self.means or UNSET,
            rows=tuple(each.snapshot() for each in self.rows) or UNSET,
        )

    @classmethod
    def restored(cls, entry: BatchEntry) -> ServedBatch:
        return cls(
            batch_id=entry.batch_id,
            step=entry.step,
            version=entry.version,
            drawn=tuple(
                ServedTree(d.tree_id, d.task_index, d.probability, d.weight, d.uses, d.turn_ids) for d in entry.drawn
            ),
            metrics=entry.metrics,
            num_ranks=entry.num_ranks,
            exact=None if entry.exact is None else TreeSet(entry.exact.version, entry.exact.tree_ids),
            trained=set(entry.trained),
            priorities=dict(entry.priorities),
            confirmed=entry.confirmed,
            means=dict(entry.means or {}),
            rows=tuple(
                ServedRow(RowKey(r.tree_id, r.leaf), r.task_index, r.advantage, r.uses) for r in entry.rows or ()
            ),
        )


class Batches:
    """The served batches that no checkpoint of the learner covers yet."""

    def __init__(self) -> None:
        self.by_step: dict[int, ServedBatch] = {}
        self.next_id = 1
        """Number of the next batch to be made."""
        self._changed: set[int] = set()

    def put(self, served: ServedBatch) -> None:
        self.by_step[served.step] = served
        self.next_id = max(self.next_id, served.batch_id + 1)
        self._changed.add(served.step)

    def remove(self, step: int) -> None:
        del self.by_step[step]
        self._changed.add(step)

    def trained(self, batch_id: int, rank: int, priorities: Mapping[str, float]) -> ServedBatch | None:
        """A rank has trained on its share of a batch, and found these priorities.  The batch, if that was the last."""
        for served in self.by_step.values():
            if served.batch_id == batch_id and not served.confirmed:
                self._changed.add(served.step)
                served.trained.add(rank)
                served.priorities |= priorities
                return served if len(served.trained) == served.num_ranks else None
        return None

    def confirm(self, served: ServedBatch) -> bool:
        """The learner has trained on a batch; False where that was known."""
        if served.confirmed:
            return False
        served.confirmed = True
        self._changed.add(served.step)
        return True

    def tree_ids(self) -> set[str]:
        """Of all these batches."""
        return {tree_id for served in self.by_step.values() for tree_id in served.tree_ids}

    def drain_changes(self) -> dict[int, BatchEntry | None]:
        """Step -> entry of each batch that was added or changed since the last call; None for a removed one."""
        changed, self._changed = self._changed, set()
        return {step: self.by_step[step].snapshot() if step in self.by_step else None for step in changed}

    def restore(self, entry: BatchEntry) -> ServedBatch:
        """A batch as an earlier process left it."""
        served = self.by_step[entry.step] = ServedBatch.restored(entry)
        return served

    def last_with(self, tree_id: str) -> int | None:
        """The last step whose batch had this tree."""
        return max((step for step, served in self.by_step.items() if tree_id in served.tree_ids), default=None)


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of a batch: the message, and where its records lie."""

    head: Batch
    """Without trees."""
    drawn: tuple[ServedTree, ...]
    trees: tuple[TreeEntry, ...]
    rows: tuple[ServedRow, ...] = ()
    """For imitation."""
    paths: tuple[TreeEntry, ...] = ()
    """Of these rows."""

    @property
    def places(self) -> list[Place]:
        """Of each tree its prompt, then its turns; and so of each row."""
        every = (*self.trees, *self.paths)
        return [place for tree in every for place in (*places_of(tree.prompt), *places_of(tree.rows))]

    def batch(self, records: Sequence[bytes | memoryview]) -> Batch:
        """The message, with the records that lie at ``places``."""
        found = iter(records)
        trees = tuple(_tree(drawn, tree, found) for drawn, tree in zip(self.drawn, self.trees, strict=True))
        rows = tuple(_row(row, path, found) for row, path in zip(self.rows, self.paths, strict=True))
        return msgspec.structs.replace(self.head, trees=trees, rows=rows)


def _tree(drawn: ServedTree, tree: TreeEntry, records: Iterator[bytes | memoryview]) -> BatchTree:
    prompt, turns = _content(tree, records)
    return BatchTree(
        tree_id=drawn.tree_id,
        task_index=drawn.task_index,
        prompt=prompt,
        turns=turns,
        failed_branches=tree.failed_branches,
        probability=drawn.probability,
        weight=drawn.weight,
        uses=drawn.uses,
        leaf_rewards=tree.leaf_rewards,
    )


def _row(row: ServedRow, path: TreeEntry, records: Iterator[bytes | memoryview]) -> BatchRow:
    prompt, turns = _content(path, records)
    return BatchRow(
        tree_id=row.key.tree_id,
        leaf=row.key.leaf,
        task_index=row.task_index,
        prompt=prompt,
        turns=turns,
        advantage=row.advantage,
        uses=row.uses,
    )


def _content(tree: TreeEntry, records: Iterator[bytes | memoryview]) -> tuple[np.ndarray, TurnRecords]:
    opened: TreeOpened = codec.decode(unpack(next(records)), TreeOpened)
    return opened.prompt, TurnRecords.raw(list(islice(records, len(tree))), len(tree))
