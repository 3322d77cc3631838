"""Used-up trees, retained until a checkpoint of the learner covers them.  Pure."""

from __future__ import annotations

from typing import NamedTuple

from buffer.journal.entries import PoolEntry
from buffer.trees.index import TreeEntry


class SpentTree(NamedTuple):
    """One tree."""

    tree: TreeEntry
    entry: PoolEntry
    """As the pool had it."""
    step: int
    """Of the batch that used it up."""


class SpentTrees:
    """By id, with their bytes counted."""

    def __init__(self) -> None:
        self._by_id: dict[str, SpentTree] = {}
        self.nbytes = 0

    def __contains__(self, tree_id: object) -> bool:
        return tree_id in self._by_id

    def __len__(self) -> int:
        return len(self._by_id)

    def find(self, tree_id: str) -> SpentTree | None:
        return self._by_id.get(tree_id)

    def put(self, spent: SpentTree) -> None:
        self._by_id[spent.tree.tree_id] = spent
        self.nbytes += spent.tree.nbytes

    def pop(self, tree_id: str) -> SpentTree:
        spent = self._by_id.pop(tree_id)
        self.nbytes -= spent.tree.nbytes
        return spent

    def pop_below(self, step: int) -> list[TreeEntry]:
        """Take out those that batches before ``step`` used up."""
        done = [tree_id for tree_id, spent in self._by_id.items() if spent.step < step]
        return [self.pop(tree_id).tree for tree_id in done]

    def replace(self, tree: TreeEntry) -> None:
        """The same tree with its records in other places."""
        self._by_id[tree.tree_id] = self._by_id[tree.tree_id]._replace(tree=tree)
