"""Attention over packed trees by the FlashAttention kernel for rows of many lengths, which PyTorch has for CUDA.

Places stand depth first, so a tree falls into *runs*: a run goes on as long as each place follows the one before it on
its path, down to a leaf.  There are as many runs as leaves.  A run's keys are the places of its path, down from the
root; its queries are the path's last.  That is one call: each run a row whose causal mask is aligned at its end.  Every
query is computed once, and keys and values are gathered to as many places as flat rows would have.

Shapes: P places of all rows, S runs, K keys of all runs, H heads of queries, G of keys and values, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.packing.arrays import I64
from learner.packing.tree_segments import ranges

LARGEST_HEAD = 256
"""Channels that the kernel takes; they must be a multiple of 8."""
LENGTH_STEP = 256
"""The longest run and the longest path are rounded up to it: the kernel only sizes its grid by them."""


@dataclass(frozen=True, slots=True)
class Runs:
    """The runs of all rows of a layout."""

    first_query: Tensor
    """int32[S + 1]: where each begins among the places, and where the last ends."""
    first_key: Tensor
    """int32[S + 1]: the same in ``keys``."""
    keys: Tensor
    """int64[K]: places along each run's path."""
    longest_run: int
    """At least the tokens of the longest."""
    longest_path: int

    @classmethod
    def of(cls, exits: I64, device: torch.device, filled: I64 | None = None) -> Runs:
        """Args: ``exits``: int64[B, T]; ``filled``: int64[B], tokens of each row before its padding, if it is known."""
        begin, pieces_of, first, size = _paths(exits, filled)
        tokens = np.bincount(pieces_of, weights=size, minlength=len(begin)).astype(np.int64)
        longest = int(np.diff(begin, append=exits.size).max(initial=1))
        return cls(
            _ends(begin, exits.size, device),
            _ends(np.cumsum(tokens) - tokens, int(tokens.sum()), device),
            torch.from_numpy(ranges(first, size)).to(device),
            _rounded(longest),
            _rounded(int(tokens.max(initial=1))),
        )


def _rounded(length: int) -> int:
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def _ends(begin: I64, end: int, device: torch.device) -> Tensor:
    return torch.from_numpy(np.append(begin, end).astype(np.int32)).to(device)


def _paths(exits: I64, filled: I64 | None) -> tuple[I64, I64, I64, I64]:
    """Where runs begin, int64[S]; and of each piece of their paths: run, first place, number of places."""
    rows, length = exits.shape
    flat = (exits + np.arange(rows)[:, None] * length).reshape(-1)
    starts = np.append(True, flat[:-1] <= np.arange(1, flat.size))
    # Padding, whose output nothing reads, is one run of each row and not one of each place.
    padding: dict[int, int] = {}
    for row, used in enumerate([] if filled is None else filled.tolist()):
        if used < length:
            starts[row * length + used + 1 : (row + 1) * length] = False
            padding[row * length + used] = (row + 1) * length
    begin = np.flatnonzero(starts)
    above: list[tuple[int, int]] = []
    runs: list[int] = []
    pieces: list[tuple[int, int]] = []
    for run, (first, stop) in enumerate(zip(begin.tolist(), np.append(begin[1:], flat.size).tolist(), strict=True)):
        above = _seen_from(first, above, flat)
        above.append((first, stop))
        runs += [run] * len(above)
        pieces += above
        if first in padding:
            above = []
    where = np.array(pieces, dtype=np.int64).reshape(-1, 2)
    return begin, np.array(runs, dtype=np.int64), where[:, 0], where[:, 1] - where[:, 0]


def _seen_from(place: int, path: list[tuple[int, int]], exits: NDArray[np.int64]) -> list[tuple[int, int]]:
    """As much of a path, in pieces, as a place that comes later sees: exits never grow down a path."""
    kept = list(path)
    while kept:
        begin, end = kept.pop()
        seen = int(np.searchsorted(-exits[begin:end], -place, side="left"))
        if seen:
            return [*kept, (begin, begin + seen)]
    return kept


