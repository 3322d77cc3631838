"""The picture that every role gives of itself: who in it waits for whom and since when, its links, how far it is.

A thread writes it to ``runs/<name>/status/<role>.json`` once a second and answers SIGUSR1 with the same in the log.
Both also work while the event loop stands still; then the picture says where.  ``status.hangs`` and ``atpo status``
read it.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from atpo_async.run import processes
from atpo_async.run.rundir import host_id
from atpo_async.status import waits

FOLDER = "status"
"""In a run's folder."""

EVERY_S = 1.0
"""Between two pictures, and between two beats of the loop."""

STANDS_STILL_S = 4.0
"""A loop that has not ticked for so long is held up: its stack is in the picture."""

MAX_WAITS = 40
"""Kinds of waits in a picture, the longest first."""
MAX_FRAMES = 15
ENDING, ENDED = "ending", "ended"
"""Phases: its work is done or given up; and that of its last picture, unless it was killed."""

LINKS = "link."
"""Begins the name under which a link publishes itself; it comes into ``StatusSnapshot.links`` without it."""

Facts = Callable[[], Mapping[str, Any]]


class Wait(msgspec.Struct, frozen=True, kw_only=True):
    """Waits of one kind."""

    who: str
    """Of the one that has waited longest."""
    what: str
    on: str
    since_s: float
    limit_s: float | None = None
    count: int = 1
    detail: str = ""
    """How far what it waits for is, or what keeps it; empty where that is not known."""


class StatusSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """One role at one moment."""

    role: str
    mark: str
    """Which attempt of the role it is (``processes.ROLE_MARK``); empty where it was started by hand."""
    pid: int
    started: int
    """Of the process, clock ticks since boot: tells it from a later one with this pid."""
    host: str
    """Machine and boot (``rundir.host_id``)."""
    hostname: str
    at: float
    """Unix seconds: for another machine."""
    monotonic_s: float
    """``time.monotonic()``, the same for every process of this boot: for this machine."""
    sequence: int
    """Rises with every picture of a process."""
    phase: str
    phase_s: float
    starting: bool
    still_s: float
    """Since anything in ``progress`` or the phase last changed."""
    loop_age_s: float | None
    """Since the event loop last ticked; None before it runs."""
    waits: tuple[Wait, ...] = ()
    progress: dict[str, int] = {}
    links: dict[str, dict[str, Any]] = {}
    """Link -> what ``link_status()`` says, as of the loop's last tick."""
    facts: dict[str, dict[str, Any]] = {}
    """What parts of the role publish of themselves, as of the loop's last tick."""
    stack: tuple[str, ...] = ()
    """Of the loop's thread, outermost call first, where the loop stands still."""

    @property
    def held_up(self) -> bool:
        return self.loop_age_s is not None and self.loop_age_s > STANDS_STILL_S


# --- what a role adds -------------------------------------------------------------------------------------------

_published: dict[str, Facts | weakref.WeakMethod[Facts]] = {}


def publish(name: str, facts: Facts) -> None:
    """Add ``facts()``, a flat mapping, to this role's picture under ``name``; the newest of a name holds.

    It is called in the event loop about once a second and must not block.  A bound method is held weakly: with its
    object it goes.  Links use names that begin with ``LINKS``.
    """
    _published[name] = weakref.WeakMethod(facts) if hasattr(facts, "__self__") else facts


def unpublish(name: str) -> None:
    _published.pop(name, None)


def published() -> dict[str, dict[str, Any]]:
    """What everybody says now.  One who cannot is named with the reason."""
    said: dict[str, dict[str, Any]] = {}
    for name, held in list(_published.items()):
        facts = held() if isinstance(held, weakref.WeakMethod) else held
        if facts is None:
            _published.pop(name, None)
            continue
        try:
            said[name] = dict(facts())
        # One part's fault must not take the whole picture away.
        except Exception as exc:
            said[name] = {"error": f"{type(exc).__name__}: {exc}"}
    return said


# --- making the picture -----------------------------------------------------------------------------------------


