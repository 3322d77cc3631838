"""All trees that the buffer holds, by state: growing, ready, with the learner, used up.  Pure.

A tree is in one of ``assembly``, ``pool`` and ``spent``; with ``buffer.ready = "partial"`` one that grows may be in the
pool too, and one that ended while the learner had an earlier state of it waits in ``late`` until that comes back.  Of a
tree that has ended, leaves may be in ``imitation`` too; once it is nowhere else, the turns on their paths stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from atpo_async.core.errors import BadMessage, SetupError
from atpo_async.core.tree import ROOT
from buffer.batches.served import ServedRow, ServedTree
from buffer.imitation.store import Freed, ImitationStore
from buffer.journal.entries import KEEP, ImitationEntry, PoolEntry, TreeStateEntry
from buffer.pool.pool import ReplayPool
from buffer.trees.assembly import Assembly
from buffer.trees.index import Rows, Store, TreeEntry, TurnEntry, entry_of
from buffer.trees.spent import SpentTree, SpentTrees


class TreeRegistry:
    """The trees of one run.

    Args:
        store: where their records are.
        pool: empty, for those that are ready.
        imitation: empty, for leaves that are kept to be imitated.
    """

    def __init__(self, store: Store, pool: ReplayPool, imitation: ImitationStore) -> None:
        self._store = store
        self.assembly = Assembly(store, find=self.find)
        """Trees that grow."""
        self.pool = pool
        """Trees that are ready, and those with the learner."""
        self.spent = SpentTrees()
        """Trees used up since the learner's last checkpoint."""
        self.imitation = imitation
        """Leaves kept to be imitated."""
        self._late: dict[str, TreeEntry] = {}
        self._partial_uses: dict[str, tuple[int, int]] = {}
        """Tree -> (uses, leaves) when it was last served, of trees that may be served before their end."""
        self._ids: dict[int, str] = {}
        """Number -> id of every tree that has a lease or records."""
        self._changed: set[str] = set()

    # --- queries--------------------------------------------------------------------------------------

    def find(self, tree_id: str) -> TreeEntry | None:
        """A tree that is still held after its end; of one that is held for leaves to be imitated only, their paths."""
        if (late := self._late.get(tree_id)) is not None:
            return late
        if (spent := self.spent.find(tree_id)) is not None:
            return spent.tree
        return self.pool.find(tree_id) or self.imitation.find(tree_id)

    def as_served(self, served: ServedTree) -> TreeEntry:
        """A tree of a batch, as it was served.

        Raises:
            BadMessage: it is held no more.
        """
        tree = self.pool.find(served.tree_id)
        if tree is None and (spent := self.spent.find(served.tree_id)) is not None:
            tree = spent.tree
        if tree is None:
            raise BadMessage(f"tree {served.tree_id} of that batch is gone: it was trained on, ask for the next step")
        if served.turn_ids is None or len(served.turn_ids) == len(tree):
            return tree
        return replace(tree, rows=tree.rows[np.isin(tree.rows["turn_id"], served.turn_ids)])

    def row_as_served(self, served: ServedRow) -> TreeEntry:
        """The path of a row of a batch.

        Raises:
            BadMessage: it is held no more.
        """
        path = self.imitation.path(served.key)
        if path is None:
            raise BadMessage(
                f"turn {served.key.leaf} of tree {served.key.tree_id}, to be imitated in that batch, is gone: it was "
                "trained on, ask for the next step"
            )
        return path

    def grows_or_is_late(self, tree_id: str) -> bool:
        """Whether a tree that leaves the pool still grows, or has a later state waiting."""
        return tree_id in self.assembly or tree_id in self._late

    @property
    def nbytes(self) -> int:
        """Bytes of all turns held."""
        return self.pool.nbytes + self.assembly.nbytes + self.spent.nbytes + self.imitation.nbytes

    # --- coming and going --------------------------------------------------------------------------------------

    def expect(self, tree_id: str, number: int) -> None:
        """A lease of this tree was granted."""
        self._ids[number] = tree_id

    def forget(self, tree: TreeEntry) -> None:
        """Release its records, unless the tree is still held somewhere; what its leaves to be imitated need stays."""
        tree_id = tree.tree_id
        if self.grows_or_is_late(tree_id) or tree_id in self.pool or tree_id in self.spent:
            return
        self._changed.add(tree_id)
        kept = self.imitation.hold_alone(tree_id)
        if kept is None:
            self._release(tree)
        else:
            self.drop_turns(tree, kept)

    def _release(self, tree: TreeEntry) -> None:
        self._ids.pop(tree.number, None)
        self._store.release(tree.prompt, gone=True)
        self._store.release(tree.rows, gone=True)

    def release_rows(self, freed: Iterable[Freed]) -> None:
        """Rows for imitation have left: release the records that nothing needs any more."""
        for before, after in freed:
            self._changed.add(before.tree_id)
            if after is None:
                if self.imitation.forgotten(before.tree_id):
                    self._release(before)
            elif self.imitation.is_alone(before.tree_id):
                self.drop_turns(before, after)

    def rows_changed(self, tree_ids: Iterable[str]) -> None:
        """Rows for imitation of these trees have come, or have another number of uses."""
        self._changed.update(tree_id for tree_id in tree_ids if tree_id in self.imitation)

    def drop_turns(self, whole: TreeEntry, kept: TreeEntry) -> None:
        """Of a tree only these turns are needed from now on."""
        if len(kept) < len(whole):
            self._store.release(whole.rows[~np.isin(whole.rows["turn_id"], kept.rows["turn_id"])])

    def put_late(self, tree: TreeEntry) -> None:
        """A tree came to its end while the learner has an earlier state of it."""
        self._late[tree.tree_id] = tree
        self._changed.add(tree.tree_id)

    def pop_late(self, tree_id: str) -> TreeEntry | None:
        late = self._late.pop(tree_id, None)
        if late is not None:
            self._changed.add(tree_id)
        return late

    def put_spent(self, spent: SpentTree) -> None:
        self.spent.put(spent)
        self._changed.add(spent.tree.tree_id)

    def partial_uses(self, tree_id: str) -> tuple[int, int]:
        """(uses, leaves) when a tree was last served before its end."""
        return self._partial_uses.get(tree_id, (0, 0))

    def put_partial_uses(self, tree_id: str, uses: int, leaves: int) -> None:
        self._partial_uses[tree_id] = uses, leaves
        self._changed.add(tree_id)

    def pop_partial_uses(self, tree_id: str) -> tuple[int, int]:
        return self._partial_uses.pop(tree_id, (0, 0))

    # --- snapshot ----------------------------------------------------------------------------------------------

    def drain_changes(self) -> set[str]:
        """Trees of which anything changed since the last call."""
        changed, self._changed = self._changed, set()
        return changed | self.assembly.drain_changes() | self.pool.drain_changes()

    def snapshot(self, tree_id: str) -> TreeStateEntry | None:
        """What ``restore`` needs of a tree beside its turns and its lease; None of one that is not here."""
        growing, tree = self.assembly.growing(tree_id), self.find(tree_id)
        owner = growing or tree
        if owner is None:
            return None
        place, spent = self.pool.snapshot(tree_id), self.spent.find(tree_id)
        return TreeStateEntry(
            number=owner.number,
            task_index=owner.task_index,
            kind="train",
            failed_branches=0 if tree is None else tree.failed_branches,
            growing=growing is not None,
            epoch=0 if growing is None else growing.epoch,
            closed=None if growing is None else growing.closing(),
            partial=self._partial_uses.get(tree_id),
            late=tree_id in self._late,
            pool=place if place is not None or spent is None else spent.entry,
            spent_at=None if place is not None or spent is None else spent.step,
            imitated=self.imitation.snapshot(tree_id) or UNSET,
            leaf_rewards=UNSET if tree is None else tree.leaf_rewards or UNSET,
        )

    def restore(self, trees: Mapping[str, TreeStateEntry], rows: Rows, *, run: str) -> NDArray[np.bool_]:
        """The trees as an earlier process left them.

        Args:
            trees: by id.
            rows: ROW[R], by tree, then by turn.
            run: its id.

        Returns:
            bool[R]: which records belong to a tree that is here.

        Raises:
            SetupError: a tree is without its turns.
        """
        owned = np.zeros(len(rows), dtype=bool)
        pooled: list[tuple[PoolEntry, TreeEntry]] = []
        imitated: list[tuple[TreeEntry, Sequence[ImitationEntry], bool]] = []
        for tree_id, entry in trees.items():
            at = slice(*np.searchsorted(rows["tree"], [entry.number, entry.number + 1]).tolist())
            tree = self._restored(tree_id, entry, rows[at], run)
            # Turns of failed branches went when their tree was done, their chunk may have stayed.
            owned[at] = tree is None or np.isin(rows["turn_id"][at], [ROOT, *tree.rows["turn_id"].tolist()])
            if tree is not None and entry.pool is not None:
                pooled.append((entry.pool, tree))
            if entry.imitated:
                imitated.append(self._with_rows(tree_id, entry, rows[at]))
        for place, tree in sorted(pooled, key=lambda each: each[0].entered):
            self.pool.restore(tree, place)
        self.imitation.restore(imitated)
        return owned

    def _restored(self, tree_id: str, entry: TreeStateEntry, rows: Rows, run: str) -> TreeEntry | None:
        """Restore one tree; returns the part of it that belongs into the pool."""
        self._ids[entry.number] = tree_id
        if entry.partial is not None:
            self._partial_uses[tree_id] = entry.partial
        prompt, turns = rows[rows["turn_id"] == ROOT], rows[rows["turn_id"] != ROOT]
        if entry.growing:
            self.assembly.restore(tree_id, entry, prompt, turns, run=run)
            return None if entry.pool is None else self.assembly.tree(tree_id).pruned()
        whole = TreeEntry(tree_id, entry.number, entry.task_index, prompt, turns, entry.failed_branches)
        tree = whole.pruned().rewarded(entry.leaf_rewards or ())
        self.drop_turns(whole, tree)
        if not len(turns) or not len(prompt):
            raise SetupError(f"the journal is damaged: tree {tree_id} is there without its turns; {KEEP}")
        if entry.late:
            self._late[tree_id] = tree
        if entry.spent_at is not None and entry.pool is not None:
            self.spent.put(SpentTree(tree, entry.pool, entry.spent_at))
            return None
        return tree if entry.pool is not None else None

    def _with_rows(
        self, tree_id: str, entry: TreeStateEntry, rows: Rows
    ) -> tuple[TreeEntry, tuple[ImitationEntry, ...], bool]:
        """A tree with leaves to be imitated: the turns that these need, and whether it is held for them only."""
        prompt, turns = rows[rows["turn_id"] == ROOT], rows[rows["turn_id"] != ROOT]
        whole = TreeEntry(tree_id, entry.number, entry.task_index, prompt, turns, entry.failed_branches)
        leaves = [each.leaf for each in entry.imitated or ()]
        try:
            kept = whole.down_to(leaves)
        except KeyError as exc:
            raise SetupError(
                f"the journal is damaged: tree {tree_id} is there without turn {exc}, to be imitated; {KEEP}"
            ) from exc
        alone = entry.pool is None and not entry.late
        if alone:
            self.drop_turns(whole, kept)
        return kept, entry.imitated or (), alone

    # --- moving records ----------------------------------------------------------------------------------------

    def live(self, rows: Rows) -> Rows:
        """Those of ROW[R] whose record is still there and needed."""
        return rows[[self._is_current(row) for row in rows]] if len(rows) else rows

    def relocate(self, rows: Rows, records: Sequence[bytes]) -> int:
        """Copy these records to new places in the store and release the old ones; leave out those not needed any more.
        Returns how many were moved."""
        moved: dict[int, dict[int, TurnEntry]] = {}
        current = [self._is_current(row) for row in rows]
        for row, record, is_current in zip(rows, records, current, strict=True):
            if is_current:
                there = self._store.add(record)
                entry = entry_of(row)._replace(chunk=there.chunk, offset=there.offset)
                self._store.note(entry)
                moved.setdefault(entry.tree, {})[entry.turn_id] = entry
        for number, turns in moved.items():
            tree_id = self._ids[number]
            self.assembly.move(tree_id, turns)
            if (ready := self.pool.find(tree_id)) is not None:
                self.pool.replace(ready.moved(turns))
            if tree_id in self._late:
                self._late[tree_id] = self._late[tree_id].moved(turns)
            if (spent := self.spent.find(tree_id)) is not None:
                self.spent.replace(spent.tree.moved(turns))
            self.imitation.moved(tree_id, turns)
        self._store.release(rows[current])
        return sum(current)

    def _is_current(self, row: np.void) -> bool:
        """Whether a tree still has this record where the row says."""
        tree_id = self._ids.get(int(row["tree"]))
        if tree_id is None:
            return False
        turn_id, place = int(row["turn_id"]), (int(row["chunk"]), int(row["offset"]))
        growing = self.assembly.growing(tree_id)
        if growing is not None:
            entry = growing.prompt if turn_id == ROOT else growing.turns.get(turn_id)
            return entry is not None and (entry.chunk, entry.offset) == place
        tree = self.find(tree_id)
        if tree is None:
            return False
        rows = tree.prompt if turn_id == ROOT else tree.rows[tree.rows["turn_id"] == turn_id]
        return bool(len(rows)) and (int(rows[0]["chunk"]), int(rows[0]["offset"])) == place
