"""A cell of a study: how it ended, its figures from its run's metrics, and its result file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from atpo_async.report.collapse import collapse_of
from atpo_async.report.facts import GOAL, by_step, series
from atpo_async.run.metrics import Record
from atpo_async.study.grid.names import LAG, label, slug
from atpo_async.study.results.statistics import mean


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

AT_TOKENS = "at_tokens"
"""The figure that the sentences are about where success is compared at equal tokens."""

COLUMNS: tuple[Column, ...] = (
    Column(key="greedy", heading="greedy", meaning="greedy success on held-out tasks, after the last update"),
    Column(
        key="sampled",
        heading="sampled",
        meaning=f"sampled success in training, mean of the last {WINDOW} steps of which it is known of every cell",
    ),
    Column(key="area", heading="area", meaning="sampled success, mean of all steps so far (area under the curve)"),
    Column(
        key=AT_TOKENS,
        heading="at equal tokens",
        meaning=f"sampled success, mean of {WINDOW} steps, when so many action tokens had been sampled as every cell "
        "of the task sampled in all",
    ),
    Column(
        key="steps_to_goal",
        heading=f"steps to {GOAL:g}",
        meaning=f"first step whose mean of {WINDOW} steps' sampled success is {GOAL:g}; empty where never",
        digits=0,
    ),
    Column(
        key="tokens_to_goal",
        heading=f"tokens to {GOAL:g}",
        meaning="action tokens that had been sampled for training by then, each once, whatever became of their trees",
        digits=0,
    ),
    Column(key="seconds_to_goal", heading=f"seconds to {GOAL:g}", meaning="from the first lease until then", digits=0),
    Column(key="collapsed", heading="collapsed", meaning="1 where success fell from above 0.6 to below 0.1, else 0"),
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
    Column(key="steps", heading="steps", meaning="up to which success is known", digits=0),
    Column(key="tokens", heading="tokens", meaning="action tokens sampled for training over these steps", digits=0),
    Column(key="trained_s", heading="seconds of training", meaning="from the first lease to the last step", digits=0),
    Column(key="seconds", heading="seconds", meaning="the whole cell, its start and evaluation included", digits=0),
)
"""In the order of the table.  From ESS/N to the share truncated: means over the batches exactly as old as the lag,
where the study has lags."""

SUCCESS = frozenset({"greedy", FINAL, "area", AT_TOKENS})
SHARES = SUCCESS | {"collapsed", "ess_turn", "ess_applied", "truncated"}
"""Figures between 0 and 1: so are the ends of their intervals."""

SIGNED = frozenset({"kl_k1"})
"""Figures that may be below 0."""

_ROUNDING = 1e-6

TO_GOAL: dict[str, str] = {"steps_to_goal": "steps", "tokens_to_goal": "tokens", "seconds_to_goal": "trained_s"}
"""What it took to reach the goal -> how much of it a run went on for, whether or not it reached the goal."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Cell:
    """One training run of the grid."""

    at: tuple[tuple[str, str], ...]
    """(axis, value), in the axes' order."""
    seed: int
    stage: str = ""
    """``choose``: of the first stage, from which a field's value is chosen; it counts in no result."""

    @property
    def lag(self) -> int | None:
        """Learner versions, exact; None where the grid has no lags."""
        found = dict(self.at).get(LAG)
        return None if found is None else int(found)

    @property
    def name(self) -> str:
        """Of its run folder."""
        parts = [self.stage, *(slug(axis, value) for axis, value in self.at), f"seed{self.seed}"]
        return "-".join(part for part in parts if part)

    @property
    def label(self) -> str:
        parts = [*(label(axis, value) for axis, value in self.at), f"seed {self.seed}"]
        return ", ".join([f"{self.stage}: {parts[0]}", *parts[1:]] if self.stage else parts)


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
    tokens: Sequence[float] = ()
    """Action tokens sampled for training up to each step of the curve; empty where they were not counted."""
    in_process: bool | None = None
    """Whether generation and training took turns in one process; None where that was not recorded."""


