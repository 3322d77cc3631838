"""Cuts the attention of a packed row into blocks along the diagonal and rectangles below, at the least cost.

A layout is cut where its exits change: such a run of places is a *chain*.  What follows a chain in its subtree sees all
of it, so attention is a sum of rectangles (queries of a subtree, keys of a chain) and of blocks with a mask along the
diagonal.  Shapes: B rows, T tokens of a row, P = B * T places.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.packing.arrays import I64


@dataclass(frozen=True, slots=True)
class Bucket:
    """n blocks along the diagonal, computed as one batch of t places each."""

    take: Tensor
    """int64[n * t]: place of each; any place for padding."""
    put: Tensor
    """The same, but P for padding."""
    size: tuple[int, int]
    """(n, t)."""
    hidden: Tensor
    """bool[n, 1, t, t]: where the query (third) does not see the key (fourth)."""


class Parts:
    """The parts that the attention of a layout is computed from.

    ``buckets`` have every place that is not alone once, as query and as key.  Each of ``rectangles`` is (first query,
    after the last, first key, after the last): all of the one see all of the other.
    """

    def __init__(
        self, buckets: Sequence[Bucket], rectangles: Sequence[tuple[int, int, int, int]], alone: Tensor
    ) -> None:
        self.buckets = buckets
        self.rectangles = rectangles
        self.alone = alone
        """int64[…]: places that only see themselves and that no other place sees: padding."""
        self._additive: dict[torch.dtype, list[Tensor]] = {}

    @classmethod
    def of(cls, exits: I64, device: torch.device) -> Parts:
        """Args: ``exits``: int64[B, T]."""
        length = exits.shape[1]
        flat = (exits + np.arange(len(exits))[:, None] * length).reshape(-1)
        edges = np.flatnonzero(np.append(True, flat[1:] != flat[:-1]))
        begin, end, leave = edges.tolist(), np.append(edges[1:], len(flat)).tolist(), flat[edges].tolist()
        blocks, rectangles = _plan(begin, end, leave)
        where = np.array(blocks, dtype=np.int64).reshape(-1, 2)
        root = np.append(True, np.maximum.accumulate(flat)[:-1] <= np.arange(1, len(flat)))
        alone = root[where[:, 0]] & (flat[where[:, 0]] == where[:, 0] + 1)
        shared = where[~alone]
        buckets = [_bucket(shared[group], flat, device) for group in _by_size(shared[:, 1] - shared[:, 0])]
        return cls(buckets, rectangles, torch.from_numpy(where[alone, 0]).to(device))

    def additive(self, dtype: torch.dtype) -> list[Tensor]:
        """float[n, 1, t, t] for each bucket: 0 where seen, minus infinity where not."""
        if dtype not in self._additive:
            self._additive[dtype] = [
                torch.zeros(b.hidden.shape, dtype=dtype, device=b.hidden.device).masked_fill_(b.hidden, float("-inf"))
                for b in self.buckets
            ]
        return self._additive[dtype]


# The cost of a part, forward and backward, in pairs of a query and a key.  Measured on one core of an AMD EPYC
# (AVX-512) in float32 with 4 heads of 64, as processor time: the kernel does 70 to 78 GFLOP/s on masked blocks and on
# rectangles of 64 keys and more (65 with 16), 48 ns a pair; a call and what is around it costs 100 to 200 us; joining a
# rectangle passes over its queries and keys a few times, 0.5 ns a channel.  A chain of 1,024 then takes 34 ms in blocks
# of 128, 35 in blocks of 256, 43 of 512, and 37 in the kernel's own causal mode; the optimum is flat.  One core hardly
# tells a call cost of 4,000 from 16,000; where several threads share busy cores each call waits for all of them.
CALL_COST = 8000
JOIN_COST = 4
LONGEST_BLOCK = 512
"""Bounds the masks: a place holds at most this many entries."""


def _plan(
    begin: list[int], end: list[int], leave: list[int]
) -> tuple[list[tuple[int, int]], list[tuple[int, int, int, int]]]:
    """Blocks (first place, after the last) and rectangles for chains in depth-first order, at the least cost.

    A subtree is one block, or its chain, a rectangle below that, and the subtrees below.
    """
    count = len(begin)
    cost = [0.0] * count
    whole = [False] * count
    following: list[int] = []  # subtrees after this chain, the next one last, that are no part of another there
    for i in range(count - 1, -1, -1):
        children = 0.0
        while following and begin[following[-1]] < leave[i]:
            children += cost[following.pop()]
        size, rest = leave[i] - begin[i], leave[i] - end[i]
        split = _chain_cost(end[i] - begin[i]) + children
        if rest:
            split += _rectangle_cost(rest, end[i] - begin[i])
        cost[i], whole[i] = min((_block_cost(size), True), (split, False))
        following.append(i)
    blocks: list[tuple[int, int]] = []
    rectangles: list[tuple[int, int, int, int]] = []
    done = 0
    for i in range(count):
        if begin[i] < done:
            continue
        if whole[i]:
            blocks.append((begin[i], leave[i]))
            done = leave[i]
            continue
        _cut_chain(begin[i], end[i], blocks, rectangles)
        if leave[i] > end[i]:
            rectangles.append((end[i], leave[i], begin[i], end[i]))
    return blocks, rectangles


def _rectangle_cost(queries: int, keys: int) -> float:
    return queries * keys + JOIN_COST * (queries + keys) + CALL_COST


@functools.lru_cache(maxsize=1 << 14)
def _chain_cost(size: int) -> float:
    return min(_block_cost(size), _halves_cost(size))


def _block_cost(size: int) -> float:
    return float(size * size) if size <= LONGEST_BLOCK else float("inf")


def _halves_cost(size: int) -> float:
    half = _half(size)
    if half == size:
        return float("inf")
    return _chain_cost(half) + _chain_cost(size - half) + _rectangle_cost(size - half, half)


def _half(size: int) -> int:
    """The kernel works in steps of 32 places and more; what is shorter is not cut."""
    return min(size, -(-size // 64) * 32)


def _cut_chain(
    begin: int, end: int, blocks: list[tuple[int, int]], rectangles: list[tuple[int, int, int, int]]
) -> None:
    """One block of a chain, or halves and the rectangle of the later one looking at the earlier."""
    if _block_cost(end - begin) <= _halves_cost(end - begin):
        blocks.append((begin, end))
        return
    middle = begin + _half(end - begin)
    _cut_chain(begin, middle, blocks, rectangles)
    _cut_chain(middle, end, blocks, rectangles)
    rectangles.append((middle, end, begin, middle))


def _by_size(sizes: I64) -> list[I64]:
    """Blocks into batches: a batch pads all to its longest, until the padding costs more than another call."""
    groups: list[list[int]] = []
    longest = waste = 0
    for i in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[i])
        padding = longest * longest - size * size
        if not groups or waste + padding > CALL_COST:
            groups.append([])
            longest, waste, padding = size, 0, 0
        groups[-1].append(i)
        waste += padding
    return [np.array(group, dtype=np.int64) for group in groups]


def _bucket(blocks: I64, exits: NDArray[np.int64], device: torch.device) -> Bucket:
    size = blocks[:, 1] - blocks[:, 0]
    longest = int(size.max())
    local = np.arange(longest)
    real = local < size[:, None]
    take = np.where(real, blocks[:, :1] + local, 0)
    put = np.where(real, take, len(exits))
    leave = np.where(real, np.minimum(exits[take] - blocks[:, :1], size[:, None]), local + 1)
    leave_nt = torch.from_numpy(leave).to(device)
    place = torch.arange(longest, device=device)
    seen = (place[None, :] <= place[:, None]) & (place[None, :, None] < leave_nt[:, None, :])
    return Bucket(
        torch.from_numpy(take.reshape(-1)).to(device), torch.from_numpy(put.reshape(-1)).to(device),
        (len(blocks), longest), ~seen[:, None],
    )  # fmt: skip
