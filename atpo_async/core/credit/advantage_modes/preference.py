"""``preference``: the best of siblings is preferred to the worst, as in step-level DPO over a search tree.

Source: MCTS + DPO (Xie et al., arXiv 2405.00451) and its published code.  Of each turn's children, and of the first
turns, the one with the greatest value w and the one with the least l are a pair, if their values differ.  With
D = sum of (log-prob under the policy - log-prob under the reference) over a turn's tokens and x = beta (D_w - D_l):

    loss = -(1 - a) log sigma(x) - a log sigma(-x)        a = 1 / (N_w / N_l + 1) or 0, N the leaves below (visits)

Its gradient is that of the policy gradient -A log pi, token by token, with A_w = beta ((1 - a) sigma(-x) - a sigma(x))
and A_l = -A_w, all other turns 0: exactly, where x is that of the weights the gradient is taken at.  x is measured
before a batch's first optimizer step.
"""

from __future__ import annotations

import numpy as np

from atpo_async.core.credit.marks import Sums, logs, reads_reference
from atpo_async.core.credit.returns import rounding
from atpo_async.core.credit.tree_arrays import F64, I64, TreeArrays
from atpo_async.core.credit.weights import leaves_below
from atpo_async.core.errors import ConfigError

NOISES = ("none", "visits")
NAMES = ("preference_loss", "preference_accuracy", "preference_margin")


def pairs(arrays: TreeArrays, values: F64, least_margin: float = 0.0) -> tuple[I64, I64]:
    """int64[P] each: winners and losers, by position; of equal siblings the first.

    Args:
        arrays: the tree.
        values: float64[N].
        least_margin: siblings whose values differ by no more are no pair, nor are those that differ by rounding.
    """
    winners, losers = [], []
    least = least_margin + rounding(arrays)
    families: dict[int, list[int]] = {}
    for turn, parent in enumerate(arrays.parent.tolist()):
        families.setdefault(parent, []).append(turn)
    for family in families.values():
        best = max(family, key=lambda turn: values[turn])
        worst = min(family, key=lambda turn: values[turn])
        if values[best] - values[worst] > least:
            winners.append(best)
            losers.append(worst)
    return np.array(winners, dtype=np.int64), np.array(losers, dtype=np.int64)


def _noise(arrays: TreeArrays, winners: I64, losers: I64, label_noise: str) -> F64:
    """float64[P]: the probability that a pair is the wrong way round."""
    if label_noise == "none":
        return np.zeros(len(winners))
    visits = leaves_below(arrays).astype(np.float64)
    found: F64 = 1.0 / (visits[winners] / visits[losers] + 1.0)
    return found


def _sigmoid(x: F64) -> F64:
    found: F64 = 0.5 * (1.0 + np.tanh(0.5 * x))
    return found


def losses(arrays: TreeArrays, winners: I64, losers: I64, *, beta: float, label_noise: str) -> tuple[F64, F64]:
    """float64[P] each: the DPO loss of each pair, and its x."""
    x = beta * (arrays.reference[winners] - arrays.reference[losers])
    noise = _noise(arrays, winners, losers, label_noise)
    found: F64 = (1.0 - noise) * np.logaddexp(0.0, -x) + noise * np.logaddexp(0.0, x)
    return found, x


def _sums(
    arrays: TreeArrays,
    values: F64,
    root_value: float,
    *,
    beta: float = 0.1,
    label_noise: str = "none",
    least_margin: float = 0.0,
) -> Sums:
    winners, losers = pairs(arrays, values, least_margin)
    loss, x = losses(arrays, winners, losers, beta=beta, label_noise=label_noise)
    count = float(len(x))
    right = float((x > 0).sum() + 0.5 * (x == 0).sum())
    found = (float(loss.sum()), right, float(x.sum()))
    return {name: (each, count) for name, each in zip(NAMES, found, strict=True)}


@logs(NAMES, _sums)
@reads_reference
def advantages(
    arrays: TreeArrays,
    values: F64,
    root_value: float,
    *,
    beta: float = 0.1,
    label_noise: str = "none",
    least_margin: float = 0.0,
) -> F64:
    """A(n); 0 of turns in no pair.

    Args:
        arrays: the tree.
        values: of its turns; they decide which sibling is the better one.
        root_value: not read.
        beta: of DPO, above 0.
        label_noise: ``none``, or ``visits``, by which a pair counts the less the fewer leaves are below its winner.
        least_margin: siblings whose values differ by no more are no pair.
    """
    if label_noise not in NOISES:
        raise ConfigError(
            f"credit.advantage_options.label_noise must be one of {', '.join(NOISES)}, got {label_noise!r}"
        )
    if not beta > 0:
        raise ConfigError(f"credit.advantage_options.beta must be > 0, got {beta}: it is DPO's")
    winners, losers = pairs(arrays, values, least_margin)
    _, x = losses(arrays, winners, losers, beta=beta, label_noise=label_noise)
    noise = _noise(arrays, winners, losers, label_noise)
    found = np.zeros(len(arrays))
    found[winners] = beta * ((1.0 - noise) * _sigmoid(-x) - noise * _sigmoid(x))
    found[losers] = -found[winners]
    return found
