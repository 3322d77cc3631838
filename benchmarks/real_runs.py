"""Real runs of the slow tool's task, as benchmarks compare them: started by `atpo train`, followed, ended once done.

What a run did is read from its own metrics; how busy its processes were, from the system.
"""

from __future__ import annotations

import math
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from atpo_async.run.metrics import MetricsTail, Record

GOAL = 0.9
WINDOW = 3
"""Steps whose mean sampled success has to be ``GOAL``."""
SETTLING = 2
"""Steps at the beginning that are not counted: roles load, and the pipeline fills."""
POLL_S = 0.25
END_S = 60.0
"""How long a run that is asked to stop may take to save."""
SLOW_TOOL = "benchmarks.slow_tool:SlowHopQA"

FIXED = {
    "environment.name": SLOW_TOOL,
    "model.warm_start": "false",
    "actor.engine": "transformers",
    "eval.at_start": "false",
    "eval.at_end": "false",
    "eval.every_steps": "0",
}
"""Of every run: no evaluation, which would hold training up on one side and not on the other."""


class RunFailed(RuntimeError):
    """`atpo train` ended with an error; its last lines are the text."""


@dataclass(frozen=True)
class RealRun:
    """What one run did."""

    records: list[Record]
    processors: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Role -> (Unix seconds, processor seconds so far), several a second."""

    @property
    def steps(self) -> list[Record]:
        """The learner's record of each step."""
        return steps_in(self.records)

    @property
    def first_lease(self) -> float:
        """Unix seconds; infinite before it."""
        found = (r.metrics["time/first_lease"] for r in self.records if "time/first_lease" in r.metrics)
        return next(found, math.inf)

    def mean(self, metric: str, steps: slice) -> float:
        """Of the learner's ``metric`` over steps; 0 where none has it."""
        values = [r.metrics[metric] for r in self.steps[steps] if metric in r.metrics]
        return statistics.fmean(values) if values else 0.0

    def busy(self, role: str, steps: slice) -> float:
        """Cores that a role used between the first and the last of ``steps``."""
        chosen = self.steps[steps]
        samples = self.processors.get(role, [])
        inside = [each for each in samples if chosen[0].time <= each[0] <= chosen[-1].time]
        if len(inside) < 2:
            return 0.0
        return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])


def steps_in(records: Iterable[Record]) -> list[Record]:
    return [r for r in records if r.source == "learner" and "train/success" in r.metrics]


def seconds_per_step(steps: Sequence[Record]) -> float:
    """Between the ends of consecutive steps, the first ``SETTLING`` left out.  Raises ValueError where none is left."""
    counted = steps[SETTLING:]
    if len(counted) < 2:
        raise ValueError(f"{len(steps)} steps are too few to measure one: {SETTLING + 2} are needed")
    return (counted[-1].time - counted[0].time) / (len(counted) - 1)


def goal_at(steps: Sequence[Record]) -> int | None:
    """How many steps it took until ``WINDOW`` of them had a mean sampled success of ``GOAL``; None: they did not."""
    seen = [record.metrics["train/success"] for record in steps]
    for end in range(WINDOW, len(seen) + 1):
        if statistics.fmean(seen[end - WINDOW : end]) >= GOAL:
            return end
    return None


def train(
    config: Path,
    options: Mapping[str, object],
    *,
    folder: Path,
    name: str,
    done: Callable[[Sequence[Record]], bool],
    limit_s: float,
) -> RealRun:
    """A run in ``folder``, until the learner's steps so far are enough, or it ends by itself.

    Raises:
        RunFailed: it failed, or was not done within ``limit_s``.
    """
    settings = {**FIXED, "run.dir": folder, "run.name": name, **options}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    log = folder / f"{name}.txt"
    folder.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "atpo_async", "train", str(config), *words],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    run = RealRun([])
    tail, deadline = MetricsTail(folder / name / "metrics.jsonl"), time.monotonic() + limit_s
    enough = late = False
    try:
        while process.poll() is None and not (enough or late):
            time.sleep(POLL_S)
            run.records.extend(tail.new())
            for role, used in _processors(process.pid):
                run.processors.setdefault(role, []).append((time.time(), used))
            enough, late = done(run.steps), time.monotonic() > deadline
    finally:
        ended = _end(process)
    run.records.extend(tail.new())
    if late or not (enough or ended == 0):
        reason = f"not done after {limit_s:g} s" if late else f"exit code {ended}"
        raise RunFailed(f"{name}: {reason}\n{log.read_text(errors='replace')[-2000:]}")
    return run


def _end(process: subprocess.Popen[bytes]) -> int:
    """End a run as Ctrl-C does, and its exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        return process.wait(timeout=END_S)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        return process.wait()


def _processors(supervisor: int) -> Iterator[tuple[str, float]]:
    """(role, processor seconds) of the processes that a supervisor started, with those that these started."""
    try:
        roles = psutil.Process(supervisor).children()
    except psutil.Error:
        return
    for process in roles:
        try:
            words = process.cmdline()
            role = next((name for name in ("actors", "learner", "buffer") if name in words), None)
            if role is not None:
                family = [process, *process.children(recursive=True)]
                yield role, sum(sum(each.cpu_times()[:2]) for each in family)
        except psutil.Error:
            continue
