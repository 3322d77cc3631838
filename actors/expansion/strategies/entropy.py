"""``entropy``: the turns whose action the policy was least sure of, less a penalty for siblings they already have.

Source: AT2PO (arXiv 2601.04767), section 3; ALGORITHM, section 1.
"""

from __future__ import annotations

import numpy as np

from actors.expansion.candidates import candidates_of, take
from actors.expansion.growing_tree import Tree
from atpo_async.config import SearchConfig
from atpo_async.core.tree import ROOT


def select(tree: Tree, count: int, rng: np.random.Generator, settings: SearchConfig) -> tuple[int, ...]:
    """Best first.  Ties break by turn id, so the choice is deterministic given the tree."""
    known = candidates_of(tree, settings)
    ranked = sorted(known, key=lambda t: (-score(tree, t, sibling_penalty=settings.sibling_penalty), t))
    return take(ranked, count)


def score(tree: Tree, turn_id: int, *, sibling_penalty: float) -> float:
    """``H(n) - alpha * siblings(n)``, n itself not counted, in nats.

    The prompt has entropy 0 and, as in the published code, counts as a sibling of its own children.
    """
    if turn_id == ROOT:
        return -sibling_penalty * max(len(tree.children(ROOT)) - 1, 0)
    return tree[turn_id].entropy - sibling_penalty * len(tree.siblings(turn_id))
