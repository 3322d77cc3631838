"""``diverse``: the entropy of a turn, less a penalty where its siblings have found the same: another try would too.

A branch is a sibling whose retrieval is unknown before it is made; how alike those are that exist says how likely it is
to be new.  Below a turn that found what an earlier sibling had there is no branch.

Source: TreePS-RAG (arXiv 2601.06922) for the idea; the score is ours (docs/methods.md).
"""

from __future__ import annotations

import numpy as np

from actors.expansion.candidates import candidates_of, take
from actors.expansion.growing_tree import Tree
from actors.expansion.overlap import is_duplicate, mean_overlap
from actors.expansion.strategies import entropy
from atpo_async.config import SearchConfig
from atpo_async.core.tree import ROOT


def select(tree: Tree, count: int, rng: np.random.Generator, settings: SearchConfig) -> tuple[int, ...]:
    """Best first; ties break by turn id."""
    closed = _below_duplicates(tree, at=settings.duplicate_at)
    known = [turn_id for turn_id in candidates_of(tree, settings) if turn_id not in closed] or [ROOT]
    return take(sorted(known, key=lambda t: (-score(tree, t, settings), t)), count)


def score(tree: Tree, turn_id: int, settings: SearchConfig) -> float:
    """``H(n) - alpha * siblings(n) - lambda * mean pairwise overlap of n and its siblings``."""
    parent = ROOT if turn_id == ROOT else tree[turn_id].parent_id
    alike = mean_overlap(tree, tree.children(parent))
    base = entropy.score(tree, turn_id, sibling_penalty=settings.sibling_penalty)
    return base - settings.diversity_penalty * alike


def _below_duplicates(tree: Tree, *, at: float) -> set[int]:
    """Turns that have such a turn among those before them."""
    closed: set[int] = set()
    duplicates: set[int] = set()
    for turn in tree:
        if turn.parent_id in closed or turn.parent_id in duplicates:
            closed.add(turn.turn_id)
        elif is_duplicate(tree, turn, at=at):
            duplicates.add(turn.turn_id)
    return closed
