"""Parts of the loss of a user's own, as ``docs/extending.md`` shows them; they lie outside the packages."""

from __future__ import annotations

import math

from torch import Tensor

from atpo_async.config import CorrectionConfig, ObjectiveConfig
from atpo_async.core.loss_traits import (
    CorrectionTraits,
    Needs,
    SurrogateTraits,
    TermTraits,
    TokenWeightTraits,
    declares,
)
from learner.loss.protocols import (
    BatchStatistics,
    Measured,
    Now,
    StartTokens,
    SurrogateTerms,
    SurrogateTokens,
    TermLoss,
    TermTokens,
    UnitRatios,
    UnitWeights,
)


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


def not_negative(settings: ObjectiveConfig, *, coef: float = 0.1) -> None:
    """Raises ValueError for a coefficient that would push away."""
    if coef < 0:
        raise ValueError(f"coef = {coef} must be >= 0")


@declares(TermTraits(needs=Needs(reference=True), check=not_negative, metrics=("distance",)))
def near(tokens: TermTokens, settings: ObjectiveConfig, *, coef: float = 0.1) -> TermLoss:
    """A spring to the policy that the run began with, whatever the advantage."""
    assert tokens.start.reference is not None
    distance = (tokens.logp - tokens.start.reference).square()
    return TermLoss(loss=coef * distance, metrics={"distance": distance.detach().sqrt()})


def middle(
    tokens: StartTokens, batch: BatchStatistics, now: Now, settings: ObjectiveConfig, *, share: float = 0.5
) -> Measured:
    """The log-prob that ``share`` of the batch's tokens are above."""
    return Measured(values={"edge": batch.quantile(tokens.logp, 1 - share)})


@declares(TokenWeightTraits(measure=middle))
def early(tokens: StartTokens, now: Now, settings: ObjectiveConfig, *, share: float = 0.5) -> Tensor:
    """The likelier tokens count half."""
    return 1 - 0.5 * (tokens.logp > now.measured.get("edge", math.inf)).to(tokens.logp.dtype)
