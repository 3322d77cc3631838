"""What a further chain is likely to cost in tokens, and how many of those that a strategy chose a tree can pay.  Pure.

With one ``search.tree_tokens`` trees of different strategies cost about the same: a branch deep in the tree is cheap, a
chain from the prompt is dear.
"""

from __future__ import annotations

from collections.abc import Sequence

from actors.expansion.growing_tree import Tree
from atpo_async.core.tree import ROOT, Turn


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


class Reserve:
    """What a tree is likely to cost in the end, while it grows: what it has cost, and what its open chains will.

    Chains that fail are taken to go on: their failures are not known to an actor that takes the tree over.

    Args:
        limit: action tokens of the tree.
        chains: that begin from the prompt.
    """

    def __init__(self, limit: int, chains: int) -> None:
        self._limit, self._open = limit, chains
        self._spent: dict[int, int] = {ROOT: 0}
        """Turn -> action tokens from the prompt to its end."""
        self._used = self._begun = self._ends = self._whole = 0

    def add(self, turn: Turn) -> None:
        """The next turn."""
        before = self._spent[turn.parent_id]
        self._spent[turn.turn_id] = before + len(turn.action)
        self._used += len(turn.action)
        if turn.end == "continue":
            self._begun += len(turn.action)
            return
        self._open, self._begun = self._open - 1, self._begun - before
        if turn.is_leaf:
            self._ends, self._whole = self._ends + 1, self._whole + before + len(turn.action)

    @property
    def is_known(self) -> bool:
        """Whether a chain has ended, by which the others are judged."""
        return self._ends > 0

    def take(self, parent_id: int) -> bool:
        """Whether one more chain after this turn is likely to fit; it counts as open then."""
        whole = self._whole / self._ends
        to_come = max(0.0, self._open * whole - self._begun) + max(0.0, whole - self._spent[parent_id])
        if self._used + to_come > self._limit:
            return False
        self._open, self._begun = self._open + 1, self._begun + self._spent[parent_id]
        return True