class Reporter:
    """A role's status thread.  Use as a context; ``attach`` from inside the event loop.

    Args:
        role: the name in the picture.
        folder: where ``<role>.json`` goes; None keeps none.
        log: where SIGUSR1 is answered.
        on_signal: take SIGUSR1; one reporter of a process can.
        every_s: seconds between two pictures.
    """

    def __init__(
        self,
        role: str,
        *,
        folder: Path | None,
        log: logging.Logger,
        on_signal: bool = False,
        every_s: float = EVERY_S,
    ) -> None:
        self._role = role
        self._file = None if folder is None else folder / f"{file_stem(role)}.json"
        self._log = log
        self._on_signal = on_signal and hasattr(faulthandler, "register")
        self._every_s = every_s
        self._mark = os.environ.get(processes.ROLE_MARK, "")
        self._started = processes.started(os.getpid()) or 0
        self._host, self._hostname = host_id(), socket.gethostname()
        self._sequence = 0
        self._lock = threading.Lock()
        self._last: object = None
        self._moved_at = time.monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread = 0
        self._ticked_at: float | None = None
        self._said: dict[str, dict[str, Any]] = {}
        self._trouble = ""
        self._ending = False
        self._wake_r = self._wake_w = -1
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._wake_r, self._wake_w = os.pipe()
        # Never may a signal handler wait for room in the pipe: it could be the thread that has to empty it.
        os.set_blocking(self._wake_w, False)
        os.set_blocking(self._wake_r, False)
        if self._on_signal:
            # A handler in C: Python's own runs in the main thread only, between two instructions, which is too late
            # when the loop hangs.  What it writes, a stack, wakes the thread.  Unlike a blocked signal mask it is not
            # inherited by the programs that this role starts.
            faulthandler.register(signal.SIGUSR1, file=self._wake_w, all_threads=False, chain=False)
        self._thread = threading.Thread(target=self._work, name="status", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending = True
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_w, b"!")
        if self._thread is not None:
            self._thread.join(timeout=5.0)
        waits.phase(ENDED)
        self._ticked_at = None
        self._write()
        if self._on_signal:
            faulthandler.unregister(signal.SIGUSR1)
            # The default action would end the process in the middle of its farewell.
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if self._thread is not None and not self._thread.is_alive():
            os.close(self._wake_r)
            os.close(self._wake_w)

    def attach(self) -> None:
        """The running loop is the one to be watched; what is published is asked in it from now on."""
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._tick()

    def _tick(self) -> None:
        assert self._loop is not None
        self._ticked_at = time.monotonic()
        self._said = published()
        self._loop.call_later(self._every_s, self._tick)

    def _work(self) -> None:
        """Waits for: the clock, or SIGUSR1.  Ended by: leaving the context."""
        while not self._ending:
            ready, _, _ = select.select([self._wake_r], [], [], self._every_s)
            if self._ending:
                return
            if ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_r, 1 << 16)
                self._tell()
            self._write()

    def _tell(self) -> None:
        """The picture, and where every thread is, to the log."""
        try:
            self._log.info("%s", "\n".join([*lines(self.picture()), *_stacks()]))
        # Whatever is wrong with one answer, the thread must live to give the next.
        except Exception:
            self._log.exception("the picture of %s could not be told", self._role)

    def _write(self) -> None:
        if self._file is None:
            return
        aside = self._file.with_name(f".{self._file.name}.{os.getpid()}")
        try:
            data = msgspec.json.encode(self.picture(), enc_hook=str)
            self._file.parent.mkdir(exist_ok=True)
            # Renamed, so that nobody reads half of it; not synced, as it means nothing after a crash of the machine.
            aside.write_bytes(data)
            aside.replace(self._file)
            self._trouble = ""
        # A full disk, a folder that was deleted: the role goes on, and says it once.
        except Exception as exc:
            if not self._trouble:
                self._log.warning("status of %s cannot be written to %s: %s", self._role, self._file, exc)
            self._trouble = str(exc)

    def picture(self) -> StatusSnapshot:
        """From any thread."""
        with self._lock:
            now = time.monotonic()
            phase, made = waits.current_phase(), waits.progress_made()
            if (phase, made) != self._last:
                self._last, self._moved_at = (phase, made), now
            self._sequence += 1
            age = None if self._ticked_at is None else now - self._ticked_at
            said = self._said
            return StatusSnapshot(
                role=self._role,
                mark=self._mark,
                pid=os.getpid(),
                started=self._started,
                host=self._host,
                hostname=self._hostname,
                at=time.time(),
                monotonic_s=now,
                sequence=self._sequence,
                phase=phase.what,
                phase_s=now - phase.since,
                starting=phase.starting,
                still_s=now - self._moved_at,
                loop_age_s=age,
                waits=grouped(waits.snapshot(now)),
                progress=made,
                links={name.removeprefix(LINKS): facts for name, facts in said.items() if name.startswith(LINKS)},
                facts={name: facts for name, facts in said.items() if not name.startswith(LINKS)},
                stack=_stack_of(self._loop_thread) if age is not None and age > STANDS_STILL_S else (),
            )


