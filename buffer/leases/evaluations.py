"""Evaluations: the tasks still to be leased, the outcomes of the others, and the result.  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from msgspec import UNSET

from atpo_async.core.mixture import TaskLabels
from atpo_async.core.naming.shards import WHOLE, Shard
from atpo_async.wire.messages import EvalResult
from buffer.journal.entries import EvaluationEntry
from buffer.trees.index import TreeEntry
from buffer.trees.parts import MOST_NAMES

NO_PARTS: Mapping[str, float] = MappingProxyType({})

REMEMBERED_EVALUATIONS = 8
"""Finished evaluations that are remembered, for a learner that requests a result again."""

MetricsRecord = tuple[int, int, dict[str, float]]
"""(step, version, metrics)."""


class Outcome(NamedTuple):
    """The outcome of one task of an evaluation that did not fail."""

    success: float | None
    """In [0, 1]; None where the environment did not report it."""
    num_turns: int
    versions: tuple[int, int]
    """Oldest and newest of those that sampled its turns."""
    parts: Mapping[str, float] = NO_PARTS
    """Name -> value of the parts of its reward."""


@dataclass(slots=True)
class Evaluation:
    """One greedy evaluation on the held-out tasks."""

    step: int
    version: int
    num_tasks: int
    blocking: bool
    next_task: int = 0
    results: dict[int, float | None] = field(default_factory=dict)
    """Task -> success in [0, 1]; None where its tree failed, and of those that are ``unknown``."""
    unknown: set[int] = field(default_factory=set)
    """Finished tasks for which the environment did not report success or failure."""
    turns: int = 0
    """Of the trees that are done."""
    versions: tuple[int, int] | None = None
    """Oldest and newest of those that sampled these turns: beside training, weights change under an evaluation."""
    parts: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Name of a part of the rewards -> sum over the tasks that have it, and their number."""
    num_unjudged: int = 0
    """Tasks, unknown ones, that could not say what the end of their chain is worth."""
    shard: Shard = WHOLE
    """Whose tasks are leased and awaited here; the others are those of other shards."""

    @property
    def done(self) -> bool:
        return len(self.results) >= self.shard.num_tasks(self.num_tasks)

    @property
    def num_to_lease(self) -> int:
        """Tasks that were never leased."""
        return len(range(self.next_task, self.num_tasks, self.shard.count))

    @property
    def num_failed(self) -> int:
        return sum(result is None for result in self.results.values()) - len(self.unknown)

    @property
    def success(self) -> float | None:
        """Share of successful tasks among those that are known, a failed tree counted as no success; None until all
        are done.

        None too where all are failed or unknown: that is no measure of the policy.
        """
        if not self.done or all(result is None for result in self.results.values()):
            return None
        return sum(result or 0.0 for result in self.results.values()) / (len(self.results) - len(self.unknown))

    def add(self, task: int, outcome: Outcome | None) -> None:
        """One task is done; None: its tree failed."""
        self.results[task] = None if outcome is None else outcome.success
        if outcome is None:
            return
        if outcome.success is None:
            self.unknown.add(task)
        self.turns += outcome.num_turns
        for name, part in outcome.parts.items():
            if name in self.parts or len(self.parts) < MOST_NAMES:
                total, number = self.parts.get(name, (0.0, 0))
                self.parts[name] = total + part, number + 1
        oldest, newest = self.versions or outcome.versions
        self.versions = min(oldest, outcome.versions[0]), max(newest, outcome.versions[1])

    def add_unjudged(self, task: int) -> None:
        """One task is done, but could not say what the end of its chain is worth."""
        self.results[task] = None
        self.unknown.add(task)
        self.num_unjudged += 1

    def snapshot(self) -> EvaluationEntry:
        return EvaluationEntry(
            step=self.step, version=self.version, num_tasks=self.num_tasks, blocking=self.blocking,
            next_task=self.next_task, results=self.results, turns=self.turns, unknown=tuple(sorted(self.unknown)),
            versions=self.versions, parts=self.parts or UNSET, unjudged=self.num_unjudged or UNSET,
        )  # fmt: skip

    @classmethod
    def restored(cls, entry: EvaluationEntry, shard: Shard = WHOLE) -> Evaluation:
        return cls(
            entry.step, entry.version, entry.num_tasks, entry.blocking, entry.next_task, dict(entry.results),
            set(entry.unknown), entry.turns, entry.versions, dict(entry.parts or {}),
            entry.unjudged or 0, shard,
        )  # fmt: skip

    def absorb(self, other: Evaluation) -> None:
        """Add what another shard has of the same evaluation."""
        self.results |= other.results
        self.unknown |= other.unknown
        self.turns += other.turns
        self.num_unjudged += other.num_unjudged
        for name, (total, number) in other.parts.items():
            if name in self.parts or len(self.parts) < MOST_NAMES:
                mine = self.parts.get(name, (0.0, 0))
                self.parts[name] = mine[0] + total, mine[1] + number
        found = [versions for versions in (self.versions, other.versions) if versions is not None]
        if found:
            self.versions = min(oldest for oldest, _ in found), max(newest for _, newest in found)

    def as_reason(self) -> str:
        """Why no training tree begins before it is done."""
        done = f"{len(self.results)} of {self.shard.num_tasks(self.num_tasks)} done"
        return f"the evaluation of step {self.step} comes first: {done}"

    def result(self) -> EvalResult:
        """For the learner, so far."""
        oldest, newest = self.versions or (-1, -1)
        return EvalResult(
            step=self.step,
            done=self.done,
            success=self.success,
            num_done=len(self.results),
            num_tasks=self.num_tasks,
            num_unknown=len(self.unknown),
            version_min=oldest,
            version_max=newest,
        )

    def metrics(self, labels: TaskLabels) -> dict[str, float]:
        """Of one that is done; where the run has several environments, success and failures of each as well."""
        found = {"eval/failed": float(self.num_failed), "eval/unknown": float(len(self.unknown))}
        if finished := self.num_tasks - self.num_failed - self.num_unjudged:
            found["eval/turns_mean"] = self.turns / finished
        found |= {f"eval/reward/{name}": total / number for name, (total, number) in self.parts.items()}
        by_label: dict[str, list[int]] = {}
        for task in self.results:
            if label := labels.of("eval", task):
                by_label.setdefault(label, []).append(task)
        for label, tasks in by_label.items():
            found |= self._metrics_of(f"eval/{label}", tasks)
        return found

    def _metrics_of(self, group: str, tasks: list[int]) -> dict[str, float]:
        """Of one environment's tasks: success as in ``success``, left out where that is None."""
        known = [self.results[task] for task in tasks if task not in self.unknown]
        failed = sum(result is None for result in known)
        found = {f"{group}/failed": float(failed), f"{group}/tasks": float(len(tasks))}
        if failed < len(known):
            found[f"{group}/success"] = sum(result or 0.0 for result in known) / len(known)
        return found


