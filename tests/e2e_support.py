"""Whole runs as a user starts them, in processes, on a policy small enough to train in seconds.

Nothing here sleeps to be in time.  Where a test has to do something in mid-run, the run's environment keeps back the
tasks from some number on until a file is there: the run cannot end before the test has acted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from atpo_async.environments.base import Split
from atpo_async.environments.hopqa.environment import HopQA, HopQAEpisode
from atpo_async.run import processes
from atpo_async.run.metrics import Record, read_metrics
from atpo_async.run.rundir import RunDir

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 150.0
"""For one wait; far beyond what it takes."""
TAG = "ATPO_TEST_JOB"

WORLD = {"hops": 1, "num_names": 16, "num_relations": 4}
BASE: dict[str, object] = {
    "model.max_context_tokens": 64,
    "search.initial_rollouts": 4,
    "search.branches": 2,
    "search.rounds": 1,
    "search.max_action_tokens": 8,
    "staleness.max_lag": 2,
    "staleness.trees_per_batch": 4,
    "staleness.max_oversampling": 2.0,
    "objective.clip_low": 0.2,
    "objective.clip_high": 0.28,
    "learner.lr": 4e-4,
    "learner.minibatches": 2,
    "learner.checkpoint_every": 1,
    "learner.num_threads": 1,
    "learner.device": "cpu",
    "actor.engine": "transformers",
    "actor.device": "cpu",
    "actor.num_threads": 1,
    "actor.trees_in_flight": 4,
    "actor.max_num_seqs": 32,
    "actor.kv_cache_gb": 0.25,
    "actor.report_every_s": 0.1,
    "links.heartbeat_s": 0.5,
    "eval.every_steps": 0,
    "eval.num_tasks": 8,
}
OPEN_TASKS = 16
"""Training tasks that need no gate.  A batch is served after 8 trees at the latest (4, and twice that without enough
signal), so they make at least one step of the learner, and at most four."""
STEPS = 6
"""More than the tasks before the gate can make."""


class GatedHopQA(HopQA):
    """hopqa whose training tasks from ``open_tasks`` on begin only when the file ``gate`` is there."""

    def __init__(self, tokenizer: Path | str, *, gate: str, open_tasks: int, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        self._gate = Path(gate)
        self._open_tasks = open_tasks

    async def start(self, split: Split, task_index: int) -> HopQAEpisode:
        while split == "train" and task_index >= self._open_tasks and not self._gate.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # another process makes the file
        return await super().start(split, task_index)


class Process:
    """One command of ``atpo``, its output in a file, everything that it starts known by a mark in the environment."""

    def __init__(self, words: Sequence[object], output: Path) -> None:
        self.tag = uuid.uuid4().hex
        self.output = output
        env = {
            **os.environ,
            TAG: self.tag,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        }
        with output.open("ab") as file:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "atpo_async", *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def interrupt(self) -> None:
        """What Ctrl-C in a terminal sends: SIGINT to the whole foreground group."""
        os.killpg(self.popen.pid, signal.SIGINT)

    def living(self) -> list[str]:
        """Processes of this command that still run, itself included."""
        sign = f"{TAG}={self.tag}".encode()
        found = []
        for process in processes.processes():
            with contextlib.suppress(OSError):
                folder = Path(f"/proc/{process.pid}")
                if sign in (folder / "environ").read_bytes().split(b"\0"):
                    words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found.append(f"{process.pid} {words}")
        return found

    def end(self) -> None:
        """End whatever is left, by id."""
        while left := self.living():
            for line in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(line.split()[0]), signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(timeout=0.1)


class Job:
    """One run folder and the commands that work on it.

    Args:
        folder: of the test; the run is ``folder/runs/run``.
        policy: model folder.
        gated: keep training tasks from ``OPEN_TASKS`` on back until ``open_gate``.
        options: dotted options beside ``BASE``.
    """

    def __init__(self, folder: Path, policy: Path, *, gated: bool, **options: object) -> None:
        self.folder = folder
        self.path = folder / "runs" / "run"
        self._gate = folder / "gate"
        self._started: list[Process] = []
        world: dict[str, object] = dict(WORLD)
        if gated:
            world |= {"gate": str(self._gate), "open_tasks": OPEN_TASKS}
        fields: dict[str, object] = {
            "run.name": "run",
            "run.dir": str(folder / "runs"),
            "run.steps": STEPS,
            "run.seed": 1,
            "model.path": str(policy),
            "environment.name": "tests.e2e_support:GatedHopQA" if gated else "hopqa",
            **{f"environment.options.{name}": value for name, value in world.items()},
            **BASE,
            **options,
        }
        self.config = folder / "run.toml"
        self.config.write_text("".join(f"{name} = {_toml(value)}\n" for name, value in fields.items()))

    def start(self, *words: object) -> Process:
        process = Process(words, self.folder / f"output-{len(self._started)}.txt")
        self._started.append(process)
        return process

    def train(self) -> Process:
        return self.start("train", self.config)

    def open_gate(self) -> None:
        self._gate.touch()

    @cached_property
    def rundir(self) -> RunDir:
        return RunDir.open(self.path)

    def records(self) -> list[Record]:
        return list(read_metrics(self.path / "metrics.jsonl"))

    def steps(self) -> list[Record]:
        """The learner's record of each batch, in the order written."""
        return [r for r in self.records() if r.source == "learner" and "train/loss" in r.metrics]

    def with_metric(self, name: str) -> list[Record]:
        return [record for record in self.records() if name in record.metrics]

    def until(self, condition: Callable[[], object], what: str, *, of: Process) -> None:
        """Wait for what other processes bring about; fails when they have ended without it."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            code = of.popen.poll()
            if code is not None and not condition():
                raise AssertionError(f"ended with {code} before {what}:\n{self.story()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"waited in vain for {what}:\n{self.story()}")
            time.sleep(0.02)

    def exit_code(self, of: Process) -> int:
        """Waits for the end of a command."""
        try:
            return of.popen.wait(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"waited in vain for the end of {of.output.name}:\n{self.story()}") from None

    def pid(self, role: str, *, attempt: int = 0) -> int:
        """The process of one attempt of a role, not what that started."""
        found = processes.marked(f"{self.rundir.run_id}/{role}/{attempt}")
        (leader,) = [process.pid for process in found if process.pid == process.session]
        return leader

    def family(self, role: str, *, attempt: int = 0) -> set[tuple[int, int]]:
        """(pid, start) of every process of one attempt of a role that runs.

        By session and descent: a process that writes its own title over its environment hides the mark.
        """
        leader = self.pid(role, attempt=attempt)
        return {(p.pid, p.started) for p in processes.members(leader, processes.processes())}

    def left_in_shared_memory(self) -> list[str]:
        memory = Path("/dev/shm")
        return [p.name for p in memory.iterdir() if self.rundir.run_id in p.name] if memory.is_dir() else []

    def living(self) -> list[str]:
        return [line for process in self._started for line in process.living()]

    def story(self) -> str:
        """What a failure should show: every command's output and the end of every log."""
        parts = [f"--- {p.output.name}\n{p.said()}" for p in self._started]
        for log in sorted((self.path / "logs").glob("*.log")):
            parts.append(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")
        return "\n".join(parts)

    def close(self) -> None:
        for process in self._started:
            process.end()


def running(family: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """Those of a family that still run."""
    return family & {(p.pid, p.started) for p in processes.processes()}


@contextlib.contextmanager
def job(folder: Path, policy: Path, *, gated: bool = True, **options: object) -> Iterator[Job]:
    """A job of which nothing is left afterwards."""
    made = Job(folder, policy, gated=gated, **options)
    try:
        yield made
    finally:
        made.close()


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else repr(value)
