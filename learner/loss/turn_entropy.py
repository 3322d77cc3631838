"""How evenly a chain's drift is spread over its turns: ``is/turn_entropy``, a diagnostic of AT2PO.

Source: AT2PO (arXiv 2601.04767), appendix, H_turn, with the ratios of its published code: of a leaf with N turns and
their log-ratios K_j, p = softmax(K / sum(K)) and H = -sum(p log p) / log N.  1 where all turns drifted alike, and near
1 unless the K_j differ in sign or size.  0 for a chain of one turn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learner.loss.units import num_units, owners, spread, unit_sum


def turn_entropy(difference: Tensor, turn: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of H over the rows, number of rows), float64.  Rows whose log-ratios sum to 0 are left out: H is undefined.

    Args:
        difference: float, log-prob of the policy minus that of the one that sampled, of each token.
        turn, row: int64, as in ``learner.loss.units``.
    """
    count, size = num_units(turn), num_units(row)
    if not count:
        none = torch.zeros((), dtype=torch.float64, device=turn.device)
        return none, none
    drift = unit_sum(difference.double(), turn, count)
    # -1, which sums leave out, for numbers that no token has: they belong to no row.
    owner = owners(turn, row, count)
    total = unit_sum(drift, owner, size)
    number = unit_sum(torch.ones_like(drift), owner, size)
    share = drift / spread(torch.where(total == 0, 1.0, total), owner).masked_fill(owner < 0, 1.0)
    largest = torch.full((size + 1,), -torch.inf, dtype=total.dtype, device=total.device)
    largest = largest.scatter_reduce_(0, torch.where(owner < 0, size, owner), share, "amax")[:size]
    weight = (share - spread(largest, owner)).exp()
    chance = weight / spread(unit_sum(weight, owner, size), owner).masked_fill(owner < 0, 1.0)
    entropy = unit_sum(-torch.xlogy(chance, chance), owner, size) / torch.where(number > 1, number, 2.0).log()
    defined = (number > 0) & (total != 0)
    return torch.where(defined & (number > 1), entropy, 0.0).sum(), defined.double().sum()
