"""The learning rate as a function of the count of optimizer steps."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    update: int,
    *,
    peak: float,
    warmup: int,
    total: int,
    schedule: Literal["constant", "linear", "cosine"],
) -> float:
    """Rate of the ``update``-th optimizer step, from 0: a function of the count alone, so a resume needs no more."""
    if update < warmup:
        return peak * (update + 1) / warmup
    done = min(1.0, (update - warmup) / max(1, total - warmup))
    if schedule == "linear":
        return peak * (1.0 - done)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * done))
    return peak
