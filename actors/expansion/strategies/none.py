"""``none``: no branches; a tree is its initial chains."""

from __future__ import annotations

import numpy as np

from atpo_async.config import SearchConfig
from atpo_async.core.tree import TurnTree


def select(tree: TurnTree, count: int, rng: np.random.Generator, settings: SearchConfig) -> tuple[int, ...]:
    return ()
