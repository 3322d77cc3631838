"""What comes out of a pool of trees: those that were drawn, those that left, and what a draw over several pools needs.
Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from buffer.pool.sampler import F64, I64
from buffer.trees.index import TreeEntry


@dataclass(frozen=True, slots=True)
class Drawn:
    """One tree of a batch, with how it was drawn."""

    tree: TreeEntry
    probability: float
    """P_i among the trees that were ready; 1/N where all of them were taken."""
    weight: float
    """w_PER."""
    uses: int
    """How often it was served, this time included."""


@dataclass(frozen=True, slots=True)
class ReadyTrees:
    """The trees of one pool that can be drawn, N of them."""

    entered: I64
    """int64[N]: when each came; no two trees of a pool have the same."""
    priority: F64
    """float64[N], at ``version``."""
    oldest: I64
    """int64[N]: the oldest version of a turn."""
    unserved: NDArray[np.bool_]
    """bool[N]: no batch has had it."""
    version: int


@dataclass(frozen=True, slots=True)
class Departure:
    """A tree that left the pool."""

    tree: TreeEntry
    cause: str
    """``used`` up, ``bytes``, ``trees`` (over a limit), ``stale`` before any batch had it, ``retired`` stale after
    one, ``inexact`` of a version that no batch is to have."""
    uses: int
    """Confirmed ones."""
    priority: float
