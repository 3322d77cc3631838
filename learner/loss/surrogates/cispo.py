"""``cispo``: the clipped ratio as a weight without gradient on log pi (CISPO, arXiv 2506.13585, eq. 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atpo_async.core.loss_traits import SurrogateTraits, declares
from learner.loss.protocols import SurrogateTerms, SurrogateTokens

if TYPE_CHECKING:
    from atpo_async.config import ObjectiveConfig


@declares(SurrogateTraits(reads=("ratio_level", "clip_low", "clip_high")))
def surrogate(tokens: SurrogateTokens, settings: ObjectiveConfig) -> SurrogateTerms:
    """-sg(clip(s)) A log pi: every token keeps its gradient, however far its ratio is."""
    ratio = tokens.log_ratio.detach().exp().clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return SurrogateTerms(loss=-ratio * tokens.advantage * tokens.logp)
