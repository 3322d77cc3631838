"""The buffer's counters: outcomes of tasks, and events since the last batch.  Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from atpo_async.core.credit import Moments, TreeArrays
from atpo_async.core.credit.returns import leaf_returns
from atpo_async.core.mixture import TaskLabels
from buffer.journal.entries import CountsEntry, RunEntry
from buffer.leases.ledger import Ledger
from buffer.pool.pool import ReplayPool
from buffer.trees.index import TreeEntry
from buffer.trees.parts import MOST_NAMES

F64 = NDArray[np.float64]

NO_LABELS = TaskLabels()
TOKENS = "train/tokens"
"""Action tokens that were sampled for training."""
LEFT_OUT = "reward_names_left_out"
"""Counts parts of rewards that have no metric, for a run has many names of them already."""


LEFT_OUT_LEAVES = "buffer/left_out_leaves"
LEFT_OUT_MEAN, LEFT_OUT_SQUARE = "buffer/left_out_reward", "buffer/left_out_reward_square"
"""How many leaves trees without a signal had, the mean of their rewards, and of the squares of these."""


def left_out(metrics: Mapping[str, float]) -> Moments:
    """Of the leaf rewards of trees without a signal, from a batch's metrics."""
    leaves = metrics.get(LEFT_OUT_LEAVES, 0.0)
    return Moments(leaves, *(leaves * metrics.get(name, 0.0) for name in (LEFT_OUT_MEAN, LEFT_OUT_SQUARE)))


def filtered_words(number: int) -> str:
    """How many tasks had trees that others were kept in place of, as text; empty for none."""
    return f", {number} not kept (buffer.keep_share)" if number else ""


