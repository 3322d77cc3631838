"""Whole runs of ``atpo train``, real learner and real actors, killed at random moments and started again: is every task
trained on as often as intended, and no version number used twice?

    .venv/bin/python scripts/oracle.py                              # three seeds, transformers engine, five kills each
    .venv/bin/python scripts/oracle.py --engine vllm --seeds 1
    .venv/bin/python scripts/oracle.py --seeds 20 --kills 8 --tasks 64
    .venv/bin/python scripts/oracle.py --seeds 2 --at all           # the learner killed at every named station instead
    .venv/bin/python scripts/oracle.py --seeds 1 --engine vllm --hang engine

Most kills end everything at once, supervisor included, as a power cut does; the others one role, which its supervisor
starts again.  With ``--at`` the learner is killed (every second time: everything) where tests/station_support.py has it
stand still: in mid-step, in mid-checkpoint and in between.  With ``--hang`` nobody is killed, but an engine hangs, and
the supervisor has to find out.

The task is hopqa under a reward that tells any two different chains apart, so that every tree has something to learn
from and none has an excuse.  What was trained on is read from ``lineage.jsonl`` (learner.lineage) and from the last
checkpoint, which says how many of its steps count.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from atpo_async.environments.base import ReplayFork, Split, StepResult  # noqa: E402
from atpo_async.environments.hopqa.environment import HopQA  # noqa: E402
from atpo_async.models.policy import list_checkpoints  # noqa: E402
from atpo_async.run import processes  # noqa: E402
from atpo_async.run.rundir import RunDir  # noqa: E402
from tests.station_support import (  # noqa: E402
    AT_THE_END,
    ENGINE_STEP,
    ON_THE_WAY,
    STATIONS,
    ask_for,
    stopped_at,
)

PATIENCE_S = 300.0
"""For one wait; an engine's start on a busy machine is the longest."""
SPREAD_S = 0.4
"""A kill comes up to this long after the step it waits for."""

WORLD: dict[str, object] = {"hops": 1, "num_names": 16, "num_relations": 4}
PAUSE_S = 0.05
"""Of each step of the environment: a run must not be over before its kills."""
OPTIONS: dict[str, object] = {
    "environment.name": "scripts.oracle:make",
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


# --- the task --------------------------------------------------------------------------------------------------


class _Episode:
    """An episode of hopqa whose reward is a number made of the whole chain."""

    def __init__(self, inner: Any, pause_s: float) -> None:
        self._inner = inner
        self._pause_s = pause_s
        self._digest = hashlib.blake2b(digest_size=4)

    @property
    def prompt(self) -> np.ndarray:
        prompt: np.ndarray = self._inner.prompt
        return prompt

    async def step(self, action: np.ndarray) -> StepResult:
        await asyncio.sleep(self._pause_s)
        result: StepResult = await self._inner.step(action)
        self._digest.update(np.ascontiguousarray(action, dtype=np.int32).tobytes() + b"|")
        if not result.done:
            return result
        reward = int.from_bytes(self._digest.digest(), "big") / 2**32
        return replace(result, reward=reward)

    async def close(self) -> None:
        await self._inner.close()


class Told(ReplayFork):
    """hopqa under the reward of ``_Episode``.

    Args:
        tokenizer: of the policy.
        pause_s: of each step.
        gate: training tasks from ``open_tasks`` on begin only when this file is there; none where empty.
        open_tasks: as said.
        options: of ``HopQA``.
    """

    def __init__(
        self, tokenizer: Path | str, *, pause_s: float = 0.0, gate: str = "", open_tasks: int = 0, **options: Any
    ) -> None:
        self._pause_s = pause_s
        self._gate = Path(gate) if gate else None
        self._open_tasks = open_tasks
        self._hopqa = HopQA(tokenizer, **options)
        self.stop_token_ids = self._hopqa.stop_token_ids

    def num_tasks(self, split: Split) -> int | None:
        return self._hopqa.num_tasks(split)

    async def start(self, split: Split, task_index: int) -> Any:
        while self._gate is not None and task_index >= self._open_tasks and not self._gate.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # another process makes the file
        return _Episode(await self._hopqa.start(split, task_index), self._pause_s)


def make(tokenizer: Path | str, **options: Any) -> Told:
    """What ``environment.name`` names."""
    return Told(tokenizer, **options)


def make_policy(folder: Path) -> None:
    """Two layers of width 64; what it has learnt is of no matter."""
    from atpo_async.environments.hopqa.warm_start import Recipe
    from atpo_async.environments.hopqa.warm_start import make_policy as warm_start

    recipe = Recipe(
        steps=20, min_hops=1, max_hops=1, num_names=16, num_relations=4, mixed_up=0, layers=2, width=64
    )  # fmt: skip
    warm_start(folder, recipe, device="cpu", num_threads=1)


# --- one run ---------------------------------------------------------------------------------------------------


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
        stations: bool = False,
        options: Mapping[str, object] | None = None,
    ) -> None:
        self.folder = folder
        self._module = "tests.station_support" if stations else "atpo_async"
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
            # Used twice, no tree may grow too old in between: it would have an excuse.
            "staleness.max_lag": 4 if max_uses == 1 else 1000,
            "model.path": str(policy),
            "actor.engine": engine,
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
                [sys.executable, "-m", self._module, "train", str(self._config)],
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
        """Those of a role and what they started; all of the run, the supervisor last, where ``role`` is "all"."""
        assert self._popen is not None
        running = processes.processes()
        below = [p.pid for p in processes.members(self._popen.pid, running) if p.pid != self._popen.pid]
        if role == "all":
            return [*below, self._popen.pid]
        run_id = RunDir.open(self.path).run_id
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
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"waited in vain for {what} in {self.folder}\n{self.story()}")
            time.sleep(0.01)

    def story(self) -> str:
        files = [*sorted(self.folder.glob("output-*.txt")), *sorted((self.path / "logs").glob("*.log"))]
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files)


