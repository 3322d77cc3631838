"""What asynchrony brings where tools are slow: synchronous against asynchronous training, both sides in one run.

The task is hopqa behind a look-up tool of log-normal latency (``benchmarks/slow_tool.py``), the policy the demo's
warm-started one, the engine transformers on the CPU.  Both sides are this system with the same settings, the same
batches (trees with a signal) and the same seed; they differ in two:

* synchronous: ``staleness.max_lag 0``, the trees of one batch in flight.  Every tree is grown with the weights that
  train on it, so generation and training take turns.
* asynchronous: ``staleness.max_lag 4``, five batches of trees in flight.

    .venv/bin/python benchmarks/async_speedup.py                          # 5 to 6 minutes
    .venv/bin/python benchmarks/async_speedup.py --seeds 1 2 3 --markdown

Told are, of each side: seconds a step (over the steps that both sides made, the first two left out), seconds from the
first lease to 0.9 sampled success (mean of three steps), mean lag, cores used by the actor (its engine is most of that)
and by the learner.  Then the same without latency, where asynchrony has little to hide.  Exit code 1 if the median over
the seeds is below ``--reach-step`` or ``--reach-goal``.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# A script's own folder comes first on the path, and there `buffer.py` would be taken for the package `buffer`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from atpo_async.api.policy import ensure_policy
from atpo_async.config import load
from atpo_async.run.metrics import Record
from benchmarks.real_runs import SETTLING, RealRun, goal_at, seconds_per_step, train
from benchmarks.script import machine, say, scratch, table

LAGS = {"synchronous": 0, "asynchronous": 4}
"""Side -> ``staleness.max_lag``; (max_lag + 1) batches of trees are in flight."""
LIMIT_S = 3600.0


@dataclass(frozen=True)
class Side:
    """One side's figures."""

    steps: int
    step_s: float
    goal_steps: int | None
    goal_s: float | None
    """From the first lease; None where it was not reached."""
    lag: float
    actor_cores: float
    learner_cores: float
    produced: float
    """Trees grown for each tree of a batch: those whose chains all earn the same train nothing."""


@dataclass(frozen=True)
class Comparison:
    seed: int
    latency_s: float
    sides: dict[str, Side]

    @property
    def per_step(self) -> float:
        return self.sides["synchronous"].step_s / self.sides["asynchronous"].step_s

    @property
    def to_goal(self) -> float | None:
        slow, fast = self.sides["synchronous"].goal_s, self.sides["asynchronous"].goal_s
        return None if slow is None or fast is None else slow / fast


def side_of(run: RealRun, *, common: int, trees: int) -> Side:
    """A side's figures; its seconds a step over the first ``common`` steps."""
    counted, goal = slice(SETTLING, common), goal_at(run.steps)
    return Side(
        steps=len(run.steps),
        step_s=seconds_per_step(run.steps[:common]),
        goal_steps=goal,
        goal_s=None if goal is None else run.steps[goal - 1].time - run.first_lease,
        lag=run.mean("lag/mean", counted),
        actor_cores=run.busy("actors", counted),
        learner_cores=run.busy("learner", counted),
        produced=run.mean("train/trees", counted) / trees,
    )


def compared(args: argparse.Namespace, policy: str, folder: Path, *, seed: int, latency_s: float) -> Comparison:
    """Both sides, one after the other, each until it has reached the goal."""
    trees = load(args.config).staleness.trees_per_batch

    def done(steps: Sequence[Record]) -> bool:
        return len(steps) >= args.least and goal_at(steps) is not None

    runs = {}
    for side, max_lag in LAGS.items():
        options = {
            "run.seed": seed,
            "run.steps": args.most,
            "model.path": policy,
            "environment.options.hops": 3,
            "environment.options.seed": seed,
            "environment.options.latency_s": latency_s,
            "environment.options.latency_sigma": args.sigma,
            "staleness.max_lag": max_lag,
            "actor.trees_in_flight": trees * (max_lag + 1),
        }
        name = f"{side}-{seed}-{latency_s:g}"
        runs[side] = train(Path(args.config), options, folder=folder, name=name, done=done, limit_s=LIMIT_S)
    common = min(len(run.steps) for run in runs.values())
    return Comparison(seed, latency_s, {side: side_of(run, common=common, trees=trees) for side, run in runs.items()})


def rows(found: Sequence[Comparison]) -> list[list[str]]:
    """Of the table: one a comparison and side."""

    def told(value: float | None, form: str = ".2f") -> str:
        return "not reached" if value is None else format(value, form)

    lines = []
    for each in found:
        for name, side in each.sides.items():
            first = name == "asynchronous"
            lines.append([
                f"{each.latency_s:g} s", str(each.seed), name, told(side.step_s), told(side.goal_s, ".0f"),
                "" if side.goal_steps is None else str(side.goal_steps), told(side.lag), told(side.produced),
                told(side.actor_cores), told(side.learner_cores),
                f"{each.per_step:.1f} ×" if first else "",
                (f"{each.to_goal:.1f} ×" if each.to_goal else "") if first else "",
            ])  # fmt: skip
    return lines


HEADER = (
    *("latency", "seed", "side", "s a step", "s to 0.9", "steps to 0.9", "mean lag", "trees grown for one trained on"),
    *("cores of the actor", "cores of the learner", "per step", "to 0.9"),
)


def verdict(found: Sequence[Comparison], *, per_step: float, to_goal: float) -> dict[str, object]:
    """Medians over the seeds, and whether they reach what was asked."""
    steps = statistics.median(each.per_step for each in found)
    goals = [each.to_goal for each in found if each.to_goal is not None]
    goal = statistics.median(goals) if len(goals) == len(found) else None
    good = steps >= per_step and goal is not None and goal >= to_goal
    return {"per_step": round(steps, 2), "to_goal": None if goal is None else round(goal, 2), "reached": good}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/demo.toml", help="whose policy and settings are taken")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--latency", type=float, default=0.3, help="mean seconds of a look-up")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the logarithm of the latency")
    parser.add_argument("--least", type=int, default=12, help="steps that each side makes at least")
    parser.add_argument("--most", type=int, default=40, help="steps after which a side that does not learn ends")
    parser.add_argument("--reach-step", type=float, default=6.0)
    parser.add_argument("--reach-goal", type=float, default=4.0)
    parser.add_argument("--dir", type=Path, default=None, help="where the runs go; they are kept there")
    parser.add_argument("--markdown", action="store_true", help="a table at the end")
    args = parser.parse_args(argv)
    policy = str(Path(ensure_policy(load(args.config), Console(stderr=True)).model.path).resolve())
    say({"machine": machine()})
    found: list[Comparison] = []
    with contextlib.ExitStack() as stack:
        folder = args.dir or stack.enter_context(scratch(None))
        for latency_s in (args.latency, 0.0):
            for seed in args.seeds if latency_s else args.seeds[:1]:
                found.append(compared(args, policy, folder, seed=seed, latency_s=latency_s))
                say({**asdict(found[-1]), "per_step": found[-1].per_step, "to_goal": found[-1].to_goal})
    reached = verdict([each for each in found if each.latency_s], per_step=args.reach_step, to_goal=args.reach_goal)
    say(reached)
    if args.markdown:
        print(table(HEADER, rows(found)))
    return 0 if reached["reached"] else 1


if __name__ == "__main__":
    sys.exit(main())