@dataclass(slots=True)
class CountsSinceBatch:
    """Counted since the last batch."""

    began_s: float
    produced: int = 0
    """Training trees that came to their end with a usable tree."""
    turns: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    means: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Name -> (sum, number)."""

    def mean(self, name: str, value: float) -> None:
        total, number = self.means.get(name, (0.0, 0.0))
        self.means[name] = (total + value, number + 1.0)


class RunCounters:
    """Counters of one run.

    Args:
        now: seconds.
        labels: by which training metrics are also counted, where a run has several environments.
    """

    def __init__(self, now: float, labels: TaskLabels = NO_LABELS) -> None:
        self.labels = labels
        self.since = CountsSinceBatch(now)
        self.tasks: Counter[str] = Counter()
        """Outcomes of training tasks: ``trained`` on at least once, ``no_signal``, ``failed`` (too few leaves),
        ``retired`` (too old before their last use)."""
        self.progress = 0
        """Turns received and trees that ended: it stands still only while nothing arrives."""
        self.left_before: Counter[str] = Counter()
        """Trees that had left the pool by the last batch, by ``Departure.cause``."""
        self._turns_earn = False
        self._parts: set[str] = set()
        """Names of parts of rewards so far."""
        self.given_up_before = 0
        """Tasks given up by the last batch."""
        self.flushed_means: dict[str, float] = {}
        """Over how many values each mean is taken, of the metrics that were flushed last."""

    def count(self, name: str, number: int = 1) -> None:
        """Count an event; the metrics of the next batch have it under ``name``."""
        self.since.counts[name] += number

    def count_task(self, outcome: str, number: int = 1) -> None:
        """Count the outcome of a training task; -1 where that is undone."""
        self.tasks[outcome] += number

    def count_turn(self, train_tokens: int = 0) -> None:
        """Count a turn that was received; of a training tree with the tokens of its action, whatever becomes of it."""
        self.since.turns += 1
        self.since.counts[TOKENS] += train_tokens
        self.progressed()

    def progressed(self) -> None:
        """Count progress: a turn was received, or a tree ended."""
        self.progress += 1

    def count_tree(self, tree: TreeEntry, arrays: TreeArrays, share: F64) -> None:
        """The policy's own sampled reward and success: under branch probabilities ``share``, trees without signal too.

        Success is the mean over the leaves for which the environment reported it; the share of the others has its own
        metric.
        """
        since = self.since
        since.produced += 1
        label = self.labels.of("train", tree.task_index)
        groups = ("train", f"train/{label}") if label else ("train",)
        unknown = float(share @ (tree.is_leaf & ~tree.judged))
        for group in groups:
            since.mean(f"{group}/reward", float(share @ arrays.reward))
            if tree.judged.any():
                since.mean(f"{group}/success", float(share @ tree.success) / (1.0 - unknown))
        for group in groups[1:]:
            since.counts[f"{group}/trees"] += 1
        since.mean("train/success_unknown", unknown)
        since.mean("train/leaves_mean", float(tree.num_leaves))
        since.mean("train/turns_mean", float(len(tree)))

    def count_rewards(self, task: int, arrays: TreeArrays, share: F64, parts: Mapping[str, float]) -> None:
        """Of the same tree: what its turns earned of their own, summed over a chain, and the parts of its reward.

        The former is a metric from the first turn on that earned anything.
        """
        if arrays.turn_reward.any():
            self._turns_earn = True
        chains = arrays.with_reward(np.zeros(len(arrays)))
        self.since.mean("train/turn_reward", float(share @ leaf_returns(chains)))
        label = self.labels.of("train", task)
        for name, part in parts.items():
            if name not in self._parts and len(self._parts) >= MOST_NAMES:
                self.count(LEFT_OUT)
                continue
            self._parts.add(name)
            for group in ("reward", f"reward/{label}") if label else ("reward",):
                self.since.mean(f"{group}/{name}", part)

    def count_left_out(self, rewards: F64) -> None:
        """Leaf rewards, float64[n], of a tree without a signal: part of the batch's deviation all the same."""
        own = Moments.of(rewards)
        for name, value in ((LEFT_OUT_MEAN, own.total), (LEFT_OUT_SQUARE, own.squares)):
            total, number = self.since.means.get(name, (0.0, 0.0))
            self.since.means[name] = (total + value, number + own.count)

    def describe_tasks(self, given_up: int) -> str:
        """The outcomes of the tasks so far, as text."""
        tasks = self.tasks
        retired = f" ({tasks['retired']} of them fewer times than meant, too old by then)" if tasks["retired"] else ""
        return (
            f"{tasks['trained']} trained on{retired}, {tasks['no_signal']} without signal, {tasks['failed']} failed, "
            f"{given_up} given up{filtered_words(tasks['filtered'])}"
        )

    def describe_drops(self, pool: ReplayPool) -> str:
        """Trees without signal and those dropped since the last batch, by cause."""
        counts, left = self.since.counts, pool.left - self.left_before
        dropped = {name: count for name, count in counts.items() if count and name.startswith("dropped_")}
        dropped |= {f"dropped_{name}": count for name, count in left.items() if name in ("stale", "bytes")}
        return f"{counts['no_signal_trees']} without signal" + "".join(
            f", {count} {name.replace('_', ' ')}" for name, count in dropped.items()
        )

    def flush(
        self, now: float, *, ledger: Ledger, pool: ReplayPool, nbytes: int, num_parked: int, more: Mapping[str, float]
    ) -> dict[str, float]:
        """The buffer's side of a step's metrics, counted since the batch before; counting begins anew.

        Args:
            now: seconds.
            ledger: of the run.
            pool: of the run.
            nbytes: of all turns held.
            num_parked: turns that came before their parents.
            more: added as they are.
        """
        since, counts = self.since, self.since.counts
        left = pool.left - self.left_before
        metrics = {name: total / number for name, (total, number) in since.means.items()}
        if not self._turns_earn:
            metrics.pop("train/turn_reward", None)
        self.flushed_means = {name: since.means[name][1] for name in metrics}
        if counts[LEFT_OUT]:
            metrics[f"buffer/{LEFT_OUT}"] = counts[LEFT_OUT]
        if LEFT_OUT_MEAN in since.means:
            metrics[LEFT_OUT_LEAVES] = since.means[LEFT_OUT_MEAN][1]
        if counts["dropped_filtered"]:
            metrics["buffer/dropped_filtered"] = counts["dropped_filtered"]
        if self.tasks["filtered"]:
            metrics["tasks/filtered"] = self.tasks["filtered"]
        metrics |= {
            "train/trees": since.produced,
            **{name: count for name, count in counts.items() if name.startswith("train/")},
            "buffer/trees": len(pool),
            "buffer/outstanding": ledger.num_training,
            "buffer/bytes": nbytes,
            "buffer/dropped_stale": left["stale"],
            "buffer/retired_stale": left["retired"],
            "buffer/dropped_bytes": left["bytes"],
            "buffer/dropped_no_leaf": counts["dropped_no_leaf"],
            "buffer/dropped_one_leaf": counts["dropped_one_leaf"],
            "buffer/dropped_inexact": counts["dropped_inexact"],
            "buffer/dropped_surplus": counts["dropped_surplus"],
            "buffer/no_signal_trees": counts["no_signal_trees"],
            "buffer/failed_branches": counts["failed_branches"],
            "buffer/given_up": ledger.tasks.given_up - self.given_up_before,
            "buffer/parked_turns": num_parked,
            "buffer/priority_mean": pool.mean_priority,
            "buffer/bad_messages": counts["bad_messages"],
            "buffer/refused_trees": counts["refused_trees"],
            "buffer/turns_per_s": since.turns / max(now - since.began_s, 1e-9),
            **{f"tasks/{name}": self.tasks[name] for name in ("trained", "no_signal", "failed", "retired")},
            "tasks/given_up": ledger.tasks.given_up,
            **more,
        }
        self.left_before = Counter(pool.left)
        self.given_up_before = ledger.tasks.given_up
        self.since = CountsSinceBatch(now)
        return {name: float(value) for name, value in metrics.items()}

    def snapshot(self, run: RunEntry) -> CountsEntry:
        """Write what ``restore`` reads, and return what was counted since the last batch."""
        run.tasks = dict(self.tasks)
        since = self.since
        return CountsEntry(produced=since.produced, turns=since.turns, counts=dict(since.counts), means=since.means)

    def restore(self, run: RunEntry, since: CountsEntry | None) -> None:
        """As an earlier process left them."""
        self.tasks.update(run.tasks)
        self.given_up_before = run.given_up
        if since is not None:
            self.since.produced, self.since.turns = since.produced, since.turns
            self.since.counts, self.since.means = Counter(since.counts), dict(since.means)
