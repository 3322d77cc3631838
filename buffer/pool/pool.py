"""The replay pool: trees that are ready and those the learner has; draws, confirmations, returns and departures.

Pure: versions and random numbers are passed in.

Source: prioritized experience replay (arXiv 1511.05952) with trees as units, the mixed maximum and mean of R2D2
(Kapturowski et al. 2019) as priority, and a schedule that serves trees before they grow stale, so that next to none are
discarded at steady state (ARCHITECTURE.md).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat

import numpy as np

from atpo_async.core.vocabulary import WeightsOver
from buffer.journal.entries import PoolEntry
from buffer.pool.expiry import Expiry
from buffer.pool.outcomes import Departure, Drawn, ReadyTrees
from buffer.pool.priorities import Priorities
from buffer.pool.sampler import F64, I64, Sampler
from buffer.pool.table import OUT, READY, TreeTable
from buffer.pool.weights import importance_weights, proportional
from buffer.sampling.prioritized import Prioritized
from buffer.trees.index import TreeEntry


class ReplayPool:
    """The trees that are ready, and those that the learner has.

    Every method that makes trees leave returns them, for their records to be dropped or their tasks to be leased again.

    With the built-in samplers adding, drawing and confirming cost O(log N) in the number of trees, with two exceptions:
    a draw whose weights are taken over the mean of all costs O(N), and a priority above all confirmed before weighs
    anew what no batch has had.

    Where ``freshness`` is below 1, the first draw at a version weighs all ready trees anew: the floor does not age, so
    no factor common to all can stand for a version.  As a tree is ready at ``max_lag + 1`` versions at most, it is
    weighed that often at most, however many there are.

    Args:
        max_uses: a tree leaves after that many confirmed batches.
        max_lag: a tree leaves when all its turns are older than this.
        exponent: a in P_i ~ p_i^a.
        freshness: priority factor per version of lag, that of the oldest turn that is trained on.
        weights_over: what w_PER is divided by.
        sampler: chooses the trees of a batch; in proportion to priority where None.
    """

    def __init__(
        self,
        *,
        max_uses: int,
        max_lag: int,
        exponent: float,
        freshness: float = 1.0,
        weights_over: WeightsOver = "max",
        sampler: Sampler | None = None,
    ) -> None:
        self._max_uses = max_uses
        self._max_lag = max_lag
        self._exponent = exponent
        self._weights_over: WeightsOver = weights_over
        self._sampler: Sampler = sampler if sampler is not None else Prioritized(exponent)
        self._table = TreeTable()
        self._priorities = Priorities(freshness=freshness, max_lag=max_lag)
        self._expiry = Expiry(max_lag)
        self._version = 0
        self._weighed_at: int | None = 0
        """Version at which the sampler had the priorities of all ready trees; None where it may have lost some."""
        self._num_ready = 0
        self._with_learner: dict[str, int] = {}
        """Tree -> row.  Small, so what is confirmed is found in the caches, however many trees there are."""
        self._changed: set[str] = set()
        self.nbytes = 0
        """Bytes of all trees, those with the learner too."""
        self.left: Counter[str] = Counter()
        """How many trees left, by ``Departure.cause``."""

    # --- queries--------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Trees that can be drawn."""
        return self._num_ready

    def __contains__(self, tree_id: object) -> bool:
        """Whether a tree is here, ready or with the learner."""
        return tree_id in self._table.rows

    def find(self, tree_id: str) -> TreeEntry | None:
        """A tree that is here, ready or with the learner."""
        row = self._table.rows.get(tree_id)
        return None if row is None else self._table.trees[row]

    def ready_ids(self) -> list[str]:
        """Trees that can be drawn; O(N)."""
        return [tree_id for tree_id, row in self._table.rows.items() if self._table.state[row] == READY]

    @property
    def num_returning(self) -> int:
        """Trees with the learner that come back: this use is not their last."""
        uses, limit = self._table.uses, self._table.limit
        return sum(int(uses[row]) + 1 < int(limit[row]) for row in self._with_learner.values())

    @property
    def num_out(self) -> int:
        """Trees with the learner."""
        return len(self._with_learner)

    @property
    def mean_priority(self) -> float:
        """Over the trees that can be drawn; O(N)."""
        ready = self._table.ready()
        return float(self._priority(ready).mean()) if len(ready) else 0.0

    def is_out(self, tree_id: str) -> bool:
        """Whether the tree is with the learner."""
        return tree_id in self._with_learner

    # --- snapshot ----------------------------------------------------------------------------------------------

    def drain_changes(self) -> set[str]:
        """Trees that came, left or have another priority or number of uses, since the last call."""
        changed, self._changed = self._changed, set()
        return changed

    def snapshot(self, tree_id: str) -> PoolEntry | None:
        """What ``add`` needs of a tree beside its turns; None of one that is not here."""
        row = self._table.rows.get(tree_id)
        if row is None:
            return None
        table = self._table
        return PoolEntry(
            priority=self._priorities.own(row), uses=int(table.uses[row]), limit=int(table.limit[row]),
            entered=int(table.entered[row]),
        )  # fmt: skip

    def restore(self, tree: TreeEntry, entry: PoolEntry) -> None:
        """Take in a tree that an earlier process had; ``entered`` ascends over such calls."""
        self.add(tree, priority=entry.priority, uses=entry.uses, limit=entry.limit, entered=entry.entered)

    @property
    def highest_priority(self) -> float:
        """The priority of a tree that no batch has had: the highest one confirmed so far."""
        return self._priorities.highest

    def restore_highest_priority(self, priority: float) -> None:
        """As an earlier process had confirmed it."""
        if self._priorities.raise_highest(priority):
            self._tell(self._expiry.unserved())

    def replace(self, tree: TreeEntry) -> None:
        """The same tree with its records in other places."""
        self._table.trees[self._table.rows[tree.tree_id]] = tree

    # --- in and out --------------------------------------------------------------------------------------------

    def add(
        self, tree: TreeEntry, *, priority: float, uses: int = 0, limit: int | None = None, entered: int | None = None
    ) -> list[Departure]:
        """Take in a tree, or a later state of one that is here.

        A tree never served has the highest priority confirmed so far: it is trained on before its own one counts.

        Args:
            tree: pruned, with at least one turn.
            priority: from its own advantages, above zero.
            uses: how often it was served before it came back with later turns; it may be served once more at least.
            limit: of uses; by ``max_uses`` where None.
            entered: when it came, of one that an earlier process had; ascending over such calls.

        Returns:
            The tree itself where it is too old.
        """
        self._changed.add(tree.tree_id)
        table = self._table
        row = table.rows.get(tree.tree_id)
        versions = tree.oldest_versions
        oldest, newest = int(versions.min()), int(versions.max())
        if row is None:
            row = table.new(tree.tree_id, entered)
            table.uses[row] = uses
            table.limit[row] = max(self._max_uses, uses + 1) if limit is None else limit
            table.oldest[row] = oldest
            self._become_ready(row)
        else:
            self._expiry.remove(row, int(table.newest[row]))
            if table.state[row] == READY and table.uses[row] == 0:
                self._expiry.remove_unserved(row, int(table.oldest[row]))
                self._expiry.put_unserved(row, oldest)
        size = tree.nbytes
        self.nbytes += size - int(table.nbytes[row])
        table.trees[row] = tree
        table.nbytes[row] = size
        table.oldest[row], table.newest[row] = oldest, newest
        self._expiry.put(row, newest)
        self._priorities.put(row, priority, versions)
        if table.state[row] != READY:
            return []
        rows = np.array([row])
        self._tell(rows)
        if self._version - newest > self._max_lag:
            return self._drop([row], "retired" if table.uses[row] else "stale")
        return []

    def bring_back(self, tree: TreeEntry, entry: PoolEntry, *, uses: int) -> list[Departure]:
        """A used-up tree is ready again, after ``uses``: its last one is undone.  Returns what ``add`` does."""
        self.left["used"] -= 1
        return self.add(tree, priority=entry.priority, uses=uses, limit=max(entry.limit, uses + 1))

    def advance(self, version: int) -> list[Departure]:
        """The learner is at ``version``: ready trees without any fresh turn leave."""
        if version <= self._version:
            return []
        self._version = version
        # Those with the learner are checked when they come back.
        stale = np.array(self._expiry.stale(version), dtype=np.int64)
        return self._drop_stale(stale[self._table.state[stale] == READY])

    def shrink(self, max_bytes: int, max_trees: int | None = None) -> list[Departure]:
        """Ready trees leave, oldest first, until all take at most ``max_bytes`` and ``max_trees`` are ready at most."""
        left: list[Departure] = []
        skipped: list[tuple[int, int]] = []
        while self.nbytes > max_bytes or (max_trees is not None and self._num_ready > max_trees):
            cause = "bytes" if self.nbytes > max_bytes else "trees"
            row = self._table.pop_oldest(skipped)
            if row is None:
                break
            left += self._drop([row], cause)
        self._table.put_back(skipped)
        return left

    def discard(self, tree_ids: Iterable[str], cause: str) -> list[Departure]:
        """Those of these trees that are ready leave, for ``cause``."""
        return self._drop(self._table.ready_among(tree_ids).tolist(), cause)

    def refuse(self, cause: str) -> None:
        """A tree is not taken in at all: it counts as one that left for ``cause``."""
        self.left[cause] += 1

    # --- with the learner --------------------------------------------------------------------------------------

    def draw(self, count: int, *, rng: np.random.Generator, beta: float) -> list[Drawn]:
        """Take up to ``count`` different trees; they stay out until ``confirm`` or ``give_back``.

        Trees that were never served and would expire come first; the sampler chooses the others.  When every ready tree
        is taken there was no choice: P is 1/N and the weights are 1.
        """
        num_ready = self._num_ready
        if not num_ready or count <= 0:
            return []
        of_all: F64 | None = None
        if num_ready <= count:
            chosen = self._table.ready()
            probability = np.full(num_ready, 1.0 / num_ready)
            self._sampler.remove(chosen)
        else:
            self._tell_all()
            if self._weights_over == "mean":
                of_all = self._sampler.probability(self._table.ready())
            first = self._due(count, rng)
            # Until it has returned: where it fails, it may hold fewer trees than are ready.
            weighed_at, self._weighed_at = self._weighed_at, None
            chosen, probability = self._sampler.draw(count - len(first), first, rng)
            self._weighed_at = weighed_at
        weight = importance_weights(
            probability, num_trees=num_ready, beta=beta, over=self._weights_over, ready=of_all
        )  # fmt: skip
        return self._hand_out(chosen, probability, weight)

    def take(self, tree_ids: Iterable[str]) -> list[Drawn]:
        """Take those of these trees that are ready, as ``draw`` does.  There is no choice: P is 1/N."""
        chosen = self._table.ready_among(tree_ids)
        self._sampler.remove(chosen)
        return self._hand_out(chosen, np.full(len(chosen), 1.0 / max(len(chosen), 1)), np.ones(len(chosen)))

    def ready_trees(self) -> ReadyTrees:
        """All that can be drawn, as a draw over several pools needs them; O(N)."""
        table, ready = self._table, self._table.ready()
        return ReadyTrees(
            entered=table.entered[ready], priority=self._priority(ready), oldest=table.oldest[ready],
            unserved=table.uses[ready] == 0, version=self._version,
        )  # fmt: skip

    def find_entered(self, entered: I64) -> I64 | None:
        """int64[n]: rows of trees by ``ReadyTrees.entered``; None if one of them cannot be drawn any more."""
        ready = self._table.ready()
        row_of = dict(zip(self._table.entered[ready].tolist(), ready.tolist(), strict=True))
        found = [row_of.get(each, -1) for each in entered.tolist()]
        return None if -1 in found else np.array(found, dtype=np.int64)

    def take_rows(self, rows: I64, probability: F64, weight: F64) -> list[Drawn]:
        """Take trees that a draw over several pools has chosen, by row; float64[n] each: P_i and w_PER."""
        self._sampler.remove(rows)
        return self._hand_out(rows, probability, weight)

    def confirm(self, tree_ids: Iterable[str], priorities: Mapping[str, float]) -> list[Departure]:
        """The learner has trained on these trees: the use counts, new priorities hold, what is used up leaves."""
        out, table = self._with_learner, self._table
        found = {tree_id: out.pop(tree_id) for tree_id in tree_ids if tree_id in out}
        if not found:
            return []
        rows = np.fromiter(found.values(), np.int64, len(found))
        self._changed.update(found)
        # What has no new priority comes out as nan.
        new = np.fromiter(map(priorities.get, found, repeat(math.nan)), np.float64, len(found))
        known = ~np.isnan(new)
        is_highest = self._priorities.confirm(rows[known], new[known])
        table.uses[rows] += 1
        done = table.uses[rows] >= table.limit[rows]
        left = self._drop(rows[done].tolist(), "used")
        back = rows[~done]
        table.state[back] = READY
        self._num_ready += len(back)
        self._tell(back)
        if is_highest:
            self._tell(self._expiry.unserved())
        return left + self._drop_stale(back)

    def give_back(self, tree_ids: Iterable[str]) -> list[Departure]:
        """The batch was never trained on: its trees are ready again, the use not counted; the stale ones leave."""
        out = self._with_learner
        rows = np.array([out.pop(tree_id) for tree_id in tree_ids if tree_id in out], dtype=np.int64)
        for row in rows.tolist():
            self._become_ready(row)
        self._tell(rows)
        return self._drop_stale(rows)

    def undo_use(self, tree_id: str, uses: int) -> None:
        """A batch that was confirmed is undone: a ready tree here has had ``uses`` again."""
        table = self._table
        row = table.rows[tree_id]
        if table.state[row] != READY:
            raise ValueError(f"tree {tree_id} is with the learner; give its batch back first")
        self._changed.add(tree_id)
        oldest = int(table.oldest[row])
        if table.uses[row] == 0:
            self._expiry.remove_unserved(row, oldest)
        table.uses[row] = uses
        if uses == 0:
            self._expiry.put_unserved(row, oldest)
        self._tell(np.array([row]))

    # --- inside ------------------------------------------------------------------------------------------------

    def _become_ready(self, row: int) -> None:
        table = self._table
        table.state[row] = READY
        self._num_ready += 1
        if table.uses[row] == 0:
            self._expiry.put_unserved(row, int(table.oldest[row]))

    def _hand_out(self, chosen: I64, probability: F64, weight: F64) -> list[Drawn]:
        """Hand out trees that the sampler has removed already."""
        table = self._table
        table.state[chosen] = OUT
        self._num_ready -= len(chosen)
        drawn = []
        for row, p, w in zip(chosen.tolist(), probability.tolist(), weight.tolist(), strict=True):
            uses = int(table.uses[row])
            if uses == 0:
                self._expiry.remove_unserved(row, int(table.oldest[row]))
            tree = table.tree(row)
            self._with_learner[tree.tree_id] = row
            drawn.append(Drawn(tree, p, w, uses + 1))
        return drawn

    def _due(self, count: int, rng: np.random.Generator) -> I64:
        """Rows of never-served trees that must go now for none to be lost."""
        return self._expiry.choose_due(
            count, self._version, rng=rng,
            weigh=lambda rows: proportional(self._priority(rows), exponent=self._exponent),
        )  # fmt: skip

    def _priority(self, rows: I64) -> F64:
        return self._priorities.of(rows, self._table.uses[rows], self._version)

    def _tell(self, rows: I64) -> None:
        """Pass ready trees to the sampler that are new to it, or that have another priority."""
        self._sampler.put(rows, self._priority(rows))

    def _tell_all(self) -> None:
        """Pass all priorities to the sampler: they have aged since the last draw, or it may have lost some."""
        if self._weighed_at is None or (self._priorities.age and self._weighed_at < self._version):
            self._tell(self._table.ready())
        self._weighed_at = self._version

    def _drop_stale(self, rows: I64) -> list[Departure]:
        """Those of these ready trees that have no fresh turn leave."""
        rows = rows[self._version - self._table.newest[rows] > self._max_lag]
        served = self._table.uses[rows] > 0
        return self._drop(rows[~served].tolist(), "stale") + self._drop(rows[served].tolist(), "retired")

    def _drop(self, rows: Sequence[int], cause: str) -> list[Departure]:
        if not rows:
            return []
        table, priorities, left = self._table, self._priorities, []
        ready: list[int] = []
        for row in rows:
            tree, uses = table.trees[row], int(table.uses[row])
            assert tree is not None
            left.append(Departure(tree, cause, uses, priorities.own(row)))
            self._changed.add(tree.tree_id)
            if table.state[row] == READY:
                ready.append(row)
                if uses == 0:
                    self._expiry.remove_unserved(row, int(table.oldest[row]))
            self._expiry.remove(row, int(table.newest[row]))
            if priorities.age:
                priorities.remove(row)
            self.nbytes -= int(table.nbytes[row])
            table.free(row, tree.tree_id)
        self._num_ready -= len(ready)
        if ready:
            self._sampler.remove(np.array(ready))
        self.left[cause] += len(left)
        return left
