"""Off-policy correction: importance weights between mu (sampled) and prox (proximal), and what they tell of staleness.

Source: ALGORITHM, section 4.  d_t = prox_t - mu_t is the log-ratio of a token, S = sum of d_t over a unit (token, turn,
prefix: the path down to a turn and that turn, sequence), the weight is exp(lambda S), bounded or masked, without
gradient.  Tokens that do not count (stale turns) add nothing to S.

Diagnostics are additive: every function gives sums that can be added over micro-batches and ranks (``SUMS`` names the
places of one vector), and ``summary`` turns the total into metrics.  Shapes as in ``objective``.

Numbers that are not finite: an infinite log-ratio weighs as one of MAX_TOKEN_LOG_RATIO nats; NaN stays NaN, so that the
loss shows it and the update is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atpo_async.config import CorrectionConfig
from atpo_async.core.vocabulary import Level
from learner.loss.objective import num_units, prefix_sum, spread, unit_mean, unit_sum, units

MAX_TOKEN_LOG_RATIO = 1e3
"""Of a token, nats: keeps sums over units finite; beyond anything that two real policies differ by."""
MAX_LOG_WEIGHT = 30.0
"""Keeps exp() and its square finite in float32."""
LENGTHS: tuple[tuple[str, int], ...] = (("1-8", 8), ("9-32", 32), ("33-128", 128), ("129-512", 512), ("over-512", 0))
"""Turn lengths told apart by ``dropped/turns_len_*``: name and largest number of action tokens; the last has none."""


@dataclass(frozen=True, slots=True)
class Tempering:
    """What the whole batch decides about its weights."""

    scale: float = 1.0
    """Multiplies lambda."""
    max_abs: float = math.inf
    """m2po keeps tokens whose |lambda S| is at most this."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Off-policy weights."""

    per_token: Tensor
    """Shape of the tokens; 0 where the unit is masked or the place holds none."""
    per_unit: Tensor
    """float[U] at the level in use."""
    changed: Tensor
    """bool[U]: bounded or masked."""


def needs_batch(settings: CorrectionConfig) -> bool:
    """Whether the weights depend on the whole batch before its first step (``batch_log_ratios``, ``temper``)."""
    return settings.action != "none" and (settings.exponent == "ess" or settings.action == "m2po")


