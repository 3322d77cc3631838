"""``epo``: the policy's entropy is held in a corridor around its mean over the run so far (EPO).

Source: EPO (arXiv 2509.22576, version 2), entropy-smoothing regularisation.  With the entropy bonus, whose coefficient
lambda is ``objective.entropy_coef``: L = L_policy - lambda (L_H - beta_k L_smooth).  In its released code the penalty
is a constant without gradient; here it is the hinge that the paper writes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from atpo_async.core.loss_traits import Needs, TermTraits, declares
from atpo_async.core.schedule import coefficient
from learner.loss.protocols import BatchStatistics, Measured, Now, StartTokens, TermLoss, TermTokens

if TYPE_CHECKING:
    from typing import Any

    from atpo_async.config import ObjectiveConfig


def check(
    settings: ObjectiveConfig, *, low: float = 0.5, high: float = 1.5, alpha: float = 0.1, decay: float = 1.0,
    steps: int = 0,
) -> None:  # fmt: skip
    """Raises ValueError for options out of range, and where there is no entropy bonus to be bounded."""
    if not 0 <= low < high:
        raise ValueError(f"low = {low} and high = {high} must be 0 <= low < high: the corridor, of the mean entropy")
    if not 0 < alpha < 0.5:
        raise ValueError(
            f"alpha = {alpha} must be above 0 and below 0.5: beta falls from 2, and beta * alpha must not be 1"
        )
    if not decay >= 0:
        raise ValueError(f"decay = {decay} must be >= 0")
    if steps < 0:
        raise ValueError(f"steps = {steps} must be 1 or more, or 0 for run.steps")
    if not settings.entropy_coef:
        raise ValueError(
            f"objective.entropy_coef = {settings.entropy_coef} is its lambda, and with 0 it does nothing: set "
            "--objective.entropy_coef 0.001, or take 'epo' out of objective.terms"
        )


def measure(tokens: StartTokens, batch: BatchStatistics, now: Now, settings: ObjectiveConfig, **_: Any) -> Measured:
    """The batch's mean entropy, and the plain mean of those of all batches before it: the corridor's middle."""
    assert tokens.entropy is not None
    mean, state = batch.mean(tokens.entropy), now.state
    count, total = state.get("count", 0.0), state.get("total", 0.0)
    values = {"entropy": mean, **({"anchor": total / count} if count else {})}
    return Measured(values=values, state={"count": count + 1, "total": total + mean})


def beta(step: int, num_steps: int, decay: float) -> float:
    """1 + exp(-decay k / k_mid), k_mid half the steps."""
    return 1 + math.exp(-decay * step / max(1, num_steps // 2))


@declares(
    TermTraits(
        needs=Needs(entropy=True, own_entropy=True),
        measure=measure,
        check=check,
        metrics=("band_low_share", "band_high_share"),
        corrected=False,
    )
)
def term(
    tokens: TermTokens, settings: ObjectiveConfig, *, low: float = 0.5, high: float = 1.5, alpha: float = 0.1,
    decay: float = 1.0, steps: int = 0,
) -> TermLoss:  # fmt: skip
    """lambda beta_k alpha (max(0, low Hbar - H_t) + max(0, H_t - high Hbar)); nothing in a run's first batch.

    Args:
        low, high: the corridor, in units of Hbar, the mean entropy of the batches so far.
        alpha: of the penalty; below 0.5.
        decay: gamma of beta_k, with which the penalty falls from twice its size.
        steps: K of beta_k; 0: ``run.steps``.
    """
    entropy, now = tokens.entropy, tokens.now
    assert entropy is not None
    anchor = now.measured.get("anchor")
    if anchor is None:
        none = entropy.detach().new_full(entropy.shape, math.nan)
        return TermLoss(loss=entropy * 0.0, metrics={"band_low_share": none, "band_high_share": none})
    below, above = low * anchor - entropy, entropy - high * anchor
    scale = coefficient(settings.entropy_coef, now.step) * beta(now.step, steps or now.num_steps, decay) * alpha
    return TermLoss(
        loss=scale * (below.clamp(min=0) + above.clamp(min=0)),
        metrics={
            "band_low_share": (below.detach() > 0).to(entropy.dtype),
            "band_high_share": (above.detach() > 0).to(entropy.dtype),
        },
    )
