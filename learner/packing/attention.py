"""Attention over packed trees (``packing.tree``): what a row's place sees, on each device.

Source: ALGORITHM, section 5.  Registered with transformers under ``NAME``; the layout comes down to it through the
model's keyword arguments as ``tree_layout``.  Without one it is transformers' SDPA, so flat rows lose nothing.

Three ways to the same numbers:

- *parts*, on a CPU.  A layout is cut where its exits change: such a run of places is a *chain*.  What follows a chain
  in its subtree sees all of it, so attention is a sum of rectangles (queries of a subtree, keys of a chain) and of
  blocks with a mask along the diagonal, joined by their log-sum-exp.  Nothing outside the mask is computed, and nothing
  of size T * T is held.
- *flex*, on CUDA: FlexAttention, its block mask computed from the exits, again without T * T.
- *dense*, where neither can be had: SDPA with a mask of T * T.

Shapes: B rows, T tokens of a row, H heads, D channels of a head, P = B * T places.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._triton import has_triton
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from learner.packing.arrays import I64
from learner.packing.rows import TreeLayout

NAME = "atpo_tree"
"""Of this attention in transformers' registries."""

Way = Literal["parts", "flex", "dense"]

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


class DeviceLayout:
    """A ``TreeLayout`` on its device.  A plain object, so that no wrapper looks into it for tensors to move."""

    def __init__(self, layout: TreeLayout, device: torch.device, way: Way) -> None:
        self.way = way
        self.position_ids = torch.from_numpy(layout.position_ids).to(device)
        """int64[B, T]."""
        self.exit = torch.from_numpy(layout.exit).to(device)
        """int64[B, T]."""
        self.depth = int(layout.position_ids.max(initial=-1)) + 1
        """Tokens of the longest path."""
        self.stub = torch.zeros((1, 1, 0, 0), dtype=torch.bool, device=device)
        """Stands where transformers would build a mask.  Whoever uses it as one fails."""
        self.parts = Parts.of(layout.exit, device) if way == "parts" else None
        self._mask: Tensor | None = None
        self._block_mask: BlockMask | None = None

    def model_arguments(self) -> dict[str, Any]:
        """What the model is called with besides its tokens."""
        return {"position_ids": self.position_ids, "attention_mask": self.stub, "tree_layout": self}

    def mask(self) -> Tensor:
        """bool[B, 1, T, T]: whether place q (third) sees place k (fourth)."""
        if self._mask is None:
            place = torch.arange(self.exit.shape[1], device=self.exit.device)
            before = place[None, :] <= place[:, None]
            self._mask = (before[None] & (place[None, :, None] < self.exit[:, None, :]))[:, None]
        return self._mask

    def block_mask(self) -> BlockMask:
        """The same for FlexAttention."""
        if self._block_mask is None:
            self._block_mask = block_mask(self.exit)
        return self._block_mask


def to_device(layout: TreeLayout, device: torch.device | str, *, way: Way | None = None) -> DeviceLayout:
    """What ``Policy.forward`` takes.  ``way``: None for the device's own."""
    device = torch.device(device)
    return DeviceLayout(layout, device, way or ways(device)[0])


def ways(device: torch.device) -> list[Way]:
    """How attention can be computed on ``device``, the best first."""
    if device.type == "cpu" and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return ["parts", "dense"]
    if device.type == "cuda" and has_triton():
        return ["flex"]
    return ["dense"]


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
    """How the attention of a layout is put together.

    ``buckets`` have every place that is not alone once, as query and as key.  Each of ``rectangles`` is (first query,
    after the last, first key, after the last): all of the one see all of the other.
    """

    def __init__(
        self, buckets: Sequence[Bucket], rectangles: Sequence[tuple[int, int, int, int]], alone: Tensor
    ) -> None:
        self.buckets = buckets
        self.rectangles = rectangles
        self.alone = alone
        """int64[…]: places that see themselves and are seen by nobody else: padding."""
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


def block_mask(exits: Tensor, *, size: int = 128) -> BlockMask:
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
    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < exits[row, key])

    return sees


