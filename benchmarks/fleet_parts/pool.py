"""One buffer under a pool of simulated actors: what it takes in, what that costs it, how long a lease takes."""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np

from atpo_async.config import Config
from atpo_async.links.keys import CLIENT_KEY, SERVER_KEY, make_keys
from benchmarks.fleet_parts.actors import ActorPlan
from benchmarks.fleet_parts.processes import Fleet, FleetPlan, Marked, raise_file_limit
from benchmarks.load import BufferProcess, Usage, configuration, learner_link
from benchmarks.script import say

Record = dict[str, Any]
MOST_SPREAD_S = 10.0
HOSTS = 40
"""Machines that the actors say they are on."""


def pool_of(number: int, *, turns_per_s: float | None, slots: int, turns_per_tree: int) -> tuple[ActorPlan, ...]:
    """So many actors, together ``turns_per_s`` fast; as fast as the link takes them where None."""
    each = None if turns_per_s is None else turns_per_s / number
    tree_s = slots * turns_per_tree / each if each is not None else 0.0
    return tuple(
        ActorPlan(
            name=f"pool-{i:04d}", turns_per_s=each, slots=slots, turns_per_tree=turns_per_tree,
            begins_s=min(tree_s, MOST_SPREAD_S) * i / number, host=f"host-{i % HOSTS}", host_id=f"boot-{i % HOSTS}",
        )
        for i in range(number)
    )  # fmt: skip


def pool_configuration(args: argparse.Namespace, folder: Path, name: str, *, shards: int = 1) -> Config:
    """Of a run in which the buffer alone is the limit; with ``--curve`` every link is encrypted."""
    links: dict[str, Any] = {"give_up_s": 120.0}
    if args.curve:
        keys = folder / f"{name}-keys"
        for pair in (SERVER_KEY, CLIENT_KEY):
            make_keys(keys, pair)
        links["keys_dir"] = str(keys)
    return configuration(folder, name=name, links=links, buffer={"journal_sync": not args.no_sync, "shards": shards})


def pool(args: argparse.Namespace, folder: Path) -> list[Record]:
    """Each number of actors at each offered rate."""
    raise_file_limit(4 * max(args.actors))
    records = []
    for number in args.actors:
        for rate in args.rates or [None]:
            name = f"pool-{number}-{'full' if rate is None else int(rate)}"
            config = pool_configuration(args, folder, name)
            with BufferProcess(config, profile=args.profile and args.profile / f"{name}.txt") as buffer:
                records.append(asyncio.run(_measured(args, buffer, number, rate)))
            say(records[-1])
    return records


async def _measured(args: argparse.Namespace, buffer: BufferProcess, number: int, rate: float | None) -> Record:
    plan = FleetPlan(
        endpoint=buffer.rundir.read_endpoints().actors, run=buffer.run, config=buffer.config, turn_bytes=args.bytes,
        actors=pool_of(number, turns_per_s=rate, slots=args.slots, turns_per_tree=args.turns),
    )  # fmt: skip
    async with learner_link(buffer):
        began = time.monotonic()
        with Fleet(plan, args.processes) as fleet:
            connected_s = time.monotonic() - began
            fleet.go()
            await asyncio.sleep(args.warm_seconds)
            fleet.mark()
            before, journal_bytes, at = buffer.usage(), buffer.journal_bytes, time.monotonic()
            await asyncio.sleep(args.seconds)
            marked = fleet.mark()
            seconds, usage = time.monotonic() - at, buffer.usage()
            written = buffer.journal_bytes - journal_bytes
            back_s = await _back_after_a_kill(buffer, fleet, number) if args.restart else None
            await asyncio.to_thread(fleet.leave)
    return {
        "part": "pool", "actors": number, "offered_turns_per_s": rate, "curve": args.curve,
        "connected_s": round(connected_s, 2),
        **summary(marked, before, usage, seconds, turn_bytes=args.bytes),
        "journal_mb": round(written / 1e6, 1),
        "all_back_after_kill_s": back_s,
    }  # fmt: skip


async def _back_after_a_kill(buffer: BufferProcess, fleet: Fleet, number: int) -> dict[str, float]:
    """Seconds from the end of a killed buffer's successor's start until it has acknowledged something of every actor,
    and of that start."""
    fleet.mark()
    began = time.monotonic()
    buffer.kill()
    await asyncio.to_thread(buffer.start)
    started = time.monotonic()
    heard: set[str] = set()
    while len(heard) < number and time.monotonic() - started < 120.0:
        await asyncio.sleep(0.1)
        heard |= {name for each in fleet.mark() for name in each.acked}
    return {
        "start_s": round(started - began, 2),
        "all_s": round(time.monotonic() - started, 2),
        "heard": len(heard),
    }


def summary(marked: list[Marked], before: Usage, after: Usage, seconds: float, *, turn_bytes: int) -> Record:
    """The figures of one measurement of ``seconds``."""
    turns = sum(each.turns for each in marked)
    leases = np.array([took for each in marked for took in each.lease_s]) * 1e3
    spent = after.cpu_since(before)
    return {
        "turns_per_s": round(turns / seconds, 1),
        "mb_per_s": round(turns * turn_bytes / seconds / 1e6, 2),
        "buffer_us_per_turn": {name: round(1e6 * s / max(turns, 1), 1) for name, s in spent.items()},
        "buffer_busy_share": round(spent["loop"] / seconds, 3),
        "lease_p50_ms": round(float(np.percentile(leases, 50)), 2) if len(leases) else None,
        "lease_p99_ms": round(float(np.percentile(leases, 99)), 2) if len(leases) else None,
        "lease_requests": len(leases),
        "buffer_private_mb": round(after.private_bytes / 1e6, 1),
        "private_bytes_per_turn": round((after.private_bytes - before.private_bytes) / max(turns, 1), 1),
        "senders_busy_share": round(sum(each.cpu_s for each in marked) / seconds, 3),
        "refused": sum(each.refused for each in marked),
    }
