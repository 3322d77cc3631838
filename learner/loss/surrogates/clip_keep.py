"""``clip-keep``: PPO's clip whose upper side keeps its gradient (AEPO, arXiv 2510.14545; its released code)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atpo_async.core.loss_traits import SurrogateTraits, declares
from learner.loss.protocols import SurrogateTerms, SurrogateTokens
from learner.loss.surrogates.clip import clipped_loss

if TYPE_CHECKING:
    from atpo_async.config import ObjectiveConfig


@declares(SurrogateTraits(reads=("ratio_level", "clip_low", "clip_high", "dual_clip")))
def surrogate(tokens: SurrogateTokens, settings: ObjectiveConfig) -> SurrogateTerms:
    """The values of ``clip``; where its upper bound binds, the gradient is that of (1 + clip_high) A log pi.

    The upper bound is (1 + clip_high) s / sg(s), so that a token of a good turn whose ratio is beyond it is still
    pushed up, as if it stood at the bound; for A > 0 that is the upper side of CISPO.  The lower bound and the dual
    clip silence a token as they do in ``clip``.
    """
    advantage = tokens.advantage
    ratio = tokens.log_ratio.exp()
    loss, clipped = clipped_loss(
        ratio, advantage, clip_low=settings.clip_low, clip_high=settings.clip_high, dual_clip=settings.dual_clip
    )
    above = (advantage > 0) & (ratio.detach() > 1 + settings.clip_high)
    # Value 1, gradient that of the log-prob: of ``logp`` and not of the ratio, which has none where it is cut off.
    unit = (tokens.logp - tokens.logp.detach()).exp()
    kept = -(1 + settings.clip_high) * advantage * unit
    return SurrogateTerms(loss=kept.where(above, loss), clipped=(clipped | tokens.at_ceiling()) & ~above)
