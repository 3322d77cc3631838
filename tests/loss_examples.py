"""A surrogate and a correction of a user's own, as ``docs/extending.md`` shows them; they lie outside the packages."""

from __future__ import annotations

import math

from torch import Tensor

from atpo_async.config import CorrectionConfig, ObjectiveConfig
from atpo_async.core.loss_traits import CorrectionTraits, SurrogateTraits, declares
from learner.loss.protocols import SurrogateTerms, SurrogateTokens, UnitRatios, UnitWeights


@declares(SurrogateTraits(reads=("ratio_level",), metrics=("gate",)))
def sapo(tokens: SurrogateTokens, settings: ObjectiveConfig, *, temperature: float = 1.0) -> SurrogateTerms:
    """A smooth gate where PPO clips (SAPO, arXiv 2511.20347, with one temperature)."""
    gate = (temperature * (tokens.log_ratio.exp() - 1)).sigmoid()
    return SurrogateTerms(
        loss=-4 / temperature * gate * tokens.advantage,
        clipped=tokens.at_ceiling(),
        metrics={"gate": 4 * gate * (1 - gate)},
    )


def edge(log_weights: Tensor, settings: CorrectionConfig, *, keep: float = 0.9) -> float:
    """How far the nearest ``keep`` of the batch's units are from being on-policy, in nats."""
    return float(log_weights.abs().quantile(keep))


@declares(CorrectionTraits(measure=edge, measured_as="is/edge"))
def trimmed(ratios: UnitRatios, settings: CorrectionConfig, *, keep: float = 0.9) -> UnitWeights:
    """Exact weights, those beyond the batch's edge pulled in to it."""
    most = math.inf if ratios.measured is None else ratios.measured
    return UnitWeights(weight=ratios.log_weight.clamp(-most, most).exp(), changed=ratios.log_weight.abs() > most)
