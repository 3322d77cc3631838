"""The optimizer of a policy, as ``learner`` names it."""

from __future__ import annotations

import torch
from torch import nn

from atpo_async.config import LearnerConfig


def make_optimizer(policy: nn.Module, settings: LearnerConfig, *, sharded: bool = False) -> torch.optim.AdamW:
    """AdamW; norms and biases are decayed like the rest (the default decay is 0)."""
    return torch.optim.AdamW(
        [p for p in policy.parameters() if p.requires_grad],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=not sharded,
    )
