"""How many trees an actor grows at once: the fewest that keep the batch of its engine full.

The more trees are in flight, the longer each takes and the older its turns are when they are trained on.  So the number
is raised only while the engine has free places and there are leases to be had, and stays raised only where that gave
more tokens a second; it is lowered while requests queue in the engine.

Pure: ``Meter`` adds up what is seen over an interval, ``SlotControl`` decides at its end.  Time spent in swaps of
weights, and time in which evaluation trees are grown (one chain each), is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from actors.engines.base import EngineStats
from atpo_async.config import Config

START = 8
"""Trees in flight at first."""
LEAST_S, MOST_S = 1.0, 60.0
"""An interval ends when as many requests finished as are in flight, but not before nor after this."""
FULL_SHARE, QUEUED_SHARE = 0.9, 1.1
"""Of the engine's places: from there on its batch counts as full; above that, requests wait for long."""
MOST_REFUSED = 0.5
"""Share of an interval in which a slot had no lease since none was admitted: with more, slots are not what lacks.  With
less they may be: a synchronous run has such a time at the end of every batch."""
LEAST_GAIN = 0.15
"""Of the share by which the slots grew: tokens a second must grow by as much, or the raise is taken back."""
QUEUED_INTERVALS = 2
HOLD, MOST_HOLD = 15, 240
"""Intervals without another raise after one that was taken back; twice as many after each further one."""
LIGHTER = 0.7
"""When so small a share of the requests that a raise was taken back at is in flight, the trees have changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One interval."""

    running: float
    """Mean number of requests in the engine, those that wait in it too."""
    refused: float
    """Share of the time in which a slot had no lease since the buffer admitted none."""
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Change:
    """The slots from now on, and why, for the log."""

    before: int
    after: int
    why: str

    def __str__(self) -> str:
        return f"{self.before} -> {self.after} trees in flight: {self.why}"


@dataclass(frozen=True, slots=True)
class _Trial:
    """What was, before the slots were raised."""

    slots: int
    running: float
    tokens_per_s: float


class SlotControl:
    """The number of slots of one actor.

    Args:
        seats: requests that the engine runs at once.
        most: slots at most.
        start: slots at first.
    """

    def __init__(self, *, seats: int, most: int, start: int = START) -> None:
        self._seats, self._most = seats, most
        self.slots = max(1, min(start, most))
        self._trial: _Trial | None = None
        self._settling = True
        self._queued = 0
        self._hold = 0
        self._next_hold = HOLD
        self._held_at = 0.0

    def after(self, seen: Seen) -> Change | None:
        """Decide at the end of an interval.  The one after a change is not judged: its trees were begun before."""
        if self._settling:
            self._settling = False
            return None
        if self._trial is not None and (back := self._judged(self._trial, seen)) is not None:
            return back
        return self._lowered(seen) or self._raised(seen)

    def _judged(self, trial: _Trial, seen: Seen) -> Change | None:
        self._trial = None
        if seen.refused > MOST_REFUSED or not trial.tokens_per_s:
            return None  # slots without a lease show nothing
        gain = seen.tokens_per_s / trial.tokens_per_s - 1
        if gain >= LEAST_GAIN * (self.slots / trial.slots - 1):
            self._next_hold = HOLD
            return None
        self._hold, self._next_hold = self._next_hold, min(2 * self._next_hold, MOST_HOLD)
        self._held_at = trial.running
        return self._to(trial.slots, f"with {self.slots} the engine made {gain:+.0%} tokens/s")

    def _lowered(self, seen: Seen) -> Change | None:
        self._queued = self._queued + 1 if seen.running > QUEUED_SHARE * self._seats else 0
        fewer = max(1, math.floor(self.slots * self._seats / max(seen.running, 1.0)))
        if self._queued < QUEUED_INTERVALS or fewer >= self.slots:
            return None
        return self._to(fewer, f"{seen.running:.0f} requests were in the engine, which runs {self._seats} at once")

    def _raised(self, seen: Seen) -> Change | None:
        if self._hold and seen.running >= LIGHTER * self._held_at:
            self._hold -= 1
            return None
        self._hold = 0
        if seen.running >= FULL_SHARE * self._seats or seen.refused > MOST_REFUSED or self.slots >= self._most:
            return None
        needed = math.ceil(self.slots * self._seats / max(seen.running, 1.0))
        more = min(self._most, 2 * self.slots, max(self.slots + 1, needed))
        self._trial = _Trial(self.slots, seen.running, seen.tokens_per_s)
        return self._to(more, f"the engine ran {seen.running:.0f} of {self._seats} requests")

    def _to(self, slots: int, why: str) -> Change:
        change = Change(self.slots, slots, why)
        self.slots, self._settling, self._queued = slots, True, 0
        return change


class Meter:
    """Adds up an interval, between samples of the engine's counters.

    Args:
        stats: of the engine, now.
    """

    def __init__(self, stats: EngineStats) -> None:
        self._last = stats
        self._begin()

    def _begin(self) -> None:
        self._seconds = self._requests_s = self._refused_s = 0.0
        self._tokens = self._finished = 0

    def add(self, stats: EngineStats, seconds: float, *, refused: bool, counts: bool) -> Seen | None:
        """A sample ``seconds`` after the last one; what was seen, where an interval ends with it.

        Args:
            stats: of the engine, now.
            seconds: since the last sample.
            refused: a slot is without a lease since the buffer admits none.
            counts: False for time that is left out.
        """
        tokens = stats.generated_tokens - self._last.generated_tokens
        finished = stats.finished_requests - self._last.finished_requests
        self._last = stats
        if not counts:
            return None
        self._seconds += seconds
        self._requests_s += stats.in_flight * seconds
        self._refused_s += seconds if refused else 0.0
        self._tokens, self._finished = self._tokens + tokens, self._finished + finished
        running = self._requests_s / max(self._seconds, 1e-9)
        if self._seconds < LEAST_S or (self._finished < max(running, 1.0) and self._seconds < MOST_S):
            return None
        seen = Seen(running=running, refused=self._refused_s / self._seconds, tokens_per_s=self._tokens / self._seconds)
        self._begin()
        return seen


def control_of(config: Config) -> SlotControl | None:
    """None where the configuration fixes the number."""
    if config.actor.trees_in_flight:
        return None
    # Of those that may be pending at once, more would never be leased.
    most = min(config.actor.max_num_seqs, config.staleness.max_trees_pending)
    return SlotControl(seats=config.actor.max_num_seqs, most=most)
