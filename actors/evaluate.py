"""Greedy success of a model folder on held-out tasks, with the engine of the configuration."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from actors.engines.base import Engine
from actors.environments import Environments, host_environments
from actors.factory import make_engine
from actors.faults.faults import Faults
from actors.greedy import Grown, grow_greedy
from actors.hosting import guard, printed
from atpo_async.config import Config, load
from atpo_async.core.errors import AtpoError, ConfigError, EnvironmentBroken
from atpo_async.core.tree import Turn
from atpo_async.environments.base import Environment
from atpo_async.models.sources import model_folder
from atpo_async.run.temporary import make_temporary_folder_fit


async def success(
    config: Config, *, engine: Engine, environment: Environment | Environments, num_tasks: int
) -> dict[str, float | None]:
    """Grow one greedy chain for each of the first ``num_tasks`` held-out tasks.

    Returns success (share of right answers; a failed chain counts as wrong, one without a success value or a judgement
    is left out; None where all are), how many are unknown and failed, and the means of turns, of rewards and of their
    named parts; of several environments also ``<label>/success`` and so on.
    Raises ConfigError when the environment has fewer tasks, EnvironmentBroken when every chain failed.
    """
    environments = Environments.of(config, environment)
    environments.check_eval_tasks(num_tasks)
    at_once = asyncio.Semaphore(config.actor.max_num_seqs)
    faults = Faults(environments.labels, at_once=config.actor.max_num_seqs)
    latest_failure = ""

    async def one(index: int) -> Grown:
        nonlocal latest_failure
        task = environments.task("eval", index)
        async with at_once:
            grown = await grow_greedy(
                config, engine=engine, environment=task.environment, faults=faults, index=index, task_index=task.task,
                label=task.label,
            )  # fmt: skip
        latest_failure = grown.failure or latest_failure
        return grown

    grown = await asyncio.gather(*(one(i) for i in range(num_tasks)))
    if not any(each.tree.leaves() for each in grown):
        raise EnvironmentBroken(f"all {num_tasks} evaluation chains failed; the latest: {latest_failure}")
    return _outcome(grown) | _by_environment(environments, grown)


def _outcome(grown: Sequence[Grown]) -> dict[str, float | None]:
    """Of some evaluation chains."""
    leaves = [leaf for each in grown for leaf in each.tree.leaves() if leaf.role != "proposer"]
    unjudged = sum(not each.judged for each in grown)
    told = [leaf.success for leaf in leaves if leaf.success is not None]
    unknown = unjudged + len(leaves) - len(told)
    return {
        "success": sum(told) / (len(grown) - unknown) if told else None,
        "num_tasks": float(len(grown)),
        "unknown": float(unknown),
        "failed": float(len(grown) - unjudged - len(leaves)),
        "reward_mean": sum(leaf.reward or 0.0 for leaf in leaves) / len(leaves) if leaves else None,
        "turns_mean": sum(len(each.tree) for each in grown) / len(grown),
        **_parts(leaves),
    }


def _parts(leaves: Sequence[Turn]) -> dict[str, float]:
    """``reward/<name>``: the mean of each named part, over the leaves that have it."""
    found: dict[str, list[float]] = {}
    for leaf in leaves:
        for name, part in leaf.rewards.items():
            found.setdefault(f"reward/{name}", []).append(part)
    return {name: sum(parts) / len(parts) for name, parts in found.items()}


def _by_environment(environments: Environments, grown: Sequence[Grown]) -> dict[str, float | None]:
    """The same of each environment, where there are several: ``<label>/success`` and so on."""
    found: dict[str, float | None] = {}
    for label in environments.labels if environments.several else ():
        if own := [each for task, each in enumerate(grown) if environments.task("eval", task).label == label]:
            found |= {f"{label}/{name}": value for name, value in _outcome(own).items()}
    return found


async def run(config: Config, model: Path, num_tasks: int) -> dict[str, float | None]:
    with guard.stray_signals_end_nothing(), printed.limited():
        return await _run(config, model, num_tasks)


async def _run(config: Config, model: Path, num_tasks: int) -> dict[str, float | None]:
    async with host_environments(config, model) as environments:
        engine = make_engine(config, model, actor="eval", stop_strings=environments.stop_strings)
        try:
            await engine.start()
            return await success(config, engine=engine, environment=environments, num_tasks=num_tasks)
        finally:
            await engine.close()


def main(argv: list[str]) -> int:
    """Prints one JSON object.  Exit code 2 and one line for what a user can mend."""
    parser = argparse.ArgumentParser(prog="python -m actors eval")
    parser.add_argument("--config", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--num-tasks", type=int, default=None)
    parser.add_argument("--debug", action="store_true")
    args = parser.parse_args(argv)
    try:
        make_temporary_folder_fit(lambda line: print(f"note: {line}", file=sys.stderr, flush=True))
        config = load(args.config)
        num_tasks = config.eval.num_tasks if args.num_tasks is None else args.num_tasks
        if num_tasks < 1:
            raise ConfigError(f"--num-tasks must be >= 1, got {num_tasks}")
        result = asyncio.run(run(config, model_folder(args.model), num_tasks))
    except AtpoError as exc:
        if args.debug:
            raise
        print(f"error: {exc}", file=sys.stderr)
        return 2
    print(json.dumps(result), flush=True)
    return 0
