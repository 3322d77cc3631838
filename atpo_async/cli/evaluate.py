"""``atpo eval``: greedy success of a run's newest policy, or of a model folder, on held-out tasks or published sets.

With ``--rewards`` it writes what sampled chains earn on training tasks instead, for
``credit.advantage_options.rewards``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from atpo_async.api.evaluation import (
    evaluate_policy,
    evaluation,
    is_run,
    sample_rewards,
    tasks_of_a_run,
    without_effect,
)
from atpo_async.api.machine import engine_of
from atpo_async.cli import benchmarks
from atpo_async.cli.common import EXIT_DONE, Asked, demo_config, note
from atpo_async.config import Config
from atpo_async.core.errors import ConfigError
from atpo_async.environments.search_qa.results import printed
from atpo_async.status.run_folders import run_at


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Of the command line."""
    parser.add_argument("target", metavar="RUN|MODEL")
    parser.add_argument(
        "config", metavar="CONFIG", nargs="*", default=[], help="for a model folder; configs/demo.toml without"
    )
    sets = parser.add_argument_group("published test sets (docs/search_qa.md)")
    sets.add_argument("--benchmarks", metavar="NAMES", help="hotpotqa,2wiki,… or multi-hop, single-hop, all")
    sets.add_argument("--data", metavar="DIR", type=Path, help="folder with them; data without")
    sets.add_argument("--out", metavar="DIR", type=Path, help="of the results; benchmarks/ in the run's folder without")
    sets.add_argument("--limit", metavar="N", type=int, help="only the first N questions of each")
    sampled = parser.add_argument_group("rewards of training tasks, for A*-PO (docs/methods.md)")
    sampled.add_argument(
        "--rewards", metavar="FILE", type=Path, help="where what sampled chains earn is written (JSON)"
    )
    sampled.add_argument("--rollouts", metavar="N", type=int, help="chains a task; 8 without")
    sampled.add_argument("--tasks", metavar="N", type=int, help="the first N tasks; as many as a run takes without")


def run(asked: Asked) -> int:
    """Prints one line, or the table of the test sets."""
    if asked.args.benchmarks is None:
        given = [f"--{name}" for name in ("data", "out", "limit") if getattr(asked.args, name) is not None]
        if given:
            raise ConfigError(f"{given[0]} goes with --benchmarks: atpo eval RUN --benchmarks all --data DIR")
    if asked.args.rewards is None:
        given = [f"--{name}" for name in ("rollouts", "tasks") if getattr(asked.args, name) is not None]
        if given:
            raise ConfigError(f"{given[0]} goes with --rewards: atpo eval MODEL CONFIG --rewards rewards.json")
    elif asked.args.benchmarks is not None:
        raise ConfigError("--rewards and --benchmarks: one is of training tasks, the other of test sets; name one")
    wanted = evaluation(asked.args.target, asked.args.config, asked.options, default=demo_config)
    with wanted as (config, model, name):
        engine, _ = engine_of(config)
        for option in without_effect(asked.options):
            note(f"--{option} has no effect on an evaluation")
        if asked.args.rewards is not None:
            return _sampled_rewards(asked, config, model, name, engine)
        if asked.args.benchmarks is not None:
            return _on_benchmarks(asked, config, model, name, engine)
        tasks = config.eval.num_tasks
        print(f"evaluating {name} on {tasks} held-out tasks with {engine} …", file=sys.stderr, flush=True)
        result = evaluate_policy(config, model, name)
    print(result.line(name))
    return EXIT_DONE


def _sampled_rewards(asked: Asked, config: Config, model: Path, name: str, engine: str) -> int:
    """Writes the file of rewards and prints one line about it."""
    file, rollouts = asked.args.rewards, 8 if asked.args.rollouts is None else asked.args.rollouts
    tasks = tasks_of_a_run(config) if asked.args.tasks is None else asked.args.tasks
    if not file.parent.is_dir():
        raise ConfigError(f"--rewards {file}: there is no folder {file.parent}")
    print(
        f"sampling {rollouts} chains of {name} on each of {tasks} training tasks with {engine} …",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    found = sample_rewards(config, model, name, file=file, num_tasks=tasks, rollouts=rollouts)
    print(
        f"{file}: rewards of {found['num_tasks']:.0f} training tasks, mean {found['reward_mean']:.3f}; use it with "
        f"--credit.advantage_options.rewards {file}"
    )
    return EXIT_DONE


def _on_benchmarks(asked: Asked, config: Config, model: Path, name: str, engine: str) -> int:
    """Prints the table; one that is interrupted goes on with the same command."""
    target = Path(asked.args.target)
    folder = run_at(target).path if is_run(target) else Path()
    wanted = benchmarks.Asked(
        benchmarks=asked.args.benchmarks,
        data=asked.args.data or Path("data"),
        out=asked.args.out or folder / "benchmarks" / Path(name).name,
        limit=asked.args.limit or 0,
    )
    config = benchmarks.with_search_qa_alone(config)
    found = benchmarks.found(wanted, config)
    sets = ", ".join(each.name for each in found)
    print(f"evaluating {name} on {sets} with {engine}; results in {wanted.out} …", file=sys.stderr, flush=True)
    try:
        lines = benchmarks.evaluate_on(
            config, model, name, wanted, found, tell=lambda line: print(line, file=sys.stderr, flush=True)
        )
    except KeyboardInterrupt:
        note(f"what is answered so far is kept in {wanted.out}; go on with: {asked.again}")
        raise
    print(printed(lines))
    print(f"\nwritten to {wanted.out / benchmarks.TABLE} and {benchmarks.NUMBERS}", file=sys.stderr)
    return EXIT_DONE
