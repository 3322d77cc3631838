"""Batches given to the learner.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from atpo_async.wire import codec
from atpo_async.wire.messages import Batch, BatchTree, TreeOpened
from atpo_async.wire.records import TurnRecords, unpack
from buffer.batches.delay_line import TreeSet
from buffer.trees.index import Place, TreeEntry, places_of


@dataclass(slots=True)
class ServedTree:
    """One tree of a batch that was given to the learner."""

    tree_id: str
    task_index: int
    probability: float
    weight: float
    uses: int
    """This time included."""
    turn_ids: tuple[int, ...] | None
    """Those served, of a tree that still grew; None for all."""


@dataclass(slots=True)
class Served:
    """One batch that was given to the learner, kept until a checkpoint of the learner holds it."""

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

    @property
    def tree_ids(self) -> list[str]:
        return [each.tree_id for each in self.drawn]


class Batches:
    """Those that no checkpoint of the learner holds yet."""

    def __init__(self) -> None:
        self.by_step: dict[int, Served] = {}
        self.next_id = 1
        """Number of the next batch to be made."""
        self.changed: set[int] = set()
        """Steps whose batch came, went or changed; whoever keeps them takes the steps away."""

    def put(self, served: Served) -> None:
        self.by_step[served.step] = served
        self.changed.add(served.step)

    def remove(self, step: int) -> None:
        del self.by_step[step]
        self.changed.add(step)

    def last_with(self, tree_id: str) -> int | None:
        """The last step whose batch had this tree."""
        return max((step for step, served in self.by_step.items() if tree_id in served.tree_ids), default=None)


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of a batch: what it says, and where its records lie."""

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
