"""Results of benchmarks: one line a question in a file, so that a run that was stopped goes on, and their table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from atpo_async.environments.search_qa.benchmarks import GROUPS, PUBLISHED_SETS, Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One question."""

    index: int
    em: float
    f1: float
    reward: float
    turns: int
    searches: int
    end: str
    """As of its last turn; ``failed`` where the chain has none."""
    failure: str = ""


class ResultFile:
    """The lines of one benchmark.

    Args:
        path: of the file.
        made_by: what decides the answers: lines that something else has made are not gone on with.
    """

    def __init__(self, path: Path, made_by: str) -> None:
        self.path = path
        self._made_by = made_by

    def read(self) -> dict[int, Answered]:
        """By index; empty where there is no such file, or one of another policy or other settings."""
        head, found = _read(self.path)
        return found if head == {"made_by": self._made_by} else {}

    def begin(self, kept: Mapping[int, Answered]) -> None:
        """Write the file anew, with what was read of it; a failed question is asked again."""
        lines = [json.dumps({"made_by": self._made_by}), *(json.dumps(asdict(each)) for each in kept.values())]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".aside")
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
        aside.replace(self.path)

    def append(self, answered: Answered) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(answered)) + "\n")


def every_answer(path: Path) -> dict[int, Answered]:
    """What a file holds, by index; empty where there is none."""
    return _read(path)[1]


def _read(path: Path) -> tuple[object, dict[int, Answered]]:
    """The first line, and the others by index, the last of each; a line that was cut short is left out."""
    try:
        first, *lines = path.read_text(encoding="utf-8").split("\n")
        head = json.loads(first)
    except (OSError, ValueError):
        return None, {}
    found = {}
    for line in lines:
        try:
            answered = Answered(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found[answered.index] = answered
    return head, found


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One benchmark of the table; means over its questions.  A chain that failed counts as a wrong answer."""

    name: str
    group: Group
    questions: int
    published: int
    """How many the published test set has."""
    em: float
    f1: float
    turns: float
    """Of the chains that did not fail."""
    searches: float
    failed: int


def line_of(name: str, answers: Sequence[Answered]) -> Line:
    """``answers`` has one at least."""
    known = next(each for each in PUBLISHED_SETS if each.name == name)
    whole = [each for each in answers if each.turns] or [Answered(
        index=0, em=0.0, f1=0.0, reward=0.0, turns=0, searches=0, end="failed",
    )]  # fmt: skip
    return Line(
        name=name,
        group=known.group,
        questions=len(answers),
        published=known.questions,
        em=sum(each.em for each in answers) / len(answers),
        f1=sum(each.f1 for each in answers) / len(answers),
        turns=sum(each.turns for each in whole) / len(whole),
        searches=sum(each.searches for each in whole) / len(whole),
        failed=sum(not each.turns for each in answers),
    )


def averages(lines: Sequence[Line]) -> dict[Group, dict[str, float]]:
    """Of each group with a line: the mean over its benchmarks, each of which counts once, as in the published table."""
    found: dict[Group, dict[str, float]] = {}
    for group in GROUPS:
        mine = [line for line in lines if line.group == group]
        if mine:
            found[group] = {
                name: sum(getattr(line, name) for line in mine) / len(mine)
                for name in ("em", "f1", "turns", "searches")
            }
    return found


HEADS = ("benchmark", "questions", "EM", "F1", "turns", "searches", "failed")


def table(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """Rows of texts, heads first: by group its benchmarks and their average.  EM and F1 are percentages."""
    rows: list[tuple[str, ...]] = [HEADS]
    of_group = averages(lines)
    for group in GROUPS:
        mine = [line for line in lines if line.group == group]
        for line in mine:
            part = "" if line.questions == line.published else f" of {line.published:,}"
            rows.append((
                line.name, f"{line.questions:,}{part}", f"{100 * line.em:.2f}", f"{100 * line.f1:.2f}",
                f"{line.turns:.2f}", f"{line.searches:.2f}", str(line.failed),
            ))  # fmt: skip
        if mine:
            mean = of_group[group]
            rows.append((
                f"{group}, mean of {len(mine)}", "", f"{100 * mean['em']:.2f}", f"{100 * mean['f1']:.2f}",
                f"{mean['turns']:.2f}", f"{mean['searches']:.2f}", "",
            ))  # fmt: skip
    return rows


def printed(lines: Sequence[Line]) -> str:
    """For a terminal."""
    rows = table(lines)
    widths = [max(len(row[at]) for row in rows) for at in range(len(HEADS))]
    return "\n".join(
        "  ".join(cell.ljust(width) if at == 0 else cell.rjust(width) for at, (cell, width) in enumerate(zip(
            row, widths, strict=True,
        ))).rstrip()
        for row in rows
    )  # fmt: skip


def markdown(policy: str, lines: Sequence[Line]) -> str:
    """A page."""
    head, *rows = table(lines)
    body = [
        f"# Benchmarks of {policy}",
        "",
        "Greedy, one chain a question; EM and F1 in percent. A chain that failed counts as a wrong answer.",
        "",
        f"| {' | '.join(head)} |",
        f"| --- |{' ---: |' * (len(head) - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(body) + "\n"


def as_json(policy: str, lines: Sequence[Line]) -> dict[str, Any]:
    """The same as numbers, shares from 0 to 1."""
    return {
        "policy": policy,
        "benchmarks": {line.name: {k: v for k, v in asdict(line).items() if k != "name"} for line in lines},
        "averages": averages(lines),
    }
