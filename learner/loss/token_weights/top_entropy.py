"""``top-entropy``: only the tokens of highest entropy are learned from (Beyond the 80/20 Rule, arXiv 2506.01939)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from atpo_async.core.loss_traits import Needs, TokenWeightTraits, declares
from learner.loss.protocols import BatchStatistics, Measured, Now, StartTokens

if TYPE_CHECKING:
    from torch import Tensor

    from atpo_async.config import ObjectiveConfig


def check(settings: ObjectiveConfig, *, share: float = 0.2) -> None:
    """Raises ValueError for options out of range."""
    if not 0 < share < 1:
        raise ValueError(f"share = {share} must be between 0 and 1: of the batch's action tokens, as 0.2")


def measure(
    tokens: StartTokens, batch: BatchStatistics, now: Now, settings: ObjectiveConfig, *, share: float = 0.2
) -> Measured:
    """The entropy that the others are below: the batch's (1 - share)-quantile."""
    assert tokens.entropy is not None
    return Measured(values={"threshold": batch.quantile(tokens.entropy, 1 - share)})


@declares(TokenWeightTraits(needs=Needs(entropy=True), measure=measure, check=check))
def weight(tokens: StartTokens, now: Now, settings: ObjectiveConfig, *, share: float = 0.2) -> Tensor:
    """1 for the ``share`` of the batch's action tokens with the highest entropy at its start, 0 for the others.

    The denominators of ``objective.aggregation`` stay those of all tokens.
    """
    assert tokens.entropy is not None
    return (tokens.entropy >= now.measured.get("threshold", -math.inf)).to(tokens.logp.dtype)
