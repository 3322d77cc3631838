"""Metrics of importance weights and staleness, from sums that add up over micro-batches and ranks.

``SUMS`` names the places of one vector; ``sums`` fills it from a micro-batch, ``summary`` turns the total into metrics.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atpo_async.core.vocabulary import Level
from learner.loss.correction import Weights, log_ratio_to_mu, present, unit_log_ratio
from learner.loss.protocols import MAX_LOG_WEIGHT
from learner.loss.tempering import ess_fraction
from learner.loss.tokens import OffPolicyTokens
from learner.loss.turn_entropy import turn_entropy
from learner.loss.units import unit_mean, unit_sum, units

LENGTHS: tuple[tuple[str, int], ...] = (("1-8", 8), ("9-32", 32), ("33-128", 128), ("129-512", 512), ("over-512", 0))
"""Ranges of turn lengths in ``dropped/turns_len_*``: name and most action tokens; the last has no limit."""


_LEVELS: tuple[Level, ...] = ("token", "turn", "prefix", "sequence")
SUMS: tuple[str, ...] = (
    *(f"{level}/{name}" for level in _LEVELS for name in ("n", "w", "w2")),
    "turn/s", "turn/s2", "turn_entropy/n", "turn_entropy/s",
    "k1", "k2", "k3", "is_k1",
    "used/n", "used/w", "used/w2", "used/pos", "used/neg", "used/changed_pos", "used/changed_neg",
    "clip/n", "clip/clipped",
    *(f"{part}/{name}" for part in ("mismatch", "staleness") for name in ("n", "k1", "k3", "abs")),
    "dropped/tokens", "kept/tokens",
    *(f"{part}/{name}" for part in ("length", "dropped") for name, _ in LENGTHS),
)  # fmt: skip
"""Names of the places in the vector that ``sums`` returns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """One micro-batch with its weights.  Shapes as in ``learner.loss.tokens``."""

    tokens: OffPolicyTokens
    """``numerator`` is prox."""
    counted: Tensor
    """bool; false for tokens of a turn that another row has counted already."""
    lag: Tensor
    """int64, versions between the one that sampled the token and the one being trained.  What differs at lag 0 is the
    engine, not the age."""
    clipped: Tensor
    """bool, from the objective."""
    weights: Weights
    level: Level
    """Of the weights."""
    policy: Tensor | None = None
    """float, the log-probs of the weights being trained; None where they are prox's."""


def sums(batch: Weighed) -> Tensor:
    """float64[len(SUMS)] of one micro-batch."""
    given = batch.tokens
    tokens = dataclasses.replace(given, numerator=given.numerator.double(), mu=given.mu.double())
    found: dict[str, Tensor] = {}
    for level in _LEVELS:
        found |= _of_units(tokens, level, batch)
    found |= _of_tokens(tokens, batch)
    policy = tokens.numerator if batch.policy is None else batch.policy.double()
    drift = log_ratio_to_mu(policy, tokens.mu)
    found["turn_entropy/s"], found["turn_entropy/n"] = turn_entropy(drift, tokens.turn, tokens.row)
    return torch.stack([found[name].double() for name in SUMS])


def _of_units(tokens: OffPolicyTokens, level: Level, batch: Weighed) -> dict[str, Tensor]:
    """Of the units of one level; at the level in use, of the weights too."""
    log_ratio, length = unit_log_ratio(tokens, level)
    unit = units(level, tokens.turn, tokens.row)
    here = present(level, tokens.turn, unit, batch.counted, log_ratio.shape[0])
    found = _moments(level, _exp(log_ratio), here)
    if level == "turn":
        found["turn/s"], found["turn/s2"] = _sum(log_ratio, here), _sum(log_ratio.square(), here)
        found |= _dropped(length, here, batch.weights, tokens.turn)
    if level == batch.level:
        sign = unit_mean(tokens.advantage.double(), unit, log_ratio.shape[0])
        found |= _moments("used", batch.weights.per_unit.double(), here)
        for name, where in (("pos", here & (sign > 0)), ("neg", here & (sign < 0))):
            found[f"used/{name}"] = where.sum()
            found[f"used/changed_{name}"] = (where & batch.weights.changed).sum()
    return found


def _of_tokens(tokens: OffPolicyTokens, batch: Weighed) -> dict[str, Tensor]:
    """Divergences and clips of single tokens, each turn's counted once."""
    difference = log_ratio_to_mu(tokens.numerator, tokens.mu)
    once = (tokens.turn >= 0) & batch.counted
    found: dict[str, Tensor] = {}
    k3 = _exp(difference) - 1 - difference
    found["k1"], found["k2"], found["k3"] = (_sum(k, once) for k in (-difference, difference.square() / 2, k3))
    found["is_k1"] = _sum(_exp(difference) * difference, once)
    found["clip/n"], found["clip/clipped"] = once.sum(), (batch.clipped & once).sum()
    for part, where in (("mismatch", once & (batch.lag == 0)), ("staleness", once & (batch.lag > 0))):
        found[f"{part}/n"], found[f"{part}/abs"] = where.sum(), _sum(difference.abs(), where)
        found[f"{part}/k1"], found[f"{part}/k3"] = _sum(-difference, where), _sum(k3, where)
    return found


