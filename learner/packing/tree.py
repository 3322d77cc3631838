"""Whole turn trees in one forward pass: each token of a tree stands once in the layout.  Pure, numpy.

Source: ALGORITHM, section 5.  A tree is laid out depth first, siblings in the order of their turn numbers; siblings
with equal observations share them.  Place q sees place k exactly if ``k <= q < exit[k]``, and ``position_ids`` is the
depth in tokens, so every token sees what it sees in its own flat row.

How it is done: the rows of a tree are sorted into depth-first order, and each lays out what it does not share with the
row before it.  A row is a list of *segments* (prompt, then observation and action of each turn); a segment that
several rows share belongs to the first of them, its owner.  All trees of a batch go through the same array operations.

Shapes: R rows, S segments of all rows, B rows of a forward pass, T its longest, N tokens scored, M occurrences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from learner.packing.arrays import I64
from learner.packing.lengths import Width, exact
from learner.packing.rows import MicroBatch, Row, TreeLayout, of_rows
from learner.packing.tree_paths import Paths
from learner.packing.tree_segments import Scored, Segments, ranges


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Laid:
    """One tree, laid out whole."""

    tokens: I64
    """int64[T], as all that follow."""
    position_ids: I64
    exit: I64
    turn: I64
    """Number of the turn whose action the token belongs to; -1 for the prompt and observations."""
    predictor: I64
    """Place of the token before it on its path; -1 for the first."""


def lay_out(rows: Sequence[Row]) -> Laid:
    """Every token of one tree's rows, those too that are only predicted: the layout without what training leaves out.

    Raises:
        ValueError: the rows are of several trees.
    """
    if len({row.tree for row in rows}) != 1:
        raise ValueError(f"rows of {len({row.tree for row in rows})} trees, not of one")
    paths = Paths.of(rows, whole=True)
    laid = Segments.of(paths, np.zeros(len(paths.order), dtype=np.int64), paths.shared)
    size = laid.end - laid.begin
    predictor = ranges(laid.place[laid.owned] - 1, size[laid.owned])
    first = (np.cumsum(size[laid.owned]) - size[laid.owned])[size[laid.owned] > 0]
    predictor[first] = laid.before()[laid.owned][size[laid.owned] > 0]
    return Laid(
        tokens=paths.tokens[laid.source()].astype(np.int64),
        position_ids=laid.depth(),
        exit=laid.spread(laid.exit),
        turn=laid.spread(laid.number),
        predictor=predictor,
    )


def attention_pairs(position_ids: I64) -> int:
    """Pairs of a query and a key it sees: a token at depth d sees d + 1 of them."""
    return int(position_ids.sum() + position_ids.size)


def flops(tokens: float, pairs: float, *, parameters: float, layers: int, width: int) -> float:
    """Of a forward pass: 2 for each parameter and token, 4 for each layer, channel of all heads and pair."""
    return 2.0 * parameters * tokens + 4.0 * layers * width * pairs


def tree_micro_batches(
    rows: Sequence[Row], *, max_tokens: int, pack_tokens: int | None, version: int, width: Width = exact
) -> list[MicroBatch]:
    """Rows of whole trees into as few forward passes as ``max_tokens`` padded tokens allow.

    A tree over the budget is split by leaves, its prefix repeated; a single path over it goes alone.  Turns under which
    nothing is scored are left out, and so is the last token of a path, which only needs predicting.

    Args:
        rows: of any number of trees (``packing.leaf_rows``).
        max_tokens: padded tokens of one forward pass.
        pack_tokens: that trees may fill of one row; None: all of a forward pass, so that nothing is padded.
        version: being trained.
        width: what the rows of a pass are padded to.

    Raises:
        ValueError: a row's first token is to be scored: nothing stands before it.
    """
    budget = max_tokens if pack_tokens is None else min(max_tokens, pack_tokens)
    paths = Paths.of(rows, whole=False)
    if not len(paths.order):
        return []
    piece, shared = _split(paths, budget)
    size = np.bincount(piece, weights=paths.placed - shared).astype(np.int64)
    bins = _first_fit(size, budget)
    groups = _group([int(size[b].sum()) for b in bins], max_tokens, width)

    # Everything in the order of the forward passes, their rows, the trees in them.
    ordered = np.array([p for group in groups for b in group for p in bins[b]], dtype=np.int64)
    rank = np.empty_like(ordered)
    rank[ordered] = np.arange(len(ordered))
    by_rank = np.argsort(rank[piece], kind="stable")
    laid = Segments.of(paths.take(by_rank), rank[piece][by_rank], shared[by_rank])
    scored = Scored.of(paths, laid, rank[piece])

    values = (paths.tokens[laid.source()].astype(np.int64), laid.depth(), laid.spread(laid.exit))
    seen: set[int] = set()
    out: list[MicroBatch] = []
    place = done = 0
    for group in groups:
        fills = np.array([size[bins[b]].sum() for b in group], dtype=np.int64)
        pieces = slice(done, done + sum(len(bins[b]) for b in group))
        cut = slice(place, place + int(fills.sum()))
        grid = _Grid.of(fills, place, width)
        predictor, target, occurrence, row_numbers = scored.cut(pieces)
        out.append(
            MicroBatch(
                tokens=grid.filled(values[0][cut], 0),
                layout=TreeLayout(
                    position_ids=grid.filled(values[1][cut], 0),
                    exit=grid.filled(values[2][cut] - grid.row_begin(), grid.alone()),
                    filled=fills,
                ),
                predictor=grid.at(predictor),
                target=target,
                occurrence=occurrence,
                **of_rows([rows[i] for i in row_numbers], version, seen),
            )
        )
        place, done = cut.stop, pieces.stop
    return out


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Grid:
    """From places of all passes, one row after the other without padding, to the B * T of one pass."""

    fills: I64
    """int64[B]: tokens of each row."""
    begin: I64
    """int64[B]: place of the row's first."""
    width: int

    @classmethod
    def of(cls, fills: I64, place: int, width: Width) -> _Grid:
        return cls(fills=fills, begin=place + np.cumsum(fills) - fills, width=width(int(fills.max())))

    def at(self, places: I64) -> I64:
        """Where places of this pass stand in the flattened B * T."""
        row = np.searchsorted(self.begin, places, side="right") - 1
        return places - self.begin[row] + row * self.width

    def row_begin(self) -> I64:
        """For each place the first of its row."""
        return np.repeat(self.begin, self.fills)

    def alone(self) -> I64:
        """int64[B * T]: the exits of places that see only themselves."""
        return np.tile(np.arange(1, self.width + 1), len(self.fills))

    def filled(self, values: I64, padding: I64 | int) -> I64:
        """int64[B, T] of this pass's values."""
        out = np.empty(len(self.fills) * self.width, dtype=np.int64)
        out[:] = padding
        out[ranges(np.arange(len(self.fills)) * self.width, self.fills)] = values
        return out.reshape(len(self.fills), self.width)