def unit_log_ratio(numerator: Tensor, mu: Tensor, turn: Tensor, row: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """float[U], float[U]: S of each unit, and its number of tokens."""
    unit = units(level, turn, row)
    count = num_units(unit)
    difference = _difference(numerator, mu)
    total, length = unit_sum(difference, unit, count), unit_sum(torch.ones_like(difference), unit, count)
    if level == "prefix":
        return prefix_sum(total, turn, row), prefix_sum(length, turn, row)
    return total, length


def importance_weights(
    numerator: Tensor,
    mu: Tensor,
    advantage: Tensor,
    turn: Tensor,
    row: Tensor,
    settings: CorrectionConfig,
    tempering: Tempering = Tempering(),
) -> Weights:
    """w = sg of exp(lambda S), bounded or masked as ``settings`` say.

    Args (tensors of one shape):
        numerator: log-probs of prox, or of the policy being trained where ``correction.numerator`` says so.
        mu: log-probs of the behaviour policy.
        advantage: of the token's turn; topr asks for its sign.
        turn, row: as in ``objective``.
        settings: action, level, exponent, bounds, gate.
        tempering: from ``temper``, where the whole batch was asked.
    """
    unit = units(settings.level, turn, row)
    count = num_units(unit)
    if settings.action == "none":
        ones = numerator.new_ones(count)
        return Weights(spread(ones, unit), ones, torch.zeros_like(ones, dtype=torch.bool))
    log_weight = _log_weight(numerator, mu, turn, row, settings)
    kept, changed = _bounded(log_weight * tempering.scale, settings)
    if settings.action == "m2po":
        far = log_weight.abs() > tempering.max_abs
        kept, changed = kept.masked_fill(far, 0.0), changed | far
    per_token = spread(kept, unit)
    if settings.action == "topr":
        good = (turn >= 0) & (advantage >= 0)
        per_token = torch.where(good, torch.ones_like(per_token), per_token)
        all_good = _all(good, unit, count)
        kept, changed = kept.masked_fill(all_good, 1.0), changed & ~all_good
    if settings.gate is not None:
        drift = unit_mean(_difference(numerator, mu), turn, num_units(turn))
        gated = spread(drift.abs() > settings.gate, turn)
        per_token = per_token.masked_fill(gated, 0.0)
        all_gated = _all(gated, unit, count)
        kept, changed = kept.masked_fill(all_gated, 0.0), changed | all_gated
    return Weights(per_token, kept, changed)


def _difference(numerator: Tensor, mu: Tensor) -> Tensor:
    return (numerator - mu).detach().clamp(-MAX_TOKEN_LOG_RATIO, MAX_TOKEN_LOG_RATIO)


def _log_weight(numerator: Tensor, mu: Tensor, turn: Tensor, row: Tensor, settings: CorrectionConfig) -> Tensor:
    """float[U]: lambda S before tempering."""
    total, length = unit_log_ratio(numerator, mu, turn, row, settings.level)
    if settings.exponent == "geometric":
        return total / length.clamp(min=1)
    return total * settings.exponent_value if settings.exponent == "fixed" else total


def _bounded(log_weight: Tensor, settings: CorrectionConfig) -> tuple[Tensor, Tensor]:
    """The weights as applied, and where that is not exp(log_weight)."""
    exact = log_weight.clamp(max=MAX_LOG_WEIGHT).exp()
    changed = (exact > settings.cap) | (exact < settings.floor)
    if settings.action == "mask" or settings.action == "icepop":
        return exact.masked_fill(changed, 0.0), changed
    return exact.clamp(settings.floor, settings.cap), changed


def _all(where: Tensor, unit: Tensor, count: int) -> Tensor:
    """bool[count]: units whose every token is in ``where``."""
    return unit_mean(where.double(), unit, count) == 1


def batch_log_ratios(
    prox: Tensor, mu: Tensor, turn: Tensor, row: Tensor, counted: Tensor, settings: CorrectionConfig
) -> Tensor:
    """float64[U]: lambda S before tempering of each unit at the level in use; what ``temper`` takes, concatenated.

    Args:
        prox, mu, turn, row: of one micro-batch.
        counted: bool; false for tokens of a turn that another row has counted already.  A sequence always counts.
        settings: level and exponent.
    """
    unit = units(settings.level, turn, row)
    log_weight = _log_weight(prox, mu, turn, row, settings)
    return log_weight[_present(settings.level, turn, unit, counted, log_weight.shape[0])].double()


def temper(log_ratios: Tensor, settings: CorrectionConfig) -> Tempering:
    """What a batch's weights need so that they keep an effective sample size, or a second moment.

    ``exponent = ess``: the largest scale up to 1 with ESS(exp(scale S)) / N >= ``ess_target``.  ``action = m2po``: the
    |log-ratio| below which the mean square is at most ``m2_limit``; those that tie at the border go together.
    Otherwise the guard: the weights as applied, bounds included, keep ``ess_floor``, if any scale gives them that.

    Args:
        log_ratios: float[U], ``batch_log_ratios`` of all micro-batches and ranks.  Infinite ones and NaN are left out.

    The guard looks at ratios alone: it knows nothing of ``gate``, and takes TOPR's weights as if every A were negative,
    so there it may temper more than it must.
    """
    logs = log_ratios.detach().double().cpu()
    logs = logs[logs.isfinite()]
    if settings.action == "none" or not logs.numel():
        return Tempering()
    if settings.action == "m2po":
        return Tempering(max_abs=_m2_threshold(logs, settings.m2_limit))
    if settings.exponent == "ess":
        return Tempering(scale=_largest(lambda scale: _exact_share(logs * scale), settings.ess_target))
    return Tempering(
        scale=_largest(lambda scale: effective_share(_bounded(logs * scale, settings)[0]), settings.ess_floor)
    )


def _largest(share: Callable[[float], float], target: float) -> float:
    """The largest scale up to 1 whose ``share`` is at least ``target``, to 1e-15; 1 where not even 0 will do."""
    if share(1.0) >= target or share(0.0) < target:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) >= target else (low, middle)
    return low


def _exact_share(logs: Tensor) -> float:
    """ESS / N of exp(logs), however large they are."""
    return effective_share((logs - logs.max()).exp())


