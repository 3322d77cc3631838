"""How many trees an actor is given: what it finishes in time, and of the last ones none that others finish sooner.

Each actor asks for as many trees as it can grow at once, whether it is fast or slow.  A slow one would finish some of
them only when their turns are older than ``staleness.max_lag`` allows.  So it holds no more at a time than its measured
rate lets it finish before the last batch that may use them.  Where a known number of trees is left to begin (of an
evaluation, of the run, of a batch without lag), a slow actor begins none of them that faster ones finish sooner.

An actor that is about as fast as the fastest one is never limited, and so nothing changes where all are alike or there
is only one.  One of which nothing is known yet begins with a few trees.  Pure: seconds are passed in.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

ALIKE = 2 / 3
"""Of the fastest actor's rate: from there on an actor is not slow."""
UNKNOWN_TREES = 4
"""Training trees at once of an actor whose rate is not known, where it is not the only one."""
MARGIN = 0.7
"""Of the time that is left: an engine is not always equally fast."""
INTERVALS = 9
"""Between batches, of which the median counts."""


class Worker(NamedTuple):
    """What one actor can do."""

    rate: float
    """Turns a second."""
    owed: float
    """Turns of trees that it holds already."""

    def time_for(self, turns: float) -> float:
        """Seconds until it has grown ``turns`` more, beside those that it owes."""
        return (self.owed + turns) / self.rate

    def trees_within(self, seconds: float, turns: float) -> int:
        """Further trees of ``turns`` each that it finishes within ``seconds``."""
        return max(math.floor((self.rate * seconds - self.owed) / turns + 1e-9), 0)


class Pace:
    """How long the learner takes from one batch to the next."""

    def __init__(self) -> None:
        self._intervals: deque[float] = deque(maxlen=INTERVALS)
        self._version: int | None = None
        self._at = 0.0

    def taken(self, next_version: int, now: float) -> None:
        """A batch may have been taken: the next one will be at ``next_version``."""
        if next_version == self._version:
            return
        if self._version is not None and next_version > self._version:
            self._intervals.append((now - self._at) / (next_version - self._version))
        self._version, self._at = next_version, now

    @property
    def step_s(self) -> float | None:
        """None where too few batches were taken to say."""
        return float(median(self._intervals)) if len(self._intervals) >= 2 else None

    def until(self, batches: int, now: float) -> float | None:
        """Seconds until the ``batches``-th batch after the next one is taken; None where that is not known."""
        step_s = self.step_s
        if step_s is None or batches < 0:
            return None if step_s is None else 0.0
        return max(self._at + step_s - now, 0.0) + batches * step_s


def in_time(rate: float, *, turns_per_tree: float, left_s: float) -> int:
    """Trees that an actor can hold at once so that each is finished within ``left_s``; one at least, so that it stays
    of use and its rate known.

    Held together they share its engine: of ``k`` trees each takes ``k * turns_per_tree / rate``.
    """
    return max(math.floor(MARGIN * rate * left_s / turns_per_tree), 1)


def others_sooner(worker: Worker, others: Iterable[Worker], *, turns: float, remaining: int) -> bool:
    """Whether others finish all ``remaining`` trees of ``turns`` each before ``worker`` would finish one."""
    seconds, found = worker.time_for(turns), 0
    for other in others:
        found += other.trees_within(seconds, turns)
        if found >= remaining:
            return True
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The actors that are there, one of them asking."""

    rate: float | None
    """Of the one that asks; None where it is not known."""
    fastest: float | None
    """Rate of the fastest one; None where none is known."""
    number: int
    """Of actors that are there, or are to be expected."""

    @property
    def is_slow(self) -> bool:
        """Whether the one that asks is known to be much slower than another."""
        return self.rate is not None and self.fastest is not None and self.rate < ALIKE * self.fastest

    @property
    def is_unknown(self) -> bool:
        """Whether the one that asks is new among others."""
        return self.rate is None and self.number > 1


def most_training(
    fleet: Fleet, *, turns_per_tree: float | None, left_s: float | None, fastest_holds: int
) -> int | None:
    """Training trees that an actor may hold at once; None for no limit.

    Args:
        fleet: it and the others.
        turns_per_tree: of a long one; None where no tree has ended yet.
        left_s: until the last batch that may use a tree begun now; None where the learner's pace is not known.
        fastest_holds: trees that the fastest actor holds.
    """
    if fleet.is_unknown:
        return UNKNOWN_TREES
    if not fleet.is_slow:
        return None
    assert fleet.rate is not None
    assert fleet.fastest is not None
    if turns_per_tree is None or left_s is None:
        return max(math.floor(fleet.rate / fleet.fastest * max(fastest_holds, UNKNOWN_TREES)), 1)
    return in_time(fleet.rate, turns_per_tree=turns_per_tree, left_s=left_s)


def remaining_trees(*counts: int | None) -> int | None:
    """Of several ends of which the first one counts; None where there is none."""
    known: Sequence[int] = [count for count in counts if count is not None]
    return max(min(known), 0) if known else None
