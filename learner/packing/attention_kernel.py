"""Attention put together from its parts on a CPU, forward and backward: each part's kernel, joined by log-sum-exp.

Shapes: P places of all rows, H heads, D channels of a head; n blocks of t places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from learner.packing.attention_parts import Bucket, Parts


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


class TreeAttention(torch.autograd.Function):
    """query, key, value [P, H, D] -> [P, H, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: Parts, scale: float | None) -> Tensor:
        count, heads, _ = query.shape
        # In half precision what is joined again and again stays in full precision.
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
