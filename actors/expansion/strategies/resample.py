"""``resample``: chains stop together every few turns, and go on from states drawn by their value, as a particle filter.

The ids are turns *after* which a chain goes on; one drawn twice is gone on from twice, one not drawn is left.

Source: Fleet of Agents (arXiv 2405.06691) and its released code; docs/methods.md says what differs.
"""

from __future__ import annotations

import numpy as np

from actors.expansion.facts import NO_FACTS, Facts
from actors.expansion.growing_tree import Tree
from actors.expansion.resampling import age, probabilities, states, value_of
from atpo_async.config import SearchConfig
from atpo_async.core.tree import ROOT


def select(
    tree: Tree, count: int, rng: np.random.Generator, settings: SearchConfig, *, facts: Facts = NO_FACTS
) -> tuple[int, ...]:
    """Drawn with replacement from every state so far; fresh chains where there is none."""
    known = states(tree)
    if not known:
        return (ROOT,) * count
    values = [
        value_of(tree, turn, settings) * settings.resample_decay ** age(tree, turn, settings, round_number=facts.round)
        for turn in known
    ]
    drawn = rng.choice(len(known), size=count, p=probabilities(values, settings.resample_weights))
    return tuple(known[at].turn_id for at in drawn.tolist())
