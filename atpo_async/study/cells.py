"""A cell of a study: how it ended, its figures from its run's metrics, and its result file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from atpo_async.report.facts import GOAL, by_step, series
from atpo_async.run.metrics import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One figure of a cell."""

    key: str
    heading: str
    meaning: str
    digits: int = 2


WINDOW = 3
"""Steps over which sampled success is averaged: one step's trees are few."""

FINAL = "sampled"
"""The figure that the sentences are about."""

COLUMNS: tuple[Column, ...] = (
    Column(key="greedy", heading="greedy", meaning="greedy success on held-out tasks, after the last update"),
    Column(
        key="sampled",
        heading="sampled",
        meaning=f"sampled success in training, mean of the last {WINDOW} of the steps that every cell has",
    ),
    Column(key="area", heading="area", meaning="sampled success, mean over the same steps (area under the curve)"),
    Column(
        key="steps_to_goal",
        heading=f"steps to {GOAL:g}",
        meaning=f"first step whose mean of {WINDOW} steps' sampled success is {GOAL:g}; empty where never",
        digits=0,
    ),
    Column(key="ess_turn", heading="ESS/N, exact", meaning="effective sample size of the exact turn ratios prox/μ"),
    Column(key="ess_applied", heading="ESS/N, applied", meaning="of the weights as applied, at their own level"),
    Column(key="kl_k1", heading="KL k1", meaning="KL(μ‖prox) by token, nats, estimator k1", digits=4),
    Column(key="kl_k3", heading="KL k3", meaning="the same, estimator k3", digits=4),
    Column(key="truncated", heading="truncated", meaning="share of weights that were truncated or masked", digits=3),
    Column(
        key="dropped", heading="dropped", meaning="share of trees dropped unused, those without signal apart", digits=3
    ),
    Column(key="lag_mean", heading="lag, mean", meaning="measured over the turns trained on, versions"),
    Column(key="lag_max", heading="lag, max", meaning="the same, the largest", digits=0),
    Column(key="skipped_updates", heading="skipped", meaning="updates that a guard refused", digits=0),
    Column(key="seconds", heading="seconds", meaning="the cell's whole command", digits=0),
)
"""In the order of the table.  From ESS/N to the share truncated: means over the batches exactly as old as the lag."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Cell:
    """One training run of the grid."""

    lag: int
    """Learner versions; exact."""
    correction: str
    seed: int

    @property
    def name(self) -> str:
        """Of its run folder."""
        return f"lag{self.lag}-{self.correction.replace('+', '-')}-seed{self.seed}"

    @property
    def label(self) -> str:
        return f"lag {self.lag}, {self.correction}, seed {self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """How a cell ended."""

    cell: Cell
    status: Literal["done", "failed"]
    reason: str = ""
    """Why it failed, one line."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """By key of ``COLUMNS``; what is not known is left out."""
    curve: Sequence[tuple[int, float]] = ()
    """(step, sampled success)."""


def curve_of(records: Sequence[Record], *, steps: int) -> list[tuple[int, float]]:
    """(step, sampled success) in ascending order, up to ``steps``."""
    return [(s.step, s.value) for s in by_step(series(records, "train/success")) if s.step <= steps]


def steps_of(records: Iterable[Record]) -> int:
    """Batches that the learner has done."""
    return max((r.step for r in records if r.source == "learner"), default=0)


def figures_of(records: Sequence[Record], *, steps: int, lag: int) -> dict[str, float]:
    """The figures of a run that has ended, by key of ``COLUMNS``; the seconds are the caller's.

    Args:
        steps: over which success counts; the run makes ``lag`` more, which only use up what is under way.
        lag: of the cell; the first ``lag`` batches are younger, and left out of what depends on it.
    """
    found: dict[str, float] = {}
    curve = curve_of(records, steps=steps)
    success = [value for _, value in curve]
    evaluations = [s for s in by_step(series(records, "eval/success")) if s.step >= steps + lag]
    if evaluations:
        found["greedy"] = evaluations[-1].value
    if len(success) >= WINDOW:
        found["sampled"] = mean(success[-WINDOW:])
        smooth = [(curve[i][0], mean(success[i - WINDOW + 1 : i + 1])) for i in range(WINDOW - 1, len(curve))]
        reached = next((step for step, value in smooth if value >= GOAL), None)
        if reached is not None:
            found["steps_to_goal"] = reached
    if success:
        found["area"] = mean(success)
    exact = [r for r in records if r.step > lag]
    for key, name in (
        ("ess_turn", "is/ess_frac_turn"),
        ("ess_applied", "is/ess_frac"),
        ("kl_k1", "kl/mu_prox_k1"),
        ("kl_k3", "kl/mu_prox_k3"),
        ("truncated", "is/truncated_share"),
        ("lag_mean", "lag/mean"),
    ):
        values = [s.value for s in by_step(series(exact, name))]
        if values:
            found[key] = mean(values)
    largest = [s.value for s in series(records, "lag/max")]
    if largest:
        found["lag_max"] = max(largest)
    skipped = by_step(series(records, "guard/skipped_updates"))
    if skipped:
        found["skipped_updates"] = skipped[-1].value
    made = _total(records, "train/trees")
    if made:
        names = {name for r in records for name in r.metrics if name.startswith(("buffer/dropped_", "dropped/"))}
        found["dropped"] = sum(_total(records, name) for name in names) / made
    return {key: value for key, value in found.items() if math.isfinite(value)}


def unfinished(records: Sequence[Record], *, steps: int, lag: int, evaluates: bool) -> str | None:
    """Why a run that ended without an error gives no result; None if it does."""
    done, curve = steps_of(records), curve_of(records, steps=steps)
    if done < steps + lag:
        return f"it ended after {done} of {steps + lag} steps"
    lacking = [step for step in range(max(1, steps - WINDOW + 1), steps + 1) if step not in dict(curve)]
    if lacking or len(curve) < WINDOW:
        return f"sampled success is not known at step {lacking[0] if lacking else steps} of {steps}"
    if evaluates and not any(s.step >= steps + lag for s in series(records, "eval/success")):
        return "it ended without its last evaluation"
    return None


def _total(records: Sequence[Record], name: str) -> float:
    return sum(s.value for s in by_step(series(records, name)))


def mean(values: Sequence[float]) -> float:
    """Of one value at least."""
    return math.fsum(values) / len(values)


def to_json(result: CellResult) -> dict[str, Any]:
    return {
        "lag": result.cell.lag,
        "correction": result.cell.correction,
        "seed": result.cell.seed,
        "status": result.status,
        "reason": result.reason,
        "figures": dict(result.figures),
        "curve": [list(point) for point in result.curve],
    }


def from_json(data: Mapping[str, Any]) -> CellResult:
    """Raises KeyError, TypeError or ValueError for anything that ``to_json`` did not make."""
    status = data["status"]
    if status not in ("done", "failed"):
        raise ValueError(f"status {status!r}")
    return CellResult(
        cell=Cell(lag=int(data["lag"]), correction=str(data["correction"]), seed=int(data["seed"])),
        status=status,
        reason=str(data["reason"]),
        figures={str(key): float(value) for key, value in data["figures"].items()},
        curve=[(int(step), float(value)) for step, value in data["curve"]],
    )
