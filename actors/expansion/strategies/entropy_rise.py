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
    """Second turns first, then third ones and so on, until ``count`` are chosen: as if all chains had gone on in step.

    Each turn is decided on once, in the round after its own; among those of one depth the order is not that of arrival.
    """
    leaves = settings.include_leaves is not False
    known = [
        turn.turn_id
        for turn in tree
        if turn.expansion_round == facts.round - 1 and (turn.end == "continue" or (leaves and turn.is_leaf))
    ]
    chosen: list[int] = []
    for turn_id in sorted(known, key=lambda t: (len(tree.path(t)), facts.key(tree, t))):
        if len(chosen) >= count:
            break
        chosen += [turn_id] * copies(tree, turn_id, settings, facts)
    return (*chosen[:count], *[ROOT] * (count - len(chosen)))
