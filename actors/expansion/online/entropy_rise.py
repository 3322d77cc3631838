"""``entropy-rise``, at each turn as it ends: the rule of the strategy of that name, which need not wait for a round.

Sources: ARPO (arXiv 2507.19849), AEPO (arXiv 2510.14545); docs/ALGORITHM.md, section 1.
"""

from __future__ import annotations

import numpy as np

from actors.expansion.facts import NO_FACTS, Facts
from actors.expansion.growing_tree import GrowingTree
from actors.expansion.rise import copies, copies_after
from atpo_async.config import SearchConfig


def decide(
    tree: GrowingTree,
    turn_id: int,
    count: int,
    rng: np.random.Generator,
    settings: SearchConfig,
    *,
    facts: Facts = NO_FACTS,
) -> tuple[int, ...]:
    """Siblings of the turn by its own rise; with ``search.rise_of = "parent"`` further chains after it by its rise."""
    turn = tree[turn_id]
    if settings.rise_of == "parent":
        return () if turn.is_leaf else (turn_id,) * min(count, copies_after(tree, turn_id, settings, facts))
    if turn.is_leaf and settings.include_leaves is False:
        return ()
    return (turn.parent_id,) * min(count, copies(tree, turn_id, settings, facts))
