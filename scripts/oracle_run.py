"""One run of the oracle: its folder, the ``atpo train`` that works on it, and the judgement of what came of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atpo_async.core.naming.shards import index_of
from atpo_async.models.policy import steps_trained
from atpo_async.run import processes
from atpo_async.run.rundir import RunDir

ROOT = Path(__file__).resolve().parent.parent

WAIT_S = 300.0
"""For one wait; an engine's start on a busy machine is the longest."""
WORLD: dict[str, object] = {"hops": 1, "num_names": 16, "num_relations": 4}
PAUSE_S = 0.05
"""Of each step of the environment: a run must not be over before its kills."""
OPTIONS: dict[str, object] = {
    "environment.name": "scripts.oracle_task:make",
    "model.max_context_tokens": 64,
    "search.initial_rollouts": 4,
    "search.branches": 2,
    "search.rounds": 1,
    "search.max_action_tokens": 8,
    "staleness.trees_per_batch": 4,
    "staleness.max_lag": 4,
    "objective.clip_low": 0.2,
    "objective.clip_high": 0.28,
    "buffer.lease_lifetime_s": 10.0,
    "buffer.max_reissues": 1000,
    "learner.checkpoint_every": 2,
    "learner.num_threads": 1,
    "learner.device": "cpu",
    "learner.lineage": True,
    "actor.count": 1,
    "actor.device": "cpu",
    "actor.num_threads": 1,
    "actor.trees_in_flight": 4,
    "actor.max_num_seqs": 32,
    "actor.kv_cache_gb": 0.25,
    "actor.report_every_s": 0.2,
    "links.heartbeat_s": 0.5,
    "eval.at_start": False,
    "eval.at_end": False,
    "eval.every_steps": 0,
    "supervisor.max_restarts": 1000,
    "supervisor.backoff_s": 0.05,
    "run.steps": 100_000,
}


@dataclass(kw_only=True)
class Outcome:
    """What came of one seed."""

    problems: list[str]
    kills: Counter[str]
    steps: int
    lost_steps: int
    attempts: int
    """How often ``atpo train`` was called."""
    seconds: float
    told: list[str] = field(default_factory=list)
    """What the supervisor said about a hung role."""


class Run:
    """One run folder, and the ``atpo train`` that works on it."""

    def __init__(
        self,
        folder: Path,
        policy: Path,
        *,
        seed: int,
        engine: str,
        num_tasks: int,
        max_uses: int,
        points: bool = False,
        options: Mapping[str, object] | None = None,
    ) -> None:
        self.folder = folder
        self.path = folder / "runs" / "run"
        self.attempts = 0
        self._popen: subprocess.Popen[bytes] | None = None
        fields = {
            **OPTIONS,
            **{f"environment.options.{name}": value for name, value in WORLD.items()},
            "environment.options.pause_s": PAUSE_S,
            "run.name": "run",
            "run.dir": str(folder / "runs"),
            "run.seed": seed,
            "run.max_tasks": num_tasks,
            "staleness.max_uses": max_uses,
            # Used twice, no tree may grow too old in between: it would rightly be left out.
            "staleness.max_lag": 4 if max_uses == 1 else 1000,
            "model.path": str(policy),
            "actor.engine": engine,
            **({"supervisor.launcher": "scripts.kill_points:KillPointLauncher"} if points else {}),
            **(options or {}),
        }
        folder.mkdir(parents=True)
        self._config = folder / "run.toml"
        self._config.write_text("".join(f"{name} = {toml(value)}\n" for name, value in fields.items()))

    def start(self) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
        env.setdefault("HF_HUB_OFFLINE", "1")
        with (self.folder / f"output-{self.attempts}.txt").open("ab") as output:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "atpo_async", "train", str(self._config)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=ROOT,
                start_new_session=True,
            )
        self.attempts += 1

    @property
    def code(self) -> int | None:
        assert self._popen is not None
        return self._popen.poll()

    def lineage(self) -> list[dict[str, Any]]:
        return lineage(self.path)

    def leader(self, role: str) -> int | None:
        """The process of a role itself, not what it started; None while it does not run."""
        assert self._popen is not None
        below = set(self.processes_of(role))
        found = [p.pid for p in processes.processes() if p.pid in below and p.pid == p.session]
        return found[0] if found else None

    def said(self) -> str:
        """All that ``atpo train`` has said, over all its calls."""
        return "\n".join(file.read_text(errors="replace") for file in sorted(self.folder.glob("output-*.txt")))

    def processes_of(self, role: str) -> list[int]:
        """Those of a role and what they started; a shard of the buffer (``buffer-0``) or its ``front`` is one process.
        All of the run, the supervisor last, where ``role`` is "all"."""
        assert self._popen is not None
        running = processes.processes()
        below = [p.pid for p in processes.members(self._popen.pid, running) if p.pid != self._popen.pid]
        if role == "all":
            return [*below, self._popen.pid]
        run_id = RunDir.open(self.path).run_id
        if index_of(role) is not None:
            return [pid for pid in below if role.encode() in _words(pid)]
        if role == "front":
            return [pid for pid in self.processes_of("buffer") if b"--name" not in _words(pid)]
        marks = [f"{run_id}/{role}/{attempt}" for attempt in range(1000)]
        leaders = [p.pid for p in processes.marked(*marks)]
        return [pid for pid in leaders if pid in below]

    def kill(self, role: str) -> bool:
        """SIGKILL to all of it at once; the supervisor stands still meanwhile, so that it neither helps nor tidies."""
        assert self._popen is not None
        if role == "all":
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._popen.pid, signal.SIGSTOP)
        victims = self.processes_of(role)
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if role == "all":
            self._popen.wait()
            self._until(lambda: not set(victims) & {p.pid for p in processes.processes()}, "their ends")
        return bool(victims)

    def close(self) -> None:
        """Nothing of it is left."""
        if self._popen is not None and self.code is None:
            self.kill("all")

    def until(self, condition: Callable[[], object], what: str) -> bool:
        """True once ``condition`` holds; False when the command has ended before."""
        self._until(lambda: condition() or self.code is not None, what)
        return bool(condition())

    def _until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"waited in vain for {what} in {self.folder}\n{self.story()}")
            time.sleep(0.01)

    def story(self) -> str:
        files = [*sorted(self.folder.glob("output-*.txt")), *sorted((self.path / "logs").glob("*.log"))]
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files)


