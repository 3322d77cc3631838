"""``entropy-rise``: a coin for each turn of the round before, likelier heads where entropy rose since the first turn.

Last turns are candidates too: an agent that branches as it goes cannot know that a turn will be its last.  First turns
are none; what is left of the round's branches are fresh chains from the prompt.

Sources: ARPO (arXiv 2507.19849) and its released code; AEPO (arXiv 2510.14545) for ``search.branch_penalty``;
docs/ALGORITHM.md, section 1.
"""

from __future__ import annotations

import numpy as np

from actors.expansion.facts import NO_FACTS, Facts
from actors.expansion.growing_tree import Tree
from actors.expansion.rise import copies
from atpo_async.config import SearchConfig
from atpo_async.core.tree import ROOT


def select(
    tree: Tree, count: int, rng: np.random.Generator, settings: SearchConfig, *, facts: Facts = NO_FACTS
) -> tuple[int, ...]:
    """By turn id, until ``count`` are chosen; each turn is decided on once, in the round after its own."""
    chosen: list[int] = []
    for turn in tree:
        if len(chosen) >= count:
            break
        if turn.expansion_round != facts.round - 1 or turn.end == "pruned":
            continue
        if turn.is_leaf and settings.include_leaves is False:
            continue
        chosen += [turn.turn_id] * copies(tree, turn.turn_id, settings, facts)
    return (*chosen[:count], *[ROOT] * (count - len(chosen)))
