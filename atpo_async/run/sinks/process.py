"""The process that feeds a run's metrics sinks: ``python -m atpo_async.run.sinks.process RUN_DIR``.

Its own process, so that what a sink's library does (its threads, its processes, an upload that takes minutes) neither
delays the run nor outlives it.  On its first line of output it says whether the sinks could be made, as JSON; every
later one is for the user.  The outcome of the run comes on its input: then each sink has ``CLOSE_S`` to take the rest.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from atpo_async.config import Config
from atpo_async.config.doors import SINK
from atpo_async.core.errors import AtpoError
from atpo_async.run.rundir import RunDir
from atpo_async.run.sinks.base import MetricsSink, RunFacts
from atpo_async.run.sinks.follower import SinkFollower

CLOSE_S = 6.0
"""For all sinks together to take what is left and to close, once the run has stopped."""

LOST_SUPERVISOR = "interrupted"
"""The outcome where the input ends without one."""


@dataclass(frozen=True, slots=True)
class Running:
    follower: SinkFollower
    thread: threading.Thread


def outside(config: Config) -> list[str]:
    """The sinks of a run that need this process: all but the run's own ``metrics.jsonl``."""
    return [name for name in config.sinks if name != "jsonl" or config.metrics.options.get(name)]


def make_sinks(rundir: RunDir) -> list[tuple[str, MetricsSink]]:
    """By name.  Raises ConfigError or SetupError for what the user can mend."""
    config = rundir.config
    facts = RunFacts(
        run_id=rundir.run_id, name=config.run.name, folder=rundir.path, config=config.model_dump(mode="json")
    )
    return [(name, SINK.make(name, facts, options=config.metrics.options.get(name))) for name in outside(config)]


def feed(
    rundir: RunDir,
    sinks: Sequence[tuple[str, MetricsSink]],
    *,
    wait_for_outcome: Callable[[], str],
    say: Callable[[str], None],
    close_s: float = CLOSE_S,
) -> None:
    """Feed every sink on a thread of its own.  Waits for: the run's outcome, then ``close_s`` for the sinks' ends."""
    stop = threading.Event()
    outcome = LOST_SUPERVISOR

    def follow_and_close(follower: SinkFollower) -> None:
        follower.follow(stop)
        follower.close(outcome)

    running = []
    for name, sink in sinks:
        follower = SinkFollower(name, sink, rundir=rundir.path, metrics=rundir.metrics_path, say=say)
        # A daemon: a sink that hangs does not keep the process from ending.
        thread = threading.Thread(target=follow_and_close, args=(follower,), name=f"sink {name}", daemon=True)
        running.append(Running(follower, thread))
        thread.start()
    outcome = wait_for_outcome()
    stop.set()
    deadline = time.monotonic() + close_s
    for each in running:
        each.thread.join(max(0.0, deadline - time.monotonic()))
    for each in running:
        if each.thread.is_alive():
            say(
                f"metrics sink {each.follower.name!r} did not finish within {close_s:g} s and was left; "
                f"{each.follower.left()} records did not reach it, {rundir.metrics_path} has every one"
            )
        if each.follower.num_lost:
            say(f"metrics sink {each.follower.name!r} refused {each.follower.num_lost} records in all")


def main(folder: str) -> None:
    """Run to the end of the run.  The process ends at once then, whatever threads of libraries are left."""
    # Libraries print: their words belong into the log, and this process's own into its output.
    output = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def say(line: str) -> None:
        output.write(line.replace("\n", " ") + "\n")

    try:
        rundir = RunDir.open(Path(folder))
        sinks = make_sinks(rundir)
    except AtpoError as exc:
        say(json.dumps({"error": str(exc), "kind": type(exc).__name__}))
        os._exit(2)
    say(json.dumps({"ready": [name for name, _ in sinks]}))
    feed(rundir, sinks, wait_for_outcome=lambda: _outcome(sys.stdin), say=say)
    output.flush()
    os._exit(0)


def _outcome(stdin: TextIO) -> str:
    return stdin.readline().strip() or LOST_SUPERVISOR


if __name__ == "__main__":
    main(sys.argv[1])
