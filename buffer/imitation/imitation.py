"""Decides which leaves are kept to be imitated, and which of them go with a batch.  Pure: randomness is passed in.

Source: SPEAR (arXiv 2509.22601).  Kept are leaves that earned more than the mean of their tree.  Served are those that
are worth at least nothing by the medians of now: the policy must not imitate what it has outgrown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from atpo_async.config import Config
from atpo_async.core.credit import TreeArrays, branch_prob
from atpo_async.core.mixture import TaskLabels
from buffer.batches.served import ServedRow
from buffer.imitation.moments import Baseline, GroupMoments
from buffer.imitation.store import ImitationRow, RowKey
from buffer.trees.index import TreeEntry
from buffer.trees.registry import TreeRegistry

ROUNDING = 1e-12
"""Of the largest reward of a tree: a leaf that earned the mean is not above it by less."""


class Imitation:
    """``[imitation]`` of one run; with ``imitation.rows = 0`` it does nothing.

    Args:
        config: the run's.
        registry: has the rows and the turns that they need.
        labels: by which rewards are judged: those of two environments are not alike.
    """

    def __init__(self, config: Config, registry: TreeRegistry, labels: TaskLabels) -> None:
        self._settings = config.imitation
        self._credit = config.credit
        self._max_bytes = int(config.buffer.max_bytes * config.imitation.bytes_share)
        self._registry = registry
        self._rows = registry.imitation
        self._labels = labels
        self.moments = GroupMoments(config.imitation.history)
        self._left_before: Counter[str] = Counter()
        self._entered_before = 0

    @property
    def is_on(self) -> bool:
        return self._settings.rows > 0

    # --- coming and going --------------------------------------------------------------------------------------

    def tree_ended(self, tree: TreeEntry, arrays: TreeArrays, *, version: int) -> None:
        """A training tree has come to its end.

        Args:
            tree: pruned.
            arrays: its own, with the rewards as they were earned.
            version: the learner's.
        """
        if not self.is_on:
            return
        leaf = arrays.is_leaf
        rewards = arrays.reward[leaf]
        share = branch_prob(arrays)[leaf] if self._credit.leaf_weights == "branch-prob" else 1.0 / len(rewards)
        mean = float(np.sum(share * rewards))
        std = float(np.sqrt(np.sum(share * (rewards - mean) ** 2)))
        self.moments.add(self._label(tree.task_index), (mean, std))
        good = rewards - mean > ROUNDING * float(np.abs(rewards).max())
        ids = tree.rows["turn_id"][leaf][good].tolist()
        if self._rows.put(tree, dict(zip(ids, rewards[good].tolist(), strict=True)), version=version):
            self._registry.rows_changed([tree.tree_id])
            self.make_space()

    def advance(self, version: int) -> None:
        """The learner is at ``version``: rows that are too old leave."""
        self._registry.release_rows(self._rows.expire(version))

    def make_space(self, max_bytes: int | None = None) -> None:
        """The oldest rows leave until the limits hold; ``max_bytes``: what trees leave to them."""
        limit = self._max_bytes if max_bytes is None else min(self._max_bytes, max(max_bytes, 0))
        self._registry.release_rows(self._rows.shrink(self._settings.rows, limit))

    # --- batches -----------------------------------------------------------------------------------------------

    def draw(
        self, *, step: int, num_leaves: int, tree_ids: Collection[str], rng: np.random.Generator
    ) -> tuple[ServedRow, ...]:
        """The rows that go with the batch of ``step``, each as likely as the others.

        Args:
            step: of the learner; where the rows count nothing there, none is used for it.
            num_leaves: of the batch.
            tree_ids: of the batch: a leaf is not imitated beside its own tree.
            rng: draws them.
        """
        count = self._settings.wanted(num_leaves)
        if not self.is_on or not count or not self._settings.coef_at(step):
            return ()
        found = list(self._worth_it(tree_ids))
        if len(found) > count:
            chosen = np.sort(rng.choice(len(found), size=count, replace=False))
            found = [found[i] for i in chosen.tolist()]
        self._rows.take(row.key for row in found)
        return tuple(found)

    def _worth_it(self, tree_ids: Collection[str]) -> Iterable[ServedRow]:
        """Ready rows whose advantage is not below 0 now, the oldest first."""
        baselines: dict[str, Baseline | None] = {}
        for row in self._rows.ready():
            tree = self._rows.find(row.key.tree_id)
            if tree is None or row.key.tree_id in tree_ids:
                continue
            label = self._label(tree.task_index)
            if label not in baselines:
                baselines[label] = self.moments.baseline(label)
            served = self._judged(row, tree.task_index, baselines[label])
            if served is not None:
                yield served

    def _judged(self, row: ImitationRow, task: int, baseline: Baseline | None) -> ServedRow | None:
        if baseline is None:
            return None
        credit = self._credit
        normalise = bool(credit.normalise_leaves or credit.normalise_returns or credit.whiten_advantages)
        advantage = baseline.advantage(row.reward, normalise=normalise)
        return ServedRow(row.key, task, advantage, row.uses + 1) if advantage >= 0 else None

    def confirm(self, keys: Sequence[RowKey], *, step: int) -> None:
        """The learner has trained on these rows, in the batch of ``step``."""
        self._rows.confirm(keys, step=step)
        self._registry.rows_changed(key.tree_id for key in keys)

    def give_back(self, keys: Sequence[RowKey]) -> None:
        """The learner has not trained on these rows."""
        self._rows.give_back(keys)

    def undo_use(self, keys: Sequence[RowKey]) -> None:
        """The learner has lost its update from these rows."""
        self._rows.undo_use(keys)
        self._registry.rows_changed(key.tree_id for key in keys)

    def checkpointed(self, step: int) -> None:
        """A checkpoint of the learner covers the batches below ``step``: rows that these used up leave."""
        self._registry.release_rows(self._rows.checkpointed(step))

    # --- metrics -----------------------------------------------------------------------------------------------

    def flush(self) -> dict[str, float]:
        """The metrics of a batch; empty where nothing is imitated.  Counting begins anew."""
        if not self.is_on:
            return {}
        left = self._rows.left - self._left_before
        metrics: dict[str, float] = {
            "imitation/kept": len(self._rows),
            "imitation/bytes": self._rows.nbytes,
            "imitation/entered": self._rows.entered - self._entered_before,
            **{f"imitation/left_{cause}": left[cause] for cause in ("age", "rows", "bytes", "used")},
        }
        for label in self.moments.labels:
            if (baseline := self.moments.baseline(label)) is not None:
                name = f"imitation/{label}" if label else "imitation"
                metrics |= {f"{name}/baseline_mean": baseline.mean, f"{name}/baseline_std": baseline.std}
        self._left_before, self._entered_before = Counter(self._rows.left), self._rows.entered
        return metrics

    def _label(self, task: int) -> str:
        return self._labels.of("train", task)
