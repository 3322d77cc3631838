"""Trees to token batches: rows, one per finished leaf, and their flat layout.  Pure, numpy.

Source: ALGORITHM, section 5.  A row is a leaf's path: prompt, then each turn's observation and action.  A turn that
several leaves share appears in each of their rows; the weights below make the sum over rows the mean over leaves.

A ``MicroBatch`` is one forward pass.  Its loss is always taken over the rows' tokens, *occurrences*: M of them, a token
that k rows share occurs k times.  The model scores N tokens.  In the flat layout (here) those are the same; in the
tree layout (``packing.tree``) each token is scored once and ``occurrence`` says where its log-prob belongs, so the
loss of either is the same sum.

Shapes: B rows of a forward pass, T its longest row, N tokens scored, M occurrences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atpo_async.core.tree import Turn, is_fresh
from atpo_async.core.vocabulary import Aggregation
from learner.packing.arrays import F64, I64, Mask
from learner.packing.credited import CreditedTree, Normaliser
from learner.packing.lengths import Width, exact


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """One leaf's path.  K action tokens that count (those of fresh turns)."""

    tokens: NDArray[np.int32]
    """int32[L]: prompt, observations, actions."""
    parts: I64
    """int64[P, 3], a line for each turn of the path, stale ones too: its number in the batch, where its observation
    begins in ``tokens``, where its action begins.  The action ends where the next observation begins, or the row."""
    tree: int
    """Tree of the batch: rows of one tree share their prompt, and every turn that has the same number."""
    at: I64
    """int64[K]: where in ``tokens`` each action token stands; it is predicted from the place before."""
    mu: F64
    """float64[K]: behaviour log-probs."""
    advantage: F64
    version: I64
    """int64[K]: that sampled the token."""
    turn: I64
    """int64[K]: turn of the batch; the same number in every row that shares the turn."""
    weight: F64
    """float64[K]: in the loss, w_PER included."""

    @property
    def has_signal(self) -> bool:
        return bool(np.any(self.weight * self.advantage))


def leaf_rows(
    trees: Iterable[CreditedTree],
    *,
    version: int,
    max_lag: int,
    aggregation: Aggregation,
    normaliser: Normaliser,
    keep_idle: bool = False,
) -> list[Row]:
    """One row for each finished leaf that has something to learn from.

    Turns older than ``max_lag`` at ``version`` are context only.  Rows in which nothing counts (all stale, or every
    advantage zero) are left out: they add exactly zero to the loss and its gradient.

    Args:
        keep_idle: keep rows whose advantages are zero, for losses with other terms, or advantages still to come.
    """
    rows: list[Row] = []
    first_turn = 0
    for index, item in enumerate(trees):
        tree = item.tree
        number = {turn.turn_id: first_turn + i for i, turn in enumerate(tree)}
        advantage = {turn.turn_id: float(a) for turn, a in zip(tree, item.advantages, strict=True)}
        weights = normaliser.row_weights(tree, aggregation)
        for leaf in tree.leaves():
            path = tree.path(leaf.turn_id)
            row = _row(
                tree.prompt,
                path,
                index,
                number,
                advantage,
                {turn_id: item.weight * weight for turn_id, weight in weights[leaf.turn_id].items()},
                lambda t: is_fresh(t, current=version, max_lag=max_lag),
            )
            if row.has_signal or (keep_idle and len(row.at)):
                rows.append(row)
        first_turn += len(tree)
    return rows


