"""``none``: every weight is 1, whatever the ratio; off-policy data then trains with its bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atpo_async.core.loss_traits import CorrectionTraits, declares
from learner.loss.protocols import UnitRatios, UnitWeights

if TYPE_CHECKING:
    from atpo_async.config import CorrectionConfig


@declares(CorrectionTraits(corrects=False))
def correction(ratios: UnitRatios, settings: CorrectionConfig) -> UnitWeights:
    """Weights of 1, of a ratio that is not a number too."""
    ones = ratios.log_weight.new_ones(ratios.log_weight.shape)
    return UnitWeights(weight=ones, changed=ones == 0)
