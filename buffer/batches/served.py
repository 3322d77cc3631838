"""Batches that were served to the learner, until a checkpoint of it covers them.  Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET

from atpo_async.wire import codec
from atpo_async.wire.messages import Batch, BatchTree, TreeOpened
from atpo_async.wire.records import TurnRecords, unpack
from buffer.batches.delay_line import TreeSet
from buffer.journal.entries import BatchEntry, DrawnEntry
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

    @property
    def tree_ids(self) -> list[str]:
        return [each.tree_id for each in self.drawn]

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

    @property
    def places(self) -> list[Place]:
        """Of each tree its prompt, then its turns."""
        return [place for tree in self.trees for place in (*places_of(tree.prompt), *places_of(tree.rows))]

    def batch(self, records: Sequence[bytes | memoryview]) -> Batch:
        """The message, with the records that lie at ``places``."""
        trees, at = [], 0
        for drawn, tree in zip(self.drawn, self.trees, strict=True):
            opened: TreeOpened = codec.decode(unpack(records[at]), TreeOpened)
            turns = records[at + 1 : at + 1 + len(tree)]
            at += 1 + len(tree)
            trees.append(
                BatchTree(
                    tree_id=drawn.tree_id,
                    task_index=drawn.task_index,
                    prompt=opened.prompt,
                    turns=TurnRecords.raw(turns, len(tree)),
                    failed_branches=tree.failed_branches,
                    probability=drawn.probability,
                    weight=drawn.weight,
                    uses=drawn.uses,
                )
            )
        return msgspec.structs.replace(self.head, trees=tuple(trees))
