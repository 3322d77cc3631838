"""Evaluations as the learner sees them: begun, asked for, reported.  The ledger leases their trees.  Pure."""

from __future__ import annotations

from atpo_async.wire.messages import EvalRequest, EvalResult
from buffer.leases.ledger import HeldLease, Ledger, Outcome
from buffer.trees.index import TreeEntry


class Evaluations:
    """Evaluations of one run.

    Args:
        ledger: leases their trees and keeps their results.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.records: list[tuple[int, int, dict[str, float]]] = []
        """(step, version, metrics) of those that are done; whoever writes them down takes them away."""

    def begin(self, request: EvalRequest) -> list[str]:
        """Begin an evaluation, unless it is the one under way.  Returns trees under lease that are in vain now."""
        return self._ledger.evaluate(
            step=request.step, version=request.version, num_tasks=request.num_tasks, blocking=request.blocking
        )

    def result(self, step: int) -> EvalResult:
        evaluation = self._ledger.evaluations.get(step)
        if evaluation is None:
            return EvalResult(step=step, done=False, success=None, num_done=0, num_tasks=0)
        oldest, newest = evaluation.versions or (-1, -1)
        return EvalResult(
            step=step,
            done=evaluation.done,
            success=evaluation.success,
            num_done=len(evaluation.results),
            num_tasks=evaluation.num_tasks,
            num_unknown=len(evaluation.unknown),
            version_min=oldest,
            version_max=newest,
        )

    def record(self, held: HeldLease, tree: TreeEntry | None) -> None:
        """A task of an evaluation is done, with this pruned tree; None where it failed."""
        outcome = None
        if tree is not None and tree.num_leaves:
            versions = tree.versions
            outcome = Outcome(tree.mean_success, len(tree), (min(versions), max(versions)))
        done = self._ledger.record(held, outcome)
        if done is None:
            return
        metrics = {"eval/failed": float(done.num_failed), "eval/unknown": float(len(done.unknown))}
        finished = done.num_tasks - done.num_failed
        if finished:
            metrics["eval/turns_mean"] = done.turns / finished
        self.records.append((done.step, done.version, metrics))