def _split(paths: Paths, budget: int) -> tuple[I64, I64]:
    """Cut trees over the budget between leaves: piece of each laid-out row, and tokens shared with the row before."""
    shared = paths.shared.copy()
    starts = np.append(True, paths.tree[1:] != paths.tree[:-1])
    first = np.flatnonzero(starts)
    fresh = paths.placed - shared
    total = np.add.reduceat(fresh, first)
    for tree in np.flatnonzero(total > budget).tolist():
        begin = int(first[tree])
        stop = int(first[tree + 1]) if tree + 1 < len(first) else len(shared)
        size = 0
        for i in range(begin, stop):
            size += int(fresh[i])
            if size > budget and i > begin:
                starts[i] = True
                shared[i] = 0
                size = int(paths.placed[i])
    return np.cumsum(starts) - 1, shared


def _first_fit(size: I64, budget: int) -> list[list[int]]:
    """Pieces into rows of at most ``budget`` tokens, the largest first; a larger one goes alone."""
    bins: list[list[int]] = []
    free: list[int] = []
    for piece in np.argsort(-size, kind="stable").tolist():
        need = int(size[piece])
        for i, left in enumerate(free):
            if need <= left:
                bins[i].append(piece)
                free[i] -= need
                break
        else:
            bins.append([piece])
            free.append(budget - need)
    return [sorted(b) for b in bins]


def _group(fills: Sequence[int], max_tokens: int, width: Width) -> list[list[int]]:
    """Rows into forward passes of at most ``max_tokens`` padded tokens."""
    groups: list[list[int]] = []
    for i in sorted(range(len(fills)), key=lambda i: -fills[i]):
        # Longest first: the first row of a group decides its width.
        if not groups or (len(groups[-1]) + 1) * width(fills[groups[-1][0]]) > max_tokens:
            groups.append([])
        groups[-1].append(i)
    return groups
