"""The driver's side of a run on a cluster: it starts the supervisor or finds it, shows its lines and passes on Ctrl-C.

A driver that ends leaves the run going; another one attaches to it.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from atpo_async.core import errors
from atpo_async.core.errors import AtpoError, RoleCrashed, SetupError
from atpo_async.ops import stopping
from atpo_async.ops.launchers.ray import cluster
from atpo_async.ops.launchers.ray.job.desk import Answer, Outcome
from atpo_async.run.metrics import Record
from atpo_async.status.loading import RoleStart

LOOK_S = 0.2
"""Between two looks whether a signal has come."""
ANSWER_S = 10.0
"""For one answer of a supervisor that is there; it gives one within a second."""
AGAIN_S = 1.0
ENDS_S = 30.0
"""For a supervisor whose work is over to be gone."""
LOOK_AT_S = 60.0
"""For the state of a run, whose files may be many."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Not SIGHUP: a terminal that is closed leaves the run going."""


class Shown(Protocol):
    """Where a driver shows what it is told: the progress of a run."""

    def say(self, line: str) -> None: ...

    def feed(self, records: Sequence[Record]) -> None: ...

    def starting(self, found: Sequence[RoleStart]) -> None: ...

    def over(self) -> None:
        """The roles have ended."""


class Stops:
    """The signals that have asked for a stop, in order."""

    def __init__(self) -> None:
        self.received: list[int] = []

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals inside the block; in the main thread only, as the system has it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number in STOP_SIGNALS:
            signal.signal(number, lambda signum, frame: self.received.append(signum))
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def facts_of(run: str, namespace: str) -> tuple[Any, Mapping[str, str]] | None:
    """The supervisor of a run that is going on, and what it was started with; None where there is none.

    Waits for: one whose work is over to be gone.  Raises SetupError where it does not answer.
    """
    deadline = time.monotonic() + ENDS_S
    while (actor := cluster.supervisor(run, namespace)) is not None:
        try:
            facts: dict[str, str] = cluster.get(actor.facts.remote(), ANSWER_S)
        except Exception as exc:
            if cluster.is_for_a_while(exc) or isinstance(exc, TimeoutError):
                return actor, {}  # its node is gone, and may come back
            if not cluster.is_lost(exc):
                raise
            facts = {"ended": "yes"}
        if not facts.get("ended"):
            return actor, facts
        if time.monotonic() > deadline:
            raise SetupError(f"the supervisor of run {run} has ended its work and does not go; try again in a moment")
        time.sleep(LOOK_S)
    return None


def follow(actor: Any, shown: Shown, *, run: str, pinned: str) -> Outcome:
    """Show what a supervisor tells, to its outcome.  Waits for: the supervisor, also while its node is gone.

    Args:
        pinned: which node it is on, for the user.

    Raises SetupError where it is gone for good.
    """
    driver, life, since = secrets.token_hex(4), "", 0
    stops, passed_on, away = Stops(), 0, False
    with stops.listening():
        while True:
            for signum in stops.received[passed_on:]:
                if not passed_on:
                    shown.say(stopping.stopping_line(signum))
                passed_on += 1
                _quietly_stop(actor, stopping.again(signum))
            if away and passed_on > 1:
                cluster.end(actor)
                return Outcome(code="interrupted", message="its supervisor was given up: its node had not come back.")
            answer = _answer(actor, driver, life, since, stops, passed_on)
            if answer is None:
                if not away:
                    away = True
                    shown.say(
                        f"the supervisor of run {run} is out of reach: the run goes on once its node ({pinned}) is "
                        "back; Ctrl-C twice gives it up"
                    )
                time.sleep(AGAIN_S)
                continue
            if life and answer.life != life:
                shown.say("the supervisor has started again, and goes on with the run")
                passed_on = 0
            away, life, since = False, answer.life, answer.upto
            _show(answer, shown)
            if answer.outcome is not None:
                return answer.outcome


def _answer(actor: Any, driver: str, life: str, since: int, stops: Stops, known: int) -> Answer | None:
    """None where it is out of reach for now.  Waits for: it, or a signal that has not been passed on."""
    ref = actor.answer.remote(driver, life, since)
    deadline = time.monotonic() + ANSWER_S
    while True:
        try:
            found: Answer = cluster.get(ref, LOOK_S)
            return found
        except TimeoutError:
            if time.monotonic() > deadline:
                return None
            if len(stops.received) > known:
                return Answer(life=life, upto=since, events=(), left_out=0, outcome=None)
        except Exception as exc:
            if cluster.is_for_a_while(exc):
                return None
            if cluster.is_lost(exc):
                raise SetupError(f"the run's supervisor is gone for good: {cluster.one_line(exc)}") from None
            raise


def _quietly_stop(actor: Any, again: str) -> None:
    """Also for one that is out of reach: then it is asked when it is back."""
    with contextlib.suppress(Exception):
        actor.stop.remote(again)


def _show(answer: Answer, shown: Shown) -> None:
    if answer.left_out:
        shown.say(f"({answer.left_out} earlier lines and figures are not kept)")
    for event in answer.events:
        if event.kind == "line":
            shown.say(event.what)
        elif event.kind == "records":
            shown.feed(event.what)
        elif event.kind == "starts":
            shown.starting(event.what)
        else:
            shown.over()


def error_of(outcome: Outcome) -> AtpoError:
    """The error that a run failed with, as on one machine."""
    kind = getattr(errors, outcome.error, None)
    if not (isinstance(kind, type) and issubclass(kind, AtpoError)):
        kind = RoleCrashed
    return kind(outcome.message)


def look(run: str, namespace: str, where: str) -> Any:
    """What the supervisor of a run says of its state.

    Args:
        where: of the cluster, for errors.

    Raises SetupError where there is none, with those that there are.
    """
    actor = cluster.supervisor(run, namespace)
    if actor is None:
        there = cluster.runs(namespace)
        others = f"runs there: {', '.join(there)}" if there else "none runs there"
        raise SetupError(
            f"no run {run} is going on at {where} in the namespace {namespace}; {others}.  A run that has ended is "
            "shown by its folder: atpo status RUN_DIR"
        )
    try:
        cluster.get(actor.facts.remote(), ANSWER_S)  # one whose node is gone answers nothing for days
        return cluster.get(actor.look.remote(), LOOK_AT_S)
    except AtpoError:
        raise
    except Exception as exc:
        if cluster.is_lost(exc) or isinstance(exc, TimeoutError):
            raise SetupError(
                f"the supervisor of run {run} does not answer: its node may be gone, and the run goes on when it is "
                f"back ({cluster.one_line(exc)})"
            ) from None
        raise
