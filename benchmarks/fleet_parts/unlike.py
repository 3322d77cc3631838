"""Actors of unlike speed that come and go, over real links: as the buffer shares the work out, and in equal shares.

Four actors with speeds 1 : 2 : 4 : 8, one that joins late, one that leaves with notice, one that is killed; a learner
that takes batches, confirms them and publishes versions.  What each did, how long it had nothing to do, how old the
turns were that the learner was given, and whether every task was trained on exactly once.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atpo_async.links.client import Client
from atpo_async.wire.messages import Batch, Exhausted, NotYet, RunFinished, SampleRequest, Trained
from benchmarks.fleet_parts.actors import ActorPlan, ActorResult
from benchmarks.fleet_parts.processes import ABSENT, Fleet, FleetPlan, Shared
from benchmarks.load import REPLY_S, BufferProcess, configuration, learner_link, publish
from benchmarks.script import say

Record = dict[str, Any]
VICTIM = "killed"
TREES_PER_BATCH, MAX_LAG = 16, 4


@dataclass
class Learned:
    """What the learner was given."""

    tasks: Counter[int] = field(default_factory=Counter)
    lags: list[int] = field(default_factory=list)
    """Of every turn."""
    batches: int = 0
    seconds: float = 0.0


def actors_of(args: argparse.Namespace) -> tuple[ActorPlan, ...]:
    """The scene; times in it are shares of what the fleet would take if all of it were there from the beginning."""
    slow = args.speed
    whole_s = args.tasks * args.turns / (15 * slow)

    def one(name: str, times: float, **more: Any) -> ActorPlan:
        return ActorPlan(
            name=name,
            turns_per_s=slow * times,
            slots=args.slots,
            turns_per_tree=args.turns,
            host=f"host-{name}",
            **more,
        )

    return (
        *(one(f"speed-{times}", times) for times in (1, 2, 4, 8)),
        one("late", 4, joins_s=0.3 * whole_s),
        one("leaves", 2, leaves_s=0.4 * whole_s),
        one(VICTIM, 2),
    )


def unlike(args: argparse.Namespace, folder: Path) -> list[Record]:
    """Both ways of sharing the work, one after the other."""
    records = []
    for mode in args.modes:
        config = configuration(
            folder, name=f"unlike-{mode}", run={"max_tasks": args.tasks},
            staleness={"trees_per_batch": TREES_PER_BATCH, "max_lag": MAX_LAG}, actor={"count": 4},
            buffer={"lease_lifetime_s": 60.0, "journal_sync": not args.no_sync}, links={"heartbeat_s": 1.0},
        )  # fmt: skip
        with BufferProcess(config) as buffer:
            records.append(asyncio.run(_played(args, buffer, mode)))
        say(records[-1])
    return records


async def _played(args: argparse.Namespace, buffer: BufferProcess, mode: str) -> Record:
    actors = actors_of(args)
    plan = FleetPlan(
        endpoint=buffer.rundir.read_endpoints().actors, run=buffer.run, config=buffer.config, actors=actors,
        turn_bytes=args.bytes, equal_shares=mode == "equal",
    )  # fmt: skip
    async with learner_link(buffer) as link:
        with Fleet(plan, processes=len(actors)) as fleet:
            fleet.go()
            killing = asyncio.create_task(_kill(fleet, 0.5 * args.tasks * args.turns / (15 * args.speed)))
            learned = await _learn(link, buffer.run, args, fleet.shared)
            victim = await killing
            results = await asyncio.to_thread(fleet.results, but=victim)
    return {"part": "unlike", "mode": mode, "tasks": args.tasks, **summary(results, learned, args)}


async def _kill(fleet: Fleet, after_s: float) -> int:
    await asyncio.sleep(after_s)
    pid = fleet.pid_of(VICTIM)
    os.kill(pid, signal.SIGKILL)
    names = [plan.name for plan in fleet.plan.actors]
    fleet.shared.begun.get_obj()[names.index(VICTIM)] = ABSENT
    return pid


async def _learn(link: Client, run: str, args: argparse.Namespace, shared: Shared) -> Learned:
    """Takes batches until every task is accounted for.  Waits for: trees; then for ``--step-seconds`` each."""
    learned, step, began = Learned(), 0, time.monotonic()
    while True:
        request = SampleRequest(
            run=run, rank=0, num_ranks=1, step=step, version=step, num_trees=TREES_PER_BATCH, wait_s=5.0
        )
        answer = await link.request(request, timeout_s=REPLY_S)
        if isinstance(answer, NotYet):
            continue
        if isinstance(answer, Exhausted):
            break
        if not isinstance(answer, Batch):
            raise SystemExit(f"the learner asked for a batch and got {answer}")
        learned.batches += 1
        for tree in answer.trees:
            learned.tasks[tree.task_index] += 1
            learned.lags += [step - turn.oldest_version for turn in tree.turns]
        await asyncio.sleep(args.step_seconds)
        step += 1
        priorities = dict.fromkeys((tree.tree_id for tree in answer.trees), 0.5)
        await link.send(Trained(run=run, batch_id=answer.batch_id, version=step, priorities=priorities))
        shared.version.value = step
        await publish(link, run, step)
    learned.seconds = time.monotonic() - began
    await link.send(RunFinished(run=run))
    await link.drain(timeout_s=REPLY_S)
    return learned


def summary(results: list[ActorResult], learned: Learned, args: argparse.Namespace) -> Record:
    """The figures of one way of sharing."""
    turns = sum(result.turns for result in results)
    lags = learned.lags
    return {
        "seconds": round(learned.seconds, 1),
        "trees_per_s": round(learned.tasks.total() / learned.seconds, 2),
        "batches": learned.batches,
        "lag_mean": round(sum(lags) / max(len(lags), 1), 2),
        "lag_max": max(lags, default=0),
        "turns_over_max_lag": round(sum(lag > MAX_LAG for lag in lags) / max(len(lags), 1), 4),
        "tasks_not_trained_on": args.tasks - len(learned.tasks),
        "tasks_trained_on_twice": sum(number > 1 for number in learned.tasks.values()),
        "refused": sum(len(result.refused) for result in results),
        "actors": {
            result.name: {
                "busy": round(result.busy_share, 3),
                "trees": result.trees,
                "share": round(result.turns / max(turns, 1), 3),
            }
            for result in results
        },
    }
