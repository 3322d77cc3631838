"""``truncate``: min(exp(lambda S), cap), and not below floor (truncated importance sampling)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atpo_async.core.loss_traits import CorrectionTraits, declares
from learner.loss.protocols import UnitRatios, UnitWeights

if TYPE_CHECKING:
    from atpo_async.config import CorrectionConfig


@declares(CorrectionTraits(reads=("cap", "floor")))
def correction(ratios: UnitRatios, settings: CorrectionConfig) -> UnitWeights:
    """Weights outside [floor, cap] are moved to the nearer bound."""
    exact = ratios.weight()
    changed = (exact > settings.cap) | (exact < settings.floor)
    return UnitWeights(weight=exact.clamp(settings.floor, settings.cap), changed=changed)
