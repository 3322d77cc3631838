"""The policy objective: a surrogate over action tokens, plus a divergence and an entropy term.

Source: AT2PO (arXiv 2601.04767), section 3.4; ALGORITHM, section 3.  Pure functions of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from atpo_async.config import ObjectiveConfig
from atpo_async.core.schedule import coefficient
from learner.loss.protocols import MAX_LOG_RATIO, Surrogate, SurrogateTokens
from learner.loss.tokens import ActionTokens
from learner.loss.units import num_units, spread, unit_mean, units


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """The result of one evaluation."""

    loss: Tensor
    """Scalar with a gradient: sum over tokens of weight * correction * loss_t."""
    log_ratio: Tensor
    """log s_t, detached, same shape as the tokens."""
    clipped: Tensor
    """bool: a clip or a mask of the surrogate binds here, so no gradient of it flows."""
    kl: Tensor
    """Scalar, detached: sum of weight * correction * KL(policy || reference); 0 without a reference."""
    entropy: Tensor
    """Scalar, detached: sum of weight * entropy; 0 without entropies."""
    metrics: Mapping[str, Tensor]
    """By token, detached: the surrogate's own."""


def log_ratio(logp: Tensor, prox: Tensor, unit: Tensor) -> Tensor:
    """log s_t = l_t - sg(l_t) + sg(mean over t's unit of (l - prox)), clamped at MAX_LOG_RATIO.

    Value: the mean log-ratio of the unit.  Gradient: that of the token's own log-prob.
    """
    difference = (logp - prox).detach()
    mean = spread(unit_mean(difference, unit, num_units(unit)), unit)
    return (logp - logp.detach() + mean).clamp(max=MAX_LOG_RATIO)


def kl_to_reference(logp: Tensor, reference: Tensor, estimator: Literal["k2", "k3"]) -> Tensor:
    """An estimate of KL(policy || reference) by token, never negative, 0 exactly where the two agree.

    k2 = d^2 / 2, whose gradient is that of the KL itself on tokens of the policy; k3 = exp(d) - 1 - d; d = reference -
    policy, clamped at MAX_LOG_RATIO: a token that far down is pulled no more by k3.
    """
    difference = reference - logp
    if estimator == "k2":
        return difference.square() / 2
    difference = difference.clamp(max=MAX_LOG_RATIO)
    return difference.exp() - 1 - difference


def atpo_loss(tokens: ActionTokens, settings: ObjectiveConfig, surrogate: Surrogate, *, step: int = 0) -> Loss:
    """The objective of ALGORITHM, section 3, for one forward pass.

    loss = sum of weight * (correction * (loss_t + kl_coef * KL_t) - entropy_coef * entropy_t)

    Args:
        tokens: of the pass.
        settings: ratio level, clip range, and the two terms besides.
        surrogate: loss_t (``objective.surrogate``).
        step: the learner's batch, from 0: the two coefficients may be schedules.

    Raises:
        ValueError: a term is switched on and its input was not given.
    """
    if settings.kl_coef and tokens.reference is None:
        raise ValueError(f"objective.kl_coef = {settings.kl_coef} needs the reference's log-probs, and got none")
    if settings.entropy_coef and tokens.entropy is None:
        raise ValueError(f"objective.entropy_coef = {settings.entropy_coef} needs entropies, and got none")
    kl_coef, entropy_coef = coefficient(settings.kl_coef, step), coefficient(settings.entropy_coef, step)
    counts = tokens.turn >= 0

    def kept(values: Tensor) -> Tensor:
        # where, not a product, and before anything else: 0 * inf of a masked place would poison the sum, and its
        # gradient too.
        return torch.where(counts, values, torch.zeros_like(values))

    logp, prox, weight = kept(tokens.logp), kept(tokens.prox), kept(tokens.weight)
    corrected = weight * kept(tokens.correction)
    ratio = log_ratio(logp, prox, units(settings.ratio_level, tokens.turn, tokens.row))
    given = SurrogateTokens(
        logp=logp,
        log_ratio=ratio,
        prox=prox,
        mu=kept(tokens.mu),
        advantage=kept(tokens.advantage),
        turn=tokens.turn,
        row=tokens.row,
    )
    terms = surrogate(given, settings)
    loss = (corrected * terms.loss).sum()
    kl = bonus = torch.zeros_like(loss).detach()
    if tokens.reference is not None:
        kl = (corrected * kl_to_reference(logp, kept(tokens.reference), settings.kl_estimator)).sum()
        loss = loss + kl_coef * kl if kl_coef else loss
    if tokens.entropy is not None:
        bonus = (weight * kept(tokens.entropy)).sum()
        loss = loss - entropy_coef * bonus if entropy_coef else loss
    return Loss(
        loss=loss,
        log_ratio=ratio.detach(),
        clipped=torch.zeros_like(counts) if terms.clipped is None else terms.clipped,
        kl=kl.detach(),
        entropy=bonus.detach(),
        metrics={name: values.detach() for name, values in terms.metrics.items()},
    )
