"""Leaf rewards, rewards of turns, or returns, normalised inside their tree or by a batch (ALGORITHM, section 2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from atpo_async.core.credit.tree_arrays import F64, TreeArrays
from atpo_async.core.credit.weights import branch_prob, mean_below

STD_FLOOR = 1e-6
"""Added to the standard deviation (published code)."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Of numbers in one place, to be added to those of others: how many, their sum, the sum of their squares."""

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: F64, weights: F64 | None = None) -> Moments:
        """Of float64[N], each as often as ``weights`` says."""
        each = np.ones(len(values)) if weights is None else weights
        return cls(float(each.sum()), float((each * values).sum()), float((each * values**2).sum()))

    @classmethod
    def sum(cls, parts: Iterable[Moments]) -> Moments:
        found = list(parts)
        return cls(sum(p.count for p in found), sum(p.total for p in found), sum(p.squares for p in found))

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    @property
    def std(self) -> float:
        """The population's; 0 of none."""
        return float(np.sqrt(max(self.squares / self.count - self.mean**2, 0.0))) if self.count else 0.0


def normalised_leaves(arrays: TreeArrays, *, weights: F64 | None = None, batch_std: float | None = None) -> F64:
    """float64[N]: ``(r - mean) / (std + 1e-6)`` on the leaves, 0 elsewhere; population moments.

    Args:
        arrays: the tree.
        weights: float64[N] leaf weights that sum to 1 (``branch_prob``); equal ones where None.
        batch_std: of the rewards of many trees, in place of this tree's own (Lite PPO, arXiv 2508.08221).
    """
    leaf = arrays.is_leaf
    rewards = arrays.reward[leaf]
    q = np.full(len(rewards), 1.0 / max(len(rewards), 1)) if weights is None else weights[leaf]
    above = _above(rewards, float(np.sum(q * rewards)))
    std = float(np.sqrt(np.sum(q * above**2))) if batch_std is None else batch_std
    out = np.zeros(len(arrays))
    out[leaf] = above / (std + STD_FLOOR)
    return out


def normalised_turns(arrays: TreeArrays, *, weights: F64 | None = None, joint: bool = False) -> TreeArrays:
    """The tree with the rewards of inner turns and the outcomes of leaves, ``(x - mean) / (std + 1e-6)`` each.

    Source: IGPO (arXiv 2510.14967), where information gains and outcomes are normalised over the group apart from each
    other (its code) or together (the paper).  An inner turn counts once, however many chains pass through it.  A leaf's
    outcome is its reward and what its own turn earned.

    Args:
        arrays: the tree.
        weights: float64[N] of the leaves, as of ``normalised_leaves``; equal ones where None.
        joint: the moments are those of inner turns and leaves together; takes no weights.  Where no inner turn earned
            anything (no answer was known to measure its gain by), the outcomes' alone, and inner turns stay at 0.
    """
    leaf = arrays.is_leaf
    paid = np.where(leaf, arrays.reward + arrays.turn_reward, arrays.turn_reward)
    if joint and paid[~leaf].any():
        found = _to_unit(paid)
    else:
        found = normalised_leaves(arrays.with_reward(paid), weights=weights)
        if not leaf.all():
            found[~leaf] = _to_unit(paid[~leaf])
    return replace(arrays, reward=np.where(leaf, found, 0.0), turn_reward=np.where(leaf, 0.0, found))


def posterior_turns(arrays: TreeArrays) -> TreeArrays:
    """The tree with each turn's reward as often as a chain through it, by branch probability, had the outcome right.

    Source: Posterior-GRPO (arXiv 2508.05170), R = r + r * t: how a chain was made counts only if its outcome is right,
    here a leaf reward above 0.  A turn that several chains share is paid the mean over them.
    """
    if not arrays.turn_reward.any():
        return arrays
    share = branch_prob(arrays)
    right = np.where(arrays.is_leaf & (arrays.reward > 0), 1.0, 0.0)
    return replace(arrays, turn_reward=arrays.turn_reward * mean_below(arrays, right, share))


def _to_unit(numbers: F64) -> F64:
    above = _above(numbers, float(numbers.mean()))
    found: F64 = above / (float(np.sqrt(np.mean(above**2))) + STD_FLOOR)
    return found


def _above(numbers: F64, mean: float) -> F64:
    """What equal numbers have above their mean is rounding, which a deviation of 0 would let look like a signal."""
    found: F64 = numbers - mean
    return np.zeros_like(found) if not len(numbers) or np.ptp(numbers) == 0.0 else found


def normalised_returns(
    arrays: TreeArrays, values: F64, root_value: float, over: Literal["turns", "first"] = "turns"
) -> tuple[TreeArrays, F64, float]:
    """``(V - mean) / (std + 1e-6)`` with the moments of V over some turns, and the rewards that give these values.

    Source: GTPO (arXiv 2511.14846), returns normalised over the turns of the group; over its first turns only in
    another implementation of it.  With m, s these moments, t' = (t - (1 - gamma) m) / s and r' = (r - gamma m) / s keep
    V'(n) = t'(n) + gamma * mean of the children's V'.

    Args:
        arrays: the tree.
        values: float64[N], V(n).
        root_value: V(root).
        over: all turns, or those that have no turn above them; where these are all worth the same, all turns.
    """
    if not len(arrays):
        return arrays, values, root_value
    first = values[arrays.parent < 0]
    among = first if over == "first" and np.ptp(first) > STD_FLOOR else values
    mean, scale = float(among.mean()), float(among.std()) + STD_FLOOR
    gamma = arrays.discount
    shifted = replace(
        arrays,
        reward=(arrays.reward - gamma * mean) / scale,
        turn_reward=(arrays.turn_reward - (1.0 - gamma) * mean) / scale,
    )
    return shifted, (values - mean) / scale, (root_value - mean) / scale
