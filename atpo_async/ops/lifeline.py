"""Ties a role's process to its signals and to its supervisor's life: each asks it to stop first, and ends it later."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable

from atpo_async.ops.exits import EXIT_CRASH, SUPERVISOR_PID
from atpo_async.run.processes import die_with_parent, started
from atpo_async.status import waits


def is_supervised() -> bool:
    return SUPERVISOR_PID in os.environ


class Signals:
    """The signals to a role, and the end of its supervisor: the first asks it to stop, the second cancels it.

    The supervisor's end arrives twice, as the kernel's death signal and from the thread that watches its process, in
    either order: together they count once, or the second would cut a clean end short.
    """

    def __init__(self, stopping: asyncio.Event, *, cancel: Callable[[], object], log: logging.Logger) -> None:
        self._stopping = stopping
        self._cancel = cancel
        self._log = log
        self._death_signal_due = False
        self.first: int | None = None
        """The signal that came first; None before any has."""

    def received(self, signum: int) -> None:
        if self._death_signal_due and signum == signal.SIGTERM:
            self._death_signal_due = False
            return
        name = signal.Signals(signum).name
        if self.first is None:
            self.first = signum
            self._log.info("%s: stopping", name)
            self._stopping.set()
        else:
            self._log.warning("%s again: cancelling", name)
            self._cancel()

    def supervisor_gone(self) -> None:
        """The supervisor has ended; called by the thread that watches it."""
        if self.first is None:
            self.received(signal.SIGTERM)
            self._death_signal_due = True


def tie_to_supervisor(
    loop: asyncio.AbstractEventLoop, stop: Callable[[], None], *, grace_s: float, saving_s: float
) -> None:
    """End this role when its supervisor ends.

    The death signal comes at once, but only to children of the supervisor (a rank's parent is accelerate) and not on
    every system; so a thread watches the supervisor's process too, and ends the whole process group when a clean end
    takes longer than ``grace_s`` or the loop is stuck.  A role that saves what it has done has ``saving_s`` for it.
    """
    supervisor = int(os.environ[SUPERVISOR_PID])
    die_with_parent()  # off Linux the thread below does it, later

    def watch() -> None:
        while _alive(supervisor):
            time.sleep(1.0)
        with contextlib.suppress(RuntimeError):  # the loop may be closed already
            loop.call_soon_threadsafe(stop)
        time.sleep(grace_s)
        deadline = time.monotonic() + saving_s
        while waits.current_phase().what == waits.SAVING and time.monotonic() < deadline:
            time.sleep(0.5)
        kill_own_group()

    threading.Thread(target=watch, name="supervisor-watch", daemon=True).start()


def kill_own_group() -> None:
    """End this process and all that it started, if the supervisor gave it a group of its own; else itself alone."""
    group = os.getpgid(0)
    if is_supervised() and group != _group_of(int(os.environ[SUPERVISOR_PID])):
        os.killpg(group, signal.SIGKILL)
    os._exit(EXIT_CRASH)


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def _alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    return started(pid) is not None


def exit_within(seconds: float, code: int) -> None:
    """End this process in ``seconds``, even if a library's thread or exit hook keeps it alive."""

    def end() -> None:
        time.sleep(seconds)
        os._exit(code)

    threading.Thread(target=end, name="exit-deadline", daemon=True).start()
