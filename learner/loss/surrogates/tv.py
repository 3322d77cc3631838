"""``tv``: no clip; tokens that move away from mu and are far from it already are masked (DPPO, arXiv 2602.04879)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atpo_async.core.loss_traits import SurrogateTraits, declares
from learner.loss.protocols import SurrogateTerms, SurrogateTokens

if TYPE_CHECKING:
    from atpo_async.config import ObjectiveConfig


@declares(SurrogateTraits(reads=("ratio_level", "tv_limit")))
def surrogate(tokens: SurrogateTokens, settings: ObjectiveConfig) -> SurrogateTerms:
    """-s A, but 0 for tokens that move away from mu and are further from it than ``tv_limit``."""
    policy, mu = tokens.logp.detach().exp(), tokens.mu.exp()
    away = tokens.advantage * (policy - mu) > 0
    masked = away & ((policy - mu).abs() > settings.tv_limit)
    loss = (-tokens.log_ratio.exp() * tokens.advantage).masked_fill(masked, 0.0)
    return SurrogateTerms(loss=loss, clipped=masked | tokens.at_ceiling())
