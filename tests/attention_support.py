"""Ways of the attention over packed trees that a CPU has, and parts so cheap that even small trees are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from learner.packing import attention_parts, attention_varlen
from learner.packing.attention import Way

CPU = torch.device("cpu")
WAYS: list[Way] = ["parts", "dense"]


def largest_difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def cheap_calls(put: Callable[[Any, str, Any], None]) -> None:
    put(attention_parts, "CALL_COST", 0)
    put(attention_parts, "JOIN_COST", 0)
    put(attention_parts, "LONGEST_BLOCK", 3)
    put(attention_parts, "_half", lambda size: -(-size // 2))
    attention_parts._chain_cost.cache_clear()


def _rows(
    query: Tensor, key: Tensor, value: Tensor, first_query: Tensor, first_key: Tensor, longest_query: int,
    longest_key: int,
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor, Tensor]]:  # fmt: skip
    """Of each row: its queries, its keys, both and their values [H, …, D], and what is seen."""
    groups = query.shape[1] // key.shape[1]
    for q0, q1, k0, k1 in zip(first_query[:-1], first_query[1:], first_key[:-1], first_key[1:], strict=True):
        assert 0 < q1 - q0 <= longest_query
        assert q1 - q0 <= k1 - k0 <= longest_key
        q = query[q0:q1].transpose(0, 1)
        k, v = (x[k0:k1].transpose(0, 1).repeat_interleave(groups, dim=0) for x in (key, value))
        # The causal mask ends in the lower right corner: the last query sees the last key.
        seen = torch.ones((q.shape[1], k.shape[1]), dtype=torch.bool).tril(int(k1 - k0) - int(q1 - q0))
        yield slice(int(q0), int(q1)), slice(int(k0), int(k1)), q, k, v, seen


def _by_rows(*arguments: Any) -> tuple[Tensor, Tensor]:
    """FlashAttention over rows of many lengths as its kernel for CUDA defines it, in any precision."""
    *rest, scale = arguments
    outs, logsums = [], []
    for _, _, q, k, v, seen in _rows(*rest):
        scores = (q @ k.mT * scale).masked_fill(~seen, float("-inf"))
        outs.append((scores.softmax(-1) @ v).transpose(0, 1))
        logsums.append(scores.logsumexp(-1))
    return torch.cat(outs).to(outs[0].dtype), torch.cat(logsums, dim=-1)


def _by_rows_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsum: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *lengths, scale = rest
    grads = [torch.zeros_like(x) for x in (query, key, value)]
    groups = query.shape[1] // key.shape[1]
    for queries, keys, q, k, v, seen in _rows(query, key, value, *lengths):
        g, o = grad[queries].transpose(0, 1), out[queries].transpose(0, 1)
        weights = ((q @ k.mT * scale) - logsum[:, queries, None].to(q.dtype)).exp().masked_fill(~seen, 0)
        scores = weights * (g @ v.mT - (g * o).sum(-1, keepdim=True)) * scale
        grads[0][queries] = (scores @ k).transpose(0, 1)
        for total, part in ((grads[1], scores.mT @ q), (grads[2], weights.mT @ g)):
            total[keys] = part.unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
    return grads[0], grads[1], grads[2]


def flash_on_a_cpu(put: Callable[[Any, str, Any], None]) -> None:
    """Put plain arithmetic in the place of the kernel that only CUDA has."""
    put(attention_varlen, "kernel", _by_rows)
    put(attention_varlen, "kernel_backward", _by_rows_backward)
    put(attention_varlen, "fits", lambda query, value: value.shape[-1] == query.shape[-1])
