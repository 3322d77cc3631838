"""The named parts of the rewards of a tree's leaves (``Turn.rewards``): read from their records when the tree ends."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from atpo_async.wire import codec
from atpo_async.wire.records import unpack
from buffer.trees.index import Store, TreeEntry

MOST_NAMES = 64
"""Names of which a run has metrics: a task may make one up for every chain."""


def part_means(tree: TreeEntry, weight: NDArray[np.float64], store: Store) -> dict[str, float]:
    """Name -> mean over the leaves that have it, under ``weight`` (float64[N]).  Empty where none has any."""
    found: dict[str, tuple[float, float]] = {}
    for at in np.flatnonzero(tree.has_parts & (weight > 0)).tolist():
        header, payload = unpack(store.read(tree.place(at)))
        share = float(weight[at])
        for name, part in codec.decode_turn(header, payload).rewards.items():
            total, of = found.get(name, (0.0, 0.0))
            found[name] = total + share * part, of + share
    return {name: total / of for name, (total, of) in found.items()}
