"""``random``: any turns that are not leaves, each at most once as long as there are enough."""

from __future__ import annotations

import numpy as np

from actors.expansion.candidates import candidates_of, take
from actors.expansion.growing_tree import Tree
from atpo_async.config import SearchConfig


def select(tree: Tree, count: int, rng: np.random.Generator, settings: SearchConfig) -> tuple[int, ...]:
    known = candidates_of(tree, settings)
    return take([known[i] for i in rng.permutation(len(known))], count)
