"""A random number for each token, of the run's seed, the step, the tree, the turn and the token's place in it alone.

So a token draws the same number whichever rank, micro-batch, row or layout holds it, and after a restart too.  The
numbers of different parts of the objective are independent of one another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from atpo_async.core.tree import TurnTree

U64 = NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def turn_keys(trees: Sequence[TurnTree], *, seed: int, step: int) -> U64:
    """uint64[turns]: of each turn, tree by tree in the order of its turns."""
    found = [_digest(f"{seed}/{step}/{tree.tree_id}/{turn.turn_id}") for tree in trees for turn in tree]
    return np.array(found, dtype=np.uint64)


def token_keys(of_turn: U64, number: NDArray[np.int64], turn: NDArray[np.int64]) -> U64:
    """uint64[M]: of each token of a forward pass.

    Args:
        of_turn: ``turn_keys`` of the pass's trees.
        number: int64[M], which of these turns the token is of.
        turn: int64[M], turn occurrences, ascending, the tokens of each in order.
    """
    within = np.arange(len(turn)) - np.searchsorted(turn, turn)
    return _mixed(of_turn[number] + (within.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def uniform(keys: U64, label: str) -> NDArray[np.float64]:
    """float64[M] in [0, 1): the draws of the part of that label."""
    return (_mixed(keys ^ np.uint64(_digest(label))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mixed(keys: U64) -> U64:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every bit of the result depends on all of the key's."""
    with np.errstate(over="ignore"):
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return keys ^ (keys >> np.uint64(31))
