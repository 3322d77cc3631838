"""Off-policy correction: importance weights between mu (sampled) and prox (proximal), and what they tell of staleness.

Source: ALGORITHM, section 4.  d_t = prox_t - mu_t is the log-ratio of a token, S = sum of d_t over a unit (token, turn
or sequence), the weight is exp(lambda S), truncated or masked, without gradient.

Diagnostics are additive: every function gives sums that can be added over micro-batches and ranks (``SUMS`` names the
places of one vector), and ``summary`` turns the total into metrics.  Shapes as in ``objective``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atpo_async.config import CorrectionConfig
from learner.objective import Level, num_units, spread, unit_mean, unit_sum, units

MAX_LOG_WEIGHT = 30.0
"""Keeps exp() and its square finite in float32."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Off-policy weights."""

    per_token: Tensor
    """Shape of the tokens; 0 where the unit is masked or the place holds none."""
    per_unit: Tensor
    """float[U] at the level in use."""
    changed: Tensor
    """bool[U]: truncated or masked."""


def unit_log_ratio(prox: Tensor, mu: Tensor, unit: Tensor, *, geometric: bool = False) -> Tensor:
    """float[U]: S of each unit, or its mean over the unit's tokens (exponent lambda = 1/T)."""
    reduce = unit_mean if geometric else unit_sum
    return reduce((prox - mu).detach(), unit, num_units(unit))


def importance_weights(prox: Tensor, mu: Tensor, turn: Tensor, row: Tensor, settings: CorrectionConfig) -> Weights:
    """w = sg(min(exp(lambda S), cap)), or exp(lambda S) within [floor, cap] and 0 outside, or 1."""
    unit = units(settings.level, turn, row)
    if settings.action == "none":
        ones = torch.ones_like(unit_sum(torch.zeros_like(prox), unit, num_units(unit)))
        return Weights(spread(ones, unit), ones, torch.zeros_like(ones, dtype=torch.bool))
    log_weight = unit_log_ratio(prox, mu, unit, geometric=settings.exponent == "geometric")
    exact = log_weight.clamp(max=MAX_LOG_WEIGHT).exp()
    if settings.action == "truncate":
        changed = exact > settings.cap
        kept = exact.clamp(max=settings.cap)
    else:
        changed = (exact > settings.cap) | (exact < settings.floor)
        kept = torch.where(changed, torch.zeros_like(exact), exact)
    return Weights(spread(kept, unit), kept, changed)


def effective_share(weights: Tensor) -> float:
    """ESS / N = (sum w)^2 / (N sum w^2), in (0, 1]; 0 where every weight is 0."""
    return _ess(weights.numel(), float(weights.double().sum()), float(weights.double().square().sum()))


SUMS: tuple[str, ...] = (
    *(f"{level}/{name}" for level in ("token", "turn", "sequence") for name in ("n", "w", "w2")),
    "k1", "k3",
    "used/n", "used/w", "used/w2", "used/pos", "used/neg", "used/changed_pos", "used/changed_neg",
    "clip/n", "clip/clipped",
    "mismatch/n", "mismatch/k1", "mismatch/k3", "mismatch/abs",
)  # fmt: skip
"""Names of the places in the vector that ``sums`` returns."""


