"""Decides which of a batch's rows for imitation can be trained on; the others are left out, each with its reason.

A row is held to all that a tree is (``batches.intake``), with a limit of age of its own; and it is one chain, from the
prompt down to its leaf.  As with trees, the numbers by which the mean is taken stay as the buffer counted them: a row
that is left out counts as one whose every turn is masked.  Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from atpo_async.core.bounds import MAX_ID
from atpo_async.core.tree import ROOT, Turn
from atpo_async.wire.messages import Batch, BatchRow, BatchTree
from learner.batches.intake import Fault, examined


@dataclass(frozen=True, slots=True)
class SiftedRows:
    """The rows of a batch that are fit, and how many are left out."""

    rows: tuple[BatchRow, ...]
    """Their turns decoded."""
    num_dropped: int
    messages: tuple[str, ...]
    """A line for each row left out."""


def sift_rows(batch: Batch, *, version: int, vocab_size: int, max_lag: int) -> SiftedRows:
    """Leave out the rows that must not, or cannot, be trained on.

    Args:
        batch: this rank's share.
        version: being trained; nothing may be newer.
        vocab_size: rows of the model's embeddings.
        max_lag: ``imitation.max_lag``; a row with an older turn is left out.
    """
    rows: list[BatchRow] = []
    messages: list[str] = []
    for row in batch.rows:
        # Its age is looked at below: it has a limit of its own, for its oldest turn.
        decoded, fault = examined(_tree(row), version=version, vocab_size=vocab_size, max_lag=MAX_ID)
        fault = fault or _own_fault(row, tuple(decoded.turns), version=version, max_lag=max_lag) or _counts(batch)
        if fault is None:
            rows.append(msgspec.structs.replace(row, turns=decoded.turns))
        else:
            messages.append(
                f"turn {row.leaf} of tree {row.tree_id}, to be imitated, is left out ({fault.reason}): {fault.fact}; "
                f"{fault.hint}"
            )
    return SiftedRows(tuple(rows), len(messages), tuple(messages))


def _tree(row: BatchRow) -> BatchTree:
    return BatchTree(
        tree_id=row.tree_id, task_index=row.task_index, prompt=row.prompt, turns=row.turns, failed_branches=0,
        probability=1.0, weight=1.0, uses=row.uses,
    )  # fmt: skip


def _own_fault(row: BatchRow, turns: Sequence[Turn], *, version: int, max_lag: int) -> Fault | None:
    made = "it was put together wrongly: look at whatever made this batch"
    if not (math.isfinite(row.advantage) and row.advantage >= 0):
        return Fault("bad_weight", f"its advantage is {row.advantage}, expected finite and at least 0", made)
    above = [ROOT, *(turn.turn_id for turn in turns)]
    broken = next((turn for turn, parent in zip(turns, above, strict=False) if turn.parent_id != parent), None)
    if broken is not None or turns[-1].turn_id != row.leaf:
        fact = f"its turns {above[1:]} are no chain from the prompt to turn {row.leaf}"
        return Fault("bad_structure", fact, made)
    lag = version - min(turn.oldest_version for turn in turns)
    if lag > max_lag:
        fact = f"its oldest turn is {lag} versions old, over imitation.max_lag = {max_lag}"
        return Fault("all_stale", fact, "it waited too long for its turn")
    return None


def _counts(batch: Batch) -> Fault | None:
    least = len(batch.rows)
    if batch.num_rows >= least and batch.num_row_tokens >= least:
        return None
    fact = f"its batch has num_rows = {batch.num_rows}, num_row_tokens = {batch.num_row_tokens}; this share has {least}"
    return Fault("bad_counts", fact, "the loss is divided by them: look at whatever made this batch")
