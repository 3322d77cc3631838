"""``clip-cov``: a few of the tokens whose advantage and log-prob covary strongly are left out of the loss (Clip-Cov).

Source: The Entropy Mechanism of Reinforcement Learning (arXiv 2505.22617), Clip-Cov.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from atpo_async.core.loss_traits import Needs, TokenWeightTraits, declares
from learner.loss.parts.covariance import check_share, covariance, means, number_of
from learner.loss.protocols import BatchStatistics, Measured, Now, StartTokens

if TYPE_CHECKING:
    from torch import Tensor

    from atpo_async.config import ObjectiveConfig


def check(settings: ObjectiveConfig, *, share: float = 2e-4, low: float = 1.0, high: float = 5.0) -> None:
    """Raises ValueError for options out of range."""
    check_share(share)
    if not low < high:
        raise ValueError(f"low = {low} must be below high = {high}: the covariances between which tokens are drawn")


def measure(
    tokens: StartTokens, batch: BatchStatistics, now: Now, settings: ObjectiveConfig, *, share: float = 2e-4,
    low: float = 1.0, high: float = 5.0,
) -> Measured:  # fmt: skip
    """The random number up to which candidates are drawn, so that they are as many as ``share`` says."""
    assert tokens.random is not None
    found = means(tokens, batch)
    cov = covariance(tokens, found)
    number = number_of(share, batch.count(tokens.turn >= 0))
    return Measured(values={**found, "drawn_below": batch.smallest(tokens.random, number, (cov > low) & (cov < high))})


@declares(TokenWeightTraits(needs=Needs(random=True), measure=measure, check=check))
def weight(
    tokens: StartTokens, now: Now, settings: ObjectiveConfig, *, share: float = 2e-4, low: float = 1.0,
    high: float = 5.0,
) -> Tensor:  # fmt: skip
    """0 for the drawn tokens, else 1.

    Drawn at random are, of those with low < cov < high, as many as ``share`` of all the batch's action tokens, one at
    the least and all where they are fewer.
    """
    assert tokens.random is not None
    if not now.measured:
        return tokens.logp * 0.0 + 1.0  # of a batch without tokens
    cov = covariance(tokens, now.measured)
    drawn = (cov > low) & (cov < high) & (tokens.random <= now.measured.get("drawn_below", -math.inf))
    return (~drawn).to(tokens.logp.dtype)
