"""``random``: any turns that are not leaves, each at most once as long as there are enough."""

from __future__ import annotations

import numpy as np

from actors.expansion.candidates import candidates_or_root, take
from atpo_async.config import SearchConfig
from atpo_async.core.tree import TurnTree


def select(tree: TurnTree, count: int, rng: np.random.Generator, settings: SearchConfig) -> tuple[int, ...]:
    known = candidates_or_root(tree, include_root=settings.include_root)
    return take([known[i] for i in rng.permutation(len(known))], count)
