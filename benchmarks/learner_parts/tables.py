"""Sides that take turns, ratios over the rounds, and tables."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.learner_parts.sides import Times


def interleave(sides: Mapping[str, Callable[[], Times]], rounds: int) -> dict[str, list[Times]]:
    """Every side once a round, the order shifted by one each round; a first round is thrown away."""
    names = list(sides)
    taken: dict[str, list[Times]] = {name: [] for name in names}
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            times = sides[name]()
            if number > 0:
                taken[name].append(times)
    return taken


@dataclass(frozen=True)
class Ratio:
    """One number a round."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float]) -> Ratio:
        return cls(tuple(a / b for a, b in zip(above, below, strict=True)))

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def times(self, factor: float) -> Ratio:
        return Ratio(tuple(v * factor for v in self.values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({min(self.values):.2f} to {max(self.values):.2f})"

    def percent(self) -> str:
        low, high = min(self.values), max(self.values)
        return f"{100 * self.median:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def column(taken: Sequence[Times], name: str) -> list[float]:
    return [times[name] for times in taken]


def median(taken: Sequence[Times], name: str) -> float:
    return statistics.median(column(taken, name))


@dataclass(frozen=True)
class Table:
    title: str
    about: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def text(self) -> str:
        widths = [max(len(row[i]) for row in [self.head, *self.rows]) for i in range(len(self.head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [self.head, tuple("-" * width for width in widths), *self.rows]
        ]
        return "\n".join([self.title, self.about, "", *lines])

    def markdown(self) -> str:
        lines = ["| " + " | ".join(row) + " |" for row in [self.head, ("---",) * len(self.head), *self.rows]]
        return "\n".join([f"### {self.title}", "", self.about, "", *lines])


def machine(device: str, threads: int) -> str:
    """What the figures were taken on, in one line."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    parts = [f"{os.cpu_count()} cores of {cpu}", f"torch {torch.__version__}", f"{threads} threads"]
    if device == "cuda":
        parts.insert(1, torch.cuda.get_device_name())
    load_1 = os.getloadavg()[0]
    return ", ".join([*parts, f"load average at the start {load_1:.1f}"])


def count(number: float) -> str:
    return f"{number:,.0f}"


def say(text: str) -> None:
    """To stderr, at once."""
    print(f"# {text}", file=sys.stderr, flush=True)
