"""The growth of one tree so far: its turns, its chains by rounds, and what is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from actors.expansion.growing_tree import GrowingTree
from atpo_async.core.tree import ROOT, Turn


class Chain(NamedTuple):
    """A chain to begin, or to go on with."""

    parent_id: int
    """Its first new turn follows this one; ``ROOT`` for a chain from the prompt."""
    round: int
    """``Turn.expansion_round`` of its turns."""
    most: int | None = None
    """It stops after so many new turns; None: at its end."""


class Growth:
    """Of one tree.

    Args:
        tree_id, task_index: of its lease.
        turns: those that earlier holders of the lease have grown.
    """

    def __init__(self, tree_id: str, task_index: int, turns: Sequence[Turn] = ()) -> None:
        self.tree = GrowingTree(tree_id, task_index, turns)
        self.failures: Counter[str] = Counter()
        self.last_detail = ""
        """The text of the latest failure, for the log."""
        self.actions = 0
        self.cut_actions = 0
        """Of those, the ones that no stop token ended."""
        self.pruned = 0
        """Branches that were closed since they found what a sibling had."""
        self.unfinished = False
        """The tree is left as it is, since the actor is asked to end."""
        self._rounds: dict[int, list[Turn]] = {}
        self._heads: dict[int, list[Turn]] = {}
        self._goes_on: dict[int, int] = {}
        """Turn -> the turn that follows it on its own chain."""
        for turn in self.tree:
            self._note(turn)

    def add(self, turn: Turn) -> None:
        """A turn that has just ended."""
        self.tree.add(turn)
        self._note(turn)
        self.pruned += turn.end == "pruned"

    def _note(self, turn: Turn) -> None:
        self._rounds.setdefault(turn.expansion_round, []).append(turn)
        if self.tree.is_head(turn):
            self._heads.setdefault(turn.expansion_round, []).append(turn)
        else:
            self._goes_on[turn.parent_id] = turn.turn_id

    @property
    def newest_round(self) -> int:
        """0 where there is no turn."""
        return max(self._rounds, default=0)

    def heads(self, number: int) -> list[Turn]:
        """First turns of the chains of round ``number``."""
        return self._heads.get(number, [])

    def heads_after(self, turn_id: int) -> int:
        """Branches that have begun after a turn: not the turn that goes on its own chain, and no initial chain."""
        children = (self.tree[child] for child in self.tree.children(turn_id))
        return sum(self.tree.is_head(child) and child.expansion_round > 0 for child in children)

    def tails(self, number: int) -> list[Turn]:
        """Last turns, so far, of the chains of round ``number``: leaves, pruned ones, or turns to go on from."""
        return [turn for turn in self._rounds.get(number, []) if turn.turn_id not in self._goes_on]

    def open_tails(self) -> list[Turn]:
        """Of all rounds, the turns to go on from."""
        return [turn for turn in self.tree if turn.end == "continue" and turn.turn_id not in self._goes_on]

    def chain_of(self, head: Turn) -> list[Turn]:
        """The turns of the chain that begins with ``head``."""
        found = [head]
        while (following := self._goes_on.get(found[-1].turn_id)) is not None:
            found.append(self.tree[following])
        return found

    def length_up_to(self, turn: Turn) -> int:
        """Turns of its own chain up to and including it."""
        length = 1
        while not self.tree.is_head(turn) and turn.parent_id != ROOT:
            turn, length = self.tree[turn.parent_id], length + 1
        return length
