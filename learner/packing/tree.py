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
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from learner.packing.arrays import I64, Mask
from learner.packing.rows import MicroBatch, Row, TreeLayout, of_rows


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
    paths = _Paths.of(rows, whole=True)
    laid = _Segments.of(paths, np.zeros(len(paths.order), dtype=np.int64), paths.shared)
    size = laid.end - laid.begin
    predictor = _ranges(laid.place[laid.owned] - 1, size[laid.owned])
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
    rows: Sequence[Row], *, max_tokens: int, pack_tokens: int | None, version: int
) -> list[MicroBatch]:
    """Rows of whole trees into as few forward passes as ``max_tokens`` padded tokens allow.

    A tree over the budget is split by leaves, its prefix repeated; a single path over it goes alone.  Turns under which
    nothing is scored are left out, and so is the last token of a path, which only needs predicting.

    Args:
        rows: of any number of trees (``packing.leaf_rows``).
        max_tokens: padded tokens of one forward pass.
        pack_tokens: that trees may fill of one row; None: all of a forward pass, so that nothing is padded.
        version: being trained.

    Raises:
        ValueError: a row's first token is to be scored: nothing stands before it.
    """
    budget = max_tokens if pack_tokens is None else min(max_tokens, pack_tokens)
    paths = _Paths.of(rows, whole=False)
    if not len(paths.order):
        return []
    piece, shared = _split(paths, budget)
    size = np.bincount(piece, weights=paths.placed - shared).astype(np.int64)
    bins = _first_fit(size, budget)
    groups = _group([int(size[b].sum()) for b in bins], max_tokens)

    # Everything in the order of the forward passes, their rows, the trees in them.
    ordered = np.array([p for group in groups for b in group for p in bins[b]], dtype=np.int64)
    rank = np.empty_like(ordered)
    rank[ordered] = np.arange(len(ordered))
    by_rank = np.argsort(rank[piece], kind="stable")
    laid = _Segments.of(paths.take(by_rank), rank[piece][by_rank], shared[by_rank])
    scored = _Scored.of(paths, laid, rank[piece])

    values = (paths.tokens[laid.source()].astype(np.int64), laid.depth(), laid.spread(laid.exit))
    seen: set[int] = set()
    out: list[MicroBatch] = []
    place = done = 0
    for group in groups:
        fills = np.array([size[bins[b]].sum() for b in group], dtype=np.int64)
        pieces = slice(done, done + sum(len(bins[b]) for b in group))
        cut = slice(place, place + int(fills.sum()))
        grid = _Grid.of(fills, place)
        predictor, target, occurrence, row_numbers = scored.cut(pieces)
        out.append(
            MicroBatch(
                tokens=grid.filled(values[0][cut], 0),
                layout=TreeLayout(
                    position_ids=grid.filled(values[1][cut], 0),
                    exit=grid.filled(values[2][cut] - grid.row_begin(), grid.alone()),
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
    def of(cls, fills: I64, place: int) -> _Grid:
        return cls(fills=fills, begin=place + np.cumsum(fills) - fills, width=int(fills.max()))

    def at(self, places: I64) -> I64:
        """Where places of this pass stand in the flattened B * T."""
        row = np.searchsorted(self.begin, places, side="right") - 1
        return places - self.begin[row] + row * self.width

    def row_begin(self) -> I64:
        """For each place the first of its row."""
        return np.repeat(self.begin, self.fills)

    def alone(self) -> I64:
        """int64[B * T]: the exits of places that see themselves and nobody else."""
        return np.tile(np.arange(1, self.width + 1), len(self.fills))

    def filled(self, values: I64, padding: I64 | int) -> I64:
        """int64[B, T] of this pass's values."""
        out = np.empty(len(self.fills) * self.width, dtype=np.int64)
        out[:] = padding
        out[_ranges(np.arange(len(self.fills)) * self.width, self.fills)] = values
        return out.reshape(len(self.fills), self.width)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Paths:
    """The rows of a batch as tables: a line for each turn of each row (``part_*``), and which rows are laid out.

    Rows whose kept path is the beginning of another's are laid out with that one: their *host*.
    """

    tokens: NDArray[np.int32]
    """Of all rows, one after the other."""
    part_row: I64
    part_number: I64
    part_group: I64
    """Smallest number among the siblings that have the same observation."""
    part_begin: I64
    """Depth where the observation begins."""
    part_action: I64
    """Depth where the action begins."""
    part_end: I64
    part_scored: Mask
    row_begin: I64
    """int64[R]: where the row's tokens begin in ``tokens``."""
    row_parts: I64
    """int64[R + 1]: where its parts begin."""
    kept: I64
    """int64[R]: parts of the row that are laid out."""
    sorted: I64
    """Rows that have anything to score, depth first."""
    host: I64
    """For each of ``sorted`` the index into ``order`` of the row that is laid out for it."""
    order: I64
    """Rows that are laid out, depth first; as long as all that follow."""
    tree: I64
    placed: I64
    """Tokens of the row's path that take a place."""
    shared: I64
    """Of these, shared with the row before."""

    @classmethod
    def of(cls, rows: Sequence[Row], *, whole: bool) -> _Paths:
        """Args: ``whole``: keep all turns, and the last token of every path."""
        sizes = np.array([len(row.parts) for row in rows], dtype=np.int64)
        lengths = np.array([len(row.tokens) for row in rows], dtype=np.int64)
        row_parts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
        row_begin = np.cumsum(lengths) - lengths
        tokens = np.concatenate([np.zeros(0, dtype=np.int32), *(row.tokens for row in rows)])
        number, begin, action = np.concatenate([np.zeros((0, 3), dtype=np.int64), *(row.parts for row in rows)]).T
        part_row = np.repeat(np.arange(len(rows)), sizes)
        index = np.arange(len(number)) - row_parts[part_row]
        end = np.append(begin[1:], 0)
        end[row_parts[1:] - 1] = lengths

        is_scored = np.zeros(int(number.max(initial=-1)) + 1, dtype=bool)
        is_scored[np.concatenate([np.zeros(0, dtype=np.int64), *(row.turn for row in rows)])] = True
        scored = is_scored[number]
        kept = sizes.copy()
        if not whole:
            kept = np.zeros(len(rows), dtype=np.int64)
            np.maximum.at(kept, part_row[scored], index[scored] + 1)

        tree = np.array([row.tree for row in rows], dtype=np.int64)
        # A first turn's parent is the root of its tree: a number of its own, below those of the turns.
        parent = np.where(index > 0, np.concatenate([number[:1], number[:-1]]), -1 - tree[part_row])
        group = _groups(number, parent, row_begin[part_row] + begin, row_begin[part_row] + action, tokens)

        deepest = int(kept.max(initial=0))
        turns = np.full((len(rows), deepest), -1, dtype=np.int64)
        groups = turns.copy()
        in_layout = index < kept[part_row]
        turns[part_row[in_layout], index[in_layout]] = number[in_layout]
        groups[part_row[in_layout], index[in_layout]] = group[in_layout]
        keys = [column for i in reversed(range(deepest)) for column in (turns[:, i], groups[:, i])]
        order = np.lexsort([*keys, tree])
        order = order[kept[order] > 0]

        same_tree = tree[order][1:] == tree[order][:-1]
        forks, _ = _fork(turns[order])
        laid = np.append(~(same_tree & ~forks), np.ones(min(1, len(order)), dtype=bool))
        host = np.cumsum(laid) - laid
        every, order = order, order[laid]

        shared = np.zeros(len(order), dtype=np.int64)
        _, at = _fork(turns[order])
        same_tree = tree[order][1:] == tree[order][:-1]
        part = row_parts[order[1:]] + at
        same_observation = groups[order[1:], at] == groups[order[:-1], at] if deepest else same_tree
        part = np.where(same_tree, part, 0)
        shared[1:] = np.where(same_tree, np.where(same_observation, action[part], begin[part]), 0)
        last_end = end[row_parts[order] + kept[order] - 1]
        return cls(
            tokens=tokens, part_row=part_row, part_number=number, part_group=group, part_begin=begin,
            part_action=action, part_end=end, part_scored=scored, row_begin=row_begin, row_parts=row_parts, kept=kept,
            sorted=every, host=host, order=order, tree=tree[order], placed=last_end if whole else last_end - 1,
            shared=shared,
        )  # fmt: skip

    def take(self, index: I64) -> _Paths:
        """The laid-out rows in another order; ``shared`` then no longer speaks of neighbours."""
        return replace(
            self, order=self.order[index], tree=self.tree[index], placed=self.placed[index], shared=self.shared[index]
        )


def _fork(turns: I64) -> tuple[Mask, I64]:
    """Of each two neighbours of int64[R, P]: whether both go on where they first differ, and at which place that is."""
    differ = turns[1:] != turns[:-1]
    if not differ.size:
        return np.zeros(len(differ), dtype=bool), np.zeros(len(differ), dtype=np.int64)
    at = differ.argmax(axis=1)
    i = np.arange(len(at))
    return differ[i, at] & (turns[1:][i, at] >= 0) & (turns[:-1][i, at] >= 0), at


def _groups(number: I64, parent: I64, begin: I64, action: I64, tokens: NDArray[np.int32]) -> I64:
    """For each part the smallest number among its turn's siblings whose observation is the same."""
    count = int(number.max(initial=-1)) + 1
    example = np.full(count, -1, dtype=np.int64)
    example[number] = np.arange(len(number))
    turns = np.flatnonzero(example >= 0)
    group = np.arange(count)
    part = example[turns]
    first: dict[tuple[int, bytes], int] = {}
    for turn, above, i, j in zip(
        turns.tolist(), parent[part].tolist(), begin[part].tolist(), action[part].tolist(), strict=True
    ):
        group[turn] = first.setdefault((above, tokens[i:j].tobytes()), turn)
    return group[number]


def _split(paths: _Paths, budget: int) -> tuple[I64, I64]:
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
    room: list[int] = []
    for piece in np.argsort(-size, kind="stable").tolist():
        need = int(size[piece])
        for i, left in enumerate(room):
            if need <= left:
                bins[i].append(piece)
                room[i] -= need
                break
        else:
            bins.append([piece])
            room.append(budget - need)
    return [sorted(b) for b in bins]


def _group(fills: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Rows into forward passes of at most ``max_tokens`` padded tokens."""
    groups: list[list[int]] = []
    for i in sorted(range(len(fills)), key=lambda i: -fills[i]):
        # Longest first: the first row of a group decides its width.
        if not groups or (len(groups[-1]) + 1) * fills[groups[-1][0]] > max_tokens:
            groups.append([])
        groups[-1].append(i)
    return groups


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Segments:
    """Prompt, observations and actions along each laid-out row.  Places count through all passes, without padding."""

    key: I64
    """int64[S], ascending where sorted: which piece and which prompt, observation or action; equal where shared."""
    keys: I64
    """The different ones, ascending."""
    inverse: I64
    """Index of ``key`` in ``keys``."""
    begin: I64
    end: I64
    """Depths.  The last token of a path is not counted, unless the layout is whole."""
    row: I64
    """Index of the laid-out row."""
    owned: Mask
    """Whether this is the first row that has the segment: only there its tokens take places."""
    place: I64
    """Of the first token, wherever its owner put it."""
    exit: I64
    number: I64
    """Turn of an action; -1 for others."""
    part: I64
    """Index of an action's part; -1 for others."""
    origin: I64
    """Where the row's tokens begin in ``_Paths.tokens``."""

    @classmethod
    def of(cls, paths: _Paths, piece: I64, shared: I64) -> _Segments:
        """Args: ``piece``: int64, ascending, of each laid-out row."""
        kept = paths.kept[paths.order]
        parts = _ranges(paths.row_parts[paths.order], kept)
        row_size = 1 + 2 * kept
        root = np.cumsum(row_size) - row_size
        total = int(row_size.sum())
        row = np.repeat(np.arange(len(kept)), row_size)
        observation = _ranges(root + 1, kept, step=2)
        action = observation + 1

        begin, end, key = (np.zeros(total, dtype=np.int64) for _ in range(3))
        number, part = (np.full(total, -1, dtype=np.int64) for _ in range(2))
        end[root] = paths.part_begin[paths.row_parts[paths.order]]
        begin[observation], end[observation] = paths.part_begin[parts], paths.part_action[parts]
        begin[action], end[action] = paths.part_action[parts], paths.part_end[parts]
        end[root + row_size - 1] = paths.placed
        number[action], part[action] = paths.part_number[parts], parts
        key[observation] = 1 + 2 * paths.part_group[parts]
        key[action] = action_key(paths.part_number[parts])
        key += piece[row] * key_stride(paths)

        keys, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        owned = np.zeros(total, dtype=bool)
        owned[first] = True
        size = np.where(owned, end - begin, 0)
        stop = np.cumsum(size)
        last = np.zeros(len(keys), dtype=np.int64)
        np.maximum.at(last, inverse, row)
        return cls(
            key=key, keys=keys, inverse=inverse, begin=begin, end=end, row=row, owned=owned,
            place=(stop - size)[first][inverse], exit=stop[root + row_size - 1][last[inverse]], number=number,
            part=part, origin=paths.row_begin[paths.order][row],
        )  # fmt: skip

    def spread(self, values: I64) -> I64:
        """A segment's value at each of its places."""
        return np.repeat(values[self.owned], (self.end - self.begin)[self.owned])

    def depth(self) -> I64:
        return _ranges(self.begin[self.owned], (self.end - self.begin)[self.owned])

    def source(self) -> I64:
        """Index into ``_Paths.tokens`` of each place."""
        return _ranges((self.origin + self.begin)[self.owned], (self.end - self.begin)[self.owned])

    def before(self) -> I64:
        """Place of the token before the segment on its path; -1 where there is none."""
        size = self.end - self.begin
        index = np.where(size > 0, np.arange(len(size)), -1)
        before = np.append(-1, np.maximum.accumulate(index)[:-1])
        found = (before >= 0) & (self.row[before] == self.row)
        return np.where(found, self.place[before] + size[before] - 1, -1)


def action_key(number: I64) -> I64:
    return 2 + 2 * number


def key_stride(paths: _Paths) -> int:
    return 3 + 2 * int(paths.part_number.max(initial=0))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Scored:
    """What is scored, and where each row finds it.  In the order of the pieces."""

    predictor: I64
    """int64[N of all passes]."""
    target: I64
    occurrence: I64
    """int64[M of all passes]: index into the two above."""
    rows: I64
    """Rows of each pass in the order of ``occurrence``."""
    tokens_upto: I64
    """int64[pieces + 1]: scored tokens before each piece; and the same of occurrences and of rows:"""
    occurrences_upto: I64
    rows_upto: I64

    @classmethod
    def of(cls, paths: _Paths, laid: _Segments, rank: I64) -> _Scored:
        """Args: ``rank``: of the piece of each of ``paths.order``.

        Raises ValueError for a first token that nothing predicts.
        """
        num_pieces = int(rank.max()) + 1
        stride = key_stride(paths)
        action = np.flatnonzero(laid.owned & (laid.part >= 0))
        action = action[paths.part_scored[laid.part[action]]]
        part = laid.part[action]
        size = paths.part_end[part] - paths.part_action[part]
        start = np.cumsum(size) - size
        before = laid.before()[action]
        if (before < 0).any():
            number = int(paths.part_number[part[before < 0][0]])
            raise ValueError(f"turn {number} of the batch has no token before its first: its prompt is empty")
        predictor = _ranges(laid.place[action] - 1, size)
        predictor[start] = before
        target = paths.tokens[_ranges(laid.origin[action] + laid.begin[action], size)].astype(np.int64)
        start_of = np.zeros(len(laid.keys), dtype=np.int64)
        start_of[laid.inverse[action]] = start

        piece = rank[paths.host]
        order = np.argsort(piece, kind="stable")
        rows, piece = paths.sorted[order], piece[order]
        sizes = np.diff(paths.row_parts)[rows]
        parts = _ranges(paths.row_parts[rows], sizes)
        part_piece = np.repeat(piece, sizes)
        part_piece, parts = part_piece[paths.part_scored[parts]], parts[paths.part_scored[parts]]
        key = part_piece * stride + action_key(paths.part_number[parts])
        lengths = paths.part_end[parts] - paths.part_action[parts]
        occurrence = _ranges(start_of[np.searchsorted(laid.keys, key)], lengths)

        def upto(of_piece: I64, amount: I64 | None = None) -> I64:
            counts = np.bincount(of_piece, weights=amount, minlength=num_pieces).astype(np.int64)
            return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])

        return cls(
            predictor=predictor, target=target, occurrence=occurrence, rows=rows,
            tokens_upto=upto(laid.key[action] // stride, size), occurrences_upto=upto(part_piece, lengths),
            rows_upto=upto(piece),
        )  # fmt: skip

    def cut(self, pieces: slice) -> tuple[I64, I64, I64, list[int]]:
        """Predictors (places of all passes), targets, occurrences (from 0) and rows of some pieces."""
        tokens = slice(int(self.tokens_upto[pieces.start]), int(self.tokens_upto[pieces.stop]))
        found = slice(int(self.occurrences_upto[pieces.start]), int(self.occurrences_upto[pieces.stop]))
        rows = slice(int(self.rows_upto[pieces.start]), int(self.rows_upto[pieces.stop]))
        return (
            self.predictor[tokens],
            self.target[tokens],
            self.occurrence[found] - tokens.start,
            self.rows[rows].tolist(),
        )


def _ranges(starts: I64, sizes: I64, *, step: int = 1) -> I64:
    """``starts[i] + step * (0, 1, … sizes[i] - 1)`` for every i, one after the other."""
    total = int(sizes.sum())
    within = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.repeat(starts, sizes) + step * within