def _listed(squares: Tensor) -> tuple[Tensor, Tensor]:
    """bool[B, n, n] -> how many of each line are set, int32[B, 1, n], and which, first, int32[B, 1, n, n]."""
    order = torch.argsort(squares.int(), dim=-1, descending=True, stable=True)
    return squares.sum(-1).int()[:, None], order.int()[:, None]


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(flex_attention)
    return compiled


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of [n, H, q, D] to [n, H, k, D] with its log-sum-exp [n, H, q]."""
    found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=mask, scale=scale
    )
    return found


def _kernel_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsum: Tensor, mask: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # Given output and log-sum-exp of the whole attention, not of this part, it gives this part of its gradients.
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, logsum, 0.0, False, attn_mask=mask, scale=scale
    )
    return found


class _TreeAttention(torch.autograd.Function):
    """query, key, value [P, H, D] -> [P, H, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: Parts, scale: float | None) -> Tensor:
        count, heads, _ = query.shape
        # In half precision what is joined again and again is kept in full.
        wide = torch.float32 if query.dtype in (torch.bfloat16, torch.float16) else query.dtype
        out = query.new_zeros((count + 1, heads, value.shape[-1]), dtype=wide)
        logsum = query.new_zeros((count + 1, heads), dtype=wide)
        for bucket, mask in zip(parts.buckets, parts.additive(query.dtype), strict=True):
            o, s = _kernel(_batched(query, bucket), _batched(key, bucket), _batched(value, bucket), mask, scale)
            out.index_copy_(0, bucket.put, o.transpose(1, 2).flatten(0, 1).to(wide))
            logsum.index_copy_(0, bucket.put, s.transpose(1, 2).flatten(0, 1).to(wide))
        if len(parts.alone):
            out.index_copy_(0, parts.alone, value.index_select(0, parts.alone).to(wide))
        for first, stop, key_first, key_stop in parts.rectangles:
            o, s = _kernel(
                _single(query[first:stop]),
                _single(key[key_first:key_stop]),
                _single(value[key_first:key_stop]),
                None,
                scale,
            )
            before, now = logsum[first:stop], s[0].transpose(0, 1).to(wide)
            out[first:stop].lerp_(o[0].transpose(0, 1).to(wide), torch.sigmoid(now - before)[:, :, None])
            logsum[first:stop] = torch.logaddexp(before, now)
        result = out[:count].to(query.dtype)
        ctx.save_for_backward(query, key, value, result, logsum[:count])
        ctx.parts, ctx.scale = parts, scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, logsum = ctx.saved_tensors
        parts, scale = ctx.parts, ctx.scale
        count = len(query)
        grads = [x.new_zeros((count + 1, *x.shape[1:]), dtype=logsum.dtype) for x in (query, key, value)]
        for bucket, mask in zip(parts.buckets, parts.additive(query.dtype), strict=True):
            found = _kernel_backward(
                _batched(grad, bucket), _batched(query, bucket), _batched(key, bucket), _batched(value, bucket),
                _batched(out, bucket), _batched(logsum[:, :, None], bucket)[..., 0], mask, scale,
            )  # fmt: skip
            for total, part in zip(grads, found, strict=True):
                total.index_copy_(0, bucket.put, part.transpose(1, 2).flatten(0, 1).to(total.dtype))
        if len(parts.alone):
            grads[2].index_copy_(0, parts.alone, grad.index_select(0, parts.alone).to(logsum.dtype))
        for first, stop, key_first, key_stop in parts.rectangles:
            above, below = slice(first, stop), slice(key_first, key_stop)
            found = _kernel_backward(
                _single(grad[above]), _single(query[above]), _single(key[below]), _single(value[below]),
                _single(out[above]), logsum[above].transpose(0, 1)[None], None, scale,
            )  # fmt: skip
            for total, where, part in zip(grads, (above, below, below), found, strict=True):
                total[where] += part[0].transpose(0, 1)
        return (*(total[:count].to(query.dtype) for total in grads), None, None)


def _batched(places: Tensor, bucket: Bucket) -> Tensor:
    """[P, H, D] -> [n, H, t, D]."""
    return places.index_select(0, bucket.take).view(*bucket.size, *places.shape[1:]).transpose(1, 2)


def _single(places: Tensor) -> Tensor:
    """[q, H, D] -> [1, H, q, D]."""
    return places.transpose(0, 1)[None]


def every_way(layout: TreeLayout, device: torch.device) -> list[DeviceLayout]:
    """The layout in each way that attention may be computed on ``device``, for a check of the model."""
    return [to_device(layout, device, way=way) for way in ways(device)]


def install(hf: Any) -> None:
    """Let a transformers model that uses SDPA use this attention, which is the same without a layout."""
    if getattr(hf.config, "_attn_implementation", None) == "sdpa" and hf._can_set_attn_implementation():
        hf.set_attn_implementation(NAME)


def obstacle(hf: Any, *, max_tokens: int) -> str | None:
    """Why a model cannot take packed trees, as far as its configuration and signature tell; None where they do not.

    Args:
        hf: the transformers model, after ``install``.
        max_tokens: of the longest context: a sliding window at least as long changes nothing.
    """
    config = hf.config
    if getattr(hf, "_is_stateful", False):
        return "it has recurrent layers, whose state runs through tokens in the order they stand"
    window = getattr(config, "sliding_window", None)
    slides = window is not None and window < max_tokens and getattr(config, "use_sliding_window", True)
    types = getattr(config, "layer_types", None)
    if types is not None:
        harmless = {"full_attention"} | (set() if slides else {"sliding_attention"})
        others = sorted(set(types) - harmless)
        if others:
            return f"it has layers of type {', '.join(others)}"
    elif slides:
        return f"its attention slides over {window} tokens, fewer than model.max_context_tokens = {max_tokens}"
    if "position_ids" not in inspect.signature(hf.base_model.forward).parameters:
        return "it takes no position_ids"
    if config._attn_implementation != NAME:
        return f"its attention is {config._attn_implementation!r}, which cannot be replaced"
    return None


def tree_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    tree_layout: DeviceLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [B, H, T, D] and so on, result [B, T, H, D].

    Raises:
        NotImplementedError: the layer wants of a packed row what it cannot have there.
    """
    if tree_layout is None:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
        return result
    if sliding_window is not None and sliding_window < tree_layout.depth:
        raise NotImplementedError(f"a sliding window of {sliding_window} tokens in a tree {tree_layout.depth} deep")
    extra = [name for name in ("s_aux", "position_bias", "cache") if kwargs.get(name) is not None]
    if extra or dropout:
        raise NotImplementedError(f"attention with {extra[0] if extra else 'dropout'} over packed trees")
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    # Its kernel has no float64, and no heads of fewer channels than a tensor core takes.
    if tree_layout.way == "flex" and query.dtype != torch.float64 and query.shape[-1] >= 16:
        block_mask = tree_layout.block_mask()
        out = _compiled_flex()(query, key, value, block_mask=block_mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if tree_layout.parts is None or value.shape[-1] != query.shape[-1]:
        out = scaled_dot_product_attention(query, key, value, attn_mask=tree_layout.mask(), scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    rows, _, length, _ = query.shape
    places = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    joined: Tensor = _TreeAttention.apply(*places, tree_layout.parts, scaling)  # type: ignore[no-untyped-call]
    return joined.view(rows, length, *joined.shape[1:]), None


AttentionInterface.register(NAME, tree_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
