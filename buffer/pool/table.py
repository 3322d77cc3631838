"""The trees of a pool in a table: a row a tree, a column a fact; numbers of rows are given again.  Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from buffer.pool.sampler import I64
from buffer.trees.index import TreeEntry

FREE, READY, OUT = 0, 1, 2
"""States of a row: empty, the tree can be drawn, the learner has it."""

_COLUMNS = ("state", "uses", "limit", "oldest", "newest", "nbytes", "entered")


class TreeTable:
    """Rows of trees.  Columns are changed by the pool."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        """Tree -> its row."""
        self.trees: list[TreeEntry | None] = []
        self.state = np.zeros(0, dtype=np.int8)
        self.uses = np.zeros(0, dtype=np.int64)
        """Confirmed ones."""
        self.limit = np.zeros(0, dtype=np.int64)
        """Of uses: after as many the tree leaves."""
        self.oldest = np.zeros(0, dtype=np.int64)
        """Oldest version of a turn."""
        self.newest = np.zeros(0, dtype=np.int64)
        """Of the oldest versions of its turns the newest: older than ``max_lag``, and no turn is trained on."""
        self.nbytes = np.zeros(0, dtype=np.int64)
        self.entered = np.zeros(0, dtype=np.int64)
        """When the tree came: ascending."""
        self._free: list[int] = []
        self._next_entered = 0
        self._order: deque[tuple[int, int]] = deque()
        """(entered, row), oldest first; what has left is skipped when it is come upon."""

    @property
    def capacity(self) -> int:
        """Rows there are columns for."""
        return len(self.state)

    def ready(self) -> I64:
        """int64[N]: rows of trees that can be drawn; O(N)."""
        return np.flatnonzero(self.state == READY)

    def ready_among(self, tree_ids: Iterable[str]) -> I64:
        """int64[n]: rows of those of these trees that can be drawn."""
        rows = [self.rows[t] for t in tree_ids if t in self.rows]
        return np.array([row for row in rows if self.state[row] == READY], dtype=np.int64)

    def tree(self, row: int) -> TreeEntry:
        tree = self.trees[row]
        assert tree is not None
        return tree

    def new(self, tree_id: str, entered: int | None) -> int:
        """A row for a tree that comes now, or that came at ``entered`` to an earlier process."""
        row = self._free.pop() if self._free else self._added()
        self.rows[tree_id] = row
        came = self._next_entered if entered is None else entered
        self.entered[row] = came
        self._next_entered = max(self._next_entered, came + 1)
        self._order.append((came, row))
        if len(self._order) > 2 * len(self.rows) + 64:
            alive = ((int(self.entered[r]), r) for r in self.rows.values())
            self._order = deque(sorted(alive))
        return row

    def _added(self) -> int:
        row = len(self.trees)
        self.trees.append(None)
        if row >= len(self.state):
            length = max(16, 2 * len(self.state))
            for name in _COLUMNS:
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros(length - len(old), dtype=old.dtype)]))
        return row

    def free(self, row: int, tree_id: str) -> None:
        """Free the row of a tree that has left."""
        del self.rows[tree_id]
        self.trees[row] = None
        self.state[row] = FREE
        self.nbytes[row] = 0
        self._free.append(row)

    def pop_oldest(self, skipped: list[tuple[int, int]]) -> int | None:
        """The row of the ready tree that came first, which has to leave; None for none.

        Args:
            skipped: those that came before it and are with the learner are added; ``put_back`` after the last call.
        """
        while self._order:
            entered, row = self._order.popleft()
            if self.state[row] == FREE or self.entered[row] != entered:
                continue
            if self.state[row] == READY:
                return row
            skipped.append((entered, row))
        return None

    def put_back(self, skipped: Sequence[tuple[int, int]]) -> None:
        """What was skipped is first in the order again."""
        self._order.extendleft(reversed(skipped))
