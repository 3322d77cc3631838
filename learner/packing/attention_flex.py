"""FlexAttention over packed trees: its block mask, and how it is compiled.

Its kernel is compiled for the shape of a pass: one whose length is a multiple of a block needs no checks at the edges,
and the code for any length has them (``packing.lengths`` pads passes to few lengths for that reason).

Shapes: B rows, T tokens of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from learner.kernels.variants import raise_limit

BLOCK = 128
"""Places of a block: FlexAttention's own default."""
MOST_SHAPES = 24
"""Shapes of passes with a kernel of their own; what comes after them shares one kernel for any length."""
SMALL_MODEL = 512
"""Channels of all heads below which one kernel serves every length: making more takes longer than they would save."""
SMALLEST_HEAD = 16
"""Channels of a head, at the least: a tensor core takes no fewer."""


def fits(query: Tensor) -> bool:
    """Whether there is a kernel for such tensors."""
    return query.dtype != torch.float64 and query.shape[-1] >= SMALLEST_HEAD


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    """query [B, H, T, D], key and value [B, G, T, D] -> [B, H, T, D]."""
    known = _shapes()
    shape = (tuple(query.shape), tuple(key.shape), query.dtype)
    if len(known) < MOST_SHAPES and query.shape[1] * query.shape[-1] >= SMALL_MODEL:
        known.add(shape)
    raise_limit()
    return _compiled(shape not in known)(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)


@functools.cache
def _shapes() -> set[tuple[object, ...]]:
    return set()


@functools.cache
def _compiled(any_length: bool) -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=any_length)
    return compiled


def block_mask(exits: Tensor, *, size: int = BLOCK) -> BlockMask:
    """FlexAttention's mask for int64[B, T]: in which squares of ``size`` places something is seen, and in which all."""
    rows, length = exits.shape
    count = -(-length // size)
    # A place beyond the last is seen by none, so that no square with one in it is taken for full.
    padded = nn.functional.pad(exits, (0, count * size - length)).view(rows, count, size)
    first = torch.arange(count, device=exits.device) * size
    earlier = first[:, None] > first[None, :]
    same = first[:, None] == first[None, :]
    full = earlier & (padded.amin(-1)[:, None, :] >= first[:, None] + size)
    some = (earlier & (padded.amax(-1)[:, None, :] > first[:, None])) | same
    found: BlockMask = BlockMask.from_kv_blocks(
        *_listed(some & ~full), *_listed(full), BLOCK_SIZE=size, mask_mod=_sees(exits), seq_lengths=(length, length)
    )
    return found


def _sees(exits: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    # The compiler knows such a function by its code and what it holds by its shape: another layout of the same shape
    # compiles nothing.
    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < exits[row, key])

    return sees


def _listed(squares: Tensor) -> tuple[Tensor, Tensor]:
    """bool[B, n, n] -> how many of each line are set, int32[B, 1, n], and which, first, int32[B, 1, n, n]."""
    order = torch.argsort(squares.int(), dim=-1, descending=True, stable=True)
    return squares.sum(-1).int()[:, None], order.int()[:, None]
