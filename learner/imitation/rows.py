"""The rows of a batch that are imitated: chains of earlier trees, each turn with the leaf's advantage.  Pure, numpy.

Source: SPEAR (arXiv 2509.22601); ALGORITHM, "Imitation".  A row is a tree of one chain.  Its loss has the batch's
aggregation, over a mean of its own:

    loss = mean over the batch's leaves + coef(t) * mean over its imitated rows

so that each of a row's tokens weighs coef(t) times what it would in a batch of these rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from atpo_async.core.tree import TurnTree
from atpo_async.core.vocabulary import Aggregation
from atpo_async.wire.messages import Batch, BatchRow
from learner.packing.credited import CreditedTree, Normaliser
from learner.packing.rows import Row, leaf_rows


def imitated(row: BatchRow, *, coef: float) -> CreditedTree:
    """A row as a tree of one chain.  ``coef``: what all rows count at this step."""
    tree = TurnTree(row.tree_id, row.task_index, row.prompt, tuple(row.turns))
    return CreditedTree(tree, coef, np.full(len(tree), row.advantage), signal=row.advantage > 0)


def normaliser_of(batch: Batch) -> Normaliser:
    """The denominators of the rows' mean, over all ranks; each row is a tree with one leaf."""
    return Normaliser(
        num_trees=batch.num_rows, num_leaves=batch.num_rows, num_action_tokens=batch.num_row_tokens,
        num_turn_tokens=batch.num_row_tokens,
    )  # fmt: skip


def imitated_rows(
    chains: Sequence[CreditedTree],
    *,
    after: Sequence[CreditedTree],
    version: int,
    max_lag: int,
    aggregation: Aggregation,
    normaliser: Normaliser,
    keep_idle: bool,
) -> list[Row]:
    """Their rows, as ``leaf_rows`` makes those of trees.

    Args:
        chains: from ``imitated``.
        after: the trees of the same optimizer step: trees and turns are numbered on from theirs.
        version, max_lag, aggregation, normaliser, keep_idle: as of ``leaf_rows``; ``max_lag`` and ``normaliser`` are
            the rows' own.
    """
    found = leaf_rows(
        chains, version=version, max_lag=max_lag, aggregation=aggregation, normaliser=normaliser, keep_idle=keep_idle
    )
    num_turns = sum(len(each.tree) for each in after)
    return [
        replace(
            row,
            tree=row.tree + len(after),
            turn=row.turn + num_turns,
            parts=row.parts + np.array([num_turns, 0, 0], dtype=np.int64),
        )
        for row in found
    ]
