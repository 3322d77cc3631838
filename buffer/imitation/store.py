"""The leaves worth imitating, a row each, and the turns on their paths, which the journal keeps for them.  Pure.

Source: SPEAR (arXiv 2509.22601), the replay of its own good chains.  A row is a leaf that earned more than its tree's
mean.  Its turns are those of its tree: nothing is copied, and once the tree is held nowhere else the turns that no row
needs are let go.

A row is ready, with the learner, or used up; a used-up one stays until a checkpoint of the learner covers the batch, so
that a learner that falls back finds it again.  Rows leave when their oldest turn is over ``imitation.max_lag`` versions
old, and the oldest ones when there are more, or take more bytes, than allowed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from buffer.journal.entries import ImitationEntry
from buffer.trees.index import TreeEntry, TurnEntry


class RowKey(NamedTuple):
    """Which leaf of which tree."""

    tree_id: str
    leaf: int
    """Its turn id."""


@dataclass(slots=True)
class ImitationRow:
    """One leaf."""

    key: RowKey
    reward: float
    oldest: int
    """The oldest version of a turn on its path: its age counts from that."""
    entered: int
    """Ascending in the order in which rows came."""
    uses: int = 0
    """Confirmed ones."""
    is_out: bool = False
    """The learner has it."""
    spent_at: int | None = None
    """Step of the batch that used it up."""

    @property
    def is_ready(self) -> bool:
        return not self.is_out and self.spent_at is None

    def snapshot(self) -> ImitationEntry:
        return ImitationEntry(
            leaf=self.key.leaf, reward=self.reward, entered=self.entered, uses=self.uses, spent_at=self.spent_at
        )


class Freed(NamedTuple):
    """Rows of one tree have left."""

    before: TreeEntry
    """The turns that they and the others of their tree needed."""
    after: TreeEntry | None
    """Those that are needed still; None where no row of the tree is left."""


class ImitationStore:
    """The rows of one run.

    Args:
        max_lag: of the oldest turn of a row, versions.
        max_uses: confirmed batches after which a row is used up.
    """

    def __init__(self, *, max_lag: int, max_uses: int) -> None:
        self._max_lag = max_lag
        self._max_uses = max_uses
        self._rows: dict[RowKey, ImitationRow] = {}
        """In the order in which they came."""
        self._trees: dict[str, TreeEntry] = {}
        """Of each tree that has rows the turns on their paths."""
        self._leaves: dict[str, set[int]] = {}
        self._alone: set[str] = set()
        """Trees that are held for their rows only."""
        self._next_entered = 0
        self._num_spent = 0
        self._expired_at = -1
        """Version at which no row is too old; -1 where some may be."""
        self.nbytes = 0
        """Bytes of the records that are held for rows only."""
        self.left: Counter[str] = Counter()
        """How many rows left, by cause: ``age``, ``rows``, ``bytes`` (over a limit), ``used`` up."""
        self.entered = 0
        """Rows that came, in this process."""

    # --- queries -----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Rows that are ready or with the learner."""
        return len(self._rows) - self._num_spent

    def __contains__(self, tree_id: object) -> bool:
        """Whether a tree has rows."""
        return tree_id in self._trees

    def find(self, tree_id: str) -> TreeEntry | None:
        """The turns of a tree that its rows need."""
        return self._trees.get(tree_id)

    def path(self, key: RowKey) -> TreeEntry | None:
        """The turns of one row."""
        if key not in self._rows:
            return None
        return self._trees[key.tree_id].down_to([key.leaf])

    def ready(self) -> Iterator[ImitationRow]:
        """Rows that can be served, the oldest first."""
        return (row for row in self._rows.values() if row.is_ready)

    # --- coming and going --------------------------------------------------------------------------------------

    def put(self, tree: TreeEntry, rewards: Mapping[int, float], *, version: int) -> bool:
        """Take in leaves of a tree that is held elsewhere; False where all are too old.

        Args:
            tree: whole.
            rewards: by the leaves' ids.
            version: the learner's.
        """
        came = False
        for leaf, reward in rewards.items():
            oldest = int(tree.down_to([leaf]).oldest_versions.min())
            if version - oldest <= self._max_lag:
                self._insert(ImitationRow(RowKey(tree.tree_id, leaf), reward, oldest, self._next_entered))
                self.entered += 1
                came = True
        if came:
            self._trees[tree.tree_id] = tree.down_to(self._leaves[tree.tree_id])
        return came

    def _insert(self, row: ImitationRow) -> None:
        self._rows[row.key] = row
        self._num_spent += row.spent_at is not None
        self._leaves.setdefault(row.key.tree_id, set()).add(row.key.leaf)
        self._next_entered = max(self._next_entered, row.entered + 1)

    def hold_alone(self, tree_id: str) -> TreeEntry | None:
        """A tree is held nowhere else any more.  The turns that rows need of it; None where it has no rows."""
        kept = self._trees.get(tree_id)
        if kept is not None and tree_id not in self._alone:
            self._alone.add(tree_id)
            self.nbytes += kept.nbytes
        return kept

    def expire(self, version: int) -> list[Freed]:
        """The learner is at ``version``: rows that are too old leave, but for those that it has."""
        if version <= self._expired_at:
            return []
        self._expired_at = version
        old = [r for r in self._rows.values() if not r.is_out and version - r.oldest > self._max_lag]
        self.left["age"] += sum(row.spent_at is None for row in old)
        return self._drop(old)

    def shrink(self, max_rows: int, max_bytes: int) -> list[Freed]:
        """The oldest ready rows leave until ``max_rows`` are left, and ``max_bytes`` of turns that only rows need."""
        over = len(self) - max_rows
        extra = [row for row, _ in zip(self.ready(), range(over), strict=False)] if over > 0 else []
        self.left["rows"] += len(extra)
        freed = self._drop(extra)
        while self.nbytes > max_bytes:
            # A row of a tree that is held elsewhere frees nothing.
            row = next((row for row in self.ready() if row.key.tree_id in self._alone), None)
            if row is None:
                break
            self.left["bytes"] += 1
            freed += self._drop([row])
        return freed

    def _drop(self, rows: Sequence[ImitationRow]) -> list[Freed]:
        """Remove rows.  What the trees that are held for rows only have lost."""
        trees = dict.fromkeys(row.key.tree_id for row in rows)
        for row in rows:
            del self._rows[row.key]
            self._num_spent -= row.spent_at is not None
            self._leaves[row.key.tree_id].remove(row.key.leaf)
        return [self._without(tree_id) for tree_id in trees]

    def _without(self, tree_id: str) -> Freed:
        before, leaves = self._trees[tree_id], self._leaves[tree_id]
        after = before.down_to(leaves) if leaves else None
        if tree_id in self._alone:
            self.nbytes -= before.nbytes - (0 if after is None else after.nbytes)
        if after is not None:
            self._trees[tree_id] = after
        else:
            del self._trees[tree_id], self._leaves[tree_id]
        return Freed(before, after)

    def forgotten(self, tree_id: str) -> bool:
        """A tree has lost its last row.  True where it was held for rows only."""
        was_alone = tree_id in self._alone
        self._alone.discard(tree_id)
        return was_alone

    def is_alone(self, tree_id: str) -> bool:
        """Whether a tree is held for its rows only."""
        return tree_id in self._alone

    # --- batches -----------------------------------------------------------------------------------------------

    def take(self, keys: Iterable[RowKey]) -> None:
        """The learner has these rows."""
        for row in self._found(keys):
            row.is_out = True

    def confirm(self, keys: Iterable[RowKey], *, step: int) -> None:
        """The learner has trained on these rows, in the batch of ``step``."""
        for row in self._found(keys):
            row.is_out, row.uses = False, row.uses + 1
            if row.uses >= self._max_uses:
                row.spent_at = step
                self._num_spent += 1
        self._expired_at = -1

    def give_back(self, keys: Iterable[RowKey]) -> None:
        """The learner has not trained on these rows."""
        for row in self._found(keys):
            row.is_out = False
        self._expired_at = -1

    def undo_use(self, keys: Iterable[RowKey]) -> None:
        """The learner has lost its update from these rows; those that have left meanwhile stay away."""
        for row in self._found(keys):
            self._num_spent -= row.spent_at is not None
            row.uses, row.spent_at = max(row.uses - 1, 0), None
        self._expired_at = -1

    def checkpointed(self, step: int) -> list[Freed]:
        """A checkpoint of the learner covers the batches below ``step``: rows that these used up leave."""
        spent = [row for row in self._rows.values() if row.spent_at is not None and row.spent_at < step]
        self.left["used"] += len(spent)
        return self._drop(spent)

    def _found(self, keys: Iterable[RowKey]) -> Iterator[ImitationRow]:
        return (self._rows[key] for key in keys if key in self._rows)

    # --- snapshot ----------------------------------------------------------------------------------------------

    def snapshot(self, tree_id: str) -> tuple[ImitationEntry, ...]:
        """The rows of a tree; none where it has none."""
        rows = (self._rows[RowKey(tree_id, leaf)] for leaf in self._leaves.get(tree_id, ()))
        return tuple(row.snapshot() for row in sorted(rows, key=lambda row: row.entered))

    def restore(self, trees: Sequence[tuple[TreeEntry, Sequence[ImitationEntry], bool]]) -> None:
        """As an earlier process left them.

        Args:
            trees: with the entries of their rows, and whether they are held for rows only.
        """
        found: list[ImitationRow] = []
        for tree, entries, alone in trees:
            for each in entries:
                oldest = int(tree.down_to([each.leaf]).oldest_versions.min())
                found.append(
                    ImitationRow(
                        RowKey(tree.tree_id, each.leaf), each.reward, oldest, each.entered, each.uses,
                        spent_at=each.spent_at,
                    )
                )  # fmt: skip
            kept = tree.down_to([each.leaf for each in entries])
            self._trees[tree.tree_id] = kept
            if alone:
                self.hold_alone(tree.tree_id)
        for row in sorted(found, key=lambda row: row.entered):
            self._insert(row)

    def moved(self, tree_id: str, turns: Mapping[int, TurnEntry]) -> None:
        """Records of a tree lie elsewhere."""
        if tree_id in self._trees:
            self._trees[tree_id] = self._trees[tree_id].moved(turns)
