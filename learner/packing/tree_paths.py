"""The rows of a batch as tables, sorted depth first: which turns they share, and which of them are laid out.  numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from learner.packing.arrays import I64, Mask
from learner.packing.rows import Row


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Paths:
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
    def of(cls, rows: Sequence[Row], *, whole: bool) -> Paths:
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

    def take(self, index: I64) -> Paths:
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
