"""A role's status thread: it writes the role's status snapshot once a second, and to the log on SIGUSR1.

Both also work while the event loop stands still; then the snapshot says where.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from atpo_async.run import processes
from atpo_async.run.host import host_id
from atpo_async.status import waits
from atpo_async.status.facts import LINKS, published_facts
from atpo_async.status.snapshot import ENDED, STANDS_STILL_S, StatusSnapshot, Wait, file_stem
from atpo_async.status.wording import status_lines

EVERY_S = 1.0
"""Between two snapshots, and between two ticks of the loop."""

MAX_WAITS = 40
"""Kinds of waits in a snapshot, the longest first."""
MAX_FRAMES = 15


class Reporter:
    """A role's status thread.  Use as a context; ``attach`` from inside the event loop.

    Args:
        role: the name in the snapshot.
        folder: where ``<role>.json`` goes; None: no file is written.
        log: where the status is logged on SIGUSR1.
        on_signal: take SIGUSR1; one reporter of a process can.
        every_s: seconds between two snapshots.
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
        # A signal handler must never wait for space in the pipe: it may run in the thread that has to empty it.
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
            # The default action would end the process in the middle of its clean-up.
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if self._thread is not None and not self._thread.is_alive():
            os.close(self._wake_r)
            os.close(self._wake_w)

    def attach(self) -> None:
        """Watch the running event loop, and collect the published facts in it from now on."""
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._tick()

    def _tick(self) -> None:
        assert self._loop is not None
        self._ticked_at = time.monotonic()
        self._said = published_facts()
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
        """Log the status, and the stack of every thread."""
        try:
            self._log.info("%s", "\n".join([*status_lines(self.status()), *_stacks()]))
        # Whatever is wrong with one answer, the thread must go on.
        except Exception:
            self._log.exception("the status of %s could not be logged", self._role)

    def _write(self) -> None:
        if self._file is None:
            return
        aside = self._file.with_name(f".{self._file.name}.{os.getpid()}")
        try:
            data = msgspec.json.encode(self.status(), enc_hook=str)
            self._file.parent.mkdir(exist_ok=True)
            # Renamed, so that no reader sees half of it; not synced, as it means nothing after a crash of the machine.
            aside.write_bytes(data)
            aside.replace(self._file)
            self._trouble = ""
        # A full disk, a folder that was deleted: the role goes on, and logs it once.
        except Exception as exc:
            if not self._trouble:
                self._log.warning("status of %s cannot be written to %s: %s", self._role, self._file, exc)
            self._trouble = str(exc)

    def status(self) -> StatusSnapshot:
        """The role's status now.  From any thread."""
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
                waits=grouped(waits.open_waits(now)),
                progress=made,
                links={name.removeprefix(LINKS): facts for name, facts in said.items() if name.startswith(LINKS)},
                facts={name: facts for name, facts in said.items() if not name.startswith(LINKS)},
                stack=_stack_of(self._loop_thread) if age is not None and age > STANDS_STILL_S else (),
            )


def grouped(found: list[dict[str, Any]]) -> tuple[Wait, ...]:
    """Waits merged by what they wait for and on whom, longest first.  Pure."""
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
    """The stack of every thread but this one."""
    told = []
    for thread in threading.enumerate():
        if thread.ident is not None and thread is not threading.current_thread():
            told += [f"  thread {thread.name}:", *(f"    {line}" for line in _stack_of(thread.ident))]
    return told
