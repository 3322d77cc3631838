"""``chains``: every branch is a fresh chain from the prompt: independent chains, up to the tree's leaves or tokens.

Beside ``search.tree_tokens`` it is the control to which strategies that place branches compare at equal tokens.
"""

from __future__ import annotations

import numpy as np

from actors.expansion.growing_tree import Tree
from atpo_async.config import SearchConfig
from atpo_async.core.tree import ROOT


def select(tree: Tree, count: int, rng: np.random.Generator, settings: SearchConfig) -> tuple[int, ...]:
    return (ROOT,) * count
