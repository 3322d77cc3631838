"""Rows to be imitated, for the learner's tests."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from atpo_async.core.tree import VersionSpan
from atpo_async.wire.messages import Batch, BatchRow
from tests.learner_support import make_tree


def make_rows(number: int, *, version: int, lag: int = 2, seed: int = 7) -> tuple[BatchRow, ...]:
    """Chains of two or three turns, all sampled ``lag`` versions before ``version``."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(number):
        tree = make_tree(f"earlier-{i}", rng, version=version)
        leaf = 3 + i % 2
        path = [1, leaf] if leaf == 3 else [1, 2, leaf]
        spans = [(turn, (VersionSpan(version - lag, 0, len(turn.action)),)) for turn in tree.turns]
        turns = tuple(msgspec.structs.replace(turn, spans=own) for turn, own in spans if turn.turn_id in path)
        rows.append(
            BatchRow(
                tree_id=tree.tree_id, leaf=leaf, task_index=i, prompt=tree.prompt, turns=turns,  # type: ignore[arg-type]
                advantage=0.25 + 0.5 * i, uses=1,
            )
        )  # fmt: skip
    return tuple(rows)


def with_rows(batch: Batch, share: Sequence[BatchRow], whole: Sequence[BatchRow]) -> Batch:
    """The same share of a batch with a share of its rows."""
    return msgspec.structs.replace(batch, rows=tuple(share), num_rows=len(whole), num_row_tokens=num_tokens(whole))


def num_tokens(rows: Sequence[BatchRow]) -> int:
    """Action tokens."""
    return sum(len(turn.action) for row in rows for turn in row.turns)
