"""``kl-cov``: tokens whose advantage and log-prob covary most are held near the policy at the batch's start (KL-Cov).

Source: The Entropy Mechanism of Reinforcement Learning (arXiv 2505.22617), KL-Cov.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from atpo_async.core.loss_traits import TermTraits, declares
from learner.loss.parts.covariance import check_share, covariance, means, number_of
from learner.loss.protocols import BatchStatistics, Measured, Now, StartTokens, TermLoss, TermTokens

if TYPE_CHECKING:
    from typing import Any

    from atpo_async.config import ObjectiveConfig


def check(settings: ObjectiveConfig, *, coef: float = 1.0, share: float = 2e-4) -> None:
    """Raises ValueError for options out of range."""
    if not coef >= 0:
        raise ValueError(f"coef = {coef} must be >= 0")
    check_share(share)


def measure(
    tokens: StartTokens, batch: BatchStatistics, now: Now, settings: ObjectiveConfig, *, share: float = 2e-4, **_: Any
) -> Measured:
    """The covariance from which on tokens are chosen."""
    found = means(tokens, batch)
    number = number_of(share, batch.count(tokens.turn >= 0))
    return Measured(values={**found, "threshold": batch.largest(covariance(tokens, found), number)})


@declares(TermTraits(measure=measure, check=check, metrics=("selected_share", "distance")))
def term(tokens: TermTokens, settings: ObjectiveConfig, *, coef: float = 1.0, share: float = 2e-4) -> TermLoss:
    """coef |log pi - log prox| on the ``share`` of the batch's tokens with the largest covariance, one at the least.

    It has no gradient where the two agree: it acts from a batch's second optimizer step on.
    """
    distance = (tokens.logp - tokens.prox).abs()
    none = tokens.logp.new_zeros(())
    if "threshold" not in tokens.now.measured:
        chosen = tokens.turn < -1  # of a batch without tokens none
    else:
        chosen = covariance(tokens.start, tokens.now.measured) >= tokens.now.measured["threshold"]
    return TermLoss(
        loss=coef * distance.where(chosen, none),
        metrics={
            "selected_share": chosen.to(distance.dtype),
            "distance": distance.detach().where(chosen, none + math.nan),
        },
    )