def sums(
    *,
    prox: Tensor,
    mu: Tensor,
    advantage: Tensor,
    turn: Tensor,
    row: Tensor,
    counted: Tensor,
    same_version: Tensor,
    clipped: Tensor,
    weights: Weights,
    settings: CorrectionConfig,
) -> Tensor:
    """float64[len(SUMS)] of one micro-batch.

    Args:
        counted: bool; false for tokens of a turn that another row has counted already.
        same_version: bool; the token was sampled by the very version that is being trained (lag 0): what differs
            there is the engine, not the age.
        clipped: bool, from the objective.
    """
    mu, prox = mu.double(), prox.detach().double()
    counts = turn >= 0
    once = counts & counted
    found: dict[str, Tensor] = {}
    levels: tuple[Level, ...] = ("token", "turn", "sequence")
    for level in levels:
        unit = units(level, turn, row)
        ratio = unit_log_ratio(prox, mu, unit).clamp(max=MAX_LOG_WEIGHT).exp()
        present = _present(unit, counts if level == "sequence" else once, ratio)
        found |= _moments(level, ratio[present])
        if level == settings.level:
            used = weights.per_unit.double()
            sign = unit_mean(advantage.double(), unit, num_units(unit))
            found |= _moments("used", used[present])
            found["used/pos"], found["used/neg"] = (present & (sign > 0)).sum(), (present & (sign < 0)).sum()
            found["used/changed_pos"] = (present & weights.changed & (sign > 0)).sum()
            found["used/changed_neg"] = (present & weights.changed & (sign < 0)).sum()
    difference = (prox - mu).clamp(max=MAX_LOG_WEIGHT)
    k3 = difference.exp() - 1 - difference
    found["k1"], found["k3"] = -difference[once].sum(), k3[once].sum()
    found["clip/n"], found["clip/clipped"] = once.sum(), (clipped & once).sum()
    fresh = once & same_version
    found["mismatch/n"] = fresh.sum()
    found["mismatch/k1"], found["mismatch/k3"] = -difference[fresh].sum(), k3[fresh].sum()
    found["mismatch/abs"] = difference[fresh].abs().sum()
    return torch.stack([found[name].double() for name in SUMS])


def summary(total: Sequence[float], settings: CorrectionConfig) -> dict[str, float]:
    """Metrics from the added-up sums; names whose denominator is 0 are left out.

    ``is/ess_frac``: of the weights as applied, at the level in use.  ``is/ess_frac_token|turn|sequence``: of the exact
    ratios.  ``kl/*``: KL(mu || prox) by token, k1 and k3 estimators; ``is/chi2_*``: mean squared ratio - 1.
    """
    s = dict(zip(SUMS, total, strict=True))
    out: dict[str, float] = {}
    for level in ("token", "turn", "sequence"):
        n = s[f"{level}/n"]
        if n:
            out[f"is/ess_frac_{level}"] = _ess(n, s[f"{level}/w"], s[f"{level}/w2"])
            out[f"is/chi2_{level}"] = s[f"{level}/w2"] / n - 1
    _share(out, "kl/mu_prox_k1", s["k1"], s["token/n"])
    _share(out, "kl/mu_prox_k3", s["k3"], s["token/n"])
    if s["used/n"]:
        out["is/ess_frac"] = _ess(s["used/n"], s["used/w"], s["used/w2"])
        out["is/mean_weight"] = s["used/w"] / s["used/n"]
    if settings.action != "none":
        signed = s["used/pos"] + s["used/neg"]
        _share(out, "is/truncated_share", s["used/changed_pos"] + s["used/changed_neg"], signed)
        _share(out, "is/truncated_share_pos", s["used/changed_pos"], s["used/pos"])
        _share(out, "is/truncated_share_neg", s["used/changed_neg"], s["used/neg"])
    elif s["used/n"]:
        out["is/truncated_share"] = 0.0
    _share(out, "clip_share", s["clip/clipped"], s["clip/n"])
    if s["mismatch/n"]:
        out["mismatch/kl_k1"] = s["mismatch/k1"] / s["mismatch/n"]
        out["mismatch/kl_k3"] = s["mismatch/k3"] / s["mismatch/n"]
        out["mismatch/mean_abs"] = s["mismatch/abs"] / s["mismatch/n"]
        out["mismatch/token_share"] = s["mismatch/n"] / s["token/n"]
    return out


def _share(out: dict[str, float], name: str, part: float, whole: float) -> None:
    if whole:
        out[name] = part / whole


def _ess(n: float, total: float, squares: float) -> float:
    return total * total / (n * squares) if n and squares > 0 else 0.0


def _moments(name: str, values: Tensor) -> dict[str, Tensor]:
    count = torch.tensor(values.numel(), device=values.device)
    return {f"{name}/n": count, f"{name}/w": values.sum(), f"{name}/w2": values.square().sum()}


def _present(unit: Tensor, once: Tensor, like: Tensor) -> Tensor:
    """bool[U]: units with at least one token counted here."""
    return unit_sum(once.to(like.dtype), unit, like.shape[0]) > 0
