"""Each environment of a run in numbers, where the run has several: what it was given, and how well the policy did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atpo_async.run.metrics import Record

AT_EACH_END = 3
"""Steps of which the mean is told, at a run's beginning and at its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentFacts:
    """One environment of several."""

    label: str
    trees: int
    """Training trees that ended with something to train on."""
    success: tuple[float, float] | None
    """Sampled, mean of the first and of the last ``AT_EACH_END`` steps that had a tree of it; None without any."""
    reward: tuple[float, float] | None
    greedy: tuple[float, ...]
    """Success on its held-out tasks, of each evaluation in order."""
    failed_branches: int

    def line(self) -> str:
        """For the end of a run on the terminal."""
        greedy = f", greedy {' → '.join(f'{value:.3f}' for value in self.greedy)}" if self.greedy else ""
        failed = f", {self.failed_branches} branches failed" if self.failed_branches else ""
        return f"environment {self.label}: sampled success {arrow(self.success)}{greedy}, {self.trees} trees{failed}"


def environment_facts(labels: Sequence[str], records: Sequence[Record]) -> list[EnvironmentFacts]:
    """Of each of ``labels``, from the run's metrics."""
    return [_facts_of(label, records) for label in labels]


def _facts_of(label: str, records: Sequence[Record]) -> EnvironmentFacts:
    return EnvironmentFacts(
        label=label,
        trees=int(sum(_by_step(records, f"train/{label}/trees"))),
        success=_ends(_by_step(records, f"train/{label}/success")),
        reward=_ends(_by_step(records, f"train/{label}/reward")),
        greedy=tuple(_by_step(records, f"eval/{label}/success")),
        failed_branches=int(sum(r.metrics.get(f"actor/{label}/failed_branches", 0.0) for r in records)),
    )


def _by_step(records: Sequence[Record], name: str) -> list[float]:
    """One value a step, the last written: a step that a resumed run takes again counts once."""
    found = {record.step: record.metrics[name] for record in records if name in record.metrics}
    return [found[step] for step in sorted(found)]


def _ends(values: Sequence[float]) -> tuple[float, float] | None:
    if not values:
        return None
    first, last = values[:AT_EACH_END], values[-AT_EACH_END:]
    return sum(first) / len(first), sum(last) / len(last)


def arrow(pair: tuple[float, float] | None) -> str:
    """``0.31 → 0.87``."""
    return "–" if pair is None else f"{pair[0]:.2f} → {pair[1]:.2f}"


HEAD = ("environment", "sampled success", "reward", "greedy success, held-out", "trees", "branches failed")


def table(found: Sequence[EnvironmentFacts]) -> list[tuple[str, ...]]:
    """The rows of the report's table, its head first; empty where the run has one environment."""
    rows = [
        (
            each.label,
            arrow(each.success),
            arrow(each.reward),
            " → ".join(f"{value:.3f}" for value in each.greedy) or "–",
            str(each.trees),
            str(each.failed_branches),
        )
        for each in found
    ]
    return [HEAD, *rows] if rows else []