def run_one(folder: Path, policy: Path, *, seed: int, engine: str, num_tasks: int, num_kills: int) -> Outcome:
    """A run to its end, with ``num_kills`` kills on the way.

    Raises:
        AssertionError: it came to no end.
    """
    rng = random.Random(seed)

    def kills(run: Run) -> Iterator[str]:
        for number in range(num_kills):
            # The first ones always are of everything; later ones may be of one role.
            role = "all" if number % 3 != 2 else rng.choice(("buffer", "learner", "actor-0"))
            goal = len(run.lineage()) + rng.randint(0, 2)
            if not run.until(lambda goal=goal: len(run.lineage()) >= goal, f"line {goal} of the lineage"):  # type: ignore[misc]
                return
            time.sleep(rng.uniform(0.0, SPREAD_S))
            if run.code is not None:
                return
            if run.kill(role):
                yield role
            if role == "all":
                run.start()

    run = Run(folder, policy, seed=seed, engine=engine, num_tasks=num_tasks, max_uses=1 + seed % 2)
    return _to_the_end(run, kills, num_tasks=num_tasks, max_uses=1 + seed % 2)


def run_at_stations(
    folder: Path, policy: Path, *, seed: int, engine: str, num_tasks: int, stations: Sequence[str]
) -> Outcome:
    """A run to its end whose learner is killed at each of ``stations``, those of the end last.

    At every second of them it is not alone: everything is killed, and started again from here.  With the next seed that
    is so at the others.

    Raises:
        AssertionError: it came to no end.
    """
    rng = random.Random(seed)
    order = [name for name in stations if name in ON_THE_WAY]
    rng.shuffle(order)
    order += [name for name in AT_THE_END if name in stations]

    def kills(run: Run) -> Iterator[str]:
        for station in order:
            role = "learner" if (stations.index(station) + seed) % 2 == 0 else "all"
            if not run.until(run.path.is_dir, "the run's folder"):
                return
            ask_for(run.path, station)
            if not run.until(lambda station=station: stopped_at(run.path) == station, f"the learner {station!r}"):  # type: ignore[misc]
                return
            yield f"{role} at {station}" if run.kill(role) else f"nobody at {station}"
            if role == "all":
                run.start()

    run = Run(folder, policy, seed=seed, engine=engine, num_tasks=num_tasks, max_uses=1 + seed % 2, stations=True)
    outcome = _to_the_end(run, kills, num_tasks=num_tasks, max_uses=1 + seed % 2)
    killed = {who.rpartition(" ")[2] for who in outcome.kills if not who.startswith("nobody")}
    outcome.problems += [f"nobody was killed at {name!r}: the run ended before" for name in order if name not in killed]
    return outcome


HANGS = {
    "engine": "the step of the engine does not return, the actor's event loop goes on",
    "core": "vLLM's engine core is stopped by a signal (SIGSTOP), the actor goes on",
    "actor": "the actor is stopped by a signal (SIGSTOP)",
}
HANG_OPTIONS: dict[str, object] = {"links.deadline_s": 3.0, "supervisor.hang_s": 15.0}
"""Said after 3 s, ended after 15."""


