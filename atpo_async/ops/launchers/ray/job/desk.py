"""What a run's supervisor has to tell its drivers, and what they ask of it: between the thread that trains and Ray's
calls."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from atpo_async.run.metrics import Record
from atpo_async.status.loading import RoleStart

MOST_EVENTS = 2000
"""That are kept for a driver that attaches later."""
MOST_OF_ONE_ANSWER = 500
MOST_RECORDS = 1000
"""In one event."""
SEEN_S = 5.0
"""A driver that has asked for nothing for so long is gone."""

Kind = Literal["line", "records", "starts", "over"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something for the terminal."""

    kind: Kind
    what: Any
    """A line; records; roles that are starting; nothing where the roles have ended, and last words follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run's supervisor ended its work."""

    code: Literal["done", "interrupted", "failed"]
    error: str = ""
    """Name of the class of ``core.errors``, where it failed."""
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """To a driver."""

    life: str
    """Another one than before: the supervisor has started again, and counts its events from 0."""
    upto: int
    """Number of the event after the last one here."""
    events: tuple[Event, ...]
    left_out: int
    """Events that are not kept any more."""
    outcome: Outcome | None


class Desk:
    """Events in, in the thread that trains; answers out, in Ray's.

    Args:
        life: of the supervisor.
        clock: seconds, monotonic.
    """

    def __init__(self, life: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.life = life
        self._clock = clock
        self._lock = threading.Lock()
        self._events: collections.deque[Event] = collections.deque(maxlen=MOST_EVENTS)
        self._count = 0
        self._outcome: Outcome | None = None
        self._drivers: dict[str, tuple[float, bool]] = {}
        """Driver -> when it asked last, and whether it knows the outcome."""
        self._stops = 0
        self._again = "Ctrl-C again"
        self._on_stop: Callable[[str], None] | None = None

    # --- the thread that trains

    def say(self, line: str) -> None:
        for part in line.splitlines() or [""]:
            self._add(Event(kind="line", what=part))

    def feed(self, records: Sequence[Record]) -> None:
        if records:  # a run that goes on has all those of its past at first
            self._add(Event(kind="records", what=tuple(records[-MOST_RECORDS:])))

    def starting(self, found: Sequence[RoleStart]) -> None:
        self._add(Event(kind="starts", what=tuple(found)))

    def over(self) -> None:
        """There is no more progress to show."""
        self._add(Event(kind="over", what=None))

    def _add(self, event: Event) -> None:
        with self._lock:
            self._events.append(event)
            self._count += 1

    def end(self, outcome: Outcome) -> None:
        with self._lock:
            self._outcome = outcome

    def answers_stops(self, stop: Callable[[str], None] | None) -> None:
        """Have ``stop(again)`` called for each request to stop, those that came before included; None: no more."""
        with self._lock:
            self._on_stop = stop
            missed, again = self._stops, self._again
        for _ in range(missed if stop is not None else 0):
            assert stop is not None
            stop(again)

    # --- Ray's calls

    def answer(self, driver: str, life: str, since: int) -> Answer:
        """What has happened from event ``since`` of ``life`` on; from the first one on where this is another life."""
        with self._lock:
            first = self._count - len(self._events)
            since = since if life == self.life else 0
            begin = max(since, first)
            events = tuple(list(self._events)[begin - first :][:MOST_OF_ONE_ANSWER])
            upto = begin + len(events)
            outcome = self._outcome if upto == self._count else None
            self._drivers[driver] = (self._clock(), outcome is not None)
            return Answer(
                life=self.life, upto=upto, events=events, left_out=max(0, first - since), outcome=outcome
            )  # fmt: skip

    def stop(self, again: str) -> None:
        """A driver asks for the end with saving; the second time for one at once."""
        with self._lock:
            self._stops += 1
            self._again = again
            stop = self._on_stop
        if stop is not None:
            stop(again)

    @property
    def drivers(self) -> int:
        """That have ever asked."""
        return len(self._drivers)

    @property
    def ended(self) -> bool:
        return self._outcome is not None

    @property
    def is_left(self) -> bool:
        """Whether the work is over and every driver that still asks knows it."""
        now = self._clock()
        with self._lock:
            return self._outcome is not None and all(
                knows or now - seen > SEEN_S for seen, knows in self._drivers.values()
            )
