"""``icepop``: ``mask`` by token (IcePop, arXiv 2510.18855; published with floor 0.5, cap 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atpo_async.core.loss_traits import CorrectionTraits, declares
from learner.loss.corrections import mask
from learner.loss.protocols import UnitRatios, UnitWeights

if TYPE_CHECKING:
    from atpo_async.config import CorrectionConfig


@declares(CorrectionTraits(reads=("cap", "floor"), levels=("token",), masks_outside=True))
def correction(ratios: UnitRatios, settings: CorrectionConfig) -> UnitWeights:
    """Tokens whose weight is outside the bounds leave the loss."""
    return mask.correction(ratios, settings)
