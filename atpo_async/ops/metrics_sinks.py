"""Starts the process that feeds a run's metrics sinks and ends it with the run; training never waits for it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any

from atpo_async.config import Config
from atpo_async.config.doors import SINK
from atpo_async.core import errors
from atpo_async.ops.exits import SUPERVISOR_PID
from atpo_async.run import launch, processes
from atpo_async.run.rundir import RunDir
from atpo_async.run.sinks.base import not_installed
from atpo_async.run.sinks.process import CLOSE_S, outside

NAME = "sinks"
"""Of the process, in marks and in the names of its logs."""

READY_S = 60.0
"""For the libraries of the sinks to be imported; past it the run begins all the same."""

END_S = CLOSE_S + 3.0
"""For the process to end once it knows the run's outcome; then it is killed with all that it started."""


def libraries() -> dict[str, str]:
    """Built-in sink -> the library that it needs, of those that need one."""
    found = {}
    for name in SINK.names():
        module = importlib.import_module(SINK.target(name).partition(":")[0])
        if (library := getattr(module, "LIBRARY", None)) is not None:
            found[name] = library
    return found


def check(config: Config) -> None:
    """Raises SetupError where a built-in sink is named whose library is not installed."""
    named = outside(config)
    for name, library in libraries().items() if named else ():
        if name in named and importlib.util.find_spec(library) is None:
            raise not_installed(library, sink=name)


class Feeding:
    """The outcome of the run, which the block sets."""

    outcome: str = "failed"
    """``done``, ``interrupted`` or ``failed``; what it is when the block raises."""


@contextlib.contextmanager
def fed(
    rundir: RunDir, *, say: Callable[[str], None], ready_s: float = READY_S, end_s: float = END_S
) -> Iterator[Feeding]:
    """Feed the run's sinks while the block runs, where its configuration names any beside ``metrics.jsonl``.

    Args:
        say: one line for the user about a sink; called from a thread.

    Raises ConfigError or SetupError before the block begins, where a sink cannot be made.
    """
    feeding = Feeding()
    if not outside(rundir.config):
        yield feeding
        return
    attempt = rundir.next_attempt(NAME)
    mark = f"{rundir.run_id}/{NAME}/{attempt}"
    with rundir.log_path(NAME, attempt).open("xb") as log:
        process = _start(rundir, mark, log)
    first: queue.SimpleQueue[str] = queue.SimpleQueue()
    listener = threading.Thread(target=_listen, args=(process, first, say), name="metrics sinks", daemon=True)
    try:
        listener.start()
        try:
            _check(first.get(timeout=ready_s), str(rundir.log_path(NAME, attempt)))
        except queue.Empty:
            say(f"metrics sinks were not ready within {ready_s:g} s; the run begins, and they may follow")
        yield feeding
    finally:
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.write(f"{feeding.outcome}\n")
            process.stdin.close()
        try:
            process.wait(timeout=end_s)
        except subprocess.TimeoutExpired:
            say(f"metrics sinks did not end within {end_s:g} s and were killed; {rundir.metrics_path} has every record")
        finally:
            processes.kill_all(process.pid, mark)
            process.wait()
            listener.join(timeout=2.0)


def _start(rundir: RunDir, mark: str, log: IO[bytes]) -> subprocess.Popen[str]:
    tie = functools.partial(processes.die_with_parent, parent_pid=os.getpid())
    return subprocess.Popen(
        launch.command("atpo_async.run.sinks.process", str(rundir.path)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env={**os.environ, processes.ROLE_MARK: mark, SUPERVISOR_PID: str(os.getpid()), "PYTHONUNBUFFERED": "1"},
        # Ctrl-C is for the supervisor: the sinks take what the roles write until they have stopped.
        start_new_session=True,
        preexec_fn=tie if sys.platform.startswith("linux") else None,
    )


def _listen(process: subprocess.Popen[str], first: queue.SimpleQueue[str], say: Callable[[str], None]) -> None:
    """Pass on the output of the process: its first line to the caller that waits for it, the others to the user."""
    assert process.stdout is not None
    first.put(process.stdout.readline())
    for line in process.stdout:
        say(line.rstrip("\n"))


def _check(first: str, log: str) -> None:
    """Raises the error that prevented the sinks from being made."""
    try:
        said: dict[str, Any] = json.loads(first)
    except ValueError:
        raise errors.SetupError(f"the process of the metrics sinks ended before it was ready  (log: {log})") from None
    if "error" in said:
        kind = getattr(errors, said["kind"], errors.SetupError)
        raise kind(said["error"])
