"""Units of tokens that share a ratio or weight: token, turn, prefix, sequence; sums and means over them.

Index tensors tell units apart: ``turn`` numbers the turns as they occur in the rows (a turn shared by two rows occurs
twice), ascending down each row, rows one after the other; ``row`` numbers the rows.  ``turn`` is -1 where a place holds
no action token that counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atpo_async.core.vocabulary import Level


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