def grouped(found: list[dict[str, Any]]) -> tuple[Wait, ...]:
    """Waits for the same thing of the same part as one, the longest of each kind first.  Pure."""
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for wait in found:
        kinds.setdefault((wait["what"], wait["on"]), []).append(wait)
    merged = [Wait(**max(alike, key=lambda wait: float(wait["since_s"])), count=len(alike)) for alike in kinds.values()]
    return tuple(sorted(merged, key=lambda wait: -wait.since_s)[:MAX_WAITS])


def _stack_of(thread: int) -> tuple[str, ...]:
    frame = sys._current_frames().get(thread)
    if frame is None:
        return ()
    return tuple(f"{f.filename}:{f.lineno} {f.name}: {f.line}" for f in traceback.extract_stack(frame)[-MAX_FRAMES:])


def _stacks() -> list[str]:
    """Where every thread but this one is."""
    told = []
    for thread in threading.enumerate():
        if thread.ident is not None and thread is not threading.current_thread():
            told += [f"  thread {thread.name}:", *(f"    {line}" for line in _stack_of(thread.ident))]
    return told


def file_stem(role: str) -> str:
    """A role's name as a file's: whatever a user called it."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", role) or "_"


# --- reading it -------------------------------------------------------------------------------------------------


def read(folder: Path) -> tuple[dict[str, StatusSnapshot], dict[str, str]]:
    """(role -> picture, file name -> what is wrong with it) of all files in a status folder; neither need exist."""
    pictures: dict[str, StatusSnapshot] = {}
    damaged: dict[str, str] = {}
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        if file.name.startswith("."):
            continue
        try:
            picture = msgspec.json.decode(file.read_bytes(), type=StatusSnapshot)
        except FileNotFoundError:
            continue
        except OSError as exc:
            damaged[file.name] = exc.strerror or str(exc)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            damaged[file.name] = str(exc)
        else:
            pictures[picture.role] = picture
    return pictures, damaged


def is_alive(picture: StatusSnapshot) -> bool | None:
    """Whether the process that made it runs; None where it ran on another machine, or before this boot."""
    if picture.host != host_id():
        return None
    started = processes.started(picture.pid)
    return started is not None and (started == picture.started or picture.started == 0)


def age_s(picture: StatusSnapshot, *, now: float, wall: float) -> float:
    """Since it was made.  ``now``, ``wall``: ``time.monotonic()`` and ``time.time()``; the wall clock may be moved, so
    that it counts for other machines only."""
    return max(0.0, now - picture.monotonic_s if picture.host == host_id() else wall - picture.at)


def forget_the_dead(folder: Path) -> None:
    """Remove the pictures of processes of this machine that have gone."""
    for role, picture in read(folder)[0].items():
        if is_alive(picture) is False:
            with contextlib.suppress(OSError):
                (folder / f"{file_stem(role)}.json").unlink(missing_ok=True)


# --- for people -------------------------------------------------------------------------------------------------


def lines(picture: StatusSnapshot) -> list[str]:
    """A picture in lines, the first one for the role itself."""
    loop = "no event loop yet" if picture.loop_age_s is None else f"loop ticked {duration(picture.loop_age_s)} ago"
    told = [f"{picture.role} (process {picture.pid}): {picture.phase} for {duration(picture.phase_s)}, {loop}"]
    if picture.progress:
        done = ", ".join(f"{count} {name}" for name, count in picture.progress.items())
        told.append(f"  done: {done}; the last {duration(picture.still_s)} ago")
    told += [f"  waits: {wait_line(wait)}" for wait in picture.waits]
    told += [f"  link {name}: {flat(facts)}" for name, facts in picture.links.items()]
    told += [f"  {name}: {flat(facts)}" for name, facts in picture.facts.items()]
    if picture.stack:
        told += ["  the loop stands still in:", *(f"    {line}" for line in picture.stack)]
    return told


def wait_line(wait: Wait) -> str:
    on = f" from {wait.on}" if wait.on else ""
    limit = f", {wait.limit_s:g} s at most" if wait.limit_s is not None else ""
    more = f", and {wait.count - 1} more" if wait.count > 1 else ""
    return f"{wait.who} for {wait.what}{on}, {duration(wait.since_s)}{limit}{more}"


def duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def flat(facts: Mapping[str, Any]) -> str:
    """Facts in one line."""
    return ", ".join(f"{name} {_word(value)}" for name, value in facts.items())


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, Mapping):
        return "{" + flat(value) + "}"
    if isinstance(value, list | tuple):
        return "[" + "; ".join(_word(part) for part in value) + "]"
    return str(value)
