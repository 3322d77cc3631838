"""iStar's arithmetic on one tree: the preference loss over pairs of chains, and the advantages of single turns.

Source: iStar (arXiv 2509.19199).  With pi_phi the reward model and pi_old the policy at the batch's start,

    r_n = beta * sum over the turn's action tokens of (log pi_phi - log pi_old)
    loss = -log sigma( sum of r over the better chain - sum of r over the worse one )
    A_n = A_outcome(n) + alpha * (r_n - mean) / (std + 1e-6),  moments over all turns of the tree

A pair is two leaves of a tree of which one earned more.  The loss is linear in the turns' log-probs up to the pairs'
margins, so its gradient by token is a number for each turn, which any layout and any micro-batching applies alike.
Shapes: N turns of a pruned tree, in its order; L leaves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atpo_async.core.credit.rewards import STD_FLOOR
from atpo_async.core.credit.tree_arrays import F64, TreeArrays


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """The pairs of one tree."""

    count: int
    right: int
    """In which the better chain has the larger sum of rewards."""
    loss: float
    """Mean over the pairs; 0 without any."""
    gradient: F64
    """float64[N]: of ``loss``, with respect to the log-prob under pi_phi of each token of a turn."""


def chain_sums(arrays: TreeArrays, values: F64) -> F64:
    """float64[N]: each turn's number and those of the turns above it."""
    sums = [0.0] * (len(arrays) + 1)
    for i, parent in enumerate(arrays.parent.tolist()):
        sums[i] = sums[parent] + float(values[i])  # -1, the last place, stands for the prompt
    return np.array(sums[:-1])


def pairs_of(arrays: TreeArrays, log_ratio: F64, *, beta: float) -> Pairs:
    """The loss over all pairs of a tree's leaves.

    Args:
        arrays: the tree, with raw rewards.
        log_ratio: float64[N], sum over each turn's tokens of log pi_phi - log pi_old; 0 where it is not known.
        beta: of the rewards.
    """
    leaves = np.flatnonzero(arrays.is_leaf)
    reward, score = arrays.reward[leaves], beta * chain_sums(arrays, log_ratio)[leaves]
    better, worse = np.nonzero(reward[:, None] > reward[None, :])
    gradient = np.zeros(len(arrays))
    if not len(better):
        return Pairs(count=0, right=0, loss=0.0, gradient=gradient)
    margin = score[better] - score[worse]
    # -d/dm of log(1 + exp(-m)): sigma(-m), in a form that overflows nowhere.
    pull = np.exp(-np.logaddexp(0.0, margin)) / len(margin)
    by_leaf = np.zeros(len(leaves))
    np.add.at(by_leaf, better, -pull)
    np.add.at(by_leaf, worse, pull)
    gradient[leaves] = by_leaf
    for i in range(len(arrays) - 1, -1, -1):  # a turn's tokens are in every chain below it
        if arrays.parent[i] >= 0:
            gradient[arrays.parent[i]] += gradient[i]
    return Pairs(
        count=len(margin),
        right=int((margin > 0).sum()),
        loss=float(np.logaddexp(0.0, -margin).mean()),
        gradient=beta * gradient,
    )


def step_advantages(rewards: F64, known: NDArray[np.bool_]) -> F64:
    """float64[N]: rewards to mean 0 and deviation 1 over the tree's turns, each once; 0 where they are not known."""
    found = np.zeros(len(rewards))
    if known.any():
        own = rewards[known]
        found[known] = (own - own.mean()) / (own.std() + STD_FLOOR)
    return found
