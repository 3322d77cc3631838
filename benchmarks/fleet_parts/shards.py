"""A buffer of one process and one of several shards, under the same pool of simulated actors, both in one run.

What a process takes in is bound by the processor that its loop runs on.  With fewer cores than processes the
clock measures the machine: the figure is the processor time that each process spends on a turn, with as many turns
a second for each shard as for the one process (``--shard-rate``; a commit holds as many then).  With a core each, one
buffer takes in 1 / (its time a turn) turns a second, n shards n / (a shard's time a turn of its own), and the front
lets through no more than 1 / (its time a turn of all).
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any, Self

import psutil

from atpo_async.core.naming.shards import shard_roles
from benchmarks.fleet_parts.pool import pool_configuration, pool_of
from benchmarks.fleet_parts.processes import Fleet, FleetPlan, raise_file_limit
from benchmarks.load import START_S, BufferProcess, Usage, learner_link
from benchmarks.script import say

Record = dict[str, Any]


class ShardedBuffer(BufferProcess):
    """A buffer as a run has it: the front and its shards, or the one process."""

    def __enter__(self) -> Self:
        super().__enter__()
        until = time.monotonic() + START_S
        while len(self.rundir.listening.shards()) < len(shard_roles(self.config.buffer.shards)):
            if time.monotonic() > until:
                raise SystemExit(f"the shards do not listen after {START_S:.0f} s; logs in {self.rundir.path / 'logs'}")
            time.sleep(0.02)
        return self

    def usages(self) -> dict[str, Usage]:
        """Of each process, by role."""
        found = {"buffer": self.usage()}
        for child in psutil.Process(self.pid).children():
            words = child.cmdline()
            if "--name" in words:
                found[words[words.index("--name") + 1]] = Usage.of(child.pid)
        return found


def shards(args: argparse.Namespace, folder: Path) -> list[Record]:
    """One process, then ``--shards``: by direct links of the actors, and all of it through the front."""
    number = args.actors[0]
    raise_file_limit(8 * number * (1 + max(args.shards)))
    records = []
    for count, direct in [(1, True), *((n, direct) for n in args.shards for direct in (True, False))]:
        name = f"shards-{count}-{'direct' if direct else 'front'}"
        config = pool_configuration(args, folder, name, shards=count)
        with ShardedBuffer(config) as buffer:
            records.append(asyncio.run(_measured(args, buffer, number, count, direct)))
        records[-1]["times_one"] = round(records[-1]["bound_turns_per_s"] / records[0]["bound_turns_per_s"], 2)
        say(records[-1])
    return records


async def _measured(args: argparse.Namespace, buffer: ShardedBuffer, number: int, count: int, direct: bool) -> Record:
    plan = FleetPlan(
        endpoint=buffer.rundir.read_endpoints().actors, run=buffer.run, config=buffer.config, turn_bytes=args.bytes,
        actors=pool_of(number, turns_per_s=count * args.shard_rate, slots=args.slots, turns_per_tree=args.turns),
        direct=direct,
    )  # fmt: skip
    async with learner_link(buffer):
        with Fleet(plan, args.processes) as fleet:
            fleet.go()
            await asyncio.sleep(args.warm_seconds)
            fleet.mark()
            before, at = buffer.usages(), time.monotonic()
            await asyncio.sleep(args.seconds)
            marked, seconds, after = fleet.mark(), time.monotonic() - at, buffer.usages()
            await asyncio.to_thread(fleet.leave)
    turns = sum(each.turns for each in marked)
    spent = {role: sum(after[role].cpu_since(before[role]).values()) for role in before}
    return {
        "part": "shards", "shards": count, "direct": direct and count > 1, "actors": number,
        "offered_turns_per_s": count * args.shard_rate, "turns_per_s": round(turns / seconds, 1),
        "us_per_turn": {role: round(1e6 * s / max(turns, 1), 1) for role, s in spent.items()},
        "actors_us_per_turn": round(1e6 * sum(each.cpu_s for each in marked) / max(turns, 1), 1),
        "bound_turns_per_s": round(turns / max(spent.values()), 1),
        "bound_by": max(spent, key=spent.__getitem__),
        "refused": sum(each.refused for each in marked),
    }  # fmt: skip
