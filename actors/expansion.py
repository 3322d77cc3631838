"""Which turns to branch at.  Pure: the tree comes in, the choice goes out.

Source: AT2PO (arXiv 2601.04767), entropy-guided tree expansion; ALGORITHM, section 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from atpo_async.core.tree import ROOT, TurnTree

Strategy = Literal["entropy", "random", "none"]


def candidates(tree: TurnTree, *, include_root: bool = False) -> tuple[int, ...]:
    """Turns that are not leaves, by id; with ``include_root`` the prompt too, first.

    A branch at a turn is a new *sibling* of it: same parent, same observation, a fresh action.
    """
    inner = tuple(turn.turn_id for turn in tree if not turn.is_leaf)
    return (ROOT, *inner) if include_root else inner


def score(tree: TurnTree, turn_id: int, *, sibling_penalty: float) -> float:
    """``H(n) - alpha * siblings(n)``, n itself not counted, in nats.

    The prompt has entropy 0 and, as in the published code, counts as a sibling of its own children.
    """
    if turn_id == ROOT:
        return -sibling_penalty * max(len(tree.children(ROOT)) - 1, 0)
    return tree[turn_id].entropy - sibling_penalty * len(tree.siblings(turn_id))


def take(ranked: Sequence[int], count: int) -> tuple[int, ...]:
    """The first ``count``; if there are fewer, the best are taken again, in the same order."""
    return tuple(ranked[i % len(ranked)] for i in range(count)) if ranked else ()


def select(
    tree: TurnTree,
    *,
    count: int,
    strategy: Strategy,
    sibling_penalty: float,
    include_root: bool,
    rng: np.random.Generator,
) -> tuple[int, ...]:
    """The turns that each get one new sibling, best first; ``ROOT`` stands for a fresh chain from the prompt.

    Ties break by turn id, so the choice is deterministic given the tree (and, for ``random``, the generator).
    A tree without candidates (every chain ended with its first turn) grows from its root, so that a round always
    adds ``count`` leaves.
    """
    if strategy == "none" or count == 0:
        return ()
    known = candidates(tree, include_root=include_root) or (ROOT,)
    if strategy == "random":
        order = rng.permutation(len(known))
        return take([known[i] for i in order], count)
    ranked = sorted(known, key=lambda t: (-score(tree, t, sibling_penalty=sibling_penalty), t))
    return take(ranked, count)


def sibling_parent(tree: TurnTree, turn_id: int) -> int:
    """Where the new sibling of ``turn_id`` hangs (the root for the root)."""
    return ROOT if turn_id == ROOT else tree[turn_id].parent_id
