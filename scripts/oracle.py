"""Whole runs of ``atpo train``, real learner and real actors, killed at random moments and started again: is every task
trained on as often as intended, and no version number used twice?

    .venv/bin/python scripts/oracle.py                              # three seeds, transformers engine, five kills each
    .venv/bin/python scripts/oracle.py --engine vllm --seeds 1
    .venv/bin/python scripts/oracle.py --seeds 20 --kills 8 --tasks 64
    .venv/bin/python scripts/oracle.py --seeds 2 --at all           # the learner killed at every kill point instead
    .venv/bin/python scripts/oracle.py --seeds 1 --engine vllm --hang engine
    .venv/bin/python scripts/oracle.py --seeds 3 --shards 2         # a buffer of two shards; they are killed as well

Most kills end everything at once, supervisor included, as a power cut does; the others one role, which its supervisor
starts again.  With ``--at`` the learner is killed (every second time: everything) where scripts/kill_points.py has it
stand still: in mid-step, in mid-checkpoint and in between.  With ``--hang`` nobody is killed, but an engine hangs, and
the supervisor has to find out.

The task is hopqa under a reward that tells any two different chains apart, so that every tree has something to learn
from and none may be left out.  What was trained on is read from ``lineage.jsonl`` (learner.lineage) and from the last
checkpoint, which says how many of its steps count.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from atpo_async.core.naming.shards import shard_roles  # noqa: E402
from atpo_async.run import processes  # noqa: E402
from scripts.kill_points import (  # noqa: E402
    AT_THE_END,
    ENGINE_STEP,
    KILL_POINTS,
    ON_THE_WAY,
    ask_for,
    stopped_at,
)
from scripts.oracle_run import Outcome, Run, judge  # noqa: E402
from scripts.oracle_task import make_policy  # noqa: E402

SPREAD_S = 0.4
"""A kill comes up to this long after the step it waits for."""


def run_one(
    folder: Path, policy: Path, *, seed: int, engine: str, num_tasks: int, num_kills: int, shards: int = 1
) -> Outcome:
    """A run to its end, with ``num_kills`` kills on the way.  Of a buffer with shards, every second of one role hits
    one of them.

    Raises:
        AssertionError: it came to no end.
    """
    rng = random.Random(seed)
    alone = ("buffer", "learner", "actor-0")
    parts = shard_roles(shards)

    def kills(run: Run) -> Iterator[str]:
        for number in range(num_kills):
            # The first ones always are of everything; later ones may be of one role.
            role = "all" if number % 3 != 2 else rng.choice(alone)
            if parts and number % 2:
                role = rng.choice((*parts, "front"))
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

    run = Run(
        folder, policy, seed=seed, engine=engine, num_tasks=num_tasks, max_uses=1 + seed % 2,
        options={"buffer.shards": shards},
    )  # fmt: skip
    return _to_the_end(run, kills, num_tasks=num_tasks, max_uses=1 + seed % 2)


def run_at_kill_points(
    folder: Path, policy: Path, *, seed: int, engine: str, num_tasks: int, points: Sequence[str]
) -> Outcome:
    """A run to its end whose learner is killed at each of ``points``, those of the end last.

    At every second of them it is not alone: everything is killed, and started again from here.  With the next seed that
    is so at the others.

    Raises:
        AssertionError: it came to no end.
    """
    rng = random.Random(seed)
    order = [name for name in points if name in ON_THE_WAY]
    rng.shuffle(order)
    order += [name for name in AT_THE_END if name in points]

    def kills(run: Run) -> Iterator[str]:
        for point in order:
            role = "learner" if (points.index(point) + seed) % 2 == 0 else "all"
            if not run.until(run.path.is_dir, "the run's folder"):
                return
            ask_for(run.path, point)
            if not run.until(lambda point=point: stopped_at(run.path) == point, f"the learner {point!r}"):  # type: ignore[misc]
                return
            yield f"{role} at {point}" if run.kill(role) else f"nobody at {point}"
            if role == "all":
                run.start()

    run = Run(folder, policy, seed=seed, engine=engine, num_tasks=num_tasks, max_uses=1 + seed % 2, points=True)
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
        folder, policy, seed=seed, engine=engine, num_tasks=num_tasks, max_uses=1 + seed % 2, points=True,
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Exactly-once work of whole runs under kills.")
    parser.add_argument("--seeds", type=int, default=3, help="how many runs")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--kills", type=int, default=5, help="of each run")
    parser.add_argument("--tasks", type=int, default=None, help="of each run; 48, with --at all as many as it takes")
    parser.add_argument("--dir", type=Path, default=None, help="for the runs; a temporary one where left out")
    parser.add_argument("--policy", type=Path, default=None, help="model folder; one is made where left out")
    parser.add_argument("--shards", type=int, default=1, help="of the buffer, where kills come at random moments")
    parser.add_argument("--at", nargs="+", choices=["all", *KILL_POINTS], help="kill the learner there, not at random")
    parser.add_argument("--hang", choices=HANGS, help="; ".join(f"{name}: {text}" for name, text in HANGS.items()))
    parser.add_argument(
        "--set", nargs=2, action="append", default=[], metavar=("FIELD", "NUMBER"), help="of the runs of --hang"
    )
    args = parser.parse_args(argv)
    folder = args.dir or Path(tempfile.mkdtemp(prefix="oracle-"))
    policy = args.policy or folder / "policy"
    if not policy.exists():
        make_policy(policy)
    points = list(KILL_POINTS) if args.at and "all" in args.at else args.at or []
    # A kill costs at most two steps of four trees; used twice, tasks make twice as many.
    num_tasks = args.tasks or max(48, 8 * len(points) + 16)
    failed = 0
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        path, how = folder / f"{args.engine}-{seed}", {"seed": seed, "engine": args.engine, "num_tasks": num_tasks}
        if args.hang:
            options = {name: float(number) for name, number in args.set}
            outcome = run_with_hang(path, policy, hang=args.hang, options=options, **how)
        elif points:
            outcome = run_at_kill_points(path, policy, points=points, **how)
        else:
            outcome = run_one(path, policy, num_kills=args.kills, shards=args.shards, **how)
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
