"""Between state and journal: what changed is handed over, and put back when a buffer starts again.  Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from atpo_async.core.errors import SetupError
from atpo_async.core.tree import ROOT
from atpo_async.wire.messages import TreeClosed
from buffer.batches.delay_line import TreeSet
from buffer.batches.served import Served, ServedTree
from buffer.journal import entries
from buffer.leases.ledger import Evaluation, HeldLease, RetriedTask
from buffer.state import BufferState
from buffer.trees.assembly import Growing
from buffer.trees.index import Rows, TreeEntry, TurnEntry, entry_of


class StatePersistence:
    """Keeps one state.

    Args:
        state: whose changes are handed over, or that is restored.
    """

    def __init__(self, state: BufferState) -> None:
        self._state = state
        self._kept: dict[bytes, bytes] = {}
        """Of the keys that are written whole: what was written last."""
        self._all_in_one = False
        """An earlier program's evaluations are under one key: it goes with the first commit."""

    def collect(self, put: Callable[[bytes, bytes | None], None]) -> None:
        """Hand over what has changed since the last time: (key, value), None where there is nothing any more."""
        state = self._state
        changed: set[str] = set()
        for names in (state.trees.changed, state.ledger.changed, state.assembly.changed):
            changed |= names
            names.clear()
        changed |= state.pool.drain_changes()
        for tree_id in changed:
            tree = self._kept_tree(tree_id)
            put(entries.TREE + tree_id.encode(), None if tree is None else entries.dump(tree))
        for step in self._state.batches.changed:
            served = self._state.batches.by_step.get(step)
            put(entries.BATCH + b"%020d" % step, None if served is None else entries.dump(_kept_batch(served)))
        self._state.batches.changed.clear()
        for step in self._state.ledger.changed_evaluations:
            evaluation = self._state.ledger.evaluations.get(step)
            put(
                entries.EVALUATION + b"%020d" % step,
                None if evaluation is None else entries.dump(_kept_evaluation(evaluation)),
            )
        self._state.ledger.changed_evaluations.clear()
        if self._all_in_one:
            self._all_in_one = False
            put(entries.ALL_EVALUATIONS, None)
        for key, value in self._kept_whole().items():
            data = entries.dump(value)
            if self._kept.get(key) != data:
                self._kept[key] = data
                put(key, data)

    def _kept_tree(self, tree_id: str) -> entries.TreeStateEntry | None:
        held, growing = self._state.ledger.held(tree_id), self._state.assembly.growing(tree_id)
        tree = self._state.trees.find(tree_id)
        if held is None and growing is None and tree is None:
            return None
        place, spent_at = self._state.pool.snapshot(tree_id), None
        if place is None and tree_id in self._state.trees.spent:
            _, place, spent_at = self._state.trees.spent[tree_id]
        owner = growing or tree or held
        assert owner is not None
        return entries.TreeStateEntry(
            number=owner.number,
            task_index=owner.task_index,
            kind="train" if held is None else held.kind,
            failed_branches=0 if tree is None else tree.failed_branches,
            attempts=self._state.ledger.attempts(owner.task_index),
            lease=None if held is None else _kept_lease(held),
            growing=growing is not None,
            epoch=0 if growing is None else growing.epoch,
            closed=None if growing is None or growing.closed is None else _kept_closed(growing.closed),
            partial=self._state.trees.partial_uses.get(tree_id),
            late=tree_id in self._state.trees.late,
            pool=place,
            spent_at=spent_at,
        )

    def _kept_whole(self) -> dict[bytes, object]:
        ledger, since, line = self._state.ledger, self._state.counters.since, self._state.delay_line
        found: dict[bytes, object] = {
            entries.REST: entries.RunEntry(
                incarnation=self._state.incarnation,
                next_task=ledger.next_task,
                next_number=ledger.next_number,
                next_batch=self._state.batches.next_id,
                again=tuple(entries.RetryEntry(task_index=t, attempts=n) for t, n in ledger.again),
                given_up=ledger.given_up,
                published=ledger.published,
                next_version=ledger.next_version,
                step=self._state.step,
                version=self._state.version,
                weights_endpoint=self._state.weights_endpoint,
                announce_endpoint=self._state.announce_endpoint,
                highest_priority=self._state.pool.highest_priority,
                saved_step=self._state.batch_server.saved_step,
                tasks=dict(self._state.counters.tasks),
                retired=tuple(sorted(self._state.trees.retired)),
            ),
            entries.SINCE: entries.CountsEntry(
                produced=since.produced, turns=since.turns, counts=dict(since.counts), means=since.means
            ),
        }
        if line is not None:
            found[entries.LINE] = line.kept()
        return found

    def restore(self, rows: Rows, state: Mapping[bytes, bytes], now: float) -> dict[str, int]:
        """Put back what an earlier buffer of this run kept, as the next incarnation.  Before anything else.

        Args:
            rows: ROW[R], by tree, then by turn.
            state: what ``collect`` handed over.
            now: seconds.

        Returns:
            Name -> number, of what is there.

        Raises:
            SetupError: the journal contradicts itself.
        """
        rest = entries.read(state, entries.REST, entries.RunEntry)
        if rest is None:
            self._state.incarnation += 1
            self._state.ledger.prefix = f"b{self._state.incarnation}"
            self._state.store.release(rows, gone=True)
            return {}
        self._restore_rest(rest, state)
        owned = np.zeros(len(rows), dtype=bool)
        pooled: list[tuple[entries.TreeStateEntry, TreeEntry]] = []
        for key in state:
            if not key.startswith(entries.TREE):
                continue
            tree = entries.read(state, key, entries.TreeStateEntry)
            assert tree is not None
            at = slice(*np.searchsorted(rows["tree"], [tree.number, tree.number + 1]).tolist())
            entry = self._restore_tree(key.removeprefix(entries.TREE).decode(), tree, rows[at], now)
            # Turns of failed branches went when their tree was done, their chunk may have stayed.
            owned[at] = entry is None or np.isin(rows["turn_id"][at], [ROOT, *entry.rows["turn_id"].tolist()])
            if entry is not None:
                pooled.append((tree, entry))
        for tree, entry in sorted(pooled, key=lambda each: 0 if each[0].pool is None else each[0].pool.entered):
            place = tree.pool
            assert place is not None
            self._state.pool.restore(entry, place)
        self._state.pool.restore_highest_priority(rest.highest_priority)
        for key in sorted(key for key in state if key.startswith(entries.BATCH)):
            batch = entries.read(state, key, entries.BatchEntry)
            assert batch is not None
            self._restore_batch(batch)
        # After the batches: what a learner has is not dropped for its age.
        self._state.trees.advance()
        # Records of trees that are gone, in chunks that others keep.
        self._state.store.release(rows[~owned], gone=True)
        return {
            "turns": int(np.count_nonzero(owned)),
            "growing trees": len(self._state.assembly),
            "ready trees": len(self._state.pool),
            "trees with the learner": self._state.pool.num_out,
            "trees kept for a checkpoint": len(self._state.trees.spent),
            "leases": len(self._state.ledger),
            "batches": len(self._state.batches.by_step),
            "tasks to lease again": len(self._state.ledger.again),
        }

    def _restore_rest(self, rest: entries.RunEntry, state: Mapping[bytes, bytes]) -> None:
        ledger = self._state.ledger
        self._state.incarnation = rest.incarnation + 1
        ledger.prefix = f"b{self._state.incarnation}"
        self._state.batch_server.saved_step, self._state.batch_server.anew = rest.saved_step, False
        self._state.counters.tasks.update(rest.tasks)
        ledger.next_task, ledger.next_number = rest.next_task, rest.next_number
        ledger.again.extend(RetriedTask(each.task_index, each.attempts) for each in rest.again)
        ledger.given_up = self._state.counters.given_up_before = rest.given_up
        ledger.published, ledger.next_version = rest.published, rest.next_version
        self._state.batches.next_id, self._state.batch_server.step = rest.next_batch, rest.step
        self._state.trees.version = rest.version
        self._state.trees.retired = set(rest.retired)
        self._state.weights_endpoint, self._state.announce_endpoint = rest.weights_endpoint, rest.announce_endpoint
        since = entries.read(state, entries.SINCE, entries.CountsEntry)
        if since is not None:
            counted = self._state.counters.since
            counted.produced, counted.turns = since.produced, since.turns
            counted.counts, counted.means = Counter(since.counts), dict(since.means)
        for each in _kept_evaluations(state):
            ledger.evaluations[each.step] = Evaluation(
                each.step, each.version, each.num_tasks, each.blocking, each.next_task, dict(each.results),
                set(each.unknown), each.turns, each.versions,
            )  # fmt: skip
        self._all_in_one = entries.ALL_EVALUATIONS in state
        if self._all_in_one:
            ledger.changed_evaluations.update(ledger.evaluations)
        line = entries.read(state, entries.LINE, entries.DelayLineEntry)
        if self._state.delay_line is not None and line is not None:
            self._state.delay_line.restore(line)

    def _restore_tree(self, tree_id: str, tree: entries.TreeStateEntry, rows: Rows, now: float) -> TreeEntry | None:
        """One tree; what of it belongs into the pool."""
        self._state.trees.names[tree.number] = tree_id
        self._state.ledger.restore_attempts(tree.task_index, tree.attempts)
        if tree.lease is not None:
            lease = tree.lease
            held = HeldLease(
                tree_id, tree.number, tree.task_index, tree.kind, lease.seed, lease.epoch, lease.holder, 0.0,
                lease.min_version, lost=lease.lost, waiting=lease.waiting, eval_step=lease.eval_step,
            )  # fmt: skip
            self._state.ledger.restore(held, now=now)
        if tree.partial is not None:
            self._state.trees.partial_uses[tree_id] = tree.partial
        prompt, turns = rows[rows["turn_id"] == ROOT], rows[rows["turn_id"] != ROOT]
        if tree.growing:
            growing = Growing(tree_id, tree.number, tree.task_index, tree.kind, tree.epoch)
            growing.prompt = entry_of(prompt[0]) if len(prompt) else None
            growing.turns = {int(row["turn_id"]): entry_of(row) for row in turns}
            if (closed := tree.closed) is not None:
                growing.closed = TreeClosed(
                    run=self._state.run, tree_id=tree_id, lease_epoch=closed.lease_epoch, num_turns=closed.num_turns,
                    failed_branches=closed.failed_branches, failures=closed.failures,
                )  # fmt: skip
            self._state.assembly.restore(growing)
            if tree.pool is None:
                return None
            return self._state.assembly.tree(tree_id).pruned()
        whole = TreeEntry(tree_id, tree.number, tree.task_index, prompt, turns, tree.failed_branches)
        entry = whole.pruned()
        if len(entry) < len(whole):
            cut = ~np.isin(whole.rows["turn_id"], entry.rows["turn_id"])
            self._state.store.release(whole.rows[cut])
        if not len(turns) or not len(prompt):
            raise SetupError(f"the journal is damaged: tree {tree_id} is there without its turns; {entries.KEEP}")
        if tree.late:
            self._state.trees.late[tree_id] = entry
        if tree.spent_at is not None and tree.pool is not None:
            self._state.trees.spent[tree_id] = (entry, tree.pool, tree.spent_at)
            self._state.trees.spent_nbytes += entry.nbytes
            return None
        return entry if tree.pool is not None else None

    def _restore_batch(self, batch: entries.BatchEntry) -> None:
        self._state.batches.by_step[batch.step] = Served(
            batch_id=batch.batch_id,
            step=batch.step,
            version=batch.version,
            drawn=tuple(
                ServedTree(d.tree_id, d.task_index, d.probability, d.weight, d.uses, d.turn_ids) for d in batch.drawn
            ),
            metrics=batch.metrics,
            num_ranks=batch.num_ranks,
            exact=None if batch.exact is None else TreeSet(batch.exact.version, batch.exact.tree_ids),
            trained=set(batch.trained),
            priorities=dict(batch.priorities),
            confirmed=batch.confirmed,
        )
        if not batch.confirmed:
            self._state.pool.take([each.tree_id for each in batch.drawn])

    # --- moving records ----------------------------------------------------------------------------------------

    def live(self, rows: Rows) -> Rows:
        """Those of ROW[R] whose record is still there and needed."""
        return rows[[self._is_current(row) for row in rows]] if len(rows) else rows

    def relocate(self, rows: Rows, records: Sequence[bytes]) -> int:
        """Put these records into the store once more and let the old ones go; those that are not needed any more are
        left out.  Returns how many were moved."""
        moved: dict[int, dict[int, TurnEntry]] = {}
        current = [self._is_current(row) for row in rows]
        for row, record, is_current in zip(rows, records, current, strict=True):
            if is_current:
                there = self._state.store.add(record)
                entry = entry_of(row)._replace(chunk=there.chunk, offset=there.offset)
                self._state.store.note(entry)
                moved.setdefault(entry.tree, {})[entry.turn_id] = entry
        for number, moved_entries in moved.items():
            tree_id = self._state.trees.names[number]
            growing = self._state.assembly.growing(tree_id)
            if growing is not None:
                growing.prompt = moved_entries.get(ROOT, growing.prompt)
                growing.turns |= {turn_id: entry for turn_id, entry in moved_entries.items() if turn_id != ROOT}
            if (ready := self._state.pool.find(tree_id)) is not None:
                self._state.pool.replace(ready.moved(moved_entries))
            if tree_id in self._state.trees.late:
                self._state.trees.late[tree_id] = self._state.trees.late[tree_id].moved(moved_entries)
            if tree_id in self._state.trees.spent:
                tree, place, step = self._state.trees.spent[tree_id]
                self._state.trees.spent[tree_id] = (tree.moved(moved_entries), place, step)
        self._state.store.release(rows[current])
        return sum(current)

    def _is_current(self, row: np.void) -> bool:
        """Whether a tree still has this record where the row says."""
        tree_id = self._state.trees.names.get(int(row["tree"]))
        if tree_id is None:
            return False
        turn_id, place = int(row["turn_id"]), (int(row["chunk"]), int(row["offset"]))
        growing = self._state.assembly.growing(tree_id)
        if growing is not None:
            entry = growing.prompt if turn_id == ROOT else growing.turns.get(turn_id)
            return entry is not None and (entry.chunk, entry.offset) == place
        tree = self._state.trees.find(tree_id)
        if tree is None:
            return False
        rows = tree.prompt if turn_id == ROOT else tree.rows[tree.rows["turn_id"] == turn_id]
        return bool(len(rows)) and (int(rows[0]["chunk"]), int(rows[0]["offset"])) == place


