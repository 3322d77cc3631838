"""What a strategy may ask for beside the tree, and draws that belong to a turn in whatever order turns come.  Pure.

A tree that another actor takes over must come out the same.  Turns finish in another order there, and have other
numbers; so a draw is a function of the lease's seed and of what stands on the path to the turn: actions, rounds, and
which of several equal siblings it is.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from actors.expansion.growing_tree import GrowingTree, Tree
from atpo_async.core.tree import ROOT, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Handed to a strategy that has a keyword ``facts``.

    Raises ValueError where the size of the vocabulary is asked for and not known.
    """

    seed: int = 0
    """Of the lease."""
    round: int = 0
    """The round that is chosen for; 0 where turns are decided on as they end."""
    policy_tokens: int | None = None
    """Tokens that the policy's model has; None where that is not known."""
    tree: GrowingTree | None = field(default=None, repr=False, compare=False)
    """The tree that all questions are about, whole; None: it is known by what is asked alone."""
    keys: dict[int, bytes] = field(default_factory=dict, repr=False, compare=False)
    """Of turns of this tree that were asked for."""

    @property
    def vocab_size(self) -> int:
        """|V|, at least 2."""
        if self.policy_tokens is None or self.policy_tokens < 2:
            raise ValueError(
                f"the size of the policy's vocabulary is {self.policy_tokens}; expected 2 or more, as vocab_size in "
                "the config.json of its model folder"
            )
        return self.policy_tokens

    def rng(self, tree: Tree, turn_id: int) -> np.random.Generator:
        """The generator of a turn: the same whenever and by whichever actor it is asked for."""
        digest = hashlib.blake2b(repr(self.seed).encode(), digest_size=16, key=self.key(tree, turn_id))
        return np.random.default_rng(int.from_bytes(digest.digest(), "big"))

    def key(self, tree: Tree, turn_id: int) -> bytes:
        """32 bytes that tell the turn by its path; by them turns have an order that is not that of their arrival."""
        keys = {} if self.tree is None else self.keys
        missing = []
        while turn_id != ROOT and turn_id not in keys:
            missing.append(turn_id)
            turn_id = tree[turn_id].parent_id
        key = keys.get(turn_id, b"")
        for below in reversed(missing):
            turn = tree[below]
            twins = _twins_before(tree, turn) if self.tree is None else self.tree.twins_before(below)
            head = f"{turn.expansion_round}/{twins}/".encode()
            key = keys[below] = hashlib.blake2b(head + turn.action.tobytes(), digest_size=32, key=key).digest()
        return key


def _twins_before(tree: Tree, turn: Turn) -> int:
    """Earlier siblings of the same round with the same action."""
    siblings = (tree[other] for other in tree.siblings(turn.turn_id) if other < turn.turn_id)
    return sum(t.expansion_round == turn.expansion_round and np.array_equal(t.action, turn.action) for t in siblings)


NO_FACTS = Facts()
"""Nothing is known."""
