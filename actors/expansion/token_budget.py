"""What a further chain is likely to cost in tokens, and how many of those that a strategy chose a tree can pay.  Pure.

With one ``search.tree_tokens`` trees of different strategies cost about the same: a branch deep in the tree is cheap, a
chain from the prompt is dear.
"""

from __future__ import annotations

from collections.abc import Sequence

from actors.expansion.growing_tree import Tree
from atpo_async.core.tree import ROOT


def costs(tree: Tree) -> dict[int, float]:
    """Turn -> mean action tokens from it, itself included, to the ends of the chains through it; ``ROOT`` -> of whole
    chains.  A turn that leads to no end is left out."""
    sums: dict[int, float] = {}
    ends: dict[int, int] = {}
    for leaf in tree.leaves():
        tokens, turn_id = 0, leaf.turn_id
        while True:
            if turn_id != ROOT:
                tokens += len(tree[turn_id].action)
            sums[turn_id] = sums.get(turn_id, 0.0) + tokens
            ends[turn_id] = ends.get(turn_id, 0) + 1
            if turn_id == ROOT:
                break
            turn_id = tree[turn_id].parent_id
    return {turn_id: total / ends[turn_id] for turn_id, total in sums.items()}


def affordable(tree: Tree, chosen: Sequence[int], *, limit: int) -> tuple[int, ...]:
    """The first of ``chosen`` whose siblings are likely to leave the tree within ``limit`` action tokens, in order.

    The first one that does not fit ends it: taking cheaper ones after it would be another strategy.
    """
    known = costs(tree)
    used = float(sum(len(turn.action) for turn in tree))
    found = []
    for turn_id in chosen:
        used += known.get(turn_id, known.get(ROOT, 0.0))
        if used > limit:
            break
        found.append(turn_id)
    return tuple(found)
