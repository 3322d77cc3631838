"""ATPO and its kin: one surrogate over action tokens, pure functions of tensors.

Source: AT2PO (arXiv 2601.04767), section 3.4; ALGORITHM, section 3.

Shapes: arguments that belong together share one shape, either rows ``BT`` or a flat list ``N`` of action tokens.
Index tensors tell units apart: ``turn_N`` numbers the turns as they occur in the rows (a turn shared by two rows
occurs twice), ``row_N`` the rows; -1 where a place holds no action token that counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from atpo_async.config import ObjectiveConfig

Level = Literal["token", "turn", "sequence"]

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
    """bool: the clip (or the dual clip) binds here, so no gradient flows."""


def units(level: Level, turn: Tensor, row: Tensor) -> Tensor:
    """int64, same shape: which unit a token belongs to at ``level``; -1 for tokens that do not count."""
    if level == "turn":
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


def atpo_loss(
    logp: Tensor,
    prox: Tensor,
    advantage: Tensor,
    turn: Tensor,
    row: Tensor,
    weight: Tensor,
    correction: Tensor,
    settings: ObjectiveConfig,
) -> Surrogate:
    """The clipped surrogate of ALGORITHM, section 3, for one forward pass.

    Args (all of one shape):
        logp: log-probs under the weights being trained; carries the gradient.
        prox: log-probs under the proximal policy, without gradient.
        advantage: of the token's turn.
        turn, row: int64 units; ``turn`` is -1 where nothing counts (observations, padding, masked turns).
        weight: aggregation weight of the token (``packing``), with the tree's w_PER.
        correction: off-policy weight of the token (``correction``), without gradient.
        settings: ratio level, clip range, dual clip.

    Padded places must hold finite numbers.
    """
    logs = log_ratio(logp, prox, units(settings.ratio_level, turn, row))
    per_token, clipped = clipped_loss(
        logs.exp(),
        advantage,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
    )
    counts = turn >= 0
    # where, not a product: 0 * inf of a masked place would poison the sum.
    weighted = torch.where(counts, weight * correction * per_token, torch.zeros_like(per_token))
    return Surrogate(weighted.sum(), logs.detach(), clipped & counts)
