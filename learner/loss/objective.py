"""ATPO and its kin: one surrogate over action tokens, pure functions of tensors.

Source: AT2PO (arXiv 2601.04767), section 3.4; ALGORITHM, section 3.  A further variant is one more function in
``SURROGATES``, of the numbers that ``Tokens`` holds.

Shapes: arguments that belong together share one shape, either rows ``BT`` or a flat list ``M`` of action tokens.
Index tensors tell units apart: ``turn`` numbers the turns as they occur in the rows (a turn shared by two rows occurs
twice), ascending down each row, rows one after the other; ``row`` numbers the rows.  ``turn`` is -1 where a place holds
no action token that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from atpo_async.config import ObjectiveConfig
from atpo_async.core.vocabulary import Level

MAX_LOG_RATIO = 10.0
"""Keeps exp() of the log-ratio finite; far outside any clip range."""


@dataclass(frozen=True, slots=True)
class Surrogate:
    """What one evaluation gives."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What a surrogate is made of.  All of one shape; masked places hold zeros."""

    logp: Tensor
    """Under the weights being trained; with the gradient."""
    log_ratio: Tensor
    """log s_t, policy over prox at the ratio level; with the gradient of ``logp``."""
    mu: Tensor
    advantage: Tensor


def units(level: Level, turn: Tensor, row: Tensor) -> Tensor:
    """int64, same shape: which unit a token belongs to at ``level``; -1 for tokens that do not count.

    A prefix, the path down to a turn and that turn, goes by the number of its last turn; its sum is ``prefix_sum``.
    """
    if level == "turn" or level == "prefix":
        return turn
    if level == "sequence":
        return torch.where(turn < 0, turn, row)
    flat = torch.arange(turn.numel(), device=turn.device).reshape(turn.shape)
    return torch.where(turn < 0, turn, flat)


def num_units(unit: Tensor) -> int:
    """Length that per-unit tensors need."""
    return int(unit.max()) + 1 if unit.numel() else 0


def unit_sum(values: Tensor, unit: Tensor, count: int) -> Tensor:
    """float[count]: sum of ``values`` over each unit; places with unit -1 are left out."""
    flat = unit.reshape(-1)
    slots = torch.where(flat < 0, count, flat)
    return values.new_zeros(count + 1).index_add_(0, slots, values.reshape(-1))[:count]


def unit_mean(values: Tensor, unit: Tensor, count: int) -> Tensor:
    """float[count]: mean over each unit; 0 for units without tokens."""
    lengths = unit_sum(torch.ones_like(values), unit, count)
    return unit_sum(values, unit, count) / lengths.clamp(min=1)


def prefix_sum(per_turn: Tensor, turn: Tensor, row: Tensor) -> Tensor:
    """float[count]: each turn's own number and those of the turns before it in its row.

    Args:
        per_turn: float[count], one for each turn occurrence; numbers that no token has count as 0.
        turn, row: of the tokens.
    """
    count = per_turn.shape[0]
    turns, rows = turn.reshape(-1), row.reshape(-1)
    counts = turns >= 0
    turns, rows = turns[counts], rows[counts]
    if not turns.numel():
        return per_turn
    # Rows come one after the other, so one running sum serves them all, less what stood before the row began.
    running = per_turn.double().cumsum(0)
    before = torch.cat([running.new_zeros(1), running[:-1]])
    row_of = rows.new_zeros(count).scatter_(0, turns, rows)
    first = turns.new_full((num_units(rows),), count - 1).scatter_reduce_(0, rows, turns, "amin")[row_of]
    return (running - before[first]).to(per_turn.dtype)


def spread(per_unit: Tensor, unit: Tensor) -> Tensor:
    """A unit's value at each of its tokens; 0 where the unit is -1."""
    padded = torch.cat([per_unit, per_unit.new_zeros(1)])
    return padded[torch.where(unit < 0, per_unit.shape[0], unit)]


def log_ratio(logp: Tensor, prox: Tensor, unit: Tensor) -> Tensor:
    """log s_t = l_t - sg(l_t) + sg(mean over t's unit of (l - prox)), clamped at MAX_LOG_RATIO.

    Value: the mean log-ratio of the unit.  Gradient: that of the token's own log-prob.
    """
    difference = (logp - prox).detach()
    mean = spread(unit_mean(difference, unit, num_units(unit)), unit)
    return (logp - logp.detach() + mean).clamp(max=MAX_LOG_RATIO)


