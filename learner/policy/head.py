"""Numbers out of the output head: log-probs of chosen tokens, entropies, and no other logits.

Shapes: N chosen tokens, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 1 << 26
"""Logits held at once (256 MB in float32); more are recomputed in the backward pass, chunk by chunk."""


def scored(head: Any, hidden: Tensor, target: Tensor, *, scale: float, with_entropy: bool) -> Tensor:
    """float32[N] (float64 in a float64 model): log-probs of the targets; float[2, N] with entropies.

    Args:
        head: a matrix, float[V, C].
        hidden: float[N, C].
        target: int64[N].
        scale: of the logits, one over the temperature.
        with_entropy: also the entropy, nats, of the whole distribution each target was scored under.
    """
    score = _head_entropies if with_entropy else _head_logprobs
    # The entropy holds the log-probs of the whole vocabulary beside the logits.
    size = max(1, MAX_LOGITS // int(head.weight.shape[0]) // (1 + with_entropy))
    if len(hidden) <= size:
        return score(head, scale, hidden, target)
    parts = [
        checkpoint(score, head, scale, h, t, use_reentrant=False)
        for h, t in zip(torch.split(hidden, size), torch.split(target, size), strict=True)
    ]
    return torch.cat(parts, dim=-1)


def _head_logprobs(head: Callable[[Tensor], Tensor], scale: float, hidden: Tensor, target: Tensor) -> Tensor:
    return -nn.functional.cross_entropy(logits(head, scale, hidden), target, reduction="none")


def _head_entropies(head: Callable[[Tensor], Tensor], scale: float, hidden: Tensor, target: Tensor) -> Tensor:
    """float[2, N]: log-probs of the targets, entropies."""
    logs = logits(head, scale, hidden).log_softmax(-1)
    return torch.stack([logs.gather(-1, target[:, None])[:, 0], -(logs.exp() * logs).sum(-1)])


def logits(head: Callable[[Tensor], Tensor], scale: float, hidden: Tensor) -> Tensor:
    found = head(hidden)
    if found.dtype in (torch.bfloat16, torch.float16):
        found = found.float()
    return found * scale if scale != 1.0 else found
