"""What a policy's sampled chains earn on training tasks, outside any run: A*-PO's optimal values are made of that."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from functools import partial
from pathlib import Path

from actors.engines.base import Engine
from actors.environments import Environments, host_environments
from actors.factory import make_engine
from actors.faults.fault import first_of
from actors.faults.faults import Faults
from actors.hosting import guard, printed
from actors.search.tree_search import TreeSearch
from atpo_async.config import Config, load
from atpo_async.core.credit import TreeArrays
from atpo_async.core.credit.returns import leaf_returns
from atpo_async.core.errors import AtpoError, ConfigError, EnvironmentBroken
from atpo_async.core.tree import Turn
from atpo_async.environments.base import Environment
from atpo_async.models.sources import model_folder
from atpo_async.run.files import write_atomic
from atpo_async.run.temporary import make_temporary_folder_fit
from atpo_async.wire.messages import Lease, TreeClosed, TreeOpened
from atpo_async.wire.records import TurnRecords


async def rewards(
    config: Config, *, engine: Engine, environment: Environment | Environments, num_tasks: int, rollouts: int
) -> dict[int, list[float]]:
    """Task index -> the returns of ``rollouts`` chains, sampled as for training; of the first ``num_tasks`` tasks.

    A chain that fails is left out, and so is a task of which none came to its end.  Raises EnvironmentBroken when every
    chain failed.
    """
    environments = Environments.of(config, environment)
    at_once = asyncio.Semaphore(max(1, config.actor.max_num_seqs // rollouts))
    faults = Faults(environments.labels, at_once=config.actor.max_num_seqs)
    latest_failure = ""

    async def one(index: int) -> list[float]:
        nonlocal latest_failure
        async with at_once:
            search = _search(config, environments, engine, faults, index, rollouts)
            try:
                with faults.growing(search_lease(config, index), environments.task("train", index).label):
                    tree = (await search.grow()).pruned()
            except ExceptionGroup as failures:
                raise first_of(failures) from failures
        latest_failure = search.growth.last_detail or latest_failure
        arrays = TreeArrays.of(tree)
        return [float(each) for each in leaf_returns(arrays)[arrays.is_leaf]]

    found = await asyncio.gather(*(one(index) for index in range(num_tasks)))
    if not any(found):
        raise EnvironmentBroken(f"all {num_tasks * rollouts} chains failed; the latest: {latest_failure}")
    return {index: earned for index, earned in enumerate(found) if earned}


def search_lease(config: Config, index: int) -> Lease:
    """Of training task ``index``, outside any run."""
    return Lease(
        tree_id=f"sampled-{index}", task_index=index, kind="train", epoch=0, lifetime_s=0.0, min_version=0,
        seed=config.run.seed + index, committed=TurnRecords.of(()),
    )  # fmt: skip


def _search(
    config: Config, environments: Environments, engine: Engine, faults: Faults, index: int, rollouts: int
) -> TreeSearch:
    async def drop(message: TreeOpened | Turn | TreeClosed) -> None:
        """Discards the turns: the search itself has them."""

    chains = {"strategy": "none", "initial_rollouts": rollouts, "rounds": 0, "turn_reward": "none", "expand": "rounds"}
    task, lease = environments.task("train", index), search_lease(config, index)
    return TreeSearch(
        run="sampled", lease=lease, task_index=task.task, engine=engine, environment=task.environment,
        search=config.search.model_copy(update=chains), expansion=None,
        max_context_tokens=config.model.max_context_tokens, emit=drop,
        chain_ended=partial(faults.chain_ended, lease.tree_id),
    )  # fmt: skip


def period_of(environments: Environments) -> int | None:
    """How many training tasks there are, where a run goes through them again and again; None where they never end."""
    return None if environments.several else environments.made[0].num_tasks("train")


async def run(config: Config, model: Path, num_tasks: int, rollouts: int) -> dict[str, object]:
    with guard.stray_signals_end_nothing(), printed.limited():
        async with host_environments(config, model) as environments:
            engine = make_engine(config, model, actor="eval", stop_strings=environments.stop_strings)
            known = period_of(environments)
            wanted = num_tasks if known is None else min(num_tasks, known)
            try:
                await engine.start()
                found = await rewards(
                    config, engine=engine, environment=environments, num_tasks=wanted, rollouts=rollouts
                )
            finally:
                await engine.close()
    whole = {"period": known} if known is not None and len(found) == known else {}
    return {
        "model": str(model),
        "rollouts": rollouts,
        "temperature": config.search.temperature,
        **whole,
        "rewards": found,
    }


def main(argv: list[str]) -> int:
    """Writes the file and prints one JSON object: tasks and mean reward.  Exit code 2 and one line for what a user can
    mend."""
    parser = argparse.ArgumentParser(prog="python -m actors sampled")
    parser.add_argument("--config", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--num-tasks", type=int, required=True)
    parser.add_argument("--rollouts", type=int, required=True)
    args = parser.parse_args(argv)
    try:
        make_temporary_folder_fit(lambda line: print(f"note: {line}", file=sys.stderr, flush=True))
        for name in ("num_tasks", "rollouts"):
            if getattr(args, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be >= 1, got {getattr(args, name)}")
        result = asyncio.run(run(load(args.config), model_folder(args.model), args.num_tasks, args.rollouts))
        write_atomic(args.out, json.dumps(result))
    except AtpoError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except OSError as exc:
        print(f"error: --rewards {args.out} cannot be written: {exc.strerror}", file=sys.stderr)
        return 2
    earned = [each for of_task in result["rewards"].values() for each in of_task]  # type: ignore[attr-defined]
    print(json.dumps({"num_tasks": len(result["rewards"]), "reward_mean": sum(earned) / len(earned)}), flush=True)  # type: ignore[arg-type]
    return 0
