"""A field whose value is chosen in a first stage: which candidates, for which values of an axis, by what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from atpo_async.config import fields, unknown_option
from atpo_async.core.errors import ConfigError
from atpo_async.study.cells import CellResult
from atpo_async.study.grid.axes import OWN, Axis, canonical, split_values
from atpo_async.study.results.statistics import mean

Criterion = Literal["area", "sampled", "greedy"]
CRITERIA: dict[str, str] = {
    "area": "the area under the curve of sampled success",
    "sampled": "sampled success at the end",
    "greedy": "greedy success on held-out tasks at the end",
}
"""What a value can be chosen by -> in words."""


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """The first stage of a study."""

    field: str
    values: tuple[str, ...]
    """The candidates."""
    by: str
    """The axis for each of whose values one candidate is chosen; empty: one for the whole grid."""
    at: Mapping[str, tuple[str, ...]]
    """Axis -> those of its values that the first stage has; all where it is not named."""
    seeds: int
    criterion: str = "area"

    @property
    def words(self) -> list[str]:
        """As on a command line."""
        found = ["--choose", f"{self.field}={','.join(self.values)}", "--choose-seeds", str(self.seeds)]
        if self.by:
            found += ["--choose-by", self.by]
        for name, values in self.at.items():
            found += ["--choose-at", f"{name}={','.join(values)}"]
        return [*found, *(["--choose-for", self.criterion] if self.criterion != "area" else [])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The value that was chosen for one value of an axis."""

    of: str
    """The axis' value; empty where one was chosen for the whole grid."""
    value: str
    means: Mapping[str, float]
    """Candidate -> mean of the criterion over its cells; one that failed counts as 0."""
    num_failed: Mapping[str, int]
    edge: Literal["", "lowest", "highest"]
    """Of the candidates, where these are numbers and the chosen one has no neighbour on that side."""
    settled: bool = True
    """Whether any of its cells gave a result; where all failed, nothing was there to choose by."""


def parse_choosing(
    text: str, axes: Sequence[Axis], *, by: str | None, at: Sequence[str], seeds: int, criterion: str
) -> Choosing:
    """From the command line.  Raises ConfigError naming the option and the value."""
    name, equals, listed = (part.strip() for part in text.partition("="))
    if not equals or not name:
        raise ConfigError(f"--choose {text}: name a field and its candidates, as in --choose learner.lr=3e-4,6e-4")
    if name in OWN:
        raise ConfigError(f"--choose {name}: a study sets that itself; use {OWN[name]}")
    if name not in fields():
        raise ConfigError(unknown_option(name).replace(f"--{name}", f"--choose {name}", 1))
    values = [canonical(word) for word in split_values(listed, f"--choose {text}")]
    if len(set(values)) < 2 or len(set(values)) < len(values):
        raise ConfigError(f"--choose {text}: a choice takes two different candidates at least, each named once")
    named = {axis.name: axis for axis in axes}
    if name in named:
        raise ConfigError(f"--choose {text}: {name} is an axis of the grid; take one or the other out")
    if by is None and len(named) > 1:
        raise ConfigError(
            f"--choose {text}: say for each of whose values one is chosen: --choose-by {' or '.join(named)}, or "
            "--choose-by all for one choice"
        )
    by = next(iter(named), "") if by is None else "" if by == "all" else by
    if by and by not in named:
        raise ConfigError(f"--choose-by {by}: the grid has no such axis; it has {', '.join(named)}")
    if seeds < 1:
        raise ConfigError(f"--choose-seeds must be >= 1, got {seeds}")
    if criterion not in CRITERIA:
        raise ConfigError(f"--choose-for {criterion}: unknown; known: {', '.join(CRITERIA)}")
    some = dict(_parse_at(each, named) for each in at)
    if by in some:
        raise ConfigError(f"--choose-at {by}: a value is chosen for every {by}; name other axes")
    return Choosing(field=name, values=tuple(values), by=by, at=some, seeds=seeds, criterion=criterion)


def _parse_at(text: str, named: Mapping[str, Axis]) -> tuple[str, tuple[str, ...]]:
    name, equals, listed = (part.strip() for part in text.partition("="))
    if not equals or name not in named:
        raise ConfigError(f"--choose-at {text}: name an axis of the grid and some of its values: {', '.join(named)}")
    words = split_values(listed, f"--choose-at {text}")
    found = {word: named[name].value_named(word) for word in words}
    if unknown := [word for word, value in found.items() if value is None]:
        raise ConfigError(
            f"--choose-at {text}: {unknown[0]!r} is none of the grid's {name}: {', '.join(named[name].values)}"
        )
    return name, tuple(value for value in found.values() if value is not None)


def choices(choosing: Choosing, axes: Sequence[Axis], results: Iterable[CellResult]) -> dict[str, Choice]:
    """Value of the axis -> what is chosen for it: the highest mean of the criterion, of equal ones the first candidate.

    A failed cell counts as 0: a value with which training breaks is not to be chosen for the runs that survived.
    """
    ended = list(results)
    ofs = next((axis.values for axis in axes if axis.name == choosing.by), ("",))
    found = {}
    for of in ofs:
        here = [r for r in ended if not choosing.by or dict(r.cell.at)[choosing.by] == of]
        by_value = {value: [r for r in here if dict(r.cell.at)[choosing.field] == value] for value in choosing.values}
        if not all(by_value.values()):
            continue
        means = {
            value: mean([r.figures.get(choosing.criterion, 0.0) if r.status == "done" else 0.0 for r in cells])
            for value, cells in by_value.items()
        }
        best = max(means, key=lambda value: means[value])
        failed = {value: sum(r.status == "failed" for r in cells) for value, cells in by_value.items()}
        edge = _edge(best, choosing.values)
        settled = any(r.status == "done" for r in here)
        found[of] = Choice(
            of=of, value=best, means=means, num_failed=failed, edge=edge if settled else "", settled=settled
        )
    return found


def _edge(value: str, values: Sequence[str]) -> Literal["", "lowest", "highest"]:
    try:
        ordered = sorted(map(float, values))
    except ValueError:
        return ""
    return "lowest" if float(value) == ordered[0] else "highest" if float(value) == ordered[-1] else ""
