"""Metrics of loss terms and token weights by token, from sums that add up over micro-batches and ranks.

Of each number two places: its sum over the tokens that have one, and their count; NaN is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from learner.loss.parts.loading import ObjectiveParts


def names(parts: ObjectiveParts) -> tuple[str, ...]:
    """The metrics: those that the terms declare; of a token weight its mean, and the share of tokens where it is 0."""
    of_terms = (f"{term.label}/{metric}" for term in parts.terms for metric in term.metrics)
    of_weights = (f"{weight.label}/{name}" for weight in parts.weights for name in ("mean", "zero_share"))
    return (*of_terms, *of_weights)


def sums(
    parts: ObjectiveParts, once: Tensor, *, terms: Mapping[str, Tensor], multipliers: Mapping[str, Tensor]
) -> Tensor:
    """float64[2 * names]: of one forward pass.

    Args:
        once: bool by token, false for a turn that another row has counted already.
        terms: by token, ``LABEL/NAME`` of each term's metric.
        multipliers: by token, of each weight by its label.
    """
    found = dict(terms)
    for label, values in multipliers.items():
        found |= {f"{label}/mean": values, f"{label}/zero_share": (values == 0).to(values.dtype)}
    out = []
    for name in names(parts):
        has = once & ~found[name].isnan()
        out += [torch.where(has, found[name], 0.0).double().sum(), has.double().sum()]
    return torch.stack(out) if out else torch.zeros(0, dtype=torch.float64, device=once.device)


def summary(parts: ObjectiveParts, total: Sequence[float]) -> dict[str, float]:
    """Metrics from the sums of all passes and ranks; one that no token has is left out."""
    pairs = zip(names(parts), total[0::2], total[1::2], strict=True)
    return {name: value / count for name, value, count in pairs if count}
