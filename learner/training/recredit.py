"""Credit again with each turn's ratio of prox to mu, once the proximal log-probs of the whole batch are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from atpo_async.core.credit import CreditRule
from learner.loss.protocols import MAX_LOG_RATIO
from learner.packing.credited import CreditedTree
from learner.training.passes import Part


def recredit(part: Part, rule: CreditRule, device: torch.device) -> None:
    """Advantages anew, of the part's trees and in its passes.  Turns without a token in the loss count as ratio 1."""
    num_turns = sum(len(tree.tree) for tree in part.trees)
    total = torch.zeros(num_turns, dtype=torch.float64, device=device)
    for item in part.passes:
        assert item.prox is not None
        difference = torch.where(item.counted, (item.prox - item.mu).double(), 0.0)
        total.index_add_(0, item.number, difference)
    ratio = total.clamp(max=MAX_LOG_RATIO).exp().cpu().numpy()
    part.trees = [tree.recredited(own, rule) for tree, own in zip(part.trees, _by_tree(ratio, part.trees), strict=True)]
    advantage = np.concatenate([np.zeros(0), *(tree.advantages for tree in part.trees)])
    for item in part.passes:
        found = torch.from_numpy(advantage).to(item.advantage)
        item.advantage = found[item.number]


def _by_tree(values: np.ndarray, trees: Sequence[CreditedTree]) -> list[np.ndarray]:
    """Numbers by turn of the part -> one array a tree."""
    return np.split(values, np.cumsum([len(tree.tree) for tree in trees])[:-1]) if trees else []