def run_with_hang(
    folder: Path, policy: Path, *, seed: int, engine: str, num_tasks: int, hang: str, options: Mapping[str, object]
) -> Outcome:
    """A run to its end in whose middle an engine hangs once; nobody but its supervisor helps it.

    Raises:
        AssertionError: it came to no end.
    """

    def hangs(run: Run) -> Iterator[str]:
        if not run.until(lambda: len(run.lineage()) >= 2, "two batches"):
            return
        if hang == "engine":
            ask_for(run.path, ENGINE_STEP)
            if not run.until(lambda: stopped_at(run.path), "the engine to hang"):
                return
        else:
            leader = run.leader("actor-0")
            assert leader is not None
            os.kill(_core_of(leader) if hang == "core" else leader, signal.SIGSTOP)
        began = time.monotonic()
        if run.until(lambda: "actor-0 ended" in run.said(), "the supervisor to start the actor again"):
            yield f"actor-0, hung ({hang}), by its supervisor after {time.monotonic() - began:.0f} s"

    run = Run(
        folder, policy, seed=seed, engine=engine, num_tasks=num_tasks, max_uses=1 + seed % 2, stations=True,
        options={**HANG_OPTIONS, **options},
    )  # fmt: skip
    outcome = _to_the_end(run, hangs, num_tasks=num_tasks, max_uses=1 + seed % 2)
    if not outcome.kills:
        outcome.problems.append("the run ended before anything hung, or with it")
    outcome.told = [line for line in run.said().splitlines() if "actor-0" in line and "join with" not in line]
    return outcome


def _core_of(leader: int) -> int:
    """vLLM's engine core among what an actor has started."""
    for process in processes.members(leader, processes.processes()):
        name = Path(f"/proc/{process.pid}/comm").read_bytes() + Path(f"/proc/{process.pid}/cmdline").read_bytes()
        if process.pid != leader and b"EngineCore" in name:
            return process.pid
    raise AssertionError(f"process {leader} has started no engine core; --hang core is for --engine vllm")


def _to_the_end(run: Run, kills: Callable[[Run], Iterator[str]], *, num_tasks: int, max_uses: int) -> Outcome:
    """Start, kill (``kills`` does it, and says whom), wait for the end, judge."""
    began = time.monotonic()
    killed: Counter[str] = Counter()
    problems: list[str] = []
    try:
        run.start()
        killed.update(kills(run))
        run.until(lambda: False, "the run's end")
        if run.code != 0:
            problems.append(f"`atpo train` ended with {run.code}:\n{run.story()}")
    finally:
        run.close()
    outcome = judge(run.path, num_tasks=num_tasks, max_uses=max_uses)
    outcome.problems[:0] = problems
    outcome.kills = killed
    outcome.attempts = run.attempts
    outcome.seconds = time.monotonic() - began
    return outcome


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
    checkpoints = list_checkpoints(run / "checkpoints")
    steps = int(checkpoints[-1].name.split("-")[1]) if checkpoints else 0
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Exactly-once work of whole runs under kills.")
    parser.add_argument("--seeds", type=int, default=3, help="how many runs")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--kills", type=int, default=5, help="of each run")
    parser.add_argument("--tasks", type=int, default=None, help="of each run; 48, with --at all as many as it takes")
    parser.add_argument("--dir", type=Path, default=None, help="for the runs; a temporary one where left out")
    parser.add_argument("--at", nargs="+", choices=["all", *STATIONS], help="kill the learner there, not at random")
    parser.add_argument("--hang", choices=HANGS, help="; ".join(f"{name}: {text}" for name, text in HANGS.items()))
    parser.add_argument(
        "--set", nargs=2, action="append", default=[], metavar=("FIELD", "NUMBER"), help="of the runs of --hang"
    )
    args = parser.parse_args(argv)
    folder = args.dir or Path(tempfile.mkdtemp(prefix="oracle-"))
    policy = folder / "policy"
    if not policy.exists():
        make_policy(policy)
    stations = list(STATIONS) if args.at and "all" in args.at else args.at or []
    # A kill costs at most two steps of four trees; used twice, tasks make twice as many.
    num_tasks = args.tasks or max(48, 8 * len(stations) + 16)
    failed = 0
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        path, how = folder / f"{args.engine}-{seed}", {"seed": seed, "engine": args.engine, "num_tasks": num_tasks}
        if args.hang:
            options = {name: float(number) for name, number in args.set}
            outcome = run_with_hang(path, policy, hang=args.hang, options=options, **how)
        elif stations:
            outcome = run_at_stations(path, policy, stations=stations, **how)
        else:
            outcome = run_one(path, policy, num_kills=args.kills, **how)
        killed = ", ".join(f"{role} {count}x" for role, count in sorted(outcome.kills.items())) or "nobody"
        verdict = "WRONG" if outcome.problems else "exact"
        print(
            f"seed {seed}: {verdict}; {num_tasks} tasks, {1 + seed % 2} uses each, {outcome.steps} steps, "
            f"{outcome.lost_steps} lost and made up for; killed: {killed}; {outcome.attempts} calls of `atpo train`; "
            f"{outcome.seconds:.0f} s",
            flush=True,
        )
        for line in [*outcome.told, *outcome.problems]:
            print(f"  {line}", flush=True)
        failed += bool(outcome.problems)
    print(f"{args.seeds - failed} of {args.seeds} runs exact (engine {args.engine}); runs in {folder}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
