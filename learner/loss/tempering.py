"""Tempering: the scale of a batch's log importance weights that keeps an effective sample size."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def largest_scale(share: Callable[[float], float], target: float) -> float:
    """The largest scale up to 1 whose ``share`` is at least ``target``, to 1e-15; 1 where not even 0 reaches it."""
    if share(1.0) >= target or share(0.0) < target:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) >= target else (low, middle)
    return low


def exact_share(log_weights: Tensor) -> float:
    """ESS / N of exp(log_weights), however large they are."""
    return effective_share((log_weights - log_weights.max()).exp())


def effective_share(weights: Tensor) -> float:
    """ESS / N = (sum w)^2 / (N sum w^2), in (0, 1]; 0 where every weight is 0."""
    return ess_fraction(weights.numel(), float(weights.double().sum()), float(weights.double().square().sum()))


def ess_fraction(count: float, total: float, squares: float) -> float:
    """ESS / N of ``count`` weights, from their sum and the sum of their squares; 0 where there is none."""
    return total * total / (count * squares) if count and squares > 0 else 0.0
