"""``m2po``: by token, the largest log-ratios are masked until the mean of their squares is at most ``m2_limit``.

The others are truncated (M2PO, arXiv 2510.01161, without a cap: set a large one).  All tokens count, whatever the sign
of A; the authors' code counts those that move outwards only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from atpo_async.core.loss_traits import CorrectionTraits, declares
from learner.loss.corrections import truncate
from learner.loss.protocols import UnitRatios, UnitWeights

if TYPE_CHECKING:
    from torch import Tensor

    from atpo_async.config import CorrectionConfig


def threshold(log_weights: Tensor, settings: CorrectionConfig) -> float:
    """The largest |log-weight| up to which, itself included, the mean square is at most ``m2_limit``; 0 if there is
    none.  Those that tie at the border go together."""
    size = log_weights.abs().sort().values
    mean = size.square().cumsum(0) / size.new_ones(len(size)).cumsum(0)
    last_of_its_kind = size.new_ones(len(size)).bool()
    last_of_its_kind[:-1] = size[1:] > size[:-1]
    fine = size[last_of_its_kind & (mean <= settings.m2_limit)]
    return float(fine[-1]) if len(fine) else 0.0


@declares(
    CorrectionTraits(
        reads=("cap", "floor", "m2_limit"), levels=("token",), measure=threshold, measured_as="is/m2po_max_abs"
    )
)
def correction(ratios: UnitRatios, settings: CorrectionConfig) -> UnitWeights:
    """Tokens beyond the batch's threshold leave the loss; the others are truncated."""
    bounded = truncate.correction(ratios, settings)
    if ratios.measured is None:
        return bounded
    far = ratios.log_weight.abs() > ratios.measured
    return UnitWeights(weight=bounded.weight.masked_fill(far, 0.0), changed=bounded.changed | far)
