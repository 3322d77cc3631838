"""The turns of a tree that may be branched at, and where a branch hangs.  Pure.

Source: AT2PO (arXiv 2601.04767), entropy-guided tree expansion; ALGORITHM, section 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from actors.expansion.growing_tree import Tree
from atpo_async.config import SearchConfig
from atpo_async.core.tree import ROOT


def candidates(tree: Tree, *, include_root: bool = False, include_leaves: bool = False) -> tuple[int, ...]:
    """Turns that are not leaves, by id; with ``include_leaves`` these too, with ``include_root`` the prompt, first.

    A branch at a turn is a new *sibling* of it: same parent, same observation, a fresh action.
    """
    found = tuple(t.turn_id for t in tree if t.end == "continue" or (include_leaves and t.is_leaf))
    return (ROOT, *found) if include_root else found


def candidates_of(tree: Tree, settings: SearchConfig) -> tuple[int, ...]:
    """``candidates`` as the settings have them; of a tree without any (every chain ended with its first turn) the
    prompt, so that it grows."""
    leaves = settings.include_leaves is True
    return candidates(tree, include_root=settings.include_root, include_leaves=leaves) or (ROOT,)


def take(ranked: Sequence[int], count: int) -> tuple[int, ...]:
    """The first ``count``; if there are fewer, the best are repeated, in the same order."""
    return tuple(ranked[i % len(ranked)] for i in range(count)) if ranked else ()


def sibling_parent(tree: Tree, turn_id: int) -> int:
    """Where the new sibling of ``turn_id`` hangs (the root for the root)."""
    return ROOT if turn_id == ROOT else tree[turn_id].parent_id
