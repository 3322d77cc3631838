"""The life cycle of trees: growing, ready, with the learner, used up, dropped.

A tree grows (``trees.assembly``), is ready or with the learner (``pool``), and when it is used up is retained until a
checkpoint of the learner covers it (``trees.spent``).  A tree that is dropped is forgotten, or its task leased again.
Pure: clock and randomness are passed in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from msgspec import UNSET

from atpo_async.config import Config
from atpo_async.config.credit_rule import credit_rule
from atpo_async.core.credit import TreeArrays, branch_prob, outcome_share
from atpo_async.core.priorities import tree_priority
from buffer.batches.delay_line import DelayLine
from buffer.batches.served import Batches, ServedTree
from buffer.counters import RunCounters
from buffer.imitation.imitation import Imitation
from buffer.imitation.store import ImitationStore
from buffer.journal.entries import PoolEntry, RunEntry
from buffer.leases.ledger import Ledger
from buffer.pool.checked import sampler_of
from buffer.pool.outcomes import Departure, Drawn
from buffer.pool.pool import ReplayPool
from buffer.trees.groups import count_roles, unusable
from buffer.trees.index import Store, TreeEntry
from buffer.trees.parts import part_means
from buffer.trees.registry import TreeRegistry
from buffer.trees.spent import SpentTree
from buffer.trees.spread_filter import filter_of, spread_of

log = logging.getLogger("atpo.buffer")

NEARLY_FULL = 0.9
"""Share of buffer.max_bytes from which no new tree is admitted while a batch is ready."""
SPENT_SHARE = 0.5
"""Of buffer.max_bytes, on top of it: used-up trees that wait for a checkpoint of the learner."""
NOT_JUDGED = "not_judged"
"""The reason of a chain whose task could not say what its end is worth."""
LEAST_PRIORITY = 1e-9
"""Of a tree that is not compared: something can be learnt from it, whatever its chains earned."""
ENGINE_FAILED = frozenset({"generate_timeout", "generate_failed"})
"""Reasons of failed branches (``TreeClosed.failures``) that are not the fault of the task."""


class TreeLifecycle:
    """The trees of one run.

    Args:
        config: the run's.
        store: where their records are.
        ledger: has their leases, their tasks and the evaluations.
        counters: counts them.
        batches: searched for the last batch that had a tree.
        delay_line: decides which trees are held where the lag is to be exact.
    """

    def __init__(
        self,
        config: Config,
        *,
        store: Store,
        ledger: Ledger,
        counters: RunCounters,
        batches: Batches,
        delay_line: DelayLine | None,
    ) -> None:
        buffer, staleness = config.buffer, config.staleness
        self._config = config
        self._store = store
        self._credit = credit_rule(config.credit)
        self._ledger = ledger
        self._tasks = ledger.tasks
        self._counters = counters
        self._batches = batches
        self._delay_line = delay_line
        self._spreads = filter_of(buffer, staleness)
        """Chooses the trees that are kept; None: all."""
        self.pool = ReplayPool(
            max_uses=staleness.max_uses,
            max_lag=staleness.max_lag,
            exponent=buffer.priority_exponent,
            freshness=buffer.freshness,
            weights_over=buffer.weights_over,
            sampler=sampler_of(buffer),
        )
        """Trees that are ready, and those with the learner."""
        rows = ImitationStore(max_lag=config.imitation.max_lag, max_uses=config.imitation.max_uses)
        self.registry = TreeRegistry(store, self.pool, rows)
        self.imitation = Imitation(config, self.registry, counters.labels)
        """Leaves that are kept to be imitated."""
        self.assembly = self.registry.assembly
        """Trees that grow."""
        self._retired: set[str] = set()
        """Trees that grew too old between two uses, neither of which is sure to be in a checkpoint of the learner."""
        self.step = 0
        """Of the learner's last request: first priorities are by the credit of that step."""
        self.version = 0
        """The learner's version, as last reported: ages count from it."""

    # --- queries--------------------------------------------------------------------------------------

    @property
    def _spent_over(self) -> int:
        """Bytes by which trees retained for a checkpoint reduce the space of the others.

        Up to ``SPENT_SHARE`` they do not count: they must not evict the trees that lead to the checkpoint.
        """
        return max(self.registry.spent.nbytes - int(self._config.buffer.max_bytes * SPENT_SHARE), 0)

    @property
    def checkpoint_wanted(self) -> bool:
        """Whether trees that only a checkpoint of the learner frees take much of the space."""
        return self.registry.spent.nbytes > self._config.buffer.max_bytes * SPENT_SHARE

    @property
    def memory_full(self) -> bool:
        """Near the limit, with enough for a batch: new trees would only evict older ones, or find no space."""
        most = self._config.buffer.max_trees
        near = self._taken >= NEARLY_FULL * self._config.buffer.max_bytes
        near = near or (most is not None and len(self.pool) >= most)
        if self._delay_line is not None:
            return near
        ready = len(self.pool) + self._ledger.elsewhere.ready
        return near and ready >= self._config.staleness.trees_per_batch

    @property
    def _taken(self) -> int:
        """Bytes that count towards ``buffer.max_bytes``."""
        return self.pool.nbytes + self.assembly.nbytes + self._spent_over

    @property
    def num_waiting(self) -> int:
        """Trees that wait to be served and are not under lease; those that come back from the learner too."""
        waiting = len(self.pool) + self.pool.num_returning
        if self._config.buffer.ready == "partial":
            waiting -= sum(t in self.pool and not self.pool.is_out(t) for t in self._ledger.training_trees())
        return waiting

    # --- the end of a tree -------------------------------------------------------------------------------------

    def end(self, tree_id: str) -> None:
        """End a tree: no further message of it will come."""
        self._counters.progressed()
        held = self._ledger.end(tree_id)
        failures = self.assembly.failures(tree_id)
        no_answer = not ENGINE_FAILED.isdisjoint(failures)
        whole = self.assembly.finish(tree_id)
        tree = whole.pruned()
        if held is None or held.kind == "eval":
            if held is not None:
                self._evaluated(held.eval_step, tree, judged=NOT_JUDGED not in failures)
            self.registry.forget(whole)
            return
        # Here and not at the closing message: a tree may be closed under more than one lease, but ends once.
        self._counters.count("failed_branches", whole.failed_branches)
        reason = unusable(tree, least_leaves=1 if self._credit.needs_no_comparison else 2)
        if reason is not None:
            self._counters.count(f"dropped_{reason}")
            if no_answer:
                # The task is not at fault: a hung engine would use up every task that it is given.
                self._lease_again(tree.task_index)
            else:
                self._counters.count_task("failed")
                self._tasks.settled(tree.task_index)
            self.registry.forget(whole)
            return
        self.registry.drop_turns(whole, tree)
        arrays = tree.arrays()
        self.imitation.tree_ended(tree, arrays, version=self.version)
        if self._delay_line is None:
            self._count_tree(tree, arrays)
            self._admit(tree, arrays, kept=self._is_kept(arrays))
        else:
            self._admit_exact(tree, arrays, self._delay_line)

    def _evaluated(self, step: int, tree: TreeEntry, *, judged: bool) -> None:
        """The pruned tree of a held-out task, for the evaluation of ``step``."""
        outcome = tree.outcome()
        parts = part_means(outcome, outcome.is_leaf.astype(np.float64), self._store)
        self._ledger.evaluations.record(step, tree.task_index, tree, judged=judged, parts=parts)

    def _count_tree(self, tree: TreeEntry, arrays: TreeArrays) -> None:
        share = outcome_share(arrays, branch_prob(arrays))
        self._counters.count_tree(tree, arrays, share)
        if arrays.role.any():
            count_roles(self._counters, tree, arrays, self._credit.at(self.step))
        self._counters.count_rewards(tree.task_index, arrays, share, part_means(tree, share, self._store))

    def forget_growing(self, tree_id: str) -> None:
        """Drop a growing tree: its turns are of no use."""
        self.registry.forget(self.assembly.finish(tree_id))

    def _is_kept(self, arrays: TreeArrays) -> bool:
        """Whether the chains of a tree differ as much as ``buffer.keep_share`` asks; once for each tree."""
        if self._spreads is None:
            return True
        return self._spreads.keeps(spread_of(self._credit.at(self.step).counted(arrays)))

    def _left_out(self, tree: TreeEntry, arrays: TreeArrays, *, signal: bool) -> None:
        """A tree goes to no batch: nothing can be learnt from it, or others are kept for their spread."""
        self._counters.count("dropped_filtered" if signal else "no_signal_trees")
        self._counters.count_task("filtered" if signal else "no_signal")
        if not signal and self._credit.needs_batch_std:
            self._counters.count_left_out(arrays.reward[arrays.is_leaf])
        self._tasks.settled(tree.task_index)
        self.registry.forget(tree)

    def _admit(self, tree: TreeEntry, arrays: TreeArrays, *, kept: bool = True) -> None:
        """Add a tree to the pool, unless nothing can be learnt from it, or it is not kept."""
        tree_id, priority = tree.tree_id, self._priority(arrays)
        if priority == 0 or not kept:
            self.registry.pop_partial_uses(tree_id)
            self._left_out(tree, arrays, signal=priority > 0)
            return
        if self.pool.is_out(tree_id):
            self.registry.put_late(tree)
            return
        uses, leaves = self.registry.pop_partial_uses(tree_id)
        if uses and tree.num_leaves <= leaves and tree_id not in self.pool:
            used_up_at = self._batches.last_with(tree_id)
            if used_up_at is None:
                self.registry.forget(tree)
            else:
                entry = PoolEntry(priority=priority, uses=uses, limit=uses, entered=0)
                self.registry.put_spent(SpentTree(tree, entry, used_up_at))
            return
        self._after(self.pool.add(tree, priority=priority, uses=uses))
        self._make_space()

    def _admit_exact(self, tree: TreeEntry, arrays: TreeArrays, delay_line: DelayLine) -> None:
        """Add a tree to the sets under way, if the version that grows them sampled every token."""
        priority = self._priority(arrays)
        versions = tree.versions
        fits = self._taken + tree.nbytes <= self._config.buffer.max_bytes
        kept = self._is_kept(arrays)
        fate = delay_line.place(tree.tree_id, versions, signal=priority > 0 and kept, fits=fits)
        if fate == "inexact":
            self._counters.count("dropped_inexact")
            log.warning(
                "tree %s is dropped, versions %s sampled it: %s", tree.tree_id, sorted(versions), delay_line.describe()
            )  # fmt: skip
        else:
            self._count_tree(tree, arrays)
        match fate:
            case "taken":
                self._after(self.pool.add(tree, priority=priority))
                return
            case "too_large":
                # This one is dropped and not the oldest, which is part of a complete batch.
                self.pool.refuse("bytes")
            case "no_signal":
                self._left_out(tree, arrays, signal=priority > 0)
                return
            case "surplus":
                self._counters.count("dropped_surplus")
        self._lease_again(tree.task_index, in_vain=fate == "inexact")
        self.registry.forget(tree)

    def offer_partial(self, tree_id: str) -> bool:
        """Serve a tree that still grows: with enough leaves, and again with as many new ones after it was served."""
        if self.pool.is_out(tree_id):
            return False
        uses, leaves = self.registry.partial_uses(tree_id)
        least = leaves + self._config.buffer.partial_min_leaves
        if self.assembly.num_leaves(tree_id) < least:
            return False
        tree = self.assembly.tree(tree_id).pruned()
        if tree.num_leaves < least:
            return False
        priority = self._priority(tree.arrays())
        if priority == 0:
            return False
        self._after(self.pool.add(tree, priority=priority, uses=uses))
        self.advance()
        return True

    def _priority(self, arrays: TreeArrays) -> float:
        # Without turn ratios, which only the learner has: a tree trace equals child_mean here.
        advantages = self._credit.at(self.step).credit(arrays).advantages
        found = tree_priority(advantages, max_share=self._config.buffer.priority_max_share)
        return max(found, LEAST_PRIORITY) if self._credit.needs_no_comparison else found

    # --- age and space -----------------------------------------------------------------------------------------

    def heard(self, version: int) -> None:
        """The learner is at ``version`` or past it."""
        self.version = max(self.version, version)

    def advance(self) -> None:
        """The learner is at ``version``: trees without any fresh turn are dropped."""
        self._after(self.pool.advance(self.version))
        self.imitation.advance(self.version)

    def discard(self, tree_ids: Sequence[str], cause: str) -> None:
        """Those of these trees that are ready leave, for ``cause``."""
        self._after(self.pool.discard(tree_ids, cause))

    def _make_space(self) -> None:
        self.advance()
        rest = self._config.buffer.max_bytes - self.assembly.nbytes - self._spent_over
        # Rows that are imitated make way for trees, not trees for them.
        self.imitation.make_space(rest - self.pool.nbytes)
        rest -= self.registry.imitation.nbytes
        self._after(self.pool.shrink(max(rest, 0), self._config.buffer.max_trees))

    def _after(self, left: Iterable[Departure], *, confirmed: int = -1) -> None:
        """Trees left the pool: retain them for a learner that falls back, lease their tasks again, or forget them.

        Args:
            left: in their order.
            confirmed: step of the batch whose confirmation used some of them up.
        """
        for each in left:
            tree = each.tree
            if self.registry.grows_or_is_late(tree.tree_id):
                continue  # it still grows, or comes back with what grew meanwhile
            if each.cause == "used":
                self._tasks.settled(tree.task_index)
                # A learner that falls back behind that batch trains on it again.
                entry = PoolEntry(priority=each.priority, uses=each.uses, limit=each.uses, entered=0)
                self.registry.put_spent(SpentTree(tree, entry, confirmed))
                continue
            if each.uses == 0:
                self._lease_again(tree.task_index)
            else:
                if each.cause == "retired":
                    self._counters.count_task("retired")
                    self._retired.add(tree.tree_id)
                self._tasks.settled(tree.task_index)
            self.registry.pop_partial_uses(tree.tree_id)
            self.registry.forget(tree)

    def _lease_again(self, task: int, *, in_vain: bool = True) -> None:
        """Lease a task again whose trees were lost before any batch had one."""
        if not self._tasks.retry(task, in_vain=in_vain):
            log.warning("task %d given up: its trees came too late, or found no space or no engine, too often", task)

    # --- batches -----------------------------------------------------------------------------------------------

    def served(self, drawn: Sequence[Drawn]) -> None:
        """These trees were sent to the learner."""
        if self._config.buffer.ready == "partial":
            for each in drawn:
                self.registry.put_partial_uses(each.tree.tree_id, each.uses, each.tree.num_leaves)

    def confirm(self, tree_ids: Sequence[str], priorities: Mapping[str, float], *, step: int) -> None:
        """The learner has trained on these trees, the batch of ``step``."""
        self._after(self.pool.confirm(tree_ids, priorities), confirmed=step)
        self._offer_late(tree_ids)

    def give_back(self, tree_ids: Sequence[str]) -> None:
        """The learner has not trained on these trees."""
        self._after(self.pool.give_back(tree_ids))
        self._offer_late(tree_ids)

    def undo_use(self, drawn: ServedTree) -> None:
        """The learner has lost its update from this tree."""
        before = drawn.uses - 1
        tree_id = drawn.tree_id
        if tree_id in self.registry.spent:
            tree, entry, _ = self.registry.spent.pop(tree_id)
            self._after(self.pool.bring_back(tree, entry, uses=before))
        elif tree_id in self.assembly:
            self.registry.put_partial_uses(tree_id, before, 0)
            if tree_id in self.pool:
                self.pool.undo_use(tree_id, before)
            else:
                self.offer_partial(tree_id)
        elif tree_id in self.pool:
            self.pool.undo_use(tree_id, before)
        elif before == 0:
            if tree_id in self._retired:
                # Its task begins anew, with all its uses.
                self._retired.remove(tree_id)
                self._counters.count_task("retired", -1)
            self._lease_again(drawn.task_index, in_vain=False)

    def _offer_late(self, tree_ids: Iterable[str]) -> None:
        """Partial trees that grew while the learner had them."""
        for tree_id in tree_ids:
            late = self.registry.pop_late(tree_id)
            if late is not None:
                self._admit(late, late.arrays())
            elif tree_id in self.assembly and self._ledger.kind(tree_id) == "train":
                self.offer_partial(tree_id)
            else:
                self.registry.pop_partial_uses(tree_id)

    def checkpointed(self, step: int) -> None:
        """A checkpoint of the learner covers the batches below ``step``."""
        self.imitation.checkpointed(step)
        for tree in self.registry.spent.pop_below(step):
            self.registry.forget(tree)
        if self._retired:
            self._retired &= self._batches.tree_ids()

    # --- snapshot ----------------------------------------------------------------------------------------------

    def snapshot(self, run: RunEntry) -> None:
        """Write what ``restore`` reads; each tree's state is the registry's."""
        run.version, run.retired = self.version, tuple(sorted(self._retired))
        run.highest_priority = self.pool.highest_priority
        run.spreads = UNSET if self._spreads is None else self._spreads.snapshot()

    def restore(self, run: RunEntry) -> None:
        """As an earlier process left it; after the trees."""
        self.version, self._retired = run.version, set(run.retired)
        self.pool.restore_highest_priority(run.highest_priority)
        if self._spreads is not None:
            self._spreads.restore(run.spreads or ())
