"""How alike what siblings found is, by the fingerprints of their turns.  Pure.

Source: TreePS-RAG (arXiv 2601.06922) prunes branches whose retrieved documents are alike; the measure is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from actors.expansion.growing_tree import Tree
from atpo_async.core.tree import Turn


def overlap(one: Sequence[int], other: Sequence[int]) -> float:
    """Jaccard index of two fingerprints; 0 where either is empty, which says nothing."""
    if not one or not other:
        return 0.0
    mine, theirs = set(one), set(other)
    return len(mine & theirs) / len(mine | theirs)


def mean_overlap(tree: Tree, turn_ids: Sequence[int]) -> float:
    """Mean over the pairs of these turns that have fingerprints; 0 without a pair."""
    found = [tree[turn_id].fingerprint for turn_id in turn_ids if tree[turn_id].fingerprint]
    pairs = [overlap(one, other) for one, other in combinations(found, 2)]
    return sum(pairs) / len(pairs) if pairs else 0.0


def found_before(tree: Tree, parent_id: int, fingerprint: Sequence[int], *, at: float) -> bool:
    """Whether a child of ``parent_id`` has found what this fingerprint says, from an overlap of ``at`` on."""
    return any(overlap(tree[child].fingerprint, fingerprint) >= at for child in tree.children(parent_id))


def is_duplicate(tree: Tree, turn: Turn, *, at: float) -> bool:
    """Whether an earlier sibling found what the turn did: of two that are alike, the later one is the duplicate.

    Args:
        turn: of the tree.
        at: the overlap from which on they are alike.
    """
    return bool(turn.fingerprint) and any(
        other < turn.turn_id and overlap(tree[other].fingerprint, turn.fingerprint) >= at
        for other in tree.children(turn.parent_id)
    )