def lineage(run: Path) -> list[dict[str, Any]]:
    """What was trained on, batch by batch: whole lines of the run's file; the last one may be under way."""
    path = run / "lineage.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if "starts_at" not in line]


def judge(run: Path, *, num_tasks: int, max_uses: int) -> Outcome:
    """Count tasks, uses, hashes and versions over the steps that the last checkpoint of a run holds."""
    problems: list[str] = []
    everything = lineage(run)
    steps = steps_trained(RunDir.open(run))
    taken = Counter(line["version"] for line in everything)
    problems += [f"version {version} was used {count} times" for version, count in taken.items() if count > 1]
    valid: dict[int, dict[str, Any]] = {}
    for line in everything:
        if line["step"] < steps and line["version"] > valid.get(line["step"], {"version": -1})["version"]:
            valid[line["step"]] = line
    if sorted(valid) != list(range(steps)):
        problems.append(f"the lineage lacks steps: {sorted(set(range(steps)) - set(valid))}")
    versions = [valid[step]["version"] for step in sorted(valid)]
    if versions != sorted(versions):
        problems.append(f"versions do not rise with the steps: {versions}")
    uses: Counter[int] = Counter()
    for line in valid.values():
        names = [tree["tree_id"] for tree in line["trees"]]
        if len(set(names)) != len(names):
            problems.append(f"batch {line['step']} holds a tree twice: {names}")
        uses.update(tree["task_index"] for tree in line["trees"])
    # What is served again, after whatever came between, is what it was to the byte; and no two trees are the same.
    bytes_of: dict[str, set[str]] = {}
    for line in everything:
        for tree in line["trees"]:
            bytes_of.setdefault(tree["tree_id"], set()).add(tree["hash"])
    problems += [f"tree {name} came with different bytes: {sorted(h)}" for name, h in bytes_of.items() if len(h) > 1]
    owners = Counter(h for hashes in bytes_of.values() for h in hashes)
    problems += [f"{count} trees have the same bytes: {h}" for h, count in owners.items() if count > 1]
    for task in range(num_tasks):
        if uses[task] != max_uses:
            problems.append(f"task {task} was trained on {uses[task]} times, not {max_uses}")
    problems += [f"task {task} is none of the run's" for task in sorted(uses) if task >= num_tasks]
    return Outcome(
        problems=problems,
        kills=Counter(),
        steps=steps,
        lost_steps=len(everything) - len(valid),
        attempts=1,
        seconds=0.0,
    )


def toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _words(pid: int) -> list[bytes]:
    """The words of a process's command; none where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