def _row(
    prompt: NDArray[np.int32],
    path: Sequence[Turn],
    tree: int,
    number: dict[int, int],
    advantage: dict[int, float],
    weight: dict[int, float],
    counts: Callable[[Turn], bool],
) -> Row:
    tokens: list[NDArray[np.int32]] = [prompt]
    parts: list[tuple[int, int, int]] = []
    used: list[Turn] = []
    at: list[I64] = []
    length = len(prompt)
    for turn in path:
        tokens += [turn.observation, turn.action]
        parts.append((number[turn.turn_id], length, length + len(turn.observation)))
        length += len(turn.observation) + len(turn.action)
        if counts(turn):
            used.append(turn)
            at.append(np.arange(length - len(turn.action), length, dtype=np.int64))
    sizes = [len(turn.action) for turn in used]
    empty = np.zeros(0)
    return Row(
        tokens=np.concatenate(tokens).astype(np.int32, copy=False),
        parts=np.array(parts, dtype=np.int64),
        tree=tree,
        at=np.concatenate([np.zeros(0, dtype=np.int64), *at]),
        mu=np.concatenate([empty, *(turn.logprobs for turn in used)]).astype(np.float64),
        advantage=np.repeat(np.array([advantage[t.turn_id] for t in used], dtype=np.float64), sizes),
        version=np.concatenate([empty, *(turn.token_versions() for turn in used)]).astype(np.int64),
        turn=np.repeat(np.array([number[t.turn_id] for t in used], dtype=np.int64), sizes),
        weight=np.repeat(np.array([weight[t.turn_id] for t in used], dtype=np.float64), sizes),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TreeLayout:
    """Where the tokens of packed trees stand (ALGORITHM, section 5).  None in a flat micro-batch."""

    position_ids: I64
    """int64[B, T]: depth in tokens, from 0 in each tree."""
    exit: I64
    """int64[B, T]: place q of a row sees place k exactly if k <= q < exit[k].  Padding sees itself alone."""
    filled: I64 | None = None
    """int64[B]: tokens of each row, before its padding; None: it is not known where padding begins."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatch:
    """The inputs of one forward pass, and what the loss needs from it."""

    tokens: I64
    """int64[B, T], padded on the right with 0."""
    layout: TreeLayout | None
    """None for plain causal rows.  Padding stands on the right, where no token looks."""
    predictor: I64
    """int64[N]: place in the flattened ``B * T`` from whose output the token is predicted."""
    target: I64
    """int64[N]: the token."""
    occurrence: I64 | None
    """int64[M]: which of the N scored tokens each place of the loss has; None: all of them, in order (M = N)."""
    mu: F64
    """float64[M], as all that follow."""
    advantage: F64
    weight: F64
    turn: I64
    """int64[M]: turn occurrences, from 0 without gaps, ascending down each row; two rows that share a turn hold two."""
    row: I64
    """int64[M]: from 0, ascending."""
    number: I64
    """int64[M]: turn of this rank's batch (``Row.turn``)."""
    counted: Mask
    """bool[M]: false where another row has counted this turn already (diagnostics count a turn once)."""
    lag: I64
    """int64[M]: versions between the token's own and the one being trained; 0: what differs there is the engine."""

    @property
    def num_targets(self) -> int:
        return len(self.target)


def micro_batches(rows: Sequence[Row], *, max_tokens: int, version: int, width: Width = exact) -> list[MicroBatch]:
    """Rows by length into as few forward passes as ``max_tokens`` padded tokens allow; a longer row goes alone.

    The last token of a row only needs predicting, so it takes no place.  ``width``: what rows are padded to.
    """
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda r: -len(r.tokens)):
        # Longest first: the first row of a group decides its width.
        if not groups or (len(groups[-1]) + 1) * width(len(groups[-1][0].tokens) - 1) > max_tokens:
            groups.append([])
        groups[-1].append(row)
    seen: set[int] = set()
    return [_padded(group, version, seen, width) for group in groups]


def idle_micro_batch() -> MicroBatch:
    """A forward pass without targets: its loss is zero and its gradient too.  Keeps ranks in step."""
    none = np.zeros(0)
    index = np.zeros(0, dtype=np.int64)
    return MicroBatch(
        tokens=np.zeros((1, 2), dtype=np.int64), layout=None, predictor=index, target=index, occurrence=None,
        mu=none, advantage=none, weight=none, turn=index, row=index, number=index, counted=np.zeros(0, dtype=bool),
        lag=index,
    )  # fmt: skip


def _padded(rows: list[Row], version: int, seen: set[int], width: Width) -> MicroBatch:
    length = width(max(len(row.tokens) for row in rows) - 1)
    tokens = np.zeros((len(rows), length), dtype=np.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens) - 1] = row.tokens[:-1]
    return MicroBatch(
        tokens=tokens,
        layout=None,
        predictor=np.concatenate([row.at - 1 + i * length for i, row in enumerate(rows)]),
        target=np.concatenate([row.tokens[row.at] for row in rows]).astype(np.int64),
        occurrence=None,
        **of_rows(rows, version, seen),
    )


def of_rows(rows: Sequence[Row], version: int, seen: set[int]) -> dict[str, Any]:
    """The fields of a ``MicroBatch`` that belong to the loss, M long, whatever the layout.

    Args:
        rows: of one forward pass, in order.
        version: being trained.
        seen: turn numbers that an earlier pass has counted; those of ``rows`` are added.
    """
    occurrences: list[I64] = []
    counted: list[Mask] = []
    next_occurrence = 0
    for row in rows:
        present, local = np.unique(row.turn, return_inverse=True)
        occurrences.append(local.astype(np.int64) + next_occurrence)
        next_occurrence += len(present)
        counted.append(np.array([turn not in seen for turn in present.tolist()], dtype=bool)[local])
        seen.update(present.tolist())
    return {
        "mu": np.concatenate([row.mu for row in rows]),
        "advantage": np.concatenate([row.advantage for row in rows]),
        "weight": np.concatenate([row.weight for row in rows]),
        "turn": np.concatenate(occurrences),
        "row": np.repeat(np.arange(len(rows), dtype=np.int64), [len(row.at) for row in rows]),
        "number": np.concatenate([row.turn for row in rows]),
        "counted": np.concatenate(counted),
        "lag": version - np.concatenate([row.version for row in rows]),
    }
