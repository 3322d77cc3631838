"""Connects state and journal: hands changes over as keys and values, and restores them when a buffer starts again.

Pure.  ``journal.entries`` defines the keys; the part of the state that owns an entry returns it from ``snapshot`` or
``drain_changes`` and takes it in ``restore``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
import numpy as np

from buffer.imitation.moments import Moments
from buffer.journal import entries
from buffer.state import BufferState
from buffer.trees.index import Rows


class StatePersistence:
    """One state and its entries.

    Args:
        state: whose changes are handed over, or that is restored.
    """

    def __init__(self, state: BufferState) -> None:
        self._state = state
        self._written: dict[bytes, bytes] = {}
        """The value last written under each key that is written as a whole."""
        self._drop_all_evaluations = False
        """An earlier program's evaluations are under one key: it goes with the first commit."""

    def collect(self, put: Callable[[bytes, bytes | None], None]) -> None:
        """The changes since the last call: (key, value), with None for a removed entry."""
        state = self._state
        for tree_id in state.trees.registry.drain_changes() | state.ledger.drain_changes():
            _put(put, entries.TREE + tree_id.encode(), self._tree(tree_id))
        for step, batch in state.batches.drain_changes().items():
            _put(put, entries.BATCH + b"%020d" % step, batch)
        for step, evaluation in state.ledger.evaluations.drain_changes().items():
            _put(put, entries.EVALUATION + b"%020d" % step, evaluation)
        for (label, block), moments in state.trees.imitation.moments.drain_changes().items():
            put(_moments_key(label, block), None if moments is None else entries.dump(moments))
        if self._drop_all_evaluations:
            self._drop_all_evaluations = False
            put(entries.ALL_EVALUATIONS, None)
        for key, value in self._whole().items():
            data = entries.dump(value)
            if self._written.get(key) != data:
                self._written[key] = data
                put(key, data)

    def _tree(self, tree_id: str) -> entries.TreeStateEntry | None:
        """A tree's entry: its state and its lease."""
        entry, held = self._state.trees.registry.snapshot(tree_id), self._state.ledger.held(tree_id)
        if entry is None:
            return None
        attempts = self._state.ledger.tasks.attempts(entry.task_index)
        if held is None:
            return msgspec.structs.replace(entry, attempts=attempts)
        return msgspec.structs.replace(entry, attempts=attempts, kind=held.kind, lease=held.snapshot())

    def _whole(self) -> dict[bytes, object]:
        """The entries that are written as a whole when anything in them has changed."""
        state, run = self._state, entries.RunEntry()
        for part in (state, state.ledger, state.trees, state.batch_server):
            part.snapshot(run)
        found: dict[bytes, object] = {entries.RUN: run, entries.COUNTS: state.counters.snapshot(run)}
        if state.delay_line is not None:
            found[entries.DELAY_LINE] = state.delay_line.snapshot()
        return found

    def restore(self, rows: Rows, stored: Mapping[bytes, bytes], now: float) -> dict[str, int]:
        """Restore the state that an earlier buffer of this run committed, as the next incarnation.  Called first.

        Args:
            rows: ROW[R], by tree, then by turn.
            stored: what ``collect`` handed over.
            now: seconds.

        Returns:
            Name -> number, of what is there.

        Raises:
            SetupError: the journal contradicts itself.
        """
        state = self._state
        run = entries.read(stored, entries.RUN, entries.RunEntry)
        state.restore(run)
        if run is None:
            state.store.release(rows, gone=True)
            return {}
        state.ledger.restore(run)
        state.counters.restore(run, entries.read(stored, entries.COUNTS, entries.CountsEntry))
        self._restore_evaluations(stored)
        line = entries.read(stored, entries.DELAY_LINE, entries.DelayLineEntry)
        if state.delay_line is not None and line is not None:
            state.delay_line.restore(line)
        trees = entries.read_all(stored, entries.TREE, entries.TreeStateEntry)
        for tree_id, tree in trees.items():
            state.ledger.restore_lease(tree_id, tree, now=now)
        owned = state.trees.registry.restore(trees, rows, run=state.run)
        state.trees.restore(run)
        state.trees.imitation.moments.restore(_moments(stored))
        state.batch_server.restore(run, entries.read_all(stored, entries.BATCH, entries.BatchEntry).values())
        # After the batches: trees that the learner has are not dropped for their age.
        state.trees.advance()
        if not state.trees.imitation.is_on:
            state.trees.imitation.make_space()  # rows of a run that imitated before
        # Records of trees that are gone, in chunks that others still need.
        state.store.release(rows[~owned], gone=True)
        return {"turns": int(np.count_nonzero(owned)), **state.sizes()}

    def _restore_evaluations(self, stored: Mapping[bytes, bytes]) -> None:
        """Raises SetupError for what is none."""
        found = entries.read_all(stored, entries.EVALUATION, entries.EvaluationEntry)
        earlier = entries.read(stored, entries.ALL_EVALUATIONS, tuple[entries.EvaluationEntry, ...])
        self._drop_all_evaluations = earlier is not None
        self._state.ledger.evaluations.restore((*(earlier or ()), *found.values()), changed=self._drop_all_evaluations)


def _moments_key(label: str, block: int) -> bytes:
    return entries.MOMENTS + b"%s/%020d" % (label.encode(), block)


def _moments(stored: Mapping[bytes, bytes]) -> dict[tuple[str, int], list[Moments]]:
    """(label, block) -> its numbers.  Raises SetupError for what is none."""
    found: dict[tuple[str, int], list[Moments]] = {}
    for name, numbers in entries.read_all(stored, entries.MOMENTS, list[Moments]).items():
        label, _, block = name.rpartition("/")
        found[label, int(block)] = numbers
    return found


def _put(put: Callable[[bytes, bytes | None], None], key: bytes, entry: object | None) -> None:
    put(key, None if entry is None else entries.dump(entry))
