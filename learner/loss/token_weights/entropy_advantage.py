"""``entropy-advantage``: tokens of high entropy count more, and those of low entropy less (AEPO, arXiv 2510.14545)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from atpo_async.core.loss_traits import Needs, TokenWeightTraits, declares
from learner.loss.protocols import BatchStatistics, Measured, Now, StartTokens

if TYPE_CHECKING:
    from torch import Tensor

    from atpo_async.config import ObjectiveConfig


def check(settings: ObjectiveConfig, *, scale: float = 0.2, sample: bool = True) -> None:
    """Raises ValueError for options out of range."""
    if not 0 <= scale <= 1:
        raise ValueError(f"scale = {scale} must be between 0 and 1: of a standard deviation of the entropies, as 0.2")


def measure(
    tokens: StartTokens, batch: BatchStatistics, now: Now, settings: ObjectiveConfig, *, scale: float = 0.2,
    sample: bool = True,
) -> Measured:  # fmt: skip
    """Mean and standard deviation of the batch's entropies."""
    assert tokens.entropy is not None
    return Measured(
        values={"mean_entropy": batch.mean(tokens.entropy), "std": batch.std(tokens.entropy, sample=sample)}
    )


@declares(TokenWeightTraits(needs=Needs(entropy=True), measure=measure, check=check))
def weight(
    tokens: StartTokens, now: Now, settings: ObjectiveConfig, *, scale: float = 0.2, sample: bool = True
) -> Tensor:
    """1 + scale (H_t - mean) / std, 0 at the least: a factor of the token's advantage.

    Every built-in surrogate is linear in the size of the advantage, so that a factor of it is one of the loss.

    Args:
        sample: the standard deviation of a sample, as in the released code; false: of the population.
    """
    assert tokens.entropy is not None
    mean, std = now.measured.get("mean_entropy", 0.0), now.measured.get("std", 0.0)
    if not (std > 0 and math.isfinite(mean)):
        return tokens.entropy * 0.0 + 1.0
    return (1 + scale * (tokens.entropy - mean) / std).clamp(min=0)
