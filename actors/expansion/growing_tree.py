"""A tree as far as it has grown: answers what a ``TurnTree`` does, while turns are added one by one.

Every answer takes time in proportion to what it returns, or to the depth of the turn, never to the size of the tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from atpo_async.core.tree import ROOT, Turn, TurnTree
from atpo_async.environments.replay import NOTHING


class GrowingTree:
    """The turns of one tree so far.  Strategies read it; the search alone adds to it.

    Args:
        tree_id, task_index: of the lease.
        turns: those that are there already.
    """

    def __init__(self, tree_id: str, task_index: int, turns: Sequence[Turn] = ()) -> None:
        self.tree_id, self.task_index = tree_id, task_index
        self.prompt: np.ndarray = NOTHING
        """int32[P]; empty before it is known."""
        self.action_tokens = 0
        """Sampled, of all turns."""
        self.next_id = ROOT + 1
        """No turn has this number or a higher one."""
        self._by_id: dict[int, Turn] = {}
        self._children: dict[int, list[int]] = {ROOT: []}
        self._leaves: list[Turn] = []
        self._twins: dict[int, int] = {}
        self._said: dict[tuple[int, int, bytes], int] = {}
        """(parent, round, action) -> turns."""
        for turn in sorted(turns, key=lambda t: t.turn_id):
            self.add(turn)

    def add(self, turn: Turn) -> None:
        """The next turn: its number is the highest."""
        self._by_id[turn.turn_id] = turn
        self._children.setdefault(turn.turn_id, [])
        self._children.setdefault(turn.parent_id, []).append(turn.turn_id)
        said = (turn.parent_id, turn.expansion_round, turn.action.tobytes())
        self._twins[turn.turn_id] = self._said[said] = self._said.get(said, -1) + 1
        self.action_tokens += len(turn.action)
        self.next_id = max(self.next_id, turn.turn_id + 1)
        if turn.is_leaf:
            self._leaves.append(turn)

    @property
    def turns(self) -> tuple[Turn, ...]:
        return tuple(self._by_id.values())

    def __iter__(self) -> Iterator[Turn]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def __getitem__(self, turn_id: int) -> Turn:
        return self._by_id[turn_id]

    def __contains__(self, turn_id: object) -> bool:
        return turn_id in self._by_id

    def children(self, turn_id: int) -> tuple[int, ...]:
        return tuple(self._children.get(turn_id, ()))

    def first_child(self, turn_id: int) -> Turn | None:
        children = self._children.get(turn_id)
        return self._by_id[children[0]] if children else None

    def siblings(self, turn_id: int) -> tuple[int, ...]:
        """Other turns with the same parent."""
        return tuple(t for t in self._children[self._by_id[turn_id].parent_id] if t != turn_id)

    def leaves(self) -> tuple[Turn, ...]:
        return tuple(self._leaves)

    def path(self, turn_id: int) -> tuple[Turn, ...]:
        """From the first turn down to ``turn_id``, both included; empty for the root."""
        steps: list[Turn] = []
        while turn_id != ROOT:
            steps.append(self._by_id[turn_id])
            turn_id = steps[-1].parent_id
        return tuple(reversed(steps))

    def context(self, turn_id: int) -> np.ndarray:
        """int32: all tokens up to and including the action of ``turn_id`` (the prompt alone for the root)."""
        parts = [self.prompt, *(part for turn in self.path(turn_id) for part in (turn.observation, turn.action))]
        tokens: np.ndarray = np.concatenate(parts).astype(np.int32, copy=False)
        return tokens

    def twins_before(self, turn_id: int) -> int:
        """Earlier siblings of the same round with the same action."""
        return self._twins[turn_id]

    def round_of(self, turn_id: int) -> int:
        """``expansion_round``; 0 for the prompt."""
        return 0 if turn_id == ROOT else self._by_id[turn_id].expansion_round

    def is_head(self, turn: Turn) -> bool:
        """Whether a chain begins with the turn: its parent is the prompt, or a turn of another round."""
        return turn.parent_id == ROOT or self.round_of(turn.parent_id) != turn.expansion_round

    def frozen(self, *, failed_branches: int = 0, before_round: int | None = None) -> TurnTree:
        """As it is now; with ``before_round`` the turns of earlier rounds alone."""
        turns = tuple(t for t in self if before_round is None or t.expansion_round < before_round)
        return TurnTree(self.tree_id, self.task_index, self.prompt, turns, failed_branches)


Tree = TurnTree | GrowingTree
"""What strategies read."""