def _m2_threshold(logs: Tensor, limit: float) -> float:
    """The largest |log| up to which, itself included, the mean square is at most ``limit``; 0 if there is none."""
    size = logs.abs().sort().values
    mean = size.square().cumsum(0) / torch.arange(1, len(size) + 1)
    last_of_its_kind = torch.cat([size[1:] > size[:-1], torch.ones(1, dtype=torch.bool)])
    fine = size[last_of_its_kind & (mean <= limit)]
    return float(fine[-1]) if len(fine) else 0.0


def interpolated_prox(logp_theta: Tensor, mu: Tensor, lag: Tensor) -> Tensor:
    """Proximal log-probs without a pass of their own: log-linear between mu and the policy by version.

    Of the lag + 1 versions that lie between the one that sampled a token and the one that this step makes, the
    proximal policy is the last but one: prox = mu + lag / (lag + 1) (theta - mu).  At lag 0 it is mu.

    Args:
        logp_theta: log-probs of the policy being trained; its gradient is not used.
        mu: log-probs of the behaviour policy.
        lag: int64, versions; negative ones count as 0.
    """
    behind = lag.clamp(min=0).to(mu.dtype)
    return mu + behind / (behind + 1) * (logp_theta.detach() - mu)


def effective_share(weights: Tensor) -> float:
    """ESS / N = (sum w)^2 / (N sum w^2), in (0, 1]; 0 where every weight is 0."""
    return _ess(weights.numel(), float(weights.double().sum()), float(weights.double().square().sum()))


_LEVELS: tuple[Level, ...] = ("token", "turn", "prefix", "sequence")
SUMS: tuple[str, ...] = (
    *(f"{level}/{name}" for level in _LEVELS for name in ("n", "w", "w2")),
    "turn/s", "turn/s2",
    "k1", "k2", "k3", "is_k1",
    "used/n", "used/w", "used/w2", "used/pos", "used/neg", "used/changed_pos", "used/changed_neg",
    "clip/n", "clip/clipped",
    *(f"{part}/{name}" for part in ("mismatch", "staleness") for name in ("n", "k1", "k3", "abs")),
    "dropped/tokens", "kept/tokens",
    *(f"{part}/{name}" for part in ("length", "dropped") for name, _ in LENGTHS),
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
    lag: Tensor,
    clipped: Tensor,
    weights: Weights,
    settings: CorrectionConfig,
) -> Tensor:
    """float64[len(SUMS)] of one micro-batch.

    Args:
        counted: bool; false for tokens of a turn that another row has counted already.
        lag: int64, versions between the one that sampled the token and the one being trained.  What differs at lag 0
            is the engine, not the age.
        clipped: bool, from the objective.
    """
    difference = _difference(prox.double(), mu.double())
    counts = turn >= 0
    once = counts & counted
    found: dict[str, Tensor] = {}
    for level in _LEVELS:
        log_ratio, length = unit_log_ratio(prox.double(), mu.double(), turn, row, level)
        unit = units(level, turn, row)
        present = _present(level, turn, unit, counted, log_ratio.shape[0])
        found |= _moments(level, _exp(log_ratio), present)
        if level == "turn":
            found["turn/s"], found["turn/s2"] = _sum(log_ratio, present), _sum(log_ratio.square(), present)
            found |= _dropped(length, present, weights, turn)
        if level == settings.level:
            sign = unit_mean(advantage.double(), unit, log_ratio.shape[0])
            found |= _moments("used", weights.per_unit.double(), present)
            for name, where in (("pos", present & (sign > 0)), ("neg", present & (sign < 0))):
                found[f"used/{name}"], found[f"used/changed_{name}"] = where.sum(), (where & weights.changed).sum()
    k3 = _exp(difference) - 1 - difference
    found["k1"], found["k2"], found["k3"] = (_sum(k, once) for k in (-difference, difference.square() / 2, k3))
    found["is_k1"] = _sum(_exp(difference) * difference, once)
    found["clip/n"], found["clip/clipped"] = once.sum(), (clipped & once).sum()
    for part, where in (("mismatch", once & (lag == 0)), ("staleness", once & (lag > 0))):
        found[f"{part}/n"], found[f"{part}/abs"] = where.sum(), _sum(difference.abs(), where)
        found[f"{part}/k1"], found[f"{part}/k3"] = _sum(-difference, where), _sum(k3, where)
    return torch.stack([found[name].double() for name in SUMS])


