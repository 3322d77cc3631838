"""The covariance of a token's advantage and log-prob over the batch, by which Clip-Cov and KL-Cov choose.

Source: The Entropy Mechanism of Reinforcement Learning (arXiv 2505.22617), section 4:
cov_t = (A_t - mean A) (log pi_t - mean log pi), the means over all action tokens of the batch.  Tokens where it is
large take the entropy down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from learner.loss.protocols import BatchStatistics, StartTokens

if TYPE_CHECKING:
    from torch import Tensor


def means(tokens: StartTokens, batch: BatchStatistics) -> dict[str, float]:
    """Of the batch's advantages and of its log-probs at its start."""
    return {"mean_advantage": batch.mean(tokens.advantage), "mean_logp": batch.mean(tokens.logp)}


def covariance(tokens: StartTokens, found: Mapping[str, float]) -> Tensor:
    """float by token.

    Args:
        found: ``means`` of the batch.
    """
    return (tokens.advantage - found["mean_advantage"]) * (tokens.logp - found["mean_logp"])


def number_of(share: float, count: int) -> int:
    """How many of ``count`` tokens are chosen: one at the least."""
    return max(1, math.floor(share * count))


def check_share(share: float) -> None:
    """Raises ValueError where it is no share of the batch's tokens."""
    if not 0 < share <= 1:
        raise ValueError(f"share = {share} must be above 0 and at most 1: of the batch's action tokens, as 0.0002")
