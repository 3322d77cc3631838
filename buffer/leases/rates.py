"""How fast each actor is: turns a second while it holds leases, as the median of its latest stretches of work.  Pure.

A stretch ends when so many turns came and it lasted for so long.  Time without a lease does not count: an actor that
admission keeps waiting is not slow.  An actor that stands still while it holds leases becomes slower by that.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median

from atpo_async.core.vocabulary import Split
from buffer.leases.table import HeldLease

STRETCH_TURNS = 16
STRETCH_S = 2.0
"""The first stretch may be shorter: what is known of a new actor is known soon."""
STRETCHES = 5
LATE = 2.0
"""A stretch that takes this many times as long as usual counts before its end."""
LONG = 0.9
"""Share of trees that have at most as many turns as a long one."""
TREES = 64
"""Trees of a kind of which the number of turns is remembered."""
HALF_LIFE_S = 60.0
"""What was received counts half as much after it."""


class Decaying:
    """A sum whose parts count half as much after ``HALF_LIFE_S``."""

    __slots__ = ("_at", "_sum")

    def __init__(self) -> None:
        self._sum = 0.0
        self._at = 0.0

    def add(self, value: float, now: float) -> None:
        self._sum, self._at = self.at(now) + value, now

    def at(self, now: float) -> float:
        return self._sum * 0.5 ** ((now - self._at) / HALF_LIFE_S) if self._sum else 0.0


@dataclass(slots=True)
class _Meter:
    held: Counter[Split] = field(default_factory=Counter)
    received: int = 0
    """Turns that came of the trees that it holds now."""
    busy_since: float = 0.0
    stretch_s: float = 0.0
    """Of the stretch under way, before ``busy_since``."""
    stretch_turns: int = 0
    rates: deque[float] = field(default_factory=lambda: deque(maxlen=STRETCHES))
    usual: float | None = None
    """The median of ``rates``."""
    turns: Decaying = field(default_factory=Decaying)
    lags: Decaying = field(default_factory=Decaying)
    trees: int = 0
    """That came to their end, in all."""

    def busy_s(self, now: float) -> float:
        """Of the stretch under way."""
        return self.stretch_s + (max(now - self.busy_since, 0.0) if self.held.total() else 0.0)


class Rates:
    """The actors that hold leases or have held some."""

    def __init__(self) -> None:
        self.now = 0.0
        """Seconds; of the latest message."""
        self._meters: dict[str, _Meter] = {}
        self._turns_of: dict[Split, deque[int]] = {"train": deque(maxlen=TREES), "eval": deque(maxlen=TREES)}
        self._typical: dict[Split, float | None] = {"train": None, "eval": None}
        self._long: float | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._meters)

    def __len__(self) -> int:
        return len(self._meters)

    def __contains__(self, actor: object) -> bool:
        return actor in self._meters

    # --- changes -----------------------------------------------------------------------------------------------

    def assigned(self, held: HeldLease) -> None:
        """Its holder has this lease from now on."""
        meter = self._meters.setdefault(held.holder, _Meter())
        if not meter.held.total():
            meter.busy_since = self.now
        meter.held[held.kind] += 1
        meter.received += held.turns

    def unassigned(self, held: HeldLease) -> None:
        """Its holder does not have it any more."""
        meter = self._meters.get(held.holder)
        if meter is None or not meter.held[held.kind]:
            return
        if meter.held.total() == 1:
            meter.stretch_s = meter.busy_s(self.now)
        meter.held[held.kind] -= 1
        meter.received -= held.turns

    def turn(self, held: HeldLease, *, lag: int) -> None:
        """A turn of a tree came, ``lag`` versions behind the learner."""
        held.turns += 1
        meter = self._meters.get(held.holder)
        if meter is None or held.waiting:
            return
        now = self.now
        meter.received += 1
        meter.stretch_turns += 1
        meter.turns.add(1.0, now)
        meter.lags.add(float(lag), now)
        if meter.stretch_turns < STRETCH_TURNS:
            return
        took = meter.busy_s(now)
        if took > 0.0 and (took >= STRETCH_S or not meter.rates):
            meter.rates.append(meter.stretch_turns / took)
            meter.usual = float(median(meter.rates))
            meter.stretch_turns, meter.stretch_s, meter.busy_since = 0, 0.0, now

    def ended(self, held: HeldLease) -> None:
        """A tree came to its end under the lease of its holder."""
        if held.turns:
            kept = self._turns_of[held.kind]
            kept.append(held.turns)
            self._typical[held.kind] = float(median(kept))
            if held.kind == "train":
                self._long = float(sorted(kept)[math.ceil(LONG * len(kept)) - 1])
        if (meter := self._meters.get(held.holder)) is not None:
            meter.trees += 1

    def excuse(self, away_s: float) -> None:
        """The buffer stood still for so long: no turn could come."""
        for meter in self._meters.values():
            if meter.held.total():
                meter.busy_since += away_s

    def forget(self, actor: str) -> None:
        """A new process of this name is another actor, perhaps on another machine."""
        self._meters.pop(actor, None)

    def goes_on(self, former: str, actor: str) -> None:
        """The process that was called ``former`` is called ``actor`` from now on; its leases are assigned to that."""
        meter, new = self._meters.pop(former, None), self._meters.get(actor)
        if meter is not None:
            if new is not None:
                meter.held, meter.received, meter.busy_since = new.held, new.received, new.busy_since
            self._meters[actor] = meter

    # --- queries -----------------------------------------------------------------------------------------------

    def turns_per_s(self, actor: str) -> float | None:
        """While it holds leases; None where too few turns came to say."""
        meter = self._meters.get(actor)
        if meter is None or meter.usual is None:
            return None
        usual, took = meter.usual, meter.busy_s(self.now)
        if took * usual > LATE * max(STRETCH_TURNS, STRETCH_S * usual):
            return min(usual, (meter.stretch_turns + 1) / took)
        return usual

    def turns_per_tree(self, kind: Split) -> float | None:
        """Of the trees of a kind that ended last, the median; None where none has."""
        return self._typical[kind]

    def turns_of_long_tree(self) -> float | None:
        """Of the training trees that ended last, one that most do not exceed; None where none has."""
        return self._long

    def held(self, actor: str, kind: Split) -> int:
        """Leases of a kind that ``actor`` holds."""
        meter = self._meters.get(actor)
        return 0 if meter is None else meter.held[kind]

    def owed(self, actor: str) -> float:
        """Turns still to come of the trees that ``actor`` holds: at least one of each."""
        meter = self._meters.get(actor)
        if meter is None:
            return 0.0
        whole = sum((self._typical[kind] or 0.0) * number for kind, number in meter.held.items())
        return max(whole - meter.received, float(meter.held.total()))

    def trees(self, actor: str) -> int:
        """Trees that came to their end under its leases."""
        meter = self._meters.get(actor)
        return 0 if meter is None else meter.trees

    def received(self, actor: str) -> tuple[float, float | None]:
        """Turns that came of late, recent ones counting more; and their mean lag, None where none came."""
        meter = self._meters.get(actor)
        if meter is None:
            return 0.0, None
        turns = meter.turns.at(self.now)
        return turns, meter.lags.at(self.now) / turns if turns > 1e-6 else None
