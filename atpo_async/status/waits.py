"""Named waits with deadlines, and counters of the progress of this process.

Code that waits registers its wait (``waiting``, ``BoundedWait``, ``DeferredAnswers``); code that works counts what it
has done (``progress``, ``phase``).  ``status.reporter`` makes a status snapshot of both, from a thread of its own, and
``status.hangs`` judges it: a wait without progress is a hang, a long one with progress is work.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from atpo_async.core.errors import WaitTimeout
from atpo_async.core.texts import shortened

TORCH, ENGINE, ENVIRONMENT = "torch", "engine", "environment"
OWN_PARTS = frozenset({TORCH, ENGINE, ENVIRONMENT})
"""Parts of a role's own process that it may wait for; starting the role again mends a hang of theirs."""

CLUSTER = "the cluster"
"""What a role waits for that has no place yet on the cluster where it is to run."""

DISK = "disk"
"""A role waits for it in its own process too, but starting the role again does not make a disk answer."""


LOADING_ENGINE = "loading its engine"
"""Phase of an actor whose engine starts; the engine may say after a colon what it is at."""

SAVING = "saving"
"""Phase of a role that was asked to end and first saves its work to disk; the supervisor gives it the time for that."""


class Deadlines(Protocol):
    """``links.deadline_s`` and ``links.give_up_s``, whatever object holds them."""

    @property
    def deadline_s(self) -> float: ...

    @property
    def give_up_s(self) -> float: ...


# --- the registry of waits ----------------------------------------------------------------------------------------


class waiting:
    """A named wait, in the registry while the block runs; in a coroutine as well as in a thread, nested or not.

    Args:
        who: what waits, as text for people: ``tree t7``, ``the learner``.
        what: what it waits for: ``batch 12``, ``space in the window``.
        on: what can end the wait: a role (``buffer``, ``learner``, ``actors``, ``actor-0``), a part of this process
            (``OWN_PARTS``, ``DISK``), or empty where nothing in the run can.
        limit_s: seconds after which it ends by itself; None where it has no limit of its own.
    """

    __slots__ = ("limit_s", "on", "since", "what", "who")

    detail = ""

    def __init__(self, who: str, what: str, *, on: str = "", limit_s: float | None = None) -> None:
        self.who = who
        self.what = what
        self.on = on
        self.limit_s = limit_s
        self.since = 0.0

    def __enter__(self) -> Self:
        self.since = time.monotonic()
        _open[id(self)] = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        _open.pop(id(self), None)


class BoundedWait:
    """A wait that is logged past ``deadline_s``, and raises past ``give_up_s`` without progress.

    It is in the registry as long as the object lives.

    Args:
        who, what: for the log and the error.
        deadlines: seconds.
        clock: seconds, monotonic.
        log: where the warnings go.
        on: as of ``waiting``; may be set anew when it turns out to be another role.
    """

    def __init__(
        self,
        who: str,
        what: str,
        deadlines: Deadlines,
        clock: Callable[[], float],
        *,
        log: logging.Logger,
        on: str = "",
    ) -> None:
        self.who = who
        self.what = what
        self.on = on
        self.detail = ""
        """The progress of what it waits for, or what holds that up: the latest reason."""
        self.since = time.monotonic()  # as every wait in the registry, whatever ``clock`` is
        self._deadlines = deadlines
        self._clock = clock
        self._log = log
        self._began = self._warned = self._moved = clock()
        _bounded.add(self)

    @property
    def limit_s(self) -> float:
        return self._deadlines.give_up_s

    def again(self, reason: str) -> None:
        """Called after every fruitless attempt.  Raises WaitTimeout once nothing has ``moved`` for ``give_up_s``,
        unless a role is loading meanwhile (``extend_while``)."""
        now, reason = self._clock(), shortened(reason, 500)
        self.detail = reason
        if now - self._moved > self._deadlines.give_up_s:
            loads = _what_loads() if now - self._began < LOADS_AT_MOST_S else None
            if loads is not None:
                self._log.warning(
                    "%s has waited %.0f s for %s and waits on, as %s", self.who, now - self._began, self.what, loads
                )
                self._moved = now
                return
            raise WaitTimeout(
                f"{self.who} waited {now - self._moved:.0f} s for {self.what} (links.give_up_s): {reason}"
            )  # fmt: skip
        if now - self._warned > self._deadlines.deadline_s:
            self._warned = now
            self._log.warning("%s has waited %.0f s for %s: %s", self.who, now - self._began, self.what, reason)

    def moved(self) -> None:
        """There was progress: the wait may take ``give_up_s`` again.  The log goes on counting from the beginning."""
        self._moved = self._clock()


