"""The evaluations of a run over all shards: each has its tasks of one, the front puts their results together."""

from __future__ import annotations

from collections import Counter

from atpo_async.core.mixture import TaskLabels
from buffer.front import messages as f
from buffer.front.shards import Shards
from buffer.journal.entries import EvaluationEntry
from buffer.leases.evaluations import Evaluation, MetricsRecord

ASK_S = 10.0


class FrontEvaluations:
    """Evaluations by step.

    Args:
        shards: as they are known.
        labels: by which success is also told, where the run has several environments.
        recorded: steps whose result is in the run's metrics.
    """

    def __init__(self, shards: Shards, labels: TaskLabels, *, recorded: set[int]) -> None:
        self._shards = shards
        self._labels = labels
        self._recorded = recorded

    def is_done(self, step: int) -> bool:
        """Whether every shard has finished its tasks, as last heard."""
        return self._done()[step] == len(self._shards)

    def _done(self) -> Counter[int]:
        """Step -> how many shards have finished its tasks."""
        return Counter(each.step for state in self._shards.states for each in state.evaluations if each.done)

    async def find(self, step: int) -> Evaluation | None:
        """An evaluation as it stands; None where a shard does not know it, or another one of that step.

        Raises:
            PeerLost, ShardAway: a shard does not answer.
        """
        looks: list[f.Question] = [f.LookAtEvaluation(step=step)] * len(self._shards)
        answers = await self._shards.ask_all(looks, f.EvaluationPart, timeout_s=ASK_S)
        return together([answer.entry for answer in answers])

    async def records(self) -> list[MetricsRecord]:
        """Of the evaluations that were done since the last call."""
        found = []
        for step, shards in sorted(self._done().items()):
            if shards < len(self._shards) or step in self._recorded:
                continue
            evaluation = await self.find(step)
            if evaluation is None or not evaluation.done:
                continue
            self._recorded.add(step)
            found.append((step, evaluation.version, evaluation.metrics(self._labels)))
        return found


def together(entries: list[EvaluationEntry | None]) -> Evaluation | None:
    """One evaluation from its parts; None where one is missing, or is of another evaluation.  Pure."""
    found: Evaluation | None = None
    for entry in entries:
        if entry is None:
            return None
        part = Evaluation.restored(entry)
        if found is None:
            found = part
        elif (found.version, found.num_tasks) != (part.version, part.num_tasks):
            return None
        else:
            found.absorb(part)
    return found
