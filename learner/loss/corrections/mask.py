"""``mask``: exp(lambda S) inside [floor, cap], 0 outside (masked importance sampling)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atpo_async.core.loss_traits import CorrectionTraits, declares
from learner.loss.protocols import UnitRatios, UnitWeights

if TYPE_CHECKING:
    from atpo_async.config import CorrectionConfig


@declares(CorrectionTraits(reads=("cap", "floor"), masks_outside=True))
def correction(ratios: UnitRatios, settings: CorrectionConfig) -> UnitWeights:
    """Units whose weight is outside the bounds leave the loss."""
    exact = ratios.weight()
    changed = (exact > settings.cap) | (exact < settings.floor)
    return UnitWeights(weight=exact.masked_fill(changed, 0.0), changed=changed)
