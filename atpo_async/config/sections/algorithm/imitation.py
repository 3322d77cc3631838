"""Imitation of the policy's own good chains: which are kept, how many go with a batch, how much they count."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from atpo_async.config.sections.base import Section
from atpo_async.config.sections.coefficients import NonNegative
from atpo_async.core.schedule import coefficient


def _whole_from_one_on(value: float) -> float:
    if value > 1 and value != int(value):
        reason = f"from 1 on a whole number of rows, below 1 a share of the batch's leaves, got {value:g}"
        raise PydanticCustomError("door", "{reason}", {"reason": f"imitation.per_batch: {reason}"})
    return value


class ImitationConfig(Section):
    """Leaves that did better than their tree, kept past their tree's use and trained on again (SPEAR, arXiv
    2509.22601; docs/ALGORITHM.md, "Imitation").
    """

    rows: int = Field(0, ge=0, le=1_000_000, description="leaves (paths from the prompt) kept at most; 0: no imitation")
    max_lag: int = Field(10, ge=1, description="versions: a row leaves when its oldest turn is older")
    max_uses: int = Field(1, ge=1, description="how often a row is served")
    per_batch: Annotated[float, AfterValidator(_whole_from_one_on)] = Field(
        0.25, gt=0, description="rows with each batch: a number, or below 1 a share of the batch's leaves"
    )
    coef: NonNegative = Field(
        1.0, description="of the rows' mean loss, which is added to the batch's; a number or a schedule"
    )
    history: int = Field(10240, ge=1, description="trees whose mean and deviation of rewards a row is judged by")
    bytes_share: float = Field(
        0.25, gt=0, le=0.5, description="of buffer.max_bytes: turns held for rows only; past it the oldest rows go"
    )

    clip_cov: float = Field(
        0.0, ge=0, le=1, description="share of the rows' tokens left out at random among those that covary (Clip-Cov)"
    )
    clip_cov_low: float = Field(1.0, description="of (A - mean A)(log p - its mean), above which a token may be drawn")
    clip_cov_high: float = Field(40.0, description="and below which")

    def coef_at(self, step: int) -> float:
        """The rows' weight at a step of the learner."""
        return coefficient(self.coef, step)

    def wanted(self, num_leaves: int) -> int:
        """Rows that go with a batch of ``num_leaves``; none with one without leaves."""
        if not num_leaves:
            return 0
        return int(self.per_batch) if self.per_batch >= 1 else max(1, math.floor(self.per_batch * num_leaves + 0.5))