LOADS_AT_MOST_S = 3600.0
"""No wait is extended beyond this because something loads: it may stand still where no supervisor sees it."""


def _nothing_loads() -> str | None:
    return None


_what_loads: Callable[[], str | None] = _nothing_loads


def extend_while(what_loads: Callable[[], str | None] | None) -> None:
    """A ``BoundedWait`` whose time is up goes on as long as ``what_loads()`` names something that still loads.

    None: nothing ever does.
    """
    global _what_loads
    _what_loads = what_loads or _nothing_loads


class DeferredAnswers:
    """The wait of a server that answers "not yet": from the first deferred answer to the first full one, or until no
    request has come for ``FORGET_S``.

    Args:
        who: what waits, as text for people: ``the requests for leases``.
    """

    limit_s = None
    detail = ""

    def __init__(self, who: str) -> None:
        self.who = who
        self.what = self.on = ""
        self.since = 0.0
        self._asked_at: float | None = None

    def goes_on(self, what: str, *, on: str) -> None:
        """A request was answered with "not yet" because of ``what``, which ``on`` can end."""
        now = time.monotonic()
        if not self.lasts(now):
            self.since = now
            _deferred.add(self)
        self.what, self.on, self._asked_at = what, on, now

    def over(self) -> None:
        """A request was answered in full."""
        self._asked_at = None

    def lasts(self, now: float) -> bool:
        return self._asked_at is not None and now - self._asked_at < FORGET_S


FORGET_S = 5.0

_open: dict[int, waiting] = {}
_bounded: weakref.WeakSet[BoundedWait] = weakref.WeakSet()
_deferred: weakref.WeakSet[DeferredAnswers] = weakref.WeakSet()


def open_waits(now: float | None = None) -> list[dict[str, Any]]:
    """The waits of this process, longest first: ``{who, what, on, since_s, limit_s, detail}``.
    From any thread.

    Args:
        now: ``time.monotonic()`` where left out.
    """
    now = time.monotonic() if now is None else now
    found = [
        {
            "who": w.who,
            "what": w.what,
            "on": w.on,
            "since_s": max(0.0, now - w.since),
            "limit_s": w.limit_s,
            "detail": w.detail,
        }
        for w in _registered(time.monotonic())
    ]
    return sorted(found, key=lambda wait: -wait["since_s"])


def _registered(now: float) -> list[waiting | BoundedWait | DeferredAnswers]:
    for _ in range(100):
        try:
            return [*_open.values(), *_bounded, *(answers for answers in _deferred if answers.lasts(now))]
        except RuntimeError:  # another thread began or ended a wait meanwhile
            continue
    return []


# --- progress and phase -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Phase:
    """What a role is doing, since ``time.monotonic()`` = ``since``."""

    what: str
    since: float
    starting: bool
    """It loads, compiles, warms up: then using the processor counts as progress too."""


_progress: dict[str, int] = {}
_phase = Phase("starting", time.monotonic(), starting=True)


def progress(name: str, count: int = 1) -> None:
    """Count progress: ``count`` more of ``name`` (turns, tokens, micro-batches).  Each name from one thread."""
    _progress[name] = _progress.get(name, 0) + count


def phase(what: str, *, starting: bool = False) -> None:
    """Enter a phase; a change of phase counts as progress."""
    global _phase
    if (what, starting) != (_phase.what, _phase.starting):
        _phase = Phase(what, time.monotonic(), starting)


def progress_made() -> dict[str, int]:
    """Name -> how many so far, of everything that was counted."""
    for _ in range(100):
        try:
            return dict(_progress)
        except RuntimeError:
            continue
    return {}


def current_phase() -> Phase:
    return _phase