def clipped_loss(
    ratio: Tensor, advantage: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """-min(s A, clip(s) A) by token, and where the clip binds.

    For A < 0 nothing bounds s from above; ``dual_clip`` c bounds the loss at c |A|.
    """
    free = -ratio * advantage
    bounded = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    loss = torch.maximum(free, bounded)
    clipped = bounded > free
    if dual_clip is not None:
        ceiling = -dual_clip * advantage
        over = (advantage < 0) & (loss > ceiling)
        loss = torch.where(over, ceiling, loss)
        clipped = clipped | over
    return loss, clipped.detach()


def _clip(tokens: Tokens, settings: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """PPO's surrogate; AT2PO, GRPO and DAPO, GSPO by the ratio level."""
    loss, clipped = clipped_loss(
        tokens.log_ratio.exp(),
        tokens.advantage,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
    )
    return loss, clipped | _at_ceiling(tokens)


def _cispo(tokens: Tokens, settings: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """-sg(clip(s)) A log pi: every token keeps its gradient, however far its ratio is (arXiv 2506.13585, eq. 4)."""
    ratio = tokens.log_ratio.detach().exp().clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return -ratio * tokens.advantage * tokens.logp, _nowhere(tokens)


def _policy_gradient(tokens: Tokens, settings: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """-A log pi; with ``correction.action = topr`` TOPR (arXiv 2503.14286)."""
    return -tokens.advantage * tokens.logp, _nowhere(tokens)


def _tv(tokens: Tokens, settings: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """-s A, but 0 for tokens that move away from mu and are further than ``tv_limit`` (arXiv 2602.04879)."""
    policy, mu = tokens.logp.detach().exp(), tokens.mu.exp()
    away = tokens.advantage * (policy - mu) > 0
    masked = away & ((policy - mu).abs() > settings.tv_limit)
    free = -tokens.log_ratio.exp() * tokens.advantage
    return torch.where(masked, torch.zeros_like(free), free), masked | _at_ceiling(tokens)


def _at_ceiling(tokens: Tokens) -> Tensor:
    return tokens.log_ratio.detach() >= MAX_LOG_RATIO


def _nowhere(tokens: Tokens) -> Tensor:
    return torch.zeros_like(tokens.logp, dtype=torch.bool)


SURROGATES: Mapping[str, Callable[[Tokens, ObjectiveConfig], tuple[Tensor, Tensor]]] = MappingProxyType(
    {"clip": _clip, "cispo": _cispo, "policy-gradient": _policy_gradient, "tv": _tv}
)
"""``objective.surrogate`` -> loss_t of each token, and where its gradient is cut off."""


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
    logp: Tensor,
    prox: Tensor,
    mu: Tensor,
    advantage: Tensor,
    turn: Tensor,
    row: Tensor,
    weight: Tensor,
    correction: Tensor,
    settings: ObjectiveConfig,
    *,
    reference: Tensor | None = None,
    entropy: Tensor | None = None,
) -> Surrogate:
    """The objective of ALGORITHM, section 3, for one forward pass.

    loss = sum of weight * (correction * (loss_t + kl_coef * KL_t) - entropy_coef * entropy_t)

    Args (all of one shape):
        logp: log-probs under the weights being trained; carries the gradient.
        prox: log-probs under the proximal policy, without gradient.
        mu: log-probs under the behaviour policy.
        advantage: of the token's turn.
        turn, row: int64 units; ``turn`` is -1 where nothing counts (observations, padding, masked turns).  Such places
            may hold anything.
        weight: aggregation weight of the token (``packing``), with the tree's w_PER.
        correction: off-policy weight of the token (``correction``), without gradient.
        settings: surrogate, ratio level, clip range, and the two terms besides.
        reference: log-probs under the reference policy, without gradient.
        entropy: of the policy over the vocabulary at each token, nats; carries the gradient.

    Raises:
        ValueError: a term is switched on and what it needs was not given.
    """
    if settings.kl_coef and reference is None:
        raise ValueError(f"objective.kl_coef = {settings.kl_coef} needs the reference's log-probs, and got none")
    if settings.entropy_coef and entropy is None:
        raise ValueError(f"objective.entropy_coef = {settings.entropy_coef} needs entropies, and got none")
    counts = turn >= 0

    def kept(values: Tensor) -> Tensor:
        # where, not a product, and before anything else: 0 * inf of a masked place would poison the sum, and its
        # gradient too.
        return torch.where(counts, values, torch.zeros_like(values))

    logp, prox, weight = kept(logp), kept(prox), kept(weight)
    corrected = weight * kept(correction)
    tokens = Tokens(
        logp=logp,
        log_ratio=log_ratio(logp, prox, units(settings.ratio_level, turn, row)),
        mu=kept(mu),
        advantage=kept(advantage),
    )
    per_token, clipped = SURROGATES[settings.surrogate](tokens, settings)
    loss = (corrected * per_token).sum()
    kl = bonus = torch.zeros_like(loss).detach()
    if reference is not None:
        kl = (corrected * kl_to_reference(logp, kept(reference), settings.kl_estimator)).sum()
        loss = loss + settings.kl_coef * kl if settings.kl_coef else loss
    if entropy is not None:
        bonus = (weight * kept(entropy)).sum()
        loss = loss - settings.entropy_coef * bonus if settings.entropy_coef else loss
    return Surrogate(loss, tokens.log_ratio.detach(), clipped, kl.detach(), bonus.detach())
