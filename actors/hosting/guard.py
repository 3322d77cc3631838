"""Protects the actor's process from an environment's code: signals, their handlers, and the working folder."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

log = logging.getLogger("atpo.actor.environment")

STRAY = tuple(getattr(signal, name) for name in ("SIGALRM", "SIGVTALRM", "SIGPROF", "SIGUSR2") if hasattr(signal, name))
"""Signals that a tool may send to this process, an alarm above all, and that end a process without a handler."""


@contextlib.contextmanager
def put_back() -> Iterator[None]:
    """After the block the working folder, and in the main thread the handlers of signals, are what they were before."""
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()} if main else {}
    folder: str | None
    try:
        folder = os.getcwd()
    except OSError:  # it was deleted
        folder = None
    try:
        yield
    finally:
        for number, before in handlers.items():
            # None: a handler in C, which Python can neither show nor set.
            if before is not None and signal.getsignal(number) != before:
                with contextlib.suppress(OSError, ValueError):
                    signal.signal(number, before)
        if folder is not None:
            with contextlib.suppress(OSError):
                os.chdir(folder)


@contextlib.contextmanager
def stray_signals_end_nothing() -> Iterator[None]:
    """While the block runs, an alarm that a tool has left behind is logged once and has no effect.

    By a handler, since programs that a tool starts would inherit that a signal is ignored.  In the main thread only.
    """
    logged: set[int] = set()

    def stray(number: int, frame: FrameType | None) -> None:
        if number not in logged:
            logged.add(number)
            log.warning(
                "%s reached the actor, from a tool of the environment it seems; it has no effect: tools run outside "
                "the main thread, where no alarm can end them (search.step_timeout_s does)",
                signal.Signals(number).name,
            )

    before = {number: signal.getsignal(number) for number in STRAY}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:
            signal.signal(number, stray)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is signal.SIG_DFL and signal.getsignal(number) is stray:
                signal.signal(number, handler)
