"""``topr``: 1 where A >= 0, ``truncate`` where A < 0 (TOPR, arXiv 2503.14286; published with cap 1 by sequence)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atpo_async.core.loss_traits import CorrectionTraits, declares
from learner.loss.corrections import truncate
from learner.loss.protocols import UnitRatios, UnitWeights

if TYPE_CHECKING:
    from atpo_async.config import CorrectionConfig


@declares(CorrectionTraits(reads=("cap", "floor")))
def correction(ratios: UnitRatios, settings: CorrectionConfig) -> UnitWeights:
    """The sign of its own turn decides for each token, also where a unit holds turns of both signs."""
    bounded = truncate.correction(ratios, settings)
    return UnitWeights(weight=bounded.weight, changed=bounded.changed, exempt=ratios.advantage >= 0)
