"""``optimal_value``: regression of what a chain earned on how far the policy has moved, above the task's best value.

Source: A*-PO (arXiv 2505.20686) and its published code.  With V* an estimate of the value of the best policy that stays
near the reference, and S_i the sum over the action tokens of a chain of (log-prob under the policy - log-prob under the
reference), each chain has the loss

    (beta2 S_i + V* - R_i)^2        V* = beta1 log mean over the task's samples of exp(R / beta1)

Its gradient is that of the policy gradient -A log pi with A_i = -2 beta2 (beta2 S_i + V* - R_i): exactly, where S is
that of the weights the gradient is taken at.  S is measured before a batch's first optimizer step.  A turn's advantage
is the mean of A_i over the leaves below it, which is what the rows of these leaves add up to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from atpo_async.core.credit.marks import Sums, logs, needs_no_comparison, reads_reference, reads_tasks_rewards
from atpo_async.core.credit.returns import leaf_returns
from atpo_async.core.credit.tree_arrays import F64, TreeArrays
from atpo_async.core.credit.weights import mean_below, sum_along
from atpo_async.core.errors import ConfigError, SetupError

NAMES = ("optimal_value_loss", "optimal_value", "optimal_value_distance")


def optimal_value(rewards: F64, beta1: float) -> float:
    """V* of what the reference's chains earned, float64[n]: beta1 log mean exp(r / beta1)."""
    most = float(rewards.max())
    return most + beta1 * float(np.log(np.mean(np.exp((rewards - most) / beta1))))


def residuals(
    arrays: TreeArrays, *, beta1: float, beta2: float, rewards: Mapping[int, Sequence[float]] | None
) -> tuple[F64, float, F64]:
    """float64[N], beta2 S_i + V* - R_i on the leaves, 0 elsewhere; V*; float64[N], S_i on the leaves.

    Raises:
        SetupError: ``rewards`` has none of the tree's task.
    """
    leaf, returns = arrays.is_leaf, leaf_returns(arrays)
    samples = returns[leaf]
    if rewards is not None:
        found = rewards.get(arrays.task_index)
        if not found:
            raise SetupError(
                f"credit.advantage_options.rewards has no rewards of task {arrays.task_index} (it has those of "
                f"{len(rewards)} tasks): make it of more tasks, or end the run earlier with --run.max_tasks"
            )
        samples = np.asarray(found, dtype=np.float64)
    best = optimal_value(samples, beta1)
    moved = np.where(leaf, sum_along(arrays, arrays.reference), 0.0)
    return np.where(leaf, beta2 * moved + best - returns, 0.0), best, moved


def _sums(
    arrays: TreeArrays,
    values: F64,
    root_value: float,
    *,
    beta1: float = 0.5,
    beta2: float = 1e-3,
    rewards: Mapping[int, Sequence[float]] | None = None,
) -> Sums:
    off, best, moved = residuals(arrays, beta1=beta1, beta2=beta2, rewards=rewards)
    chains = float(arrays.is_leaf.sum())
    return {NAMES[0]: (float((off**2).sum()), chains), NAMES[1]: (best, 1.0), NAMES[2]: (float(moved.sum()), chains)}


@logs(NAMES, _sums)
@reads_tasks_rewards("rewards")
@needs_no_comparison
@reads_reference
def advantages(
    arrays: TreeArrays,
    values: F64,
    root_value: float,
    *,
    beta1: float = 0.5,
    beta2: float = 1e-3,
    rewards: Mapping[int, Sequence[float]] | None = None,
) -> F64:
    """A(n).

    Args:
        arrays: the tree.
        values: of its turns; not read.
        root_value: not read.
        beta1: temperature of V*, above 0.
        beta2: of the log-ratio, above 0.
        rewards: task index -> what the reference's chains earned; the option names a file of them.  None: what the
            tree's own chains earned takes their place.
    """
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not value > 0:
            raise ConfigError(f"credit.advantage_options.{name} must be > 0, got {value}")
    off, _, _ = residuals(arrays, beta1=beta1, beta2=beta2, rewards=rewards)
    found: F64 = -2.0 * beta2 * mean_below(arrays, off, np.ones(len(arrays)))
    return found
