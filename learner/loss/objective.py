"""The policy objective: a surrogate over action tokens, plus a divergence, an entropy and further terms.

Source: AT2PO (arXiv 2601.04767), section 3.4; ALGORITHM, section 3.  Pure functions of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from atpo_async.config import ObjectiveConfig
from atpo_async.core.schedule import coefficient
from learner.loss.protocols import (
    MAX_LOG_RATIO,
    Now,
    StartTokens,
    Surrogate,
    SurrogateTokens,
    TermLoss,
    TermTokens,
)
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
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    """Label of a further term -> scalar, detached: its sum under its weights."""
    term_metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """By token, detached: ``LABEL/NAME`` of each further term; NaN where a token has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTerm:
    """A further term in one forward pass."""

    label: str
    corrected: bool
    """Under the off-policy weight."""
    compute: Callable[[TermTokens], TermLoss]
    start: StartTokens
    now: Now


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


def atpo_loss(
    tokens: ActionTokens,
    settings: ObjectiveConfig,
    surrogate: Surrogate,
    *,
    step: int = 0,
    further: Sequence[PassTerm] = (),
) -> Loss:
    """The objective of ALGORITHM, section 3, for one forward pass.

    loss = sum of weight * (correction * (multiplier_t * loss_t + kl_coef * KL_t) - entropy_coef * entropy_t + term_t)

    Args:
        tokens: of the pass.
        settings: ratio level, clip range, and the two terms besides.
        surrogate: loss_t (``objective.surrogate``).
        step: the learner's batch, from 0: the two coefficients may be schedules.
        further: ``objective.terms``; a term may take the place of the surrogate at some tokens.

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
    added = _further(further, tokens, given, weight=weight, corrected=corrected)
    own = terms.loss if tokens.multiplier is None else kept(tokens.multiplier) * terms.loss
    clipped = torch.zeros_like(counts) if terms.clipped is None else terms.clipped
    if added.replaced is not None:
        own, clipped = own.masked_fill(added.replaced, 0.0), clipped & ~added.replaced
    loss = (corrected * own).sum()
    kl = bonus = torch.zeros_like(loss).detach()
    if tokens.reference is not None:
        kl = (corrected * kl_to_reference(logp, kept(tokens.reference), settings.kl_estimator)).sum()
        loss = loss + kl_coef * kl if kl_coef else loss
    if tokens.entropy is not None:
        bonus = (weight * kept(tokens.entropy)).sum()
        loss = loss - entropy_coef * bonus if entropy_coef else loss
    for term in added.losses.values():
        loss = loss + term
    return Loss(
        loss=loss,
        log_ratio=ratio.detach(),
        clipped=clipped,
        kl=kl.detach(),
        entropy=bonus.detach(),
        metrics={name: values.detach() for name, values in terms.metrics.items()},
        terms={label: term.detach() for label, term in added.losses.items()},
        term_metrics={name: values.detach() for name, values in added.metrics.items()},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Further:
    losses: Mapping[str, Tensor]
    """Label -> scalar, with its gradient."""
    metrics: Mapping[str, Tensor]
    replaced: Tensor | None
    """bool by token: the surrogate's loss is left out."""


def _further(
    terms: Sequence[PassTerm], tokens: ActionTokens, given: SurrogateTokens, *, weight: Tensor, corrected: Tensor
) -> _Further:
    counts = tokens.turn >= 0
    entropy = None if tokens.entropy is None else torch.where(counts, tokens.entropy, torch.zeros_like(tokens.entropy))
    losses: dict[str, Tensor] = {}
    metrics: dict[str, Tensor] = {}
    replaced: Tensor | None = None
    for term in terms:
        found = term.compute(
            TermTokens(
                logp=given.logp, log_ratio=given.log_ratio, prox=given.prox, mu=given.mu, advantage=given.advantage,
                turn=given.turn, row=given.row, start=term.start, now=term.now, entropy=entropy, min_p=tokens.min_p,
            )
        )  # fmt: skip
        by_token = torch.where(counts, found.loss, torch.zeros_like(found.loss))
        losses[term.label] = ((corrected if term.corrected else weight) * by_token).sum()
        metrics.update({f"{term.label}/{name}": values for name, values in found.metrics.items()})
        if found.replaces is not None:
            replaced = found.replaces if replaced is None else replaced | found.replaces
    return _Further(losses=losses, metrics=metrics, replaced=replaced)
