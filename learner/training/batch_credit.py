"""Credit of a batch's trees: what the whole batch decides of it, and crediting again with what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from atpo_async.core.credit import CreditRule, Moments, TreeArrays, leaf_tokens
from atpo_async.core.schedule import Schedule
from atpo_async.core.tree import TurnTree
from atpo_async.wire.messages import Batch
from learner.loss.protocols import MAX_LOG_RATIO
from learner.packing.arrays import F64
from learner.packing.credited import CreditedTree, whole_tree
from learner.training.passes import Part
from learner.training.reductions import Reductions

VARIANCE_FLOOR = 1e-8
"""Added to the variance by which advantages are whitened (published code)."""


class BatchCredit:
    """Credits the batches of a run; every rank calls each of its methods at the same point.

    Args:
        rule: of the run.
        reductions: over the ranks.
        device: of the passes.
    """

    def __init__(self, rule: CreditRule, reductions: Reductions, device: torch.device) -> None:
        self._rule = rule
        self._reductions = reductions
        self._device = device
        self.metrics: dict[str, float] = {}
        """Of the batch that was credited last, the same on every rank."""

    def of(self, batch: Batch) -> list[CreditedTree]:
        """This rank's trees, before anything was measured of them."""
        self.metrics = {}
        self._rule = self._rule.at(batch.step)
        if isinstance(self._rule.turn_reward_scale, Schedule):
            self.metrics["credit/turn_reward_scale"] = self._rule.turn_reward_scale.at(batch.step)
        std = self._reward_std(batch) if self._rule.needs_batch_std else None
        return self._whitened([CreditedTree.of(tree, self._rule, batch_std=std) for tree in batch.trees])

    def again(self, parts: Sequence[Part]) -> None:
        """Advantages anew, of the parts' trees and in their passes, with the ratios and the distances from the
        reference that the passes have measured.  Turns without a token in the loss count as ratio 1 and distance 0."""
        trees = [tree for part in parts for tree in self._measured(part)]
        trees = self._whitened(trees)
        for part in parts:
            part.trees, trees = trees[: len(part.trees)], trees[len(part.trees) :]
            part.hand_out()

    def of_trees(self, trees: Sequence[CreditedTree]) -> dict[str, float]:
        """What the advantage mode says of the batch's trees: ``credit/NAME``, means over all ranks."""
        names = self._rule.logged
        if not names:
            return dict(self.metrics)
        own = [tree.sums.get(name, (0.0, 0.0)) for name in names for tree in trees]
        sums = np.array(own, dtype=np.float64).reshape(len(names), len(trees), 2).sum(axis=1)
        total = self._reductions.sum(sums.reshape(-1)).reshape(-1, 2)
        found = {f"credit/{name}": float(s / n) for name, (s, n) in zip(names, total, strict=True) if n}
        return {**self.metrics, **found}

    def _reward_std(self, batch: Batch) -> float:
        """Of the leaf rewards of the batch's trees and of those left out of it for lack of a signal."""
        trees: list[TurnTree] = [whole_tree(tree) for tree in batch.trees]
        rewards = np.array([leaf.reward for tree in trees for leaf in tree.leaves()], dtype=np.float64)
        own = Moments.of(rewards)
        total = Moments(*self._reductions.sum(np.array([own.count, own.total, own.squares])).tolist())
        left_out = Moments(batch.left_out_leaves, batch.left_out_rewards, batch.left_out_squares)
        std = Moments.sum([total, left_out]).std
        self.metrics["credit/reward_std"] = std
        return std

    def _measured(self, part: Part) -> list[CreditedTree]:
        """The part's trees, credited with what its passes have measured."""
        rule = self._rule
        ratio = reference = None
        if rule.reads_ratio:
            total = _by_turn(part, [_known(item.prox) - item.mu for item in part.tree_passes], self._device)
            ratio = total.clamp(max=MAX_LOG_RATIO).exp().cpu().numpy()
        if rule.reads_reference:
            total = _by_turn(
                part, [_known(item.prox) - _known(item.reference) for item in part.tree_passes], self._device
            )
            # What is not finite makes the loss so, and the guard then leaves the update out.
            reference = total.nan_to_num(0.0, 0.0, 0.0).cpu().numpy()
        nothing = [None] * len(part.trees)
        ratios = nothing if ratio is None else _by_tree(ratio, part.trees)
        references = nothing if reference is None else _by_tree(reference, part.trees)
        return [
            tree.recredited(own, rule, reference=moved)
            for tree, own, moved in zip(part.trees, ratios, references, strict=True)
        ]

    def _whitened(self, trees: list[CreditedTree]) -> list[CreditedTree]:
        """Advantages with mean 0 and deviation 1 over the action tokens of all rows, each with its leaf's advantage;
        trees without a signal keep their zeros and do not count."""
        if not self._rule.whiten:
            return trees
        own = Moments.sum(_row_moments(tree) for tree in trees if tree.signal)
        total = Moments(*self._reductions.sum(np.array([own.count, own.total, own.squares])).tolist())
        if total.count < 2:
            return trees
        variance = total.std**2 * total.count / (total.count - 1)
        self.metrics |= {"credit/advantage_mean": total.mean, "credit/advantage_std": float(np.sqrt(variance))}
        scale = np.sqrt(variance + VARIANCE_FLOOR)
        return [
            replace(tree, advantages=(tree.advantages - total.mean) / scale) if tree.signal else tree for tree in trees
        ]


def _row_moments(tree: CreditedTree) -> Moments:
    """Of a leaf's advantage, as often as its row has action tokens."""
    arrays = TreeArrays.of(tree.tree)
    return Moments.of(tree.advantages, weights=leaf_tokens(arrays).astype(np.float64))


def _known(values: Tensor | None) -> Tensor:
    assert values is not None
    return values


def _by_turn(part: Part, differences: Sequence[Tensor], device: torch.device) -> Tensor:
    """float64[turns of the part]: the sum of a number by token over each turn's tokens, each counted once."""
    total = torch.zeros(sum(len(tree.tree) for tree in part.trees), dtype=torch.float64, device=device)
    for item, difference in zip(part.tree_passes, differences, strict=True):
        total.index_add_(0, item.number, torch.where(item.counted, difference.double(), 0.0))
    return total


def _by_tree(values: F64, trees: Sequence[CreditedTree]) -> list[F64]:
    """Numbers by turn of the part -> one array a tree."""
    return np.split(values, np.cumsum([len(tree.tree) for tree in trees])[:-1]) if trees else []
