"""What a study's cells say together: figures of a cell, groups over seeds, and the sentences that they support.

Pure: records and results in, numbers and words out.  A difference is stated only where it is larger than what seeds do
(``Yardstick``); a group with a failed or missing cell is described and never compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from atpo_async.report.page import GOAL, by_step, series
from atpo_async.run.metrics import Record

WINDOW = 3
"""Steps over which sampled success is averaged: one step's trees are few."""

RESOLUTION = 0.05
"""Least difference in success that is stated: a hundred held-out tasks, or three steps' trees, tell no less apart."""

NUM_ERRORS = 3.0
"""Standard errors of a difference, pooled over all groups, that it must exceed: a grid holds many comparisons."""

FINAL = "sampled"
"""The figure that the sentences are about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One figure of a cell."""

    key: str
    heading: str
    meaning: str
    digits: int = 2


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
    def words(self) -> str:
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
        lag: of the cell; the first ``lag`` batches are younger and tell nothing of it.
    """
    found: dict[str, float] = {}
    curve = curve_of(records, steps=steps)
    success = [value for _, value in curve]
    evaluations = [s for s in by_step(series(records, "eval/success")) if s.step >= steps + lag]
    if evaluations:
        found["greedy"] = evaluations[-1].value
    if len(success) >= WINDOW:
        found["sampled"] = _mean(success[-WINDOW:])
        smooth = [(curve[i][0], _mean(success[i - WINDOW + 1 : i + 1])) for i in range(WINDOW - 1, len(curve))]
        reached = next((step for step, value in smooth if value >= GOAL), None)
        if reached is not None:
            found["steps_to_goal"] = reached
    if success:
        found["area"] = _mean(success)
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
            found[key] = _mean(values)
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


# --- groups over seeds --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """One figure over the seeds of a group."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def range(self) -> float:
        return self.high - self.low

    def text(self, digits: int = 2) -> str:
        """``0.95 (0.93–0.97)``; of one seed ``0.95``."""
        mean, low, high = (f"{value:.{digits}f}" for value in (self.mean, self.low, self.high))
        return mean if self.count == 1 else f"{mean} ({low}–{high})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The cells of one lag and correction, over seeds."""

    lag: int
    correction: str
    planned: int
    results: tuple[CellResult, ...]

    @property
    def failed(self) -> list[CellResult]:
        return [r for r in self.results if r.status == "failed"]

    @property
    def num_missing(self) -> int:
        return self.planned - len(self.results)

    @property
    def is_whole(self) -> bool:
        """Every cell planned has ended, and well."""
        return not self.failed and not self.num_missing

    def values(self, key: str) -> list[float]:
        return [r.figures[key] for r in self.results if r.status == "done" and key in r.figures]

    def spread(self, key: str) -> Spread | None:
        """None where no cell has the figure."""
        values = self.values(key)
        if not values:
            return None
        return Spread(mean=_mean(values), low=min(values), high=max(values), count=len(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The grid's results by group."""

    lags: tuple[int, ...]
    corrections: tuple[str, ...]
    seeds: tuple[int, ...]
    groups: Mapping[tuple[int, str], Group]

    @classmethod
    def of(
        cls, results: Iterable[CellResult], *, lags: Sequence[int], corrections: Sequence[str], seeds: Sequence[int]
    ) -> Summary:
        """``results`` outside the grid are left aside; cells without one are missing."""
        by_group: dict[tuple[int, str], list[CellResult]] = {}
        for result in sorted(results, key=lambda r: r.cell):
            if result.cell.seed in seeds:
                by_group.setdefault((result.cell.lag, result.cell.correction), []).append(result)
        groups = {
            (lag, name): Group(
                lag=lag, correction=name, planned=len(seeds), results=tuple(by_group.get((lag, name), ()))
            )
            for lag in lags
            for name in corrections
        }
        return cls(lags=tuple(lags), corrections=tuple(corrections), seeds=tuple(seeds), groups=groups)

    def __getitem__(self, key: tuple[int, str]) -> Group:
        return self.groups[key]

    @property
    def results(self) -> list[CellResult]:
        return [result for group in self.groups.values() for result in group.results]

    @property
    def num_missing(self) -> int:
        return sum(group.num_missing for group in self.groups.values())


# --- differences --------------------------------------------------------------------------------------------------

Sign = Literal["above", "below", "same"]


@dataclass(frozen=True, slots=True)
class Yardstick:
    """When one group is told apart from another.

    All of: their ranges over seeds do not meet; the means differ by more than either range, by more than
    ``NUM_ERRORS`` standard errors with the variance over seeds pooled over the whole grid, and by more than
    ``RESOLUTION``.
    """

    variance: float
    """Within groups, pooled; 0 where no group has two seeds (then nothing is compared)."""

    @classmethod
    def of(cls, summary: Summary, key: str = FINAL) -> Yardstick:
        squares, freedom = 0.0, 0
        for group in summary.groups.values():
            values = group.values(key)
            if len(values) > 1:
                mean = _mean(values)
                squares += math.fsum((value - mean) ** 2 for value in values)
                freedom += len(values) - 1
        return cls(squares / freedom if freedom else 0.0)

    def least(self, a: Spread, b: Spread) -> float:
        """The difference of means that has to be exceeded."""
        error = math.sqrt(self.variance * (1 / a.count + 1 / b.count))
        return max(a.range, b.range, NUM_ERRORS * error, RESOLUTION)

    def sign(self, a: Spread, b: Spread) -> Sign:
        """Of ``a`` against ``b``."""
        apart = a.low > b.high or a.high < b.low
        if not apart or abs(a.mean - b.mean) <= self.least(a, b):
            return "same"
        return "above" if a.mean > b.mean else "below"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two groups by one figure.  ``sign`` is None where they cannot be compared; ``why_not`` then says why."""

    first: Group
    second: Group
    sign: Sign | None
    why_not: str = ""


def compare(first: Group, second: Group, yardstick: Yardstick, key: str = FINAL) -> Comparison:
    for group in (first, second):
        if not group.is_whole:
            return Comparison(first=first, second=second, sign=None, why_not="cells lack")
        if len(group.values(key)) < group.planned:
            return Comparison(first=first, second=second, sign=None, why_not="figures lack")
    if first.planned < 2:
        return Comparison(first=first, second=second, sign=None, why_not="one seed")
    a, b = first.spread(key), second.spread(key)
    assert a is not None
    assert b is not None
    return Comparison(first=first, second=second, sign=yardstick.sign(a, b))


# --- words --------------------------------------------------------------------------------------------------------


def conclusions(summary: Summary, words: Mapping[str, str] | None = None) -> list[str]:
    """Sentences that the results support: of final sampled success, the largest lag first, then of other figures.

    Args:
        words: name of a correction -> how a sentence calls it ("turn-level truncation").

    Each lag is spoken of, so no part of the grid that says otherwise is left out.
    """
    words = words or {}
    if not any(group.spread(FINAL) for group in summary.groups.values()):
        ended = len(summary.results)
        return [f"Nothing can be said: {ended} of {_num_planned(summary)} cells have ended, none with a result."]
    found = []
    if len(summary.seeds) < 2:
        found.append("With one seed a cell no difference can be told from chance; the figures are what was measured.")
    yardstick = Yardstick.of(summary)
    reference = "none" if "none" in summary.corrections else summary.corrections[0]
    others = [name for name in summary.corrections if name != reference]
    if others:
        found += _against(summary, yardstick, reference, others, words)
        found += _among(summary, yardstick, others)
        for key, name in (("area", "the area under the learning curve"), ("greedy", "greedy success")):
            found += _by(summary, key, name, reference, others)
    if len(summary.lags) > 1:
        found += _price(summary, yardstick, words)
    found += _incomplete(summary)
    return found


def _num_planned(summary: Summary) -> int:
    return sum(group.planned for group in summary.groups.values())


def _against(
    summary: Summary, yardstick: Yardstick, reference: str, others: Sequence[str], words: Mapping[str, str]
) -> list[str]:
    """Each lag's corrections beside ``reference``: lags with a difference first, the largest lag leading."""
    apart: list[str] = []
    alike: list[int] = []
    open_lags: list[str] = []
    empty: list[int] = []
    for lag in sorted(summary.lags, reverse=True):
        base = summary[lag, reference]
        made = {name: compare(summary[lag, name], base, yardstick) for name in others}
        signs = {c.sign for c in made.values()}
        if not any(group.spread(FINAL) for group in (base, *(c.first for c in made.values()))):
            empty.append(lag)
        elif signs == {"same"}:
            alike.append(lag)
        elif signs & {"above", "below"}:
            apart.append(_told_apart(lag, base, made, words))
        else:
            open_lags.append(_only_figures(lag, [base, *(c.first for c in made.values())], words))
    found = apart
    if alike:
        found.append(_alike(summary, sorted(alike), reference, others, words))
    found += open_lags
    if empty:
        found.append(f"At {_lags(sorted(empty))} no cell has given a result.")
    return found


def _told_apart(lag: int, base: Group, made: Mapping[str, Comparison], words: Mapping[str, str]) -> str:
    parts = [f"At lag {lag} training {_with(base, words)} ends at {_level(base)}"]
    for sign, lead in (
        ("above", "higher:"),
        ("below", "lower:"),
        ("same", "not told apart from that:"),
        (None, "not compared:"),
    ):
        groups = [c.first for c in made.values() if c.sign == sign]
        if groups:
            parts.append(f"{lead} {_listed([f'{_with(g, words)} at {_level(g)}' for g in groups])}")
    text = "; ".join(parts) + "."
    if lag == 0:
        text += "  Age cannot be the reason there: at lag 0 all corrections are one computation, engine mismatch apart."
    return text


def _alike(
    summary: Summary, lags: Sequence[int], reference: str, others: Sequence[str], words: Mapping[str, str]
) -> str:
    spreads = {(lag, name): _spread(summary[lag, name]) for lag in lags for name in (reference, *others)}
    difference = max(abs(spreads[lag, name].mean - spreads[lag, reference].mean) for lag in lags for name in others)
    widest = max(s.range for s in spreads.values())
    means = [s.mean for s in spreads.values()]
    return (
        f"At {_lags(lags)} nothing is told apart from training {_with(summary[lags[0], reference], words)} beyond what "
        f"seeds do: the means are {min(means):.2f} to {max(means):.2f}, the largest difference at one lag is "
        f"{difference:.2f}, the largest spread over seeds {widest:.2f}."
    )


def _only_figures(lag: int, groups: Sequence[Group], words: Mapping[str, str]) -> str:
    return f"At lag {lag}, without a comparison: {_listed([f'{_with(g, words)} {_level(g)}' for g in groups])}."


def _among(summary: Summary, yardstick: Yardstick, names: Sequence[str]) -> list[str]:
    """Corrections beside one another, by name."""
    if len(names) < 2:
        return []
    parts, alike, compared = [], [], True
    for lag in sorted(summary.lags, reverse=True):
        here = []
        for i, first in enumerate(names):
            made = [compare(summary[lag, first], summary[lag, second], yardstick) for second in names[i + 1 :]]
            compared &= all(c.sign is not None for c in made)
            for sign in ("above", "below"):
                others = [c.second for c in made if c.sign == sign]
                if others:
                    here.append(f"{_short(summary[lag, first])} ends {sign} {_listed([_short(g) for g in others])}")
        if here:
            parts.append(f"at lag {lag} {_listed(here)}")
        else:
            alike.append(lag)
    if parts:
        rest = f"; at {_lags(sorted(alike))} none is told apart from another" if alike and compared else ""
        return [f"Among the corrections, {'; '.join(parts)}{rest}."]
    if not compared:
        return []
    return [f"Among the corrections themselves none is told apart from another, at {_lags(sorted(summary.lags))}."]


def _by(summary: Summary, key: str, name: str, reference: str, others: Sequence[str]) -> list[str]:
    """The same beside ``reference`` by another figure; nothing where no cell has it."""
    yardstick = Yardstick.of(summary, key)
    parts, alike = [], []
    for lag in sorted(summary.lags, reverse=True):
        base = summary[lag, reference]
        made = [compare(summary[lag, other], base, yardstick, key) for other in others]
        here = []
        for sign, word in (("above", "below"), ("below", "above")):
            groups = [c.first for c in made if c.sign == sign]
            if groups:
                here.append(f"{word} {_listed([_short(group, key) for group in groups])}")
        if here:
            parts.append(f"at lag {lag} {_short(base, key)} is {' and '.join(here)}")
        elif all(c.sign == "same" for c in made):
            alike.append(lag)
    if alike:
        parts.append(f"at {_lags(sorted(alike))} nothing is told apart from {reference}")
    return [f"By {name}, {'; '.join(parts)}."] if parts else []


def _short(group: Group, key: str = FINAL) -> str:
    spread = group.spread(key)
    return group.correction if spread is None else f"{group.correction} ({spread.mean:.2f})"


def _price(summary: Summary, yardstick: Yardstick, words: Mapping[str, str]) -> list[str]:
    """Each correction at its lags beside the smallest lag of the grid."""
    start, *lags = sorted(summary.lags)
    free, found = [], []
    for name in summary.corrections:
        base = summary[start, name]
        made = [compare(summary[lag, name], base, yardstick) for lag in lags]
        if all(c.sign == "same" for c in made):
            free.append(name)
            continue
        parts = []
        for sign in ("below", "above"):
            there = [c.first for c in made if c.sign == sign]
            if there:
                parts.append(f"{sign} that at {_listed([f'lag {g.lag} ({_spread(g).mean:.2f})' for g in there])}")
        if parts:
            found.append(
                f"{_capital(_with(base, words))}, success is {_level(base)} at lag {start} and {' and '.join(parts)}"
            )
    sentences = [f"{text}." for text in found]
    if free:
        listed = _listed([_with(summary[start, name], words) for name in free], last="or")
        sentences.append(
            f"{_capital(listed)}, success up to lag {lags[-1]} is not told apart from that at lag {start}."
        )
    return sentences


def _incomplete(summary: Summary) -> list[str]:
    failed = [r for r in summary.results if r.status == "failed"]
    found = []
    if failed:
        listed = "; ".join(f"{r.cell.words}: {r.reason}" for r in failed[:4])
        more = f"; and {len(failed) - 4} more" if len(failed) > 4 else ""
        found.append(f"Failed, and in no mean: {len(failed)} of {_num_planned(summary)} cells ({listed}{more}).")
    if summary.num_missing:
        found.append(f"Not run to the end yet: {summary.num_missing} of {_num_planned(summary)} cells.")
    return found


def _level(group: Group) -> str:
    """Final success with its range, or what happened instead."""
    spread = group.spread(FINAL)
    notes = []
    if group.failed:
        notes.append(f"{len(group.failed)} of {group.planned} failed")
    if group.num_missing:
        notes.append(f"{group.num_missing} of {group.planned} not run")
    if spread is None:
        return f"no result ({', '.join(notes) or 'no figure'})"
    return spread.text() + (f" [{', '.join(notes)}]" if notes else "")


def _spread(group: Group) -> Spread:
    spread = group.spread(FINAL)
    assert spread is not None
    return spread


def _called(name: str, words: Mapping[str, str]) -> str:
    return words.get(name, name)


def _with(group: Group, words: Mapping[str, str]) -> str:
    return "without a correction" if group.correction == "none" else f"with {_called(group.correction, words)}"


def _lags(lags: Sequence[int]) -> str:
    return f"lag{'s' if len(lags) > 1 else ''} {_listed([str(lag) for lag in lags])}"


def _listed(parts: Sequence[str], last: str = "and") -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {last} {parts[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# --- on disk ------------------------------------------------------------------------------------------------------


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
