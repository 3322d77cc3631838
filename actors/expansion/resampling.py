"""Which states of a tree go on: values, their decay, and the probabilities by which states are drawn.  Pure.

Source: Fleet of Agents (arXiv 2405.06691) and its released code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from actors.expansion.growing_tree import Tree
from atpo_async.config import SearchConfig
from atpo_async.core.tree import ROOT, Turn

Weights = Literal["linear", "logistic", "max", "percentile", "above-half"]
PERCENTILE = 75


def probabilities(values: Sequence[float], how: Weights) -> np.ndarray:
    """float64[N], summing to 1: of drawing each of N states.

    ``linear``: in proportion to the value, none below 0; ``logistic``: softmax of sigma(value); ``max``: the best,
    equally where several are; ``percentile``: linear among those from the 75th percentile on; ``above-half``: linear
    among those of at least half the best.  Where all weights are 0, all are equally likely.
    """
    found = np.asarray(values, dtype=np.float64)
    if how == "logistic":
        weight = np.exp(1.0 / (1.0 + np.exp(-np.clip(found, -700.0, 700.0))))
    elif how == "max":
        weight = (found == found.max()).astype(np.float64)
    else:
        weight = np.maximum(found, 0.0)
        if how == "percentile":
            weight = np.where(found >= np.percentile(found, PERCENTILE), weight, 0.0)
        elif how == "above-half":
            weight = np.where(weight >= 0.5 * weight.max(), weight, 0.0)
    # By the largest first: numbers near the end of the range would add up to infinity.
    weight = weight / weight.max() if weight.max() > 0 else np.ones(len(found))
    chances: np.ndarray = weight / weight.sum()
    return chances


def states(tree: Tree) -> list[Turn]:
    """Turns after which a chain can go on."""
    return [turn for turn in tree if turn.end == "continue"]


def value_of(tree: Tree, turn: Turn, settings: SearchConfig) -> float:
    """What the state after a turn is worth, before its decay, by ``search.resample_value``.

    ``environment``: ``state_value`` of its step, and where there is none what turns on its path have earned so far;
    ``turn-rewards``: that; ``certainty``: exp(-H), the geometric mean of the probabilities of the turn's tokens.
    """
    if settings.resample_value == "certainty":
        return math.exp(-turn.entropy)
    if settings.resample_value == "environment" and turn.state_value is not None:
        return turn.state_value
    return sum(above.turn_reward for above in tree.path(turn.turn_id))


def age(tree: Tree, turn: Turn, settings: SearchConfig, *, round_number: int) -> int:
    """Turns that every chain has taken since, when the states for ``round_number`` are drawn."""
    taken, above = 1, turn.parent_id
    while above != ROOT and tree[above].expansion_round == turn.expansion_round:
        taken, above = taken + 1, tree[above].parent_id
    return max(0, (round_number - turn.expansion_round) * settings.resample_every - taken)
