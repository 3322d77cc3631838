"""When an update is refused: a loss or gradient that is not finite, or a gradient far larger than usual.  Pure.

Ranks must agree: one that takes a step which another skips holds other weights from then on.  So every decision here
is taken from global numbers alone, the loss added up over the ranks and the norm of the whole gradient, and from a
history of such numbers; no rank's own trees enter into it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from atpo_async.core.errors import AtpoError

WINDOW = 50
"""Gradient norms that the running median is over."""
WARM = 10
"""Norms before the guard refuses any: the first updates of a run have nothing to be compared with."""


class UpdatesRefused(AtpoError):
    """Too many updates in a row had to be skipped; the message has the reason and the folder of the batches."""


@dataclass(frozen=True, slots=True)
class GradNorms:
    """The last gradient norms, before clipping, whose median is the usual one.

    The norm of an update that was skipped as a spike enters as well.  Rare spikes hardly move a median, so what is
    usual stays; but where gradients are larger from some update on, and for good, the median follows once such norms
    are half of the window.  If they were left out, the median would stay for ever at a size that never occurs again,
    and every update would be skipped.  For the same reason slow growth passes: a norm that doubles every ``WINDOW``
    updates is never a spike.
    """

    norms: tuple[float, ...] = ()
    """At most ``WINDOW``, oldest first, each finite and above zero."""

    @classmethod
    def of(cls, norms: Iterable[float]) -> GradNorms:
        """From recorded ``norms``, oldest first."""
        history = cls()
        for norm in norms:
            history = history.after(float(norm))
        return history

    @property
    def median(self) -> float | None:
        """Of the window; None while there are fewer than ``WARM``."""
        return statistics.median(self.norms) if len(self.norms) >= WARM else None

    def after(self, norm: float) -> GradNorms:
        """With one more.

        A norm that is not finite, or zero (of a batch without signal), is left out: neither shows what is usual.
        """
        if not math.isfinite(norm) or norm <= 0:
            return self
        return GradNorms((*self.norms, norm)[-WINDOW:])

    def spike(self, norm: float, factor: float | None) -> str | None:
        """Why ``norm`` is no usual one: more than ``factor`` running medians.  None if it is, or ``factor`` is None."""
        median = self.median
        if factor is None or median is None or not norm > factor * median:
            return None
        return (
            f"gradient norm is {norm:.4g}, {norm / median:.4g} times the median {median:.4g} of the last "
            f"{len(self.norms)} (learner.max_grad_spike = {factor:g})"
        )


def fault(*, loss: float, grad_norm: float, history: GradNorms, max_spike: float | None) -> str | None:
    """Why an update must not be applied; None if it may.

    Args:
        loss: of the whole batch, added up over the ranks.
        grad_norm: of the whole gradient, before clipping.
        history: the norms before this one.
        max_spike: running medians that a norm may reach; None: any finite norm is fine.
    """
    if not math.isfinite(loss):
        return f"loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"gradient norm is {grad_norm}"
    return history.spike(grad_norm, max_spike)


def overflowed(*, loss: float, grad_norm: float, scale: float | None) -> bool:
    """Whether a gradient is not finite because of fp16's loss scale: the scale falls, and the batch is not at fault.

    Args:
        loss: of the whole batch, unscaled.
        grad_norm: of the whole gradient.
        scale: of the loss in the backward passes; None without fp16.  Once it is 1 or less, it is not the cause.
    """
    return scale is not None and scale > 1 and math.isfinite(loss) and not math.isfinite(grad_norm)


@dataclass(frozen=True, slots=True)
class SkipCount:
    """How many updates were skipped."""

    in_a_row: int = 0
    total: int = 0

    def after(self, reason: str | None) -> SkipCount:
        """The count after one update that was applied (None) or skipped."""
        return SkipCount(0, self.total) if reason is None else SkipCount(self.in_a_row + 1, self.total + 1)

    def check(self, reason: str, *, limit: int, kept_in: str, checkpoint: str | None = None) -> None:
        """Stop the run once ``limit`` updates in a row were skipped.

        Args:
            reason: of the last one.
            limit: ``learner.max_skipped_updates``.
            kept_in: folder of the batches.
            checkpoint: the newest; None where its path is not known.

        Raises:
            UpdatesRefused
        """
        if self.in_a_row >= limit:
            raise UpdatesRefused(
                f"{self.in_a_row} updates in a row were skipped (learner.max_skipped_updates = {limit}), the last one "
                f"because its {reason}; the batches are kept in {kept_in}; no skipped update has changed a weight, so "
                f"{checkpoint or 'the last checkpoint'} is good and the run goes on from it: lower learner.lr or look "
                "into those batches, and if gradients of this size are right, raise learner.max_grad_spike (none: off)"
            )
