"""When a run's success has collapsed, and what makes that less likely.  Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from atpo_async.config import Config

HIGH, LOW = 0.6, 0.1
"""A collapse: sampled success, mean of ``STEPS`` steps, was above the one and later is below the other."""
STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Collapse:
    """The first fall of a run's success from above ``HIGH`` to below ``LOW``."""

    best_step: int
    best: float
    step: int
    value: float

    def line(self, advice: str) -> str:
        """For the terminal and the report."""
        return (
            f"success has collapsed: from {self.best:.2f} at step {self.best_step} to {self.value:.2f} at step "
            f"{self.step} (sampled, mean of {STEPS} steps).  What to try: {advice}"
        )


class CollapseWatch:
    """Takes in sampled success step by step; a step that comes again, after a resume, counts as it came last."""

    def __init__(self) -> None:
        self._values: dict[int, float] = {}
        self._best: tuple[float, int] | None = None
        self.found: Collapse | None = None

    def feed(self, step: int, success: float) -> Collapse | None:
        """The collapse where this step has brought it; None otherwise, and after it."""
        self._values[step] = success
        recent = sorted(self._values)[-STEPS:]
        self._values = {at: self._values[at] for at in recent}
        if len(recent) < STEPS or self.found is not None:
            return None
        value = sum(self._values.values()) / STEPS
        if self._best is None or value > self._best[0]:
            self._best = (value, step)
        best, best_step = self._best
        if best <= HIGH or value >= LOW:
            return None
        self.found = Collapse(best_step=best_step, best=best, step=step, value=value)
        return self.found


def collapse_of(success: Iterable[tuple[int, float]]) -> Collapse | None:
    """The first collapse in (step, sampled success), in ascending order of steps."""
    watch = CollapseWatch()
    for step, value in success:
        watch.feed(step, value)
    return watch.found


def advice(config: Config) -> str:
    """What to try, most likely first; only what this configuration does not do already."""
    learner, correction = config.learner, config.correction
    found = [f"a lower learner.lr ({learner.lr:g} now, for instance --learner.lr {learner.lr / 2:g})"]
    if learner.schedule == "constant":
        found.append("--learner.schedule linear, which takes the learning rate to zero")
    found.append(
        f"a lower learner.max_grad_norm ({learner.max_grad_norm:g} now): one rare gradient may undo many updates"
    )
    if config.staleness.max_lag and correction.action == "none":
        found.append("--correction.action truncate, as older data are trained on uncorrected")
    elif config.staleness.max_lag:
        found.append(
            f"a lower staleness.max_lag ({config.staleness.max_lag} now), or --correction.exponent ess, which bounds "
            "the variance of the weights"
        )
    return "; ".join(found)
