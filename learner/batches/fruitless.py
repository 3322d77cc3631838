"""Counts batches without a tree to train on, with the reasons, and decides when the run must stop for them.

Trees without a signal (all their leaves earned the same) are no fault: the policy always solves these tasks, or never.
Trees that failed, were refused or came too late are one: batch after batch of them points to a broken environment, a
wrong tokenizer, a dead tool.  A run that only counted its steps would end as if it had trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from atpo_async.core.errors import SetupError
from atpo_async.wire.messages import Batch
from learner.batches.intake import REASONS
from learner.training.report import StepReport

NO_SIGNAL = "buffer/no_signal_trees"
FAULTS: Mapping[str, str] = {
    "buffer/dropped_no_leaf": "failed, no chain of them came to its end",
    "buffer/dropped_one_leaf": "failed but for one chain",
    "buffer/dropped_stale": "older than staleness.max_lag",
    "buffer/dropped_bytes": "dropped because buffer.max_bytes was full",
    "buffer/dropped_inexact": "sampled by more than one version",
    **{f"dropped/{reason}": f"refused by the learner ({reason})" for reason in REASONS},
}
"""Metric of a batch -> the reason of the trees counted there, in words."""


class NothingToTrainOn(SetupError):
    """The run trains on nothing; the message counts the reasons."""


def num_trained(batch: Batch, report: StepReport) -> int:
    """Trees of the whole batch, over all ranks, that were trained on."""
    return batch.num_trees - sum(int(report.metrics.get(f"dropped/{reason}", 0)) for reason in REASONS)


class Fruitless:
    """Counts the trees of batches that had nothing to train on, by reason.  All its numbers are equal on every rank.

    Args:
        limit: such batches in a row, for reasons that are faults, after which the run stops.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_a_row = 0
        self._latest: Counter[str] = Counter()
        """Of the batches in a row."""
        self._all: Counter[str] = Counter()
        """Of all batches that this process has seen."""

    def after(self, batch: Batch, report: StepReport) -> NothingToTrainOn | None:
        """Count one more batch.  Returns why the run has to stop; None where it goes on."""
        found = Counter(
            {
                name: int(count)
                for name, count in {**batch.metrics, **report.metrics}.items()
                if (name in FAULTS or name == NO_SIGNAL) and count > 0
            }
        )
        self._all.update(found)
        if num_trained(batch, report):
            self._in_a_row = 0
            self._latest.clear()
            return None
        self._latest.update(found)
        # Failed tasks beside others without a signal are not the reason why the run does not learn.
        self._in_a_row += found.total() > 2 * found[NO_SIGNAL]
        if self._in_a_row < self._limit:
            return None
        return NothingToTrainOn(
            f"{self._in_a_row} batches in a row held no tree to train on (learner.max_skipped_updates = "
            f"{self._limit}): {listed(self._latest)}; the logs of the actors and the learner name each fault; once "
            "it is mended the same command goes on"
        )

    def at_the_end(self, *, step: int, because: str) -> NothingToTrainOn:
        """The message of a run that ends without a single update.

        Args:
            step: batches so far.
            because: why there is no further batch; empty where there were as many as wanted.
        """
        ended = f"; the run ended since {because}" if because else ""
        return NothingToTrainOn(
            f"nothing was trained in {step} batches: {listed(self._all)}{ended}.  The policy is as it was, no model/ "
            "is written; look at the logs of the actors, or at search.* and the rewards where trees had no signal"
        )


def listed(counts: Counter[str]) -> str:
    """Reasons by count, the most frequent first."""
    if not counts.total():
        return "no tree came at all"
    words = {**FAULTS, NO_SIGNAL: "without a signal (all leaves of a tree earned the same)"}
    return "trees: " + ", ".join(f"{count} {words[name]}" for name, count in counts.most_common())
