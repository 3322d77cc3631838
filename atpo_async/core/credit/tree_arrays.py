"""The shape of a turn tree as arrays, and what credit needs of its turns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from atpo_async.core.tree import ROOT, TurnTree
from atpo_async.core.vocabulary import Role

_ROLE_INDEX = {role: index for index, role in enumerate(get_args(Role))}

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TreeArrays:
    """The shape of a tree and what credit needs of its turns.  Every chain must end in a leaf (``TurnTree.pruned``)."""

    parent: I64
    """int64[N]: position of the parent, below the turn's own; -1 for first turns."""
    is_leaf: NDArray[np.bool_]
    """bool[N]."""
    reward: F64
    """float64[N]; only leaves are read."""
    entropy: F64
    """float64[N], nats: H(n)."""
    num_action_tokens: I64
    """int64[N]."""
    turn_reward: F64 = field(default_factory=lambda: np.zeros(0))
    """float64[N]: what each turn earned of its own; zeros where it is left out."""
    discount: float = 1.0
    """γ: what the turns below a turn earn counts that much for it."""
    role: I64 = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """int64[N]: index of each turn's role in ``core.credit.ROLES``; zeros outside groups, where it is left out."""
    reference: F64 = field(default_factory=lambda: np.zeros(0))
    """float64[N], nats: sum over a turn's action tokens of log-prob under the policy less that under the reference, for
    modes with ``reads_reference``; zeros where it is not known, as in the buffer."""
    task_index: int = -1
    """Of the tree's task; -1 where it has none."""

    def __post_init__(self) -> None:
        count = len(self.parent)
        for name in ("turn_reward", "reference"):
            if not len(getattr(self, name)):
                object.__setattr__(self, name, np.zeros(count))
        if not len(self.role):
            object.__setattr__(self, "role", np.zeros(count, dtype=np.int64))
        if not np.all(self.parent < np.arange(count)):
            raise ValueError("credit needs parents before their children")
        has_child = np.zeros(count, dtype=bool)
        has_child[self.parent[self.parent >= 0]] = True
        if not np.array_equal(has_child, ~self.is_leaf):
            odd = np.flatnonzero(has_child == self.is_leaf).tolist()
            raise ValueError(f"credit needs a pruned tree: turns at {odd} are neither leaves nor lead to one")

    def __len__(self) -> int:
        return len(self.parent)

    @property
    def only_outcomes(self) -> bool:
        """Whether leaf rewards are all that counts: no turn earned anything of its own, and nothing is discounted."""
        return self.discount == 1.0 and not self.turn_reward.any()

    @classmethod
    def of(cls, tree: TurnTree) -> TreeArrays:
        """Of a pruned tree, in the order of ``tree.turns``.

        Raises:
            ValueError: a chain ends without a finished leaf, or a leaf has no reward.
        """
        position = {turn.turn_id: i for i, turn in enumerate(tree)}
        position[ROOT] = -1
        unrewarded = [turn.turn_id for turn in tree if turn.is_leaf and turn.reward is None]
        if unrewarded:
            raise ValueError(f"tree {tree.tree_id}: leaves {unrewarded} have no reward")
        return cls(
            parent=np.array([position[t.parent_id] for t in tree], dtype=np.int64),
            is_leaf=np.array([t.is_leaf for t in tree], dtype=bool),
            reward=np.array([0.0 if t.reward is None else t.reward for t in tree], dtype=np.float64),
            turn_reward=np.array([t.turn_reward for t in tree], dtype=np.float64),
            entropy=np.array([t.entropy for t in tree], dtype=np.float64),
            num_action_tokens=np.array([len(t.action) for t in tree], dtype=np.int64),
            role=np.array([_ROLE_INDEX[t.role] for t in tree], dtype=np.int64),
            task_index=tree.task_index,
        )

    def with_reward(self, reward: F64) -> TreeArrays:
        """The same tree with other leaf rewards (float64[N])."""
        return replace(self, reward=reward)
