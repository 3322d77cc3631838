"""Numbers out of the output head: log-probs of chosen tokens, entropies and the like, and no other logits.

A head that is one matrix goes through ``FusedHead``: chunk by chunk of the tokens, logits are made, read and dropped,
and made again in the backward pass.  Any other head (a bias, an adapter, sharded weights) is called as the module that
it is, its chunks checkpointed.  Both read logits by ``kernels.vocabulary``.

The loop is our own and not Liger-Kernel's fused linear cross entropy.  That one has no entropy, rounds the logits to
half precision before the log-sum-exp, and makes its chunks so small that their logits take no more than the hidden
states (128 tokens of 10,000 for a vocabulary of 152k and 1,024 channels): for each chunk it reads and writes the
gradient of the matrix, 0.6 GB, and casts float32 weights again.

Shapes: N chosen tokens, C channels, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from learner.kernels.vocabulary import Scoring, TokenNumbers, logit_gradient, measured
from learner.policy.frozen import FrozenLinear

MAX_LOGITS = 1 << 26
"""Logits held at once (256 MB in float32); more are recomputed in the backward pass, chunk by chunk."""

CARD_SHARE = 64
"""On CUDA a chunk of logits may fill this part of the card's memory (1.3 GB of 80): the gradient of the matrix is read
and written once a chunk, so that larger ones cost less."""


def scored(head: Any, hidden: Tensor, target: Tensor, scoring: Scoring) -> Tensor:
    """float32[N] (float64 in a float64 model): log-probs of the targets; float[R, N] if more is wanted.

    Args:
        head: gives logits, float[N, V], of hidden states.
        hidden: float[N, C].
        target: int64[N].
        scoring: the temperature, and which numbers, in the order of ``Wanted``.
    """
    size = _chunk(int(head.weight.shape[0]), hidden.device, scoring)
    chunks = list(zip(torch.split(hidden, size), torch.split(target, size), strict=True))
    if is_matrix(head) and (hidden.is_cuda or len(chunks) > 1):
        found, extra = FusedHead.apply(hidden, head.weight, target, scoring, size)  # type: ignore[no-untyped-call]
    elif len(chunks) == 1:
        found, extra = _numbers(head, scoring, hidden, target)
    else:
        parts = [checkpoint(_numbers, head, scoring, h, t, use_reentrant=False) for h, t in chunks]
        found, extra = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    result: Tensor = found if not len(extra) else torch.cat([found, extra])
    return result[0] if len(result) == 1 else result


def is_matrix(head: Any) -> bool:
    """Whether calling the head is a product with its weight here and now, and nothing else."""
    plain = type(head) in (nn.Linear, FrozenLinear) and head.bias is None and "forward" not in vars(head)
    hooks = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks if plain else None
    # Sharded weights are a subclass until their own module's forward gathers them.
    return plain and not hooks and type(head.weight) in (Tensor, nn.Parameter)


def logits(head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """float[N, V], float32 at the least."""
    found = head(hidden)
    return found.float() if found.dtype in (torch.bfloat16, torch.float16) else found


def logits_at_once(device: torch.device) -> int:
    """How many logits a chunk may hold on a device."""
    if device.type != "cuda":
        return MAX_LOGITS
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(MAX_LOGITS, int(memory) // CARD_SHARE // 4)


def _chunk(vocabulary: int, device: torch.device, scoring: Scoring) -> int:
    """Tokens of a chunk."""
    held = 1 if scoring.compiled else scoring.wanted.temporaries
    return max(1, logits_at_once(device) // vocabulary // held)


def _numbers(
    head: Callable[[Tensor], Tensor], scoring: Scoring, hidden: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    found, extra = TokenNumbers.apply(head(hidden), target, scoring)  # type: ignore[no-untyped-call]
    return found, extra


class FusedHead(torch.autograd.Function):
    """The numbers of ``measured`` out of hidden states and the head's matrix, a chunk of tokens at a time.

    Between the passes it keeps what it was given and a few numbers a token.  Products are in autocast's precision, else
    in the higher one of the two; the gradient of a float32 weight is summed in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, scoring: Scoring, size: int
    ) -> tuple[Tensor, Tensor]:
        dtype = _product_dtype(weight, hidden)
        ctx.scoring, ctx.size, ctx.dtype = scoring, size, dtype
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            parts = [
                measured(_product(h.to(dtype), matrix), t, scoring)
                for h, t in zip(torch.split(hidden, size), torch.split(target, size), strict=True)
            ]
        found = torch.cat([part.found for part in parts], dim=-1)
        extra = torch.cat([part.extra for part in parts], dim=-1)
        ctx.save_for_backward(hidden, weight, target, found, torch.cat([part.log_sum for part in parts]))
        ctx.mark_non_differentiable(extra)
        return found, extra

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, target, found, log_sum = ctx.saved_tensors
        dtype = ctx.dtype
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight = None
        with torch.autocast(hidden.device.type, enabled=False):
            # Cast again and not kept: a copy of the matrix would lie there while activations are at their most.
            matrix = weight.to(dtype)
            for begin in range(0, len(hidden), ctx.size):
                part = slice(begin, begin + ctx.size)
                inputs = hidden[part].to(dtype)
                gradient = logit_gradient(
                    _product(inputs, matrix), target[part], ctx.scoring, found=found[:, part], log_sum=log_sum[part],
                    given=given[:, part], dtype=dtype,
                )  # fmt: skip
                if of_hidden is not None:
                    of_hidden[part] = gradient @ matrix
                if ctx.needs_input_grad[1]:
                    of_weight = _summed(of_weight, gradient.t(), inputs)
        if ctx.needs_input_grad[1]:
            of_weight = torch.zeros_like(weight) if of_weight is None else of_weight.to(weight.dtype)
        return of_hidden, of_weight, None, None, None


def _product_dtype(weight: Tensor, hidden: Tensor) -> torch.dtype:
    kind = weight.device.type
    # As autocast does it: float64 stays.
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(weight.dtype, hidden.dtype)  # frozen weights may be held in fewer bits


def _product(hidden: Tensor, matrix: Tensor) -> Tensor:
    """Logits; where the device can, float32 ones of half-precision factors.

    Rounded to bfloat16 a logit of 20 moves in steps of 0.125, and log-probs with it: far wider than a clip.
    """
    if _sums_apart(hidden):
        return torch.mm(hidden, matrix.t(), torch.float32)
    return hidden @ matrix.t()


def _summed(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """``total + left @ right``, in float32 at the least; ``total`` is overwritten."""
    if _sums_apart(left):
        if total is None:
            return torch.mm(left, right, torch.float32)
        if not _adds_in_place(left.device):
            return total.add_(torch.mm(left, right, torch.float32))
        return torch.addmm(total, left, right, torch.float32, out=total)
    if total is None:
        first = left @ right
        return first if first.dtype == torch.float64 else first.float()
    return total.addmm_(left, right) if total.dtype == left.dtype else total.add_(left @ right)


def _sums_apart(factor: Tensor) -> bool:
    """Whether products of this half-precision factor can be given in float32."""
    return factor.is_cuda and factor.dtype in (torch.bfloat16, torch.float16) and _has_wide_products(factor.device)


@functools.cache
def _adds_in_place(device: torch.device) -> bool:
    """Whether a float32 product of half-precision factors can be added to what is there, found out by trying; where
    not, it takes a matrix of its own first."""
    ones, total = torch.ones(16, 16, device=device, dtype=torch.bfloat16), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, ones, ones, torch.float32, out=total)
    except RuntimeError:
        return False
    return bool((total == 17).all())


@functools.cache
def _has_wide_products(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
