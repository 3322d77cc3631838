"""The report of one batch's updates, and the exception of a batch that is abandoned before any."""

from __future__ import annotations

from dataclasses import dataclass


class Abandoned(Exception):
    """The batch was given up between two forward passes because the role is stopping; no weight has changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """The outcome of one batch."""

    metrics: dict[str, float]
    """Global, the same on every rank."""
    priorities: dict[str, float]
    """Of this rank's trees."""
    trained: frozenset[str]
    """Ids of this rank's trees that were fit to train on."""
    fault: str | None
    """Why an update of this batch was skipped."""
    warnings: tuple[str, ...] = ()
    """One line for each tree of this rank that was left out."""