def fits(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes such tensors."""
    channels = query.shape[-1]
    half = query.dtype in (torch.bfloat16, torch.float16)
    return half and value.shape[-1] == channels and channels % 8 == 0 and channels <= LARGEST_HEAD


def attend(query: Tensor, key: Tensor, value: Tensor, runs: Runs, scale: float | None) -> Tensor:
    """query [P, H, D], key and value [P, G, D] -> [P, H, D]."""
    out: Tensor = tree_attention(
        query, key, value, runs.first_query, runs.first_key, runs.keys, runs.longest_run, runs.longest_path, scale
    )[0]
    return out


def kernel(
    query: Tensor, key: Tensor, value: Tensor, first_query: Tensor, first_key: Tensor, longest_query: int,
    longest_key: int, scale: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Causal attention of [P, H, D] to [K, G, D], row by row, with its log-sum-exp float32[H, P].

    A row with fewer queries than keys has them at its end.
    """
    found = torch.ops.aten._flash_attention_forward(
        query, key, value, first_query, first_key, longest_query, longest_key, 0.0, True, False, scale=scale
    )
    return found[0], found[1]


def kernel_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsum: Tensor, first_query: Tensor,
    first_key: Tensor, longest_query: int, longest_key: int, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``kernel``'s first three arguments."""
    # A generator's state and what is no longer used: without dropout neither is read.
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    unused = torch.empty(0, device=query.device)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        grad, query, key, value, out, logsum, first_query, first_key, longest_query, longest_key, 0.0, True, state,
        unused, scale=scale,
    )  # fmt: skip
    return found


# Operators of their own, so that a compiler takes them as they are and lays its own code around them.


@torch.library.custom_op("atpo::tree_attention", mutates_args=())
def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, first_query: Tensor, first_key: Tensor, keys: Tensor, longest_run: int,
    longest_path: int, scale: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention [P, H, D] and its log-sum-exp [H, P]; arguments as ``attend`` and ``Runs`` have them."""
    out, logsum = kernel(query, key[keys], value[keys], first_query, first_key, longest_run, longest_path, scale)
    return out.contiguous(), logsum  # as it is announced below, whatever the strides of the queries are


@torch.library.custom_op("atpo::tree_attention_backward", mutates_args=())
def tree_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsum: Tensor, first_query: Tensor,
    first_key: Tensor, keys: Tensor, longest_run: int, longest_path: int, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the first three arguments of ``tree_attention``."""
    grad_query, *others = kernel_backward(
        grad.contiguous(), query, key[keys], value[keys], out, logsum, first_query, first_key, longest_run,
        longest_path, scale,
    )  # fmt: skip
    # A key that many runs see gets a term from each: they are added up in full precision.
    wide = torch.float32 if query.dtype in (torch.bfloat16, torch.float16) else query.dtype
    grad_key, grad_value = (
        torch.zeros(whole.shape, dtype=wide, device=whole.device).index_add_(0, keys, part.to(wide)).to(whole.dtype)
        for whole, part in zip((key, value), others, strict=True)
    )
    return grad_query.contiguous(), grad_key, grad_value


@tree_attention.register_fake
def _like_attention(
    query: Tensor, key: Tensor, value: Tensor, first_query: Tensor, first_key: Tensor, keys: Tensor, longest_run: int,
    longest_path: int, scale: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    logsum = torch.empty((query.shape[1], query.shape[0]), dtype=torch.float32, device=query.device)
    return torch.empty(query.shape, dtype=query.dtype, device=query.device), logsum


@tree_attention_backward.register_fake
def _like_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsum: Tensor, first_query: Tensor,
    first_key: Tensor, keys: Tensor, longest_run: int, longest_path: int, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    whole = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (query, key, value)]
    return whole[0], whole[1], whole[2]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, first_query, first_key, keys, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, *output, first_query, first_key, keys)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = tree_attention_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return (*grads, None, None, None, None, None, None)


tree_attention.register_autograd(_backward, setup_context=_remember)
