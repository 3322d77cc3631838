"""A forward pass of any size on made-up tokens, laid out as training's are: for warming up and for measuring."""

from __future__ import annotations

import numpy as np

from learner.packing.rows import MicroBatch, Row, micro_batches
from learner.packing.tree import tree_micro_batches


def made_up(tokens: int, *, longest: int, layout: str) -> MicroBatch:
    """A pass of at most so many tokens, every one of them scored: trees of one path each, all of one length.

    Args:
        tokens: of the pass; at least 1.
        longest: tokens of a path, at most.
        layout: ``tree`` or ``flat``.
    """
    length = min(tokens, longest)
    rows = [_path(number, length) for number in range(tokens // length)]
    if layout == "flat":
        return micro_batches(rows, max_tokens=tokens, version=0)[0]
    return tree_micro_batches(rows, max_tokens=tokens, pack_tokens=None, version=0)[0]


def _path(number: int, length: int) -> Row:
    """A prompt of one token and an action of all the others; the last one takes no place."""
    nothing = np.zeros(length)
    return Row(
        tokens=np.zeros(length + 1, dtype=np.int32), parts=np.array([[number, 1, 1]], dtype=np.int64), tree=number,
        at=np.arange(1, length + 1, dtype=np.int64), mu=nothing, advantage=nothing,
        version=np.zeros(length, dtype=np.int64), turn=np.full(length, number, dtype=np.int64), weight=nothing,
    )  # fmt: skip
