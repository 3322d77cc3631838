"""Numbers of a distribution over the vocabulary from its logits, and the gradient of the logits.

On CUDA both are compiled: one kernel reads the logits and writes a few numbers a token, another writes the gradient in
the precision that the matrix products take.  Elsewhere the same lines run one by one.

With z the logits at the policy's temperature, p = softmax(z), ell = log p of the target and H the entropy:
d ell / dz = onehot - p and dH / dz = -p (log p + H).

Shapes: N tokens, V vocabulary, R numbers of a token.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learner.kernels.variants import raise_limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which numbers of a token, one line of the result each, in this order after the log-prob of the target."""

    entropy: bool = False
    """Of the whole distribution, nats; with its gradient."""
    min_p: float | None = None
    """Two numbers without a gradient, of the tokens whose probability is at least this share of the largest one: the
    log of their mass, and the largest log-prob.  Lp-Reg's target for a kept token is its log-prob less that mass, and a
    target takes no gradient; a token is kept if its log-prob is at least log(min_p) below the largest."""

    @property
    def with_gradient(self) -> int:
        """How many numbers have one; they come first."""
        return 1 + self.entropy

    @property
    def without_gradient(self) -> int:
        return 0 if self.min_p is None else 2

    @property
    def temporaries(self) -> int:
        """Tensors of the logits' size that computing them holds at once, where it is not compiled."""
        return 1 + (self.entropy or self.min_p is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """How logits are read."""

    scale: float
    """Of the logits: one over the temperature."""
    wanted: Wanted
    compiled: bool = False
    """The lines below as compiled kernels (CUDA)."""

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result; its first argument is the logits."""
        if not (self.compiled and len(arguments[0])):
            return function(*arguments)
        raise_limit()
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.dim():
                # Batches differ in their number of tokens; the vocabulary stays a constant.
                torch._dynamo.maybe_mark_dynamic(argument, 0)
        return _compiled(function)(*arguments)

    def scale_on(self, logits: Tensor) -> Tensor | None:
        """As a tensor, so that another temperature is no other kernel; None for 1."""
        if self.scale == 1.0:
            return None
        return torch.full((), self.scale, dtype=_wide_dtype(logits), device=logits.device)


@dataclass(slots=True, kw_only=True)
class Measured:
    """What a forward pass keeps of a token's logits."""

    found: Tensor
    """float[R, N], those with a gradient."""
    extra: Tensor
    """float[R', N], those without."""
    log_sum: Tensor
    """float[N]: log of the sum of the exponentials of z."""


def measured(logits: Tensor, target: Tensor, scoring: Scoring) -> Measured:
    """The numbers that are wanted, in float32 (float64 of float64 logits).

    Args:
        logits: float[N, V], before the temperature.
        target: int64[N].

    Raises:
        RuntimeError: a target lies outside the vocabulary (on CUDA an assertion of the device).
    """
    wanted, scale = scoring.wanted, scoring.scale_on(logits)
    # Outside the compiled part: only this indexing checks its bounds everywhere.
    picked = logits.gather(-1, target[:, None])[:, 0].to(_wide_dtype(logits))
    floor = None if wanted.min_p is None else math.log(wanted.min_p)
    top, log_total, *rest = scoring.run(_reductions, logits, scale, wanted.entropy, floor)
    logp, log_sum = picked - top, top
    if scale is not None:
        logp, log_sum = logp * scale, log_sum * scale
    found = [logp - log_total, *rest[: int(wanted.entropy)]]
    extra = [*rest[int(wanted.entropy) :], -log_total][: wanted.without_gradient]
    return Measured(
        found=torch.stack(found),
        extra=torch.stack(extra) if extra else logits.new_empty((0, len(logits)), dtype=logp.dtype),
        log_sum=log_sum + log_total,
    )


def logit_gradient(
    logits: Tensor,
    target: Tensor,
    scoring: Scoring,
    *,
    found: Tensor,
    log_sum: Tensor,
    given: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of the logits, before the temperature.

    Args:
        logits, target, found, log_sum: as ``measured`` took and gave them.
        given: float[R, N], the gradient of each number.
        dtype: of the result.
    """
    logp, scale = found[0], scoring.scale
    of_logp = given[0] * scale
    of_entropy = given[1] * scale if scoring.wanted.entropy else None
    entropy = found[1] if scoring.wanted.entropy else None
    # The target's own place apart, in full precision: 1 - p loses its digits where p is near 1.
    at_target = of_logp * -torch.expm1(logp)
    if of_entropy is not None and entropy is not None:
        at_target = at_target - of_entropy * logp.exp() * (logp + entropy)
    found_gradient: Tensor = scoring.run(
        _others_gradient, logits, scoring.scale_on(logits), log_sum, of_logp, of_entropy, entropy, dtype
    )
    return found_gradient.scatter_(1, target[:, None], at_target[:, None].to(found_gradient.dtype))


def _reductions(logits: Tensor, scale: Tensor | None, with_entropy: bool, log_min_p: float | None) -> list[Tensor]:
    """The largest logit, before the temperature; log of the sum of exponentials above it; entropy; log of kept mass."""
    wide = logits.to(_wide_dtype(logits))
    top = wide.amax(-1)
    below = wide - top[:, None]
    if scale is not None:
        below = below.mul_(scale)
    more = with_entropy or log_min_p is not None
    weights = below.exp() if more else below.exp_()
    total = weights.sum(-1)
    log_total = total.log()
    kept = []
    if log_min_p is not None:
        kept.append(torch.where(below >= log_min_p, weights, 0.0).sum(-1).log() - log_total)
    if with_entropy:
        return [top, log_total, log_total - weights.mul_(below).sum(-1) / total, *kept]
    return [top, log_total, *kept]


def _others_gradient(
    logits: Tensor,
    scale: Tensor | None,
    log_sum: Tensor,
    of_logp: Tensor,
    of_entropy: Tensor | None,
    entropy: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of every logit as if it were not the target's."""
    wide = logits.to(_wide_dtype(logits))
    logp = wide - log_sum[:, None] if scale is None else (wide * scale).sub_(log_sum[:, None])
    if of_entropy is None or entropy is None:
        return logp.exp_().mul_(-of_logp[:, None]).to(dtype)
    chances = logp.exp()
    factors = logp.add_(entropy[:, None]).mul_(-of_entropy[:, None]).sub_(of_logp[:, None])
    return chances.mul_(factors).to(dtype)


class TokenNumbers(torch.autograd.Function):
    """``measured`` with its gradient, keeping nothing of the logits' size but the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
        numbers = measured(logits, target, scoring)
        ctx.scoring = scoring
        ctx.save_for_backward(logits, target, numbers.found, numbers.log_sum)
        ctx.mark_non_differentiable(numbers.extra)
        return numbers.found, numbers.extra

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        logits, target, found, log_sum = ctx.saved_tensors
        gradient = logit_gradient(
            logits, target, ctx.scoring, found=found, log_sum=log_sum, given=given, dtype=logits.dtype
        )
        return gradient, None, None


def _wide_dtype(logits: Tensor) -> torch.dtype:
    return logits.dtype if logits.dtype == torch.float64 else torch.float32


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function, fullgraph=True)
    return compiled
