"""Where each token of a packed tree stands, and where each row finds what is scored.  numpy.

A row is a list of *segments* (prompt, then observation and action of each turn); a segment that several rows share
belongs to the first of them, its owner.  Shapes: S segments of all rows, N tokens scored, M occurrences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from learner.packing.arrays import I64, Mask
from learner.packing.tree_paths import Paths


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Segments:
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
    """Where the row's tokens begin in ``Paths.tokens``."""

    @classmethod
    def of(cls, paths: Paths, piece: I64, shared: I64) -> Segments:
        """Args: ``piece``: int64, ascending, of each laid-out row."""
        kept = paths.kept[paths.order]
        parts = ranges(paths.row_parts[paths.order], kept)
        row_size = 1 + 2 * kept
        root = np.cumsum(row_size) - row_size
        total = int(row_size.sum())
        row = np.repeat(np.arange(len(kept)), row_size)
        observation = ranges(root + 1, kept, step=2)
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
        return ranges(self.begin[self.owned], (self.end - self.begin)[self.owned])

    def source(self) -> I64:
        """Index into ``Paths.tokens`` of each place."""
        return ranges((self.origin + self.begin)[self.owned], (self.end - self.begin)[self.owned])

    def before(self) -> I64:
        """Place of the token before the segment on its path; -1 where there is none."""
        size = self.end - self.begin
        index = np.where(size > 0, np.arange(len(size)), -1)
        before = np.append(-1, np.maximum.accumulate(index)[:-1])
        found = (before >= 0) & (self.row[before] == self.row)
        return np.where(found, self.place[before] + size[before] - 1, -1)


def action_key(number: I64) -> I64:
    return 2 + 2 * number


def key_stride(paths: Paths) -> int:
    return 3 + 2 * int(paths.part_number.max(initial=0))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
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
    def of(cls, paths: Paths, laid: Segments, rank: I64) -> Scored:
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
        predictor = ranges(laid.place[action] - 1, size)
        predictor[start] = before
        target = paths.tokens[ranges(laid.origin[action] + laid.begin[action], size)].astype(np.int64)
        start_of = np.zeros(len(laid.keys), dtype=np.int64)
        start_of[laid.inverse[action]] = start

        piece = rank[paths.host]
        order = np.argsort(piece, kind="stable")
        rows, piece = paths.sorted[order], piece[order]
        sizes = np.diff(paths.row_parts)[rows]
        parts = ranges(paths.row_parts[rows], sizes)
        part_piece = np.repeat(piece, sizes)
        part_piece, parts = part_piece[paths.part_scored[parts]], parts[paths.part_scored[parts]]
        key = part_piece * stride + action_key(paths.part_number[parts])
        lengths = paths.part_end[parts] - paths.part_action[parts]
        occurrence = ranges(start_of[np.searchsorted(laid.keys, key)], lengths)

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


def ranges(starts: I64, sizes: I64, *, step: int = 1) -> I64:
    """``starts[i] + step * (0, 1, … sizes[i] - 1)`` for every i, one after the other."""
    total = int(sizes.sum())
    within = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.repeat(starts, sizes) + step * within
