"""Every tree that is held, from its first turn until nobody needs it, and what becomes of it.

A tree grows (``trees.assembly``), is ready or with the learner (``trees.pool``), and is kept when it is used up
until a checkpoint of the learner holds what it taught.  What falls out of all that is leased again or forgotten.
Pure: clock and randomness come in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from atpo_async.config import Config
from atpo_async.config.credit_rule import credit_rule
from atpo_async.core.credit import TreeArrays
from atpo_async.core.errors import BadMessage
from atpo_async.core.priorities import tree_priority
from buffer.batches.delay_line import DelayLine
from buffer.batches.served import Batches, ServedTree
from buffer.counters import RunCounters
from buffer.journal import entries
from buffer.leases.evaluations import Evaluations
from buffer.leases.ledger import Ledger
from buffer.pool.checked import sampler_of
from buffer.pool.pool import Departure, Drawn, ReplayPool
from buffer.trees.assembly import Assembly
from buffer.trees.index import Store, TreeEntry

log = logging.getLogger("atpo.buffer")

NEARLY_FULL = 0.9
"""Share of buffer.max_bytes from which no new tree is admitted while a batch is ready."""
SPENT_SHARE = 0.5
"""Of buffer.max_bytes, on top of it: trees that are only kept until a checkpoint of the learner holds them."""
ENGINE_FAILED = frozenset({"generate_timeout", "generate_failed"})
"""Why branches failed (``TreeClosed.failures``) that says nothing about their task."""


class TreeLifecycle:
    """The trees of one run.

    Args:
        config: the run's.
        store: where their records are.
        ledger: told what becomes of their tasks.
        evaluations: told of trees that are grown for one.
        counters: counts them.
        batches: looked into for who had a tree last.
        delay_line: decides what is kept where the lag is to be exact.
    """

    def __init__(
        self,
        config: Config,
        *,
        store: Store,
        ledger: Ledger,
        evaluations: Evaluations,
        counters: RunCounters,
        batches: Batches,
        delay_line: DelayLine | None,
    ) -> None:
        buffer, staleness = config.buffer, config.staleness
        self._config = config
        self._credit = credit_rule(config.credit)
        self._store = store
        self._ledger = ledger
        self._evaluations = evaluations
        self._counters = counters
        self._batches = batches
        self._delay_line = delay_line
        self.assembly = Assembly(store, find=self.find)
        """Trees that grow."""
        self.pool = ReplayPool(
            max_uses=staleness.max_uses,
            max_lag=staleness.max_lag,
            exponent=buffer.priority_exponent,
            freshness=buffer.freshness,
            weights_over=buffer.weights_over,
            sampler=sampler_of(buffer),
        )
        """Trees that are ready, and those with the learner."""
        self.spent: dict[str, tuple[TreeEntry, entries.PoolEntry, int]] = {}
        """Trees used up since the learner's last checkpoint, as the pool had them, and the step that used them up."""
        self.spent_nbytes = 0
        self.late: dict[str, TreeEntry] = {}
        """Trees that came to their end while the learner had an earlier state of them."""
        self.retired: set[str] = set()
        """Trees that grew too old between two uses, neither of which a checkpoint of the learner holds for sure."""
        self.partial_uses: dict[str, tuple[int, int]] = {}
        """Tree -> (uses, leaves) when it was last served, of trees that may be served before their end."""
        self.names: dict[int, str] = {}
        """Number -> id of every tree that has a lease or records."""
        self.version = 0
        """The learner's, as last heard: ages count from it."""
        self.changed: set[str] = set()
        """Trees of which something changed that only this class knows; whoever keeps them takes the names away."""

    # --- what is there -----------------------------------------------------------------------------------------

    def find(self, tree_id: str) -> TreeEntry | None:
        """A tree that is still kept after its end."""
        late = self.late.get(tree_id)
        if late is not None:
            return late
        if tree_id in self.spent:
            return self.spent[tree_id][0]
        return self.pool.find(tree_id)

    def tree_of(self, drawn: ServedTree) -> TreeEntry:
        """A tree of a batch, as it was served.

        Raises:
            BadMessage: it is kept no more.
        """
        tree = self.pool.find(drawn.tree_id)
        if tree is None and drawn.tree_id in self.spent:
            tree = self.spent[drawn.tree_id][0]
        if tree is None:
            raise BadMessage(f"tree {drawn.tree_id} of that batch is gone: it was trained on, ask for the next step")
        if drawn.turn_ids is None or len(drawn.turn_ids) == len(tree):
            return tree
        return replace(tree, rows=tree.rows[np.isin(tree.rows["turn_id"], drawn.turn_ids)])

    @property
    def nbytes(self) -> int:
        """Bytes of all turns kept."""
        return self.pool.nbytes + self.assembly.nbytes + self.spent_nbytes

    @property
    def _spent_over(self) -> int:
        """Bytes by which trees kept for a checkpoint cut into the room of the others.

        Up to ``SPENT_SHARE`` they come on top: they must not push out those that lead to the checkpoint.
        """
        return max(self.spent_nbytes - int(self._config.buffer.max_bytes * SPENT_SHARE), 0)

    @property
    def checkpoint_wanted(self) -> bool:
        """Whether trees that only a checkpoint of the learner sets free take much of the room."""
        return self.spent_nbytes > self._config.buffer.max_bytes * SPENT_SHARE

    @property
    def memory_full(self) -> bool:
        """Near the limit, with enough for a batch: new trees would only push out older ones, or find no room."""
        most = self._config.buffer.max_trees
        taken = self.pool.nbytes + self.assembly.nbytes + self._spent_over
        near = taken >= NEARLY_FULL * self._config.buffer.max_bytes
        near = near or (most is not None and len(self.pool) >= most)
        if self._delay_line is not None:
            return near
        return near and len(self.pool) >= self._config.staleness.trees_per_batch

    @property
    def num_waiting(self) -> int:
        """Trees that wait to be served and are not under lease; those that come back from the learner too."""
        waiting = len(self.pool) + self.pool.num_returning
        if self._config.buffer.ready == "partial":
            waiting -= sum(t in self.pool and not self.pool.is_out(t) for t in self._ledger.training_trees())
        return waiting

    # --- the end of a tree -------------------------------------------------------------------------------------

    def end(self, tree_id: str) -> None:
        """Nothing more will come of this tree."""
        self._counters.progress += 1
        held = self._ledger.end(tree_id)
        no_answer = not ENGINE_FAILED.isdisjoint(self.assembly.failures(tree_id))
        whole = self.assembly.finish(tree_id)
        tree = whole.pruned()
        if held is None or held.kind == "eval":
            self.forget(whole)
            if held is not None:
                self._evaluations.record(held, tree)
            return
        # Here and not when the closing comes: a tree may be closed under more than one lease, but ends once.
        self._counters.since.counts["failed_branches"] += whole.failed_branches
        reason = unusable(tree)
        if reason is not None:
            self._counters.since.counts[f"dropped_{reason}"] += 1
            if no_answer:
                # Not for want of anything in the task: a hung engine would eat every task that it is given.
                self._lease_again(tree.task_index)
            else:
                self._counters.tasks["failed"] += 1
                self._ledger.settled(tree.task_index)
            self.forget(whole)
            return
        if len(tree) < len(whole):
            self._store.release(whole.rows[~np.isin(whole.rows["turn_id"], tree.rows["turn_id"])])
        arrays = tree.arrays()
        if self._delay_line is None:
            self._counters.count_tree(tree, arrays)
            self._admit(tree, self._priority(arrays))
        else:
            self._admit_exact(tree, arrays, self._delay_line)

    def forget(self, tree: TreeEntry) -> None:
        """Its records are needed no more, unless somebody else has the tree still."""
        tree_id = tree.tree_id
        if tree_id in self.assembly or tree_id in self.late or tree_id in self.pool or tree_id in self.spent:
            return
        self.changed.add(tree_id)
        self.names.pop(tree.number, None)
        self._store.release(tree.prompt, gone=True)
        self._store.release(tree.rows, gone=True)

    def forget_growing(self, tree_id: str) -> None:
        """Nobody grows this tree any more, and what came of it is of no use."""
        self.forget(self.assembly.finish(tree_id))

    def _admit(self, tree: TreeEntry, priority: float) -> None:
        """Into the pool, unless nothing can be learnt from it."""
        if priority == 0:
            self._counters.since.counts["no_signal_trees"] += 1
            self._counters.tasks["no_signal"] += 1
            self.partial_uses.pop(tree.tree_id, None)
            self._ledger.settled(tree.task_index)
            self.forget(tree)
            return
        if self.pool.is_out(tree.tree_id):
            self.late[tree.tree_id] = tree
            self.changed.add(tree.tree_id)
            return
        uses, leaves = self.partial_uses.pop(tree.tree_id, (0, 0))
        if uses and tree.num_leaves <= leaves and tree.tree_id not in self.pool:
            place = entries.PoolEntry(priority=priority, uses=uses, limit=uses, entered=0)
            used_up_at = self._batches.last_with(tree.tree_id)
            if used_up_at is None:
                self.forget(tree)
            else:
                self._spend(tree, place, used_up_at)
            return
        self._see_off(self.pool.add(tree, priority=priority, uses=uses))
        self._make_space()

    def _admit_exact(self, tree: TreeEntry, arrays: TreeArrays, delay_line: DelayLine) -> None:
        """Into the sets under way, if the version that grows them sampled every token."""
        priority = self._priority(arrays)
        versions = tree.versions
        taken = self.pool.nbytes + self.assembly.nbytes + self._spent_over
        room = taken + tree.nbytes <= self._config.buffer.max_bytes
        fate = delay_line.place(tree.tree_id, versions, signal=priority > 0, room=room)
        if fate == "kept":
            self._counters.count_tree(tree, arrays)
            self._see_off(self.pool.add(tree, priority=priority))
            return
        if fate == "inexact":
            self._counters.since.counts["dropped_inexact"] += 1
            log.warning(
                "tree %s is dropped, versions %s sampled it: %s", tree.tree_id, sorted(versions), delay_line.describe()
            )  # fmt: skip
        else:
            self._counters.count_tree(tree, arrays)
        match fate:
            case "no_room":
                # This one and not the oldest, as otherwise: the oldest is of a batch that is whole.
                self.pool.refuse("bytes")
            case "no_signal":
                self._counters.since.counts["no_signal_trees"] += 1
            case "surplus":
                self._counters.since.counts["dropped_surplus"] += 1
        if fate == "no_signal":
            self._counters.tasks["no_signal"] += 1
            self._ledger.settled(tree.task_index)
        else:
            self._lease_again(tree.task_index, in_vain=fate == "inexact")
        self.forget(tree)

    def offer_partial(self, tree_id: str) -> bool:
        """Serve a tree that still grows: with enough leaves, and again with as many new ones after it was served."""
        if self.pool.is_out(tree_id):
            return False
        uses, leaves = self.partial_uses.get(tree_id, (0, 0))
        least = leaves + self._config.buffer.partial_min_leaves
        if self.assembly.num_leaves(tree_id) < least:
            return False
        tree = self.assembly.tree(tree_id).pruned()
        if tree.num_leaves < least:
            return False
        priority = self._priority(tree.arrays())
        if priority == 0:
            return False
        self._see_off(self.pool.add(tree, priority=priority, uses=uses))
        self.advance()
        return True

    def _priority(self, arrays: TreeArrays) -> float:
        # Without turn ratios, which the learner alone has: a tree trace counts as child_mean here.
        advantages = self._credit.credit(arrays).advantages
        return tree_priority(advantages, max_share=self._config.buffer.priority_max_share)

    # --- age and room ------------------------------------------------------------------------------------------

    def heard(self, version: int) -> None:
        """The learner is at ``version`` or past it."""
        self.version = max(self.version, version)

    def advance(self) -> None:
        """The learner is at ``version``: trees without any fresh turn go."""
        self._see_off(self.pool.advance(self.version))

    def discard(self, tree_ids: Sequence[str], cause: str) -> None:
        """Those of these trees that are ready leave, for ``cause``."""
        self._see_off(self.pool.discard(tree_ids, cause))

    def _make_space(self) -> None:
        self.advance()
        rest = self._config.buffer.max_bytes - self.assembly.nbytes - self._spent_over
        self._see_off(self.pool.shrink(max(rest, 0), self._config.buffer.max_trees))

    def _see_off(self, left: Sequence[Departure], *, confirmed: int = -1) -> None:
        """Trees that left the pool: kept for a learner that falls back, leased again, or forgotten.

        Args:
            left: in their order.
            confirmed: step of the batch whose confirmation used some of them up.
        """
        for each in left:
            self._left_the_pool(each, confirmed)

    def _left_the_pool(self, gone: Departure, confirmed: int) -> None:
        tree = gone.tree
        tree_id = tree.tree_id
        if tree_id in self.assembly or tree_id in self.late:
            return  # it still grows, or comes back with what grew meanwhile
        if gone.cause == "used":
            self._ledger.settled(tree.task_index)
            place = entries.PoolEntry(priority=gone.priority, uses=gone.uses, limit=gone.uses, entered=0)
            self._spend(tree, place, confirmed)
            return
        if gone.uses == 0:
            self._lease_again(tree.task_index)
        else:
            if gone.cause == "retired":
                self._counters.tasks["retired"] += 1
                self.retired.add(tree_id)
            self._ledger.settled(tree.task_index)
        self.partial_uses.pop(tree_id, None)
        self.forget(tree)

    def _lease_again(self, task: int, *, in_vain: bool = True) -> None:
        """Its trees were lost before any batch had one: the task's turn comes again."""
        if not self._ledger.lease_again(task, in_vain=in_vain):
            log.warning("task %d given up: its trees came too late, or found no room or no engine, too often", task)

    def _spend(self, tree: TreeEntry, place: entries.PoolEntry, step: int) -> None:
        """Used up by the batch of ``step``; but a learner that falls back behind it trains on it again."""
        self.spent[tree.tree_id] = (tree, place, step)
        self.spent_nbytes += tree.nbytes
        self.changed.add(tree.tree_id)

    # --- batches -----------------------------------------------------------------------------------------------

    def served(self, drawn: Sequence[Drawn]) -> None:
        """These trees went out to the learner."""
        if self._config.buffer.ready != "partial":
            return
        for each in drawn:
            self.partial_uses[each.tree.tree_id] = (each.uses, each.tree.num_leaves)
            self.changed.add(each.tree.tree_id)

    def confirm(self, tree_ids: Sequence[str], priorities: Mapping[str, float], *, step: int) -> None:
        """The learner has trained on these trees, the batch of ``step``."""
        self._see_off(self.pool.confirm(tree_ids, priorities), confirmed=step)
        self._offer_late(tree_ids)

    def give_back(self, tree_ids: Sequence[str]) -> None:
        """The learner has not trained on these trees."""
        self._see_off(self.pool.give_back(tree_ids))
        self._offer_late(tree_ids)

    def undo_use(self, drawn: ServedTree) -> None:
        """The learner has lost what it learned from this tree."""
        before = drawn.uses - 1
        tree_id = drawn.tree_id
        if tree_id in self.spent:
            tree, place, _ = self.spent.pop(tree_id)
            self.spent_nbytes -= tree.nbytes
            self._see_off(self.pool.bring_back(tree, place, uses=before))
        elif tree_id in self.assembly:
            self.partial_uses[tree_id] = (before, 0)
            self.changed.add(tree_id)
            if tree_id in self.pool:
                self.pool.undo_use(tree_id, before)
            else:
                self.offer_partial(tree_id)
        elif tree_id in self.pool:
            self.pool.undo_use(tree_id, before)
        elif before == 0:
            if tree_id in self.retired:
                # Its task begins anew, with all its uses.
                self.retired.remove(tree_id)
                self._counters.tasks["retired"] -= 1
            self._lease_again(drawn.task_index, in_vain=False)

    def _offer_late(self, tree_ids: Iterable[str]) -> None:
        """Partial trees that grew while the learner had them."""
        for tree_id in tree_ids:
            late = self.late.pop(tree_id, None)
            if late is not None:
                self.changed.add(tree_id)
                self._admit(late, self._priority(late.arrays()))
            elif tree_id in self.assembly and self._ledger.kind(tree_id) == "train":
                self.offer_partial(tree_id)
            else:
                self.partial_uses.pop(tree_id, None)

    def checkpointed(self, step: int) -> None:
        """A checkpoint of the learner holds what the batches below ``step`` taught."""
        for tree_id in [tree_id for tree_id, (_, _, used_up_at) in self.spent.items() if used_up_at < step]:
            tree, _, _ = self.spent.pop(tree_id)
            self.spent_nbytes -= tree.nbytes
            self.forget(tree)
        if self.retired:
            self.retired &= {tree_id for served in self._batches.by_step.values() for tree_id in served.tree_ids}


def unusable(tree: TreeEntry) -> str | None:
    """Why a pruned tree cannot be trained on; None if it can.  One leaf has nothing to be compared with."""
    leaves = tree.num_leaves
    return None if leaves >= 2 else ("one_leaf" if leaves else "no_leaf")
