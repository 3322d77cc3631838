"""``clip``: PPO's clipped surrogate; AT2PO, GRPO and DAPO, GSPO by the ratio level."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atpo_async.core.loss_traits import SurrogateTraits, declares
from learner.loss.protocols import SurrogateTerms, SurrogateTokens

if TYPE_CHECKING:
    from torch import Tensor

    from atpo_async.config import ObjectiveConfig


@declares(SurrogateTraits(reads=("ratio_level", "clip_low", "clip_high", "dual_clip")))
def surrogate(tokens: SurrogateTokens, settings: ObjectiveConfig) -> SurrogateTerms:
    """-min(s A, clip(s) A)."""
    loss, clipped = clipped_loss(
        tokens.log_ratio.exp(),
        tokens.advantage,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
    )
    return SurrogateTerms(loss=loss, clipped=clipped | tokens.at_ceiling())


def clipped_loss(
    ratio: Tensor, advantage: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """-min(s A, clip(s) A) by token, and where the clip binds.

    For A < 0 nothing bounds s from above; ``dual_clip`` c bounds the loss at c |A|.
    """
    free = -ratio * advantage
    bounded = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    loss = free.maximum(bounded)
    clipped = bounded > free
    if dual_clip is not None:
        ceiling = -dual_clip * advantage
        over = (advantage < 0) & (loss > ceiling)
        loss = ceiling.where(over, loss)
        clipped = clipped | over
    return loss, clipped.detach()