def _dropped(length: Tensor, here: Tensor, weights: Weights, turn: Tensor) -> dict[str, Tensor]:
    """Turns by length, and those whose every token got weight 0."""
    kept = unit_sum((weights.per_token != 0).double(), turn, length.shape[0]) > 0
    dropped = here & ~kept
    edges = torch.tensor([longest for _, longest in LENGTHS[:-1]], dtype=length.dtype, device=length.device)
    bucket = torch.bucketize(length, edges)
    found = {"dropped/tokens": _sum(length, dropped), "kept/tokens": _sum(length, here & kept)}
    for i, (name, _) in enumerate(LENGTHS):
        of_length = bucket == i
        found[f"length/{name}"], found[f"dropped/{name}"] = (of_length & here).sum(), (of_length & dropped).sum()
    return found


def summary(total: Sequence[float], *, corrects: bool) -> dict[str, float]:
    """Metrics from the added-up sums; names whose denominator is 0 are left out.

    ``is/ess_frac``: of the weights as applied, at the level in use.  ``is/ess_frac_token|turn|prefix|sequence``: of the
    exact ratios; ``is/ess_frac_turn_lognormal``: what it would be were the turns' log-ratios normal, exp(-variance).
    ``kl/mu_prox_*``: KL(mu || prox) by token, estimators k1, k2, k3; ``kl/prox_mu_is``: KL(prox || mu), by importance
    sampling.  ``is/chi2_*``: mean squared ratio - 1.  ``mismatch/*``: of tokens at lag 0, ``staleness/*``: of older
    ones.  ``is/turn_entropy``: how evenly a chain's drift is spread over its turns.
    ``dropped/*``: turns that the correction weighs with 0, as a share of the turns (of their length).

    Args:
        corrects: whether the correction's weights are not all 1.
    """
    s = dict(zip(SUMS, total, strict=True))
    out: dict[str, float] = {}
    for level in _LEVELS:
        n = s[f"{level}/n"]
        if n:
            out[f"is/ess_frac_{level}"] = ess_fraction(n, s[f"{level}/w"], s[f"{level}/w2"])
            out[f"is/chi2_{level}"] = s[f"{level}/w2"] / n - 1
    if s["turn/n"]:
        mean = s["turn/s"] / s["turn/n"]
        # Rounding must not make a variance of 0 a negative one.
        out["is/ess_frac_turn_lognormal"] = math.exp(min(mean * mean - s["turn/s2"] / s["turn/n"], 0.0))
    _share(out, "is/turn_entropy", s["turn_entropy/s"], s["turn_entropy/n"])
    _share(out, "is/mean_ratio_token", s["token/w"], s["token/n"])
    for name in ("k1", "k2", "k3"):
        _share(out, f"kl/mu_prox_{name}", s[name], s["token/n"])
    _share(out, "kl/prox_mu_is", s["is_k1"], s["token/n"])
    _summarize_weights(out, s, corrects)
    _share(out, "clip_share", s["clip/clipped"], s["clip/n"])
    for part in ("mismatch", "staleness"):
        _share(out, f"{part}/kl_k1", s[f"{part}/k1"], s[f"{part}/n"])
        _share(out, f"{part}/kl_k3", s[f"{part}/k3"], s[f"{part}/n"])
        _share(out, f"{part}/mean_abs", s[f"{part}/abs"], s[f"{part}/n"])
        if s[f"{part}/n"]:
            out[f"{part}/token_share"] = s[f"{part}/n"] / s["token/n"]
    _summarize_dropped(out, s)
    return out


def _summarize_weights(out: dict[str, float], s: Mapping[str, float], corrects: bool) -> None:
    if s["used/n"]:
        out["is/ess_frac"] = ess_fraction(s["used/n"], s["used/w"], s["used/w2"])
        out["is/mean_weight"] = s["used/w"] / s["used/n"]
    if corrects:
        signed = s["used/pos"] + s["used/neg"]
        _share(out, "is/truncated_share", s["used/changed_pos"] + s["used/changed_neg"], signed)
        _share(out, "is/truncated_share_pos", s["used/changed_pos"], s["used/pos"])
        _share(out, "is/truncated_share_neg", s["used/changed_neg"], s["used/neg"])
    elif s["used/n"]:
        out["is/truncated_share"] = 0.0


def _summarize_dropped(out: dict[str, float], s: Mapping[str, float]) -> None:
    turns, dropped = (sum(s[f"{part}/{name}"] for name, _ in LENGTHS) for part in ("length", "dropped"))
    _share(out, "dropped/turns_share", dropped, turns)
    _share(out, "dropped/mean_tokens", s["dropped/tokens"], dropped)
    _share(out, "kept/mean_tokens", s["kept/tokens"], turns - dropped)
    for name, _ in LENGTHS:
        _share(out, f"dropped/turns_len_{name}", s[f"dropped/{name}"], s[f"length/{name}"])


def _share(out: dict[str, float], name: str, part: float, whole: float) -> None:
    if whole:
        out[name] = part / whole


def _exp(log: Tensor) -> Tensor:
    return log.clamp(max=MAX_LOG_WEIGHT).exp()


def _sum(values: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, values, torch.zeros_like(values)).sum()


def _moments(name: str, values: Tensor, where: Tensor) -> dict[str, Tensor]:
    return {f"{name}/n": where.sum(), f"{name}/w": _sum(values, where), f"{name}/w2": _sum(values.square(), where)}
