"""The turns of a tree that may be branched at, and where a branch hangs.  Pure.

Source: AT2PO (arXiv 2601.04767), entropy-guided tree expansion; ALGORITHM, section 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from atpo_async.core.tree import ROOT, TurnTree


def candidates(tree: TurnTree, *, include_root: bool = False) -> tuple[int, ...]:
    """Turns that are not leaves, by id; with ``include_root`` the prompt too, first.

    A branch at a turn is a new *sibling* of it: same parent, same observation, a fresh action.
    """
    inner = tuple(turn.turn_id for turn in tree if not turn.is_leaf)
    return (ROOT, *inner) if include_root else inner


def candidates_or_root(tree: TurnTree, *, include_root: bool) -> tuple[int, ...]:
    """``candidates``; of a tree without any (every chain ended with its first turn) the prompt, so that it grows."""
    return candidates(tree, include_root=include_root) or (ROOT,)


def take(ranked: Sequence[int], count: int) -> tuple[int, ...]:
    """The first ``count``; if there are fewer, the best are repeated, in the same order."""
    return tuple(ranked[i % len(ranked)] for i in range(count)) if ranked else ()


def sibling_parent(tree: TurnTree, turn_id: int) -> int:
    """Where the new sibling of ``turn_id`` hangs (the root for the root)."""
    return ROOT if turn_id == ROOT else tree[turn_id].parent_id
