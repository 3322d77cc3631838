"""Evaluations as the learner sees them: begun, asked for, reported.  The ledger leases their trees.  Pure."""

from __future__ import annotations

from collections import Counter

import numpy as np

from atpo_async.messages import EvalRequest, EvalResult
from buffer.index import TreeEntry
from buffer.ledger import Held, Ledger


class Evaluations:
    """Evaluations of one run.

    Args:
        ledger: leases their trees and keeps their results.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.turns: Counter[int] = Counter()
        """Step -> turns of the trees that are done, of evaluations under way."""
        self.records: list[tuple[int, int, dict[str, float]]] = []
        """(step, version, metrics) of those that are done; whoever writes them down takes them away."""

    def begin(self, request: EvalRequest) -> list[str]:
        """Begin an evaluation, unless it is the one under way.  Returns trees under lease that are in vain now."""
        before = self._ledger.evaluations.get(request.step)
        in_vain = self._ledger.evaluate(
            step=request.step, version=request.version, num_tasks=request.num_tasks, blocking=request.blocking
        )
        if self._ledger.evaluations[request.step] is not before:
            self.turns.pop(request.step, None)
        return in_vain

    def result(self, step: int) -> EvalResult:
        evaluation = self._ledger.evaluations.get(step)
        if evaluation is None:
            return EvalResult(step=step, done=False, success=None, num_done=0, num_tasks=0)
        return EvalResult(
            step=step,
            done=evaluation.done,
            success=evaluation.success,
            num_done=len(evaluation.results),
            num_tasks=evaluation.num_tasks,
        )

    def record(self, held: Held, tree: TreeEntry | None) -> None:
        """A task of an evaluation is done, with this pruned tree; None where it failed."""
        success = None
        if tree is not None and tree.num_leaves:
            success = float(np.mean(tree.success[tree.is_leaf]))
            self.turns[held.eval_step] += len(tree)
        done = self._ledger.record(held, success)
        if done is None:
            return
        metrics = {"eval/failed": float(done.num_failed)}
        turns, finished = self.turns.pop(done.step, 0), done.num_tasks - done.num_failed
        if finished:
            metrics["eval/turns_mean"] = turns / finished
        self.records.append((done.step, done.version, metrics))
