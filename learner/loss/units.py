"""Units of tokens that share a ratio or weight: token, turn, prefix, sequence; sums and means over them.

Index tensors tell units apart: ``turn`` numbers the turns as they occur in the rows (a turn shared by two rows occurs
twice), ascending down each row, rows one after the other; ``row`` numbers the rows.  ``turn`` is -1 where a place holds
no action token that counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atpo_async.core.vocabulary import Level

_COUNT = "atpo_num_units"


def counted(unit: Tensor, count: int) -> Tensor:
    """The same indices, which know from now on how many units they number.

    To ask a GPU for the largest of them is to wait until it has done all that it was given.
    """
    setattr(unit, _COUNT, count)
    return unit


def units(level: Level, turn: Tensor, row: Tensor) -> Tensor:
    """int64, same shape: which unit a token belongs to at ``level``; -1 for tokens that do not count.

    A prefix, the path down to a turn and that turn, goes by the number of its last turn; its sum is ``prefix_sum``.
    """
    if level == "turn" or level == "prefix":
        return turn
    known = hasattr(turn, _COUNT)  # and then every place counts
    if level == "sequence":
        found = torch.where(turn < 0, turn, row)
        return counted(found, num_units(row)) if known else found
    flat = torch.arange(turn.numel(), device=turn.device).reshape(turn.shape)
    found = torch.where(turn < 0, turn, flat)
    return counted(found, turn.numel()) if known else found


def num_units(unit: Tensor) -> int:
    """Length that per-unit tensors need."""
    known: int | None = getattr(unit, _COUNT, None)
    if known is not None:
        return known
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
    if not count:
        return per_turn
    turns, rows = turn.reshape(-1), row.reshape(-1)
    # Rows come one after the other, so one running sum serves them all, less what stood before the row began.
    running = per_turn.double().cumsum(0)
    before = torch.cat([running.new_zeros(1), running[:-1]])
    last = turns.new_full((num_units(row),), count - 1)
    first = last.scatter_reduce_(0, rows, torch.where(turns < 0, count - 1, turns), "amin")
    return (running - before[first[_owners(turns, rows, count, 0)]]).to(per_turn.dtype)


def _owners(turns: Tensor, rows: Tensor, count: int, none: int) -> Tensor:
    """int64[count]: the row of each turn occurrence; ``none`` for numbers that no token has."""
    slots = torch.where(turns < 0, count, turns)
    return rows.new_full((count + 1,), none).scatter_(0, slots, rows)[:count]


def owners(turn: Tensor, row: Tensor, count: int) -> Tensor:
    """int64[count]: the row of each turn occurrence; -1 for numbers that no token has."""
    return _owners(turn.reshape(-1), row.reshape(-1), count, -1)


def spread(per_unit: Tensor, unit: Tensor) -> Tensor:
    """A unit's value at each of its tokens; 0 where the unit is -1."""
    padded = torch.cat([per_unit, per_unit.new_zeros(1)])
    return padded[torch.where(unit < 0, per_unit.shape[0], unit)]
