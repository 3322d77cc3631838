"""Batches given to the learner, and what is counted between them.  Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from atpo_async import wire
from atpo_async.messages import Batch, BatchTree, TreeOpened
from atpo_async.records import TurnRecords, unpack
from buffer.delay_line import TreeSet
from buffer.index import Place, TreeEntry, places_of


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
            opened: TreeOpened = wire.decode(unpack(records[at]), TreeOpened)
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


@dataclass(slots=True)
class Since:
    """Counted since the last batch."""

    began_s: float
    produced: int = 0
    """Training trees that came to their end with a usable tree."""
    turns: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    means: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Name -> (sum, number)."""

    def mean(self, name: str, value: float) -> None:
        total, number = self.means.get(name, (0.0, 0.0))
        self.means[name] = (total + value, number + 1.0)