def _kept_evaluations(state: Mapping[bytes, bytes]) -> list[entries.EvaluationEntry]:
    """By step.  Raises SetupError for what is none."""
    keys = sorted(key for key in state if key.startswith(entries.EVALUATION))
    found = [entries.read(state, key, entries.EvaluationEntry) for key in keys]
    earlier = entries.read(state, entries.ALL_EVALUATIONS, tuple[entries.EvaluationEntry, ...])
    return [*(earlier or ()), *(each for each in found if each is not None)]


def _kept_evaluation(evaluation: Evaluation) -> entries.EvaluationEntry:
    return entries.EvaluationEntry(
        step=evaluation.step,
        version=evaluation.version,
        num_tasks=evaluation.num_tasks,
        blocking=evaluation.blocking,
        next_task=evaluation.next_task,
        results=evaluation.results,
        turns=evaluation.turns,
        unknown=tuple(sorted(evaluation.unknown)),
        versions=evaluation.versions,
    )


def _kept_lease(held: HeldLease) -> entries.LeaseEntry:
    return entries.LeaseEntry(
        holder=held.holder, seed=held.seed, epoch=held.epoch, min_version=held.min_version, lost=held.lost,
        waiting=held.waiting, eval_step=held.eval_step,
    )  # fmt: skip


def _kept_closed(closed: TreeClosed) -> entries.ClosingEntry:
    return entries.ClosingEntry(
        lease_epoch=closed.lease_epoch, num_turns=closed.num_turns, failed_branches=closed.failed_branches,
        failures=closed.failures,
    )  # fmt: skip


def _kept_batch(served: Served) -> entries.BatchEntry:
    exact = served.exact
    return entries.BatchEntry(
        batch_id=served.batch_id,
        step=served.step,
        version=served.version,
        num_ranks=served.num_ranks,
        metrics=served.metrics,
        drawn=tuple(
            entries.DrawnEntry(
                tree_id=d.tree_id, task_index=d.task_index, probability=d.probability, weight=d.weight, uses=d.uses,
                turn_ids=d.turn_ids,
            )
            for d in served.drawn
        ),
        trained=tuple(sorted(served.trained)),
        priorities=served.priorities,
        confirmed=served.confirmed,
        exact=None if exact is None else entries.TreeSetEntry(version=exact.version, tree_ids=exact.tree_ids),
    )  # fmt: skip
