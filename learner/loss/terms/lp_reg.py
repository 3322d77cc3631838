"""``lp-reg``: improbable tokens of bad turns that are no noise are held near a denoised copy of the policy (Lp-Reg).

Source: Lp-Reg (arXiv 2510.03222), equations of its section 4, with the estimator of its released code.  The denoised
copy of a distribution p keeps the tokens with p >= noise * max p, and scales them to a mass of 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from atpo_async.core.loss_traits import Needs, TermTraits, declares
from learner.loss.protocols import MAX_LOG_RATIO, BatchStatistics, Measured, Now, StartTokens, TermLoss, TermTokens

if TYPE_CHECKING:
    from typing import Any

    from atpo_async.config import ObjectiveConfig

PROXIES = ("prox", "policy")


def check(
    settings: ObjectiveConfig, *, coef: float = 1.0, noise: float = 0.02, share: float = 0.01, proxy: str = "prox",
    replace: bool = False,
) -> None:  # fmt: skip
    """Raises ValueError for options out of range."""
    if not coef >= 0:
        raise ValueError(f"coef = {coef} must be >= 0")
    if not 0 < noise < 1:
        raise ValueError(f"noise = {noise} must be between 0 and 1: the share of the largest probability, as 0.02")
    if not 0 < share <= 1:
        raise ValueError(f"share = {share} must be above 0 and at most 1: of the tokens of bad turns, as 0.01")
    if proxy not in PROXIES:
        raise ValueError(f"proxy = {proxy!r} is unknown; known: {', '.join(PROXIES)}")
    if replace and settings.token_weights:
        raise ValueError(
            f"replace = true with objective.token_weights = {list(settings.token_weights)}: what stands in the "
            "surrogate's place would not be weighed; set replace = false, or leave the token weights out"
        )


def needs(*, noise: float = 0.02, proxy: str = "prox", **_: Any) -> Needs:
    """The noise floor, of the policy that is denoised."""
    return Needs(min_p=noise) if proxy == "prox" else Needs(own_min_p=noise)


def measure(
    tokens: StartTokens, batch: BatchStatistics, now: Now, settings: ObjectiveConfig, *, share: float = 0.01, **_: Any
) -> Measured:
    """The log-prob up to which tokens of bad turns are improbable ones: a ``share`` of them, one at the least."""
    bad = tokens.advantage < 0
    number = max(1, math.floor(share * batch.count(bad)))
    return Measured(values={"threshold": batch.smallest(tokens.logp, number, bad)})


@declares(TermTraits(needs=needs, measure=measure, check=check, metrics=("selected_share", "noise_share", "gap", "k3")))
def term(
    tokens: TermTokens, settings: ObjectiveConfig, *, coef: float = 1.0, noise: float = 0.02, share: float = 0.01,
    proxy: str = "prox", replace: bool = False,
) -> TermLoss:  # fmt: skip
    """coef (exp(d) - 1 - d), d = log proxy - log pi, on selected tokens that are kept in the proxy and below it.

    Selected are the ``share`` of the whole batch's tokens with A < 0 whose probability at the batch's start is lowest;
    kept those whose probability is at least ``noise`` of the largest one at their place.

    Args:
        proxy: what is denoised: ``prox``, the policy at the batch's start (as the released scripts do), or ``policy``,
            the one being trained, as the paper writes it; then d is minus the log of the mass that is kept.
        replace: the surrogate's loss is left out at such tokens, and -s A stands in its place, without a clip, as in
            the released code.  Otherwise the term is added, and the surrogate's clip goes on.
    """
    start = tokens.start
    of_start = proxy == "prox"
    floor, logp = (start.min_p, start.logp) if of_start else (tokens.min_p, tokens.logp.detach())
    assert floor is not None
    selected = (tokens.advantage < 0) & (start.logp <= tokens.now.measured.get("threshold", -math.inf))
    kept = logp >= floor.top_logp + math.log(noise)
    target = logp - floor.log_mass
    acts = selected & kept & (target > tokens.logp.detach())
    # where before exp(): what a token without a target would give must not reach the gradient.
    gap = (target - tokens.logp).where(acts, tokens.logp.new_zeros(())).clamp(max=MAX_LOG_RATIO)
    pull = gap.exp() - 1 - gap
    loss = coef * pull
    if replace:
        loss = loss - (tokens.log_ratio.exp() * tokens.advantage).where(acts, tokens.logp.new_zeros(()))
    none = tokens.logp.new_full((), math.nan)
    return TermLoss(
        loss=loss,
        replaces=acts if replace else None,
        metrics={
            "selected_share": selected.to(pull.dtype),
            "noise_share": (~kept).to(pull.dtype).where(selected, none),
            "gap": gap.detach().where(acts, none),
            "k3": pull.detach().where(acts, none),
        },
    )
