"""The loss of a forward pass over rows that are imitated, and their metrics.

Source: SPEAR (arXiv 2509.22601); ALGORITHM, "Imitation".  It is the batch's surrogate with the batch's off-policy
correction, and nothing else: no divergence, no entropy, none of the objective's further terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from atpo_async.config import Config, ObjectiveConfig
from atpo_async.config.doors import TOKEN_WEIGHT
from atpo_async.core.loss_traits import TokenWeightTraits, declared
from atpo_async.core.tree import lag_versions
from learner.loss.correction import OffPolicyCorrection, Tempering, Weights
from learner.loss.objective import Loss, atpo_loss
from learner.loss.parts.loading import ObjectiveParts, WeightPart
from learner.loss.protocols import Surrogate
from learner.loss.tempering import ess_fraction
from learner.loss.tokens import ActionTokens
from learner.loss.units import unit_sum, units
from learner.packing.credited import CreditedTree
from learner.training.passes import Pass
from learner.training.reductions import Reductions
from learner.training.whole_batch.measuring import Measuring

SUMS = ("loss", "tokens", "clipped", "units", "weight", "weight_squared", "changed", "left_out")
"""What a pass's sums hold: its loss, coef(t) included; tokens, and those whose clip binds; units of the correction, the
sums of their weights and of these squared, and how many weights were bounded or masked; tokens that Clip-Cov left
out."""

CLIP_COV = "clip-cov"
"""Among the built-in token weights."""


def clip_cov(config: Config) -> ObjectiveParts:
    """The token weight of the rows alone: Clip-Cov, or none where ``imitation.clip_cov`` is 0."""
    settings = config.imitation
    if not (settings.rows and settings.clip_cov):
        return ObjectiveParts()
    options = {"share": settings.clip_cov, "low": settings.clip_cov_low, "high": settings.clip_cov_high}
    function = TOKEN_WEIGHT.offered(CLIP_COV, options)
    part = WeightPart(
        door=TOKEN_WEIGHT, name=CLIP_COV, function=function, traits=declared(function, TokenWeightTraits()),
        options=options, settings=config.objective,
    )  # fmt: skip
    return ObjectiveParts(weights=(part,))


@dataclass(frozen=True, slots=True, kw_only=True)
class ImitatedLoss:
    """How the loss of such a pass is computed."""

    config: Config
    model: Callable[..., Tensor]
    correction: OffPolicyCorrection
    surrogate: Surrogate
    prox: Callable[[Pass, Tensor], Tensor]
    """Proximal log-probs of a pass, given its log-probs under the weights now."""
    measuring: Measuring
    """Of ``clip_cov``, over the rows alone."""

    def __call__(self, item: Pass, tempering: Tempering) -> tuple[Loss, Tensor, Tensor]:
        """Forward.

        Returns:
            The loss with its gradient; float64[U], the log-weights of its units; float64[len(SUMS)].
        """
        logp = item.spread(self.model(**item.inputs))
        own = logp.detach()
        prox = self.prox(item, own)
        tokens = item.against_mu(own if self.config.correction.numerator == "policy" else prox)
        weights = self.correction.weights(tokens, tempering)
        loss = atpo_loss(
            ActionTokens(
                logp=logp, prox=prox, mu=item.mu, advantage=item.advantage, turn=item.turn, row=item.row,
                weight=item.weight, correction=weights.per_token, multiplier=self.measuring.multiplier(item),
            ),
            surrogate_alone(self.config.objective),
            self.surrogate,
        )  # fmt: skip
        return loss, self.correction.log_weights(tokens, item.counted), self._sums(item, loss, weights)

    def _sums(self, item: Pass, loss: Loss, weights: Weights) -> Tensor:
        counts = item.turn >= 0
        unit = units(self.config.correction.level, item.turn, item.row)
        weight = weights.per_unit.double()
        here = unit_sum(torch.ones_like(item.mu), unit, len(weight)) > 0
        each = (
            loss.loss.detach(), counts.sum(), (loss.clipped & counts).sum(), here.sum(),
            torch.where(here, weight, 0.0).sum(), torch.where(here, weight.square(), 0.0).sum(),
            (weights.changed & here).sum(), sum(((own == 0) & counts).sum() for own in item.multipliers.values()),
        )  # fmt: skip
        return torch.stack([torch.as_tensor(value, device=weight.device).double() for value in each])


def surrogate_alone(settings: ObjectiveConfig) -> ObjectiveConfig:
    """The objective without the terms beside its surrogate."""
    return settings.model_copy(update={"kl_coef": 0.0, "entropy_coef": 0.0})


def metrics(
    chains: Sequence[CreditedTree],
    passes: Sequence[Pass],
    sums: Tensor,
    losses: Sequence[float],
    *,
    version: int,
    coef: float,
    num_dropped: int,
    reductions: Reductions,
) -> dict[str, float]:
    """``imitation/*`` of a batch; the same on every rank.

    Args:
        chains: of this rank.
        passes: of the batch's trees and rows, of this rank.
        sums: float64[len(SUMS)], of this rank's passes and of all optimizer steps.
        losses: of the optimizer steps.
        version: being trained.
        coef: what they count at this step.
        num_dropped: rows of this rank that were left out.
        reductions: over the ranks.
    """
    turns = [turn for chain in chains for turn in chain.tree]
    own = [
        len(chains), num_dropped, sum(float(chain.advantages[0]) for chain in chains), len(turns),
        sum(max(0, lag_versions(turn, current=version)) for turn in turns), *_sizes(passes),
    ]  # fmt: skip
    rows, dropped, advantage, num_turns, lag, of_trees, of_rows = reductions.sum(
        np.array(own, dtype=np.float64)
    ).tolist()
    s = dict(zip(SUMS, reductions.sum_of(sums), strict=True))
    out = {"imitation/rows": rows, "imitation/coef": coef}
    if dropped:
        out["imitation/dropped"] = dropped
    if rows:
        out["imitation/advantage_mean"] = advantage / rows
        out["imitation/lag_mean"] = lag / num_turns
    if s["units"]:
        out["imitation/ess_frac"] = ess_fraction(s["units"], s["weight"], s["weight_squared"])
        out["imitation/mean_weight"] = s["weight"] / s["units"]
        out["imitation/truncated_share"] = s["changed"] / s["units"]
        out["imitation/clip_share"] = s["clipped"] / s["tokens"]
        if s["left_out"]:
            out["imitation/clip_cov_share"] = s["left_out"] / s["tokens"]
    if losses:
        out["imitation/loss"] = s["loss"] / len(losses)
    if of_trees + of_rows:
        out["imitation/loss_share"] = of_rows / (of_trees + of_rows)
    return out


def _sizes(passes: Sequence[Pass]) -> tuple[float, float]:
    """Sum of weight * |A| over the tokens of trees, and of rows: what each may move, where the loss itself cancels."""
    found = {False: 0.0, True: 0.0}
    for item in passes:
        found[item.imitated] += float((item.weight * item.advantage.abs()).sum())
    return found[False], found[True]