def curve_of(records: Sequence[Record], *, steps: int) -> list[tuple[int, float]]:
    """(step, sampled success) in ascending order, up to ``steps``."""
    return [(s.step, s.value) for s in by_step(series(records, "train/success")) if s.step <= steps]


def tokens_of(records: Sequence[Record], curve: Sequence[tuple[int, float]]) -> list[float]:
    """Action tokens sampled for training up to each step of a curve; none where the run did not count them."""
    counted = by_step(series(records, "train/tokens"))
    if not counted:
        return []
    found, total, at = [], 0.0, 0
    for step, _ in curve:
        while at < len(counted) and counted[at].step <= step:
            total += counted[at].value
            at += 1
        found.append(total)
    return found


def smooth(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """(step, mean of the last ``WINDOW`` steps up to it)."""
    values = [value for _, value in curve]
    return [(curve[i][0], mean(values[i - WINDOW + 1 : i + 1])) for i in range(WINDOW - 1, len(curve))]


def steps_of(records: Iterable[Record]) -> int:
    """Batches that the learner has done."""
    return max((r.step for r in records if r.source == "learner"), default=0)


def figures_of(records: Sequence[Record], *, steps: int, lag: int) -> dict[str, float]:
    """The figures of a run that has ended, by key of ``COLUMNS``; the seconds are the caller's.

    Args:
        steps: over which success counts; the run makes ``lag`` more, which only use up what is under way.
        lag: of the cell, 0 where its lag is not exact; the first ``lag`` batches are younger, and left out of what
            depends on it.
    """
    curve = curve_of(records, steps=steps)
    found = _of_curve(curve, tokens_of(records, curve), _seconds(records)) | {"steps": float(steps)}
    evaluations = [s for s in by_step(series(records, "eval/success")) if s.step >= steps + lag]
    if evaluations:
        found["greedy"] = evaluations[-1].value
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


def _of_curve(
    curve: Sequence[tuple[int, float]], tokens: Sequence[float], seconds: Mapping[int, float]
) -> dict[str, float]:
    """Of success by step: its level, and what it took to get there."""
    found: dict[str, float] = {}
    if curve:
        found["area"] = mean([value for _, value in curve])
        found["collapsed"] = float(collapse_of(curve) is not None)
        if tokens:
            found["tokens"] = tokens[-1]
        if curve[-1][0] in seconds:
            found["trained_s"] = seconds[curve[-1][0]]
    level = smooth(curve)
    if level:
        found["sampled"] = level[-1][1]
    reached = next((i for i, (_, value) in enumerate(level) if value >= GOAL), None)
    if reached is not None:
        step = level[reached][0]
        found["steps_to_goal"] = step
        if tokens:
            found["tokens_to_goal"] = tokens[reached + WINDOW - 1]
        if step in seconds:
            found["seconds_to_goal"] = seconds[step]
    return found


def _seconds(records: Sequence[Record]) -> dict[int, float]:
    """Step -> seconds from the first lease to its success, as in a run's report."""
    leases = [s.value for s in series(records, "time/first_lease") if s.value > 1e9]
    began = min(leases) if leases else min((r.time for r in records if r.source != "supervisor"), default=0.0)
    return {s.step: s.time - began for s in by_step(series(records, "train/success"))}


KNOWN_SHARE = 0.8
"""Of the steps of a run whose lag is not exact: up to there at least success is to be known.  The last batches of such
a run may be of trees that all came in before."""
LATE_STEPS = 2
"""As many of the last steps may be such in any case, so that a run of a few steps gives a result too."""


def least_known(steps: int) -> float:
    """Step of a run of ``steps`` up to which success is to be known at least, where its lag is not exact."""
    return min(KNOWN_SHARE * steps, steps - LATE_STEPS)


def unfinished(records: Sequence[Record], *, steps: int, lag: int | None, evaluates: bool) -> str | None:
    """Why a run that ended without an error gives no result; None if it does.

    Args:
        lag: exact; None where it is not, and success need not be known of each of the last steps.
    """
    done, curve = steps_of(records), curve_of(records, steps=steps)
    if done < steps + (lag or 0):
        return f"it ended after {done} of {steps + (lag or 0)} steps"
    known = dict(curve)
    if lag is None:
        last = curve[-1][0] if curve else 0
        if last < least_known(steps):
            return (
                f"sampled success is not known after step {last} of {steps}: all later batches were of trees that had "
                "come in before; more steps (--run.steps) or a smaller staleness.max_lag leave fewer such"
            )
        if len(curve) < WINDOW:
            return (
                f"sampled success is known of {len(curve)} of {steps} steps, and is a mean of {WINDOW}: use more "
                "--run.steps"
            )
    else:
        lacking = [step for step in range(max(1, steps - WINDOW + 1), steps + 1) if step not in known]
        if lacking or len(curve) < WINDOW:
            return f"sampled success is not known at step {lacking[0] if lacking else steps} of {steps}"
    if evaluates and not any(s.step >= steps + (lag or 0) for s in series(records, "eval/success")):
        return "it ended without its last evaluation"
    return None


def _total(records: Sequence[Record], name: str) -> float:
    return sum(s.value for s in by_step(series(records, name)))


def to_json(result: CellResult) -> dict[str, Any]:
    return {
        "axes": [list(pair) for pair in result.cell.at],
        "seed": result.cell.seed,
        **({"stage": result.cell.stage} if result.cell.stage else {}),
        "status": result.status,
        "reason": result.reason,
        "figures": dict(result.figures),
        "curve": [list(point) for point in result.curve],
        **({"tokens": list(result.tokens)} if result.tokens else {}),
        **({"in_process": result.in_process} if result.in_process is not None else {}),
    }


def from_json(data: Mapping[str, Any]) -> CellResult:
    """Raises KeyError, TypeError or ValueError for anything that ``to_json`` did not make, or no run gives."""
    status = data["status"]
    if status not in ("done", "failed"):
        raise ValueError(f"status {status!r}")
    if "axes" in data:
        at = tuple((str(axis), str(value)) for axis, value in data["axes"])
    else:  # of a program whose studies had these two axes
        at = (("lag", str(int(data["lag"]))), ("correction", str(data["correction"])))
    result = CellResult(
        cell=Cell(at=at, seed=int(data["seed"]), stage=str(data.get("stage", ""))),
        status=status,
        reason=str(data["reason"]),
        figures={str(key): float(value) for key, value in data["figures"].items()},
        curve=[(int(step), float(value)) for step, value in data["curve"]],
        tokens=[float(value) for value in data.get("tokens", ())],
        in_process=bool(data["in_process"]) if data.get("in_process") is not None else None,
    )
    _check(result)
    return result


def _check(result: CellResult) -> None:
    """Raises ValueError for figures that no run gives."""
    for key, value in result.figures.items():
        most = 1.0 if key in SHARES else math.inf
        if not (math.isfinite(value) and (key in SIGNED or -_ROUNDING <= value <= most + _ROUNDING)):
            raise ValueError(f"{key} = {value:g}")
    if any(not -_ROUNDING <= value <= 1.0 + _ROUNDING for _, value in result.curve):
        raise ValueError("a success outside 0 to 1 in the curve")
    steps = [step for step, _ in result.curve]
    if steps != sorted(set(steps)):
        raise ValueError("steps of the curve out of order")
    if result.tokens and len(result.tokens) != len(result.curve):
        raise ValueError(f"{len(result.tokens)} counts of tokens beside a curve of {len(result.curve)} steps")
    if result.status == "done" and not result.curve:
        raise ValueError("no curve")