def _dropped(length: Tensor, present: Tensor, weights: Weights, turn: Tensor) -> dict[str, Tensor]:
    """Turns by length, and those whose every token got weight 0."""
    kept = unit_sum((weights.per_token != 0).double(), turn, length.shape[0]) > 0
    dropped = present & ~kept
    edges = torch.tensor([longest for _, longest in LENGTHS[:-1]], dtype=length.dtype, device=length.device)
    bucket = torch.bucketize(length, edges)
    found = {"dropped/tokens": _sum(length, dropped), "kept/tokens": _sum(length, present & kept)}
    for i, (name, _) in enumerate(LENGTHS):
        here = bucket == i
        found[f"length/{name}"], found[f"dropped/{name}"] = (here & present).sum(), (here & dropped).sum()
    return found


def summary(total: Sequence[float], settings: CorrectionConfig) -> dict[str, float]:
    """Metrics from the added-up sums; names whose denominator is 0 are left out.

    ``is/ess_frac``: of the weights as applied, at the level in use.  ``is/ess_frac_token|turn|prefix|sequence``: of the
    exact ratios; ``is/ess_frac_turn_lognormal``: what it would be were the turns' log-ratios normal, exp(-variance).
    ``kl/mu_prox_*``: KL(mu || prox) by token, estimators k1, k2, k3; ``kl/prox_mu_is``: KL(prox || mu), by importance
    sampling.  ``is/chi2_*``: mean squared ratio - 1.  ``mismatch/*``: of tokens at lag 0, ``staleness/*``: of older
    ones.  ``dropped/*``: turns that the correction weighs with 0, as a share of the turns (of their length).
    """
    s = dict(zip(SUMS, total, strict=True))
    out: dict[str, float] = {}
    for level in _LEVELS:
        n = s[f"{level}/n"]
        if n:
            out[f"is/ess_frac_{level}"] = _ess(n, s[f"{level}/w"], s[f"{level}/w2"])
            out[f"is/chi2_{level}"] = s[f"{level}/w2"] / n - 1
    if s["turn/n"]:
        mean = s["turn/s"] / s["turn/n"]
        # Rounding must not make a variance of 0 a negative one.
        out["is/ess_frac_turn_lognormal"] = math.exp(min(mean * mean - s["turn/s2"] / s["turn/n"], 0.0))
    _share(out, "is/mean_ratio_token", s["token/w"], s["token/n"])
    for name in ("k1", "k2", "k3"):
        _share(out, f"kl/mu_prox_{name}", s[name], s["token/n"])
    _share(out, "kl/prox_mu_is", s["is_k1"], s["token/n"])
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
    for part in ("mismatch", "staleness"):
        _share(out, f"{part}/kl_k1", s[f"{part}/k1"], s[f"{part}/n"])
        _share(out, f"{part}/kl_k3", s[f"{part}/k3"], s[f"{part}/n"])
        _share(out, f"{part}/mean_abs", s[f"{part}/abs"], s[f"{part}/n"])
        if s[f"{part}/n"]:
            out[f"{part}/token_share"] = s[f"{part}/n"] / s["token/n"]
    turns, dropped = (sum(s[f"{part}/{name}"] for name, _ in LENGTHS) for part in ("length", "dropped"))
    _share(out, "dropped/turns_share", dropped, turns)
    _share(out, "dropped/mean_tokens", s["dropped/tokens"], dropped)
    _share(out, "kept/mean_tokens", s["kept/tokens"], turns - dropped)
    for name, _ in LENGTHS:
        _share(out, f"dropped/turns_len_{name}", s[f"dropped/{name}"], s[f"length/{name}"])
    return out


def _share(out: dict[str, float], name: str, part: float, whole: float) -> None:
    if whole:
        out[name] = part / whole


def _ess(n: float, total: float, squares: float) -> float:
    return total * total / (n * squares) if n and squares > 0 else 0.0


def _exp(log: Tensor) -> Tensor:
    return log.clamp(max=MAX_LOG_WEIGHT).exp()


def _sum(values: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, values, torch.zeros_like(values)).sum()


def _moments(name: str, values: Tensor, where: Tensor) -> dict[str, Tensor]:
    return {f"{name}/n": where.sum(), f"{name}/w": _sum(values, where), f"{name}/w2": _sum(values.square(), where)}


def _present(level: Level, turn: Tensor, unit: Tensor, counted: Tensor, count: int) -> Tensor:
    """bool[U]: units with at least one token counted here; a sequence is counted wherever it has one that counts."""
    here = turn >= 0
    if level != "sequence":
        here = here & counted
    return unit_sum(here.double(), unit, count) > 0
