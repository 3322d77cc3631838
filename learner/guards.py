"""What stops a bad update.  Pure decisions; the loop acts on them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from atpo_async.errors import AtpoError


class UpdatesRefused(AtpoError):
    """Too many updates in a row had to be skipped; the message says why and where the batches are."""


def fault(*, loss: float, grad_norm: float) -> str | None:
    """Why an update must not be applied; None if it may."""
    if not math.isfinite(loss):
        return f"loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"gradient norm is {grad_norm}"
    return None


@dataclass(frozen=True, slots=True)
class SkipCount:
    """How many updates were skipped."""

    in_a_row: int = 0
    total: int = 0

    def after(self, reason: str | None) -> SkipCount:
        """The count after one update that was applied (None) or skipped."""
        return SkipCount(0, self.total) if reason is None else SkipCount(self.in_a_row + 1, self.total + 1)

    def check(self, reason: str, *, limit: int, kept_in: str) -> None:
        """Raises UpdatesRefused once ``limit`` updates in a row were skipped."""
        if self.in_a_row >= limit:
            raise UpdatesRefused(
                f"{self.in_a_row} updates in a row were skipped (learner.max_skipped_updates = {limit}), the last one "
                f"because its {reason}; the batches are kept in {kept_in}, the last checkpoint is good; lower "
                "learner.lr or look into those batches"
            )