class Evaluations:
    """Evaluations of one run, by step.

    Args:
        labels: by which success is also told, where the run has several environments.
        shard: only its tasks are leased.
    """

    def __init__(self, labels: TaskLabels | None = None, shard: Shard = WHOLE) -> None:
        self._labels = labels or TaskLabels()
        self._shard = shard
        self._by_step: dict[int, Evaluation] = {}
        self._changed: set[int] = set()
        self._records: list[MetricsRecord] = []

    def __iter__(self) -> Iterator[Evaluation]:
        return iter(self._by_step.values())

    def __len__(self) -> int:
        return len(self._by_step)

    def find(self, step: int) -> Evaluation | None:
        return self._by_step.get(step)

    def begin(self, *, step: int, version: int, num_tasks: int, blocking: bool) -> bool:
        """Begin an evaluation; False where it is the one under way.  Another version begins anew."""
        there = self._by_step.get(step)
        if there is not None and (there.version, there.num_tasks) == (version, num_tasks):
            return False
        self._by_step[step] = Evaluation(
            step, version, num_tasks, blocking, next_task=self._shard.index, shard=self._shard
        )  # fmt: skip
        self._changed.add(step)
        done = sorted(each.step for each in self if each.done)
        for old in done[:-REMEMBERED_EVALUATIONS]:
            del self._by_step[old]
            self._changed.add(old)
        return True

    def next_task(self, published: int | None) -> tuple[Evaluation, int] | None:
        """A task to lease now that ``published`` is the newest version: its evaluation and its index; None for none."""
        for evaluation in self:
            if _is_runnable(evaluation, published) and evaluation.num_to_lease:
                task = evaluation.next_task
                evaluation.next_task += self._shard.count
                self._changed.add(evaluation.step)
                return evaluation, task
        return None

    def num_to_lease(self, published: int | None) -> int:
        """Tasks that ``next_task`` would give, one after another."""
        return sum(each.num_to_lease for each in self if _is_runnable(each, published))

    def blocking(self, published: int | None) -> Evaluation | None:
        """The evaluation that holds training leases back, once its version is published: training may lead to it."""
        for evaluation in self:
            if evaluation.blocking and not evaluation.done and _is_runnable(evaluation, published):
                return evaluation
        return None

    def record(
        self,
        step: int,
        task: int,
        tree: TreeEntry | None,
        *,
        judged: bool = True,
        parts: Mapping[str, float] = NO_PARTS,
    ) -> None:
        """A task of the evaluation of ``step`` is done.

        Args:
            step: of the evaluation.
            task: its index.
            tree: pruned; None where it failed.
            judged: False where the task could not say what the end of its chain is worth: no failure then.
            parts: name -> value of the parts of its reward.
        """
        evaluation = self._by_step.get(step)
        if evaluation is None or evaluation.done:
            return
        if label := self._labels.of("eval", task):
            parts = {**parts, **{f"{label}/{name}": part for name, part in parts.items()}}
        outcome = None if tree is None else outcome_of(tree, parts)
        if outcome is None and not judged:
            evaluation.add_unjudged(task)
        else:
            evaluation.add(task, outcome)
        self._changed.add(step)
        if evaluation.done:
            self._records.append((step, evaluation.version, evaluation.metrics(self._labels)))

    def result(self, step: int) -> EvalResult:
        """For the learner, so far; of an evaluation that is not known here, nothing."""
        evaluation = self._by_step.get(step)
        if evaluation is None:
            return EvalResult(step=step, done=False, success=None, num_done=0, num_tasks=0)
        return evaluation.result()

    def drain_records(self) -> list[MetricsRecord]:
        """Of the evaluations that were done since the last call."""
        records, self._records = self._records, []
        return records

    def drain_changes(self) -> dict[int, EvaluationEntry | None]:
        """Step -> entry of each evaluation that was added or changed since the last call; None for a removed one."""
        changed, self._changed = self._changed, set()
        return {step: each.snapshot() if (each := self.find(step)) is not None else None for step in changed}

    def restore(self, entries: Iterable[EvaluationEntry], *, changed: bool) -> None:
        """As an earlier process left them.

        Args:
            entries: in their order.
            changed: whether they are to be handed over once more, for they lie under a key of an earlier program.
        """
        self._by_step |= {each.step: Evaluation.restored(each, self._shard) for each in entries}
        if changed:
            self._changed.update(self._by_step)


def outcome_of(tree: TreeEntry, parts: Mapping[str, float] = NO_PARTS) -> Outcome | None:
    """The outcome of a task from its pruned tree; None where no leaf was finished."""
    if not tree.outcome().num_leaves:
        return None
    versions = tree.versions
    return Outcome(tree.mean_success, len(tree), (min(versions), max(versions)), parts)


def _is_runnable(evaluation: Evaluation, published: int | None) -> bool:
    return published is not None and evaluation.version <= published
