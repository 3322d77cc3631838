"""Many simulated actors on one buffer for minutes: flat memory, no growth of any queue, nothing lost.

A real buffer process, actors with a link each in processes of their own, and a learner here that takes batches, looks
at every turn, confirms them at a steady pace, publishes a version for each and says every few that it has a checkpoint.
Admission is as in a run: the learner's pace is everybody's.  Every few seconds the buffer's memory, its journal and
every queue that anybody knows of are noted down.

At the end the actors finish their trees, the learner takes what is left, and it is held against what the actors know:
a tree of which every message was acknowledged has been served once, with the bytes that were sent, or the buffer says
why it was dropped.

    .venv/bin/python benchmarks/soak.py [--minutes 10] [--actors 64] [--turns-per-s 2000]

Prints one JSON object a sample, then the verdict; exit code 1 if it is not kept.  Growth is that of the second half: a
run of less than a few minutes judges how the journal fills up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# A script's own folder comes first on the path, and there `buffer.py` would be taken for the package `buffer`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from atpo_async.config import Config
from atpo_async.links.client import Client
from atpo_async.wire.messages import Batch, Checkpointed, Lease, SampleRequest, Trained
from benchmarks.load import (
    REPLY_S,
    Actor,
    BufferProcess,
    Plan,
    Turns,
    configuration,
    content,
    learner_link,
    plans,
    publish,
)
from benchmarks.script import BYTES, machine, options, say, scratch, table

TREES_PER_BATCH = 16
CHECKPOINT_EVERY = 10
"""Steps."""
SPARE = 1.3
"""How much faster the actors could be than the learner: it is the learner that everybody waits for."""
TELL_EVERY_S = 1.0
QUEUES = ("queued", "unsettled", "waiting", "uncommitted", "unacked", "parked", "requests")
"""A number whose name has one of these counts things that wait."""
MEMORY_SLACK = 0.05
MEMORY_SLACK_BYTES = 8 << 20
QUEUE_SLACK = 0.5

Contents = dict[str, bytes]
"""Tree -> int64[N] as bytes: what turns 1 … N say (``load.content``)."""


# --- actors ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Told:
    """A process of actors, about the time since it last said something."""

    closed: Contents
    """Trees of which everything is acknowledged."""
    unacked: int
    """Messages under way, over all its actors."""
    turns_acked: int
    """Of the closed trees."""
    refused: tuple[str, ...] = ()
    done: bool = False


def packed(contents: dict[int, int]) -> bytes:
    """Contents of turns 1 … N."""
    return np.array([contents[i] for i in sorted(contents)], dtype=np.uint64).tobytes()


def act(plan: Plan, pipe: Connection) -> None:
    """All actors of ``plan`` until ``pipe`` says ``stop``; then they finish their trees."""

    async def main() -> None:
        closed: Contents = {}
        stopping = asyncio.Event()
        turns = Turns(plan.turn_bytes, marked=True)

        def on_tree(lease: Lease, contents: dict[int, int]) -> None:
            closed[lease.tree_id] = packed(contents)

        def tell(*, done: bool = False) -> None:
            nonlocal closed
            told, closed = closed, {}
            refused = tuple(reason for actor in actors for reason in actor.refused)
            for actor in actors:
                actor.refused.clear()
            pipe.send(
                Told(
                    closed=told,
                    unacked=sum(actor.link.stats.unacked for actor in actors),
                    turns_acked=len(told) * plan.turns_per_tree,
                    refused=refused,
                    done=done,
                )
            )

        async def work(actor: Actor) -> None:
            while not stopping.is_set():
                for lease in await actor.lease(1, stopping=stopping):
                    await actor.grow(lease, version=max(lease.min_version, 0))
            await actor.link.drain(timeout_s=REPLY_S)

        async def talk() -> None:
            while True:
                await asyncio.sleep(TELL_EVERY_S)
                tell()

        async def listen() -> None:
            await asyncio.to_thread(pipe.recv)
            stopping.set()

        async with contextlib.AsyncExitStack() as stack:
            actors = [await stack.enter_async_context(Actor(plan, name, turns, on_tree=on_tree)) for name in plan.names]
            talking, listening = asyncio.create_task(talk()), asyncio.create_task(listen())
            await asyncio.gather(*(work(actor) for actor in actors))
            talking.cancel()
            await listening
            tell(done=True)

    asyncio.run(main())


# --- what is noted down ----------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Seen:
    """Everything that came of a soak."""

    served: Contents = field(default_factory=dict)
    times_served: Counter[str] = field(default_factory=Counter)
    closed: Contents = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    """By the buffer, with the reason it gives."""
    refused: list[str] = field(default_factory=list)
    unacked: dict[int, int] = field(default_factory=dict)
    """Process -> messages under way."""
    done: set[int] = field(default_factory=set)
    samples: list[dict[str, float]] = field(default_factory=list)

    def take(self, process: int, told: Told) -> None:
        self.closed |= told.closed
        self.unacked[process] = told.unacked
        self.refused += told.refused
        if told.done:
            self.done.add(process)

    def serve(self, batch: Batch) -> int:
        """Note a batch down; returns its number of turns."""
        for tree in batch.trees:
            self.times_served[tree.tree_id] += 1
            self.served[tree.tree_id] = packed({turn.turn_id: content(turn) for turn in tree.turns})
        for name, value in batch.metrics.items():
            if name.startswith(("buffer/dropped_", "buffer/no_signal", "buffer/given_up")) and value:
                self.dropped[name] += int(value)
        return sum(len(tree.turns) for tree in batch.trees)


def queues_of(status: Any, path: str = "") -> dict[str, float]:
    """Every number in a role's status that counts things that wait, summed over a link's peers."""
    found: dict[str, float] = {}

    def add(name: str, value: float) -> None:
        found[name] = found.get(name, 0.0) + value

    if isinstance(status, dict):
        for name, value in status.items():
            here = f"{path}.{name}" if path else name
            if any(queue in name for queue in QUEUES):
                if isinstance(value, list):
                    add(here, len(value))
                elif isinstance(value, (int, float)) and not isinstance(value, bool):
                    add(here, value)
            if isinstance(value, (dict, list)):
                for inner, count in queues_of(value, here).items():
                    add(inner, count)
    elif isinstance(status, list):
        for value in status:
            for inner, count in queues_of(value, path).items():
                add(inner, count)
    return found


def queues_in_status(buffer: BufferProcess) -> dict[str, float]:
    """The buffer's queues, from its status file; empty while there is none."""
    path = buffer.rundir.path / "status" / "buffer.json"
    with contextlib.suppress(OSError, ValueError):
        status = json.loads(path.read_text(encoding="utf-8"))
        return queues_of({name: status.get(name, {}) for name in ("links", "facts")})
    return {}


# --- the verdict -----------------------------------------------------------------------------------------------


def growth(at_s: Sequence[float], values: Sequence[float]) -> float:
    """What ``values`` grow by over the second half of the time, along the median of all slopes between two of them."""
    when, what = np.asarray(at_s), np.asarray(values, dtype=np.float64)
    half = when >= (when[0] + when[-1]) / 2
    when, what = when[half], what[half]
    if len(when) < 3:
        return 0.0
    first, second = np.triu_indices(len(when), 1)
    slope = float(np.median((what[second] - what[first]) / (when[second] - when[first])))
    return slope * float(when[-1] - when[0])


def judge_samples(samples: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    """Of each series: its level, what it grows by in the second half, how much is allowed, and whether that holds."""
    found = []
    at_s = [sample["at_s"] for sample in samples]
    names = dict.fromkeys(name for sample in samples for name in sample if name != "at_s")
    for name in names:
        values = [sample.get(name, 0.0) for sample in samples]
        kind = name.split(".")[0]
        level, most = float(np.median(values)), max(values)
        allowed = {
            "memory": max(MEMORY_SLACK * level, MEMORY_SLACK_BYTES),
            "disk": max(MEMORY_SLACK * level, 2 * MEMORY_SLACK_BYTES),
            # Half as much again as the largest of the first half: they go up and down, but not up and up.
            "queue": max(QUEUE_SLACK * max(values[: len(values) // 2 + 1]), 1 << 20 if name.endswith("bytes") else 64),
        }.get(kind)
        grown = growth(at_s, values)
        found.append(
            {
                "series": name, "level": level, "most": most, "growth": grown, "allowed": allowed,
                "kept": allowed is None or grown <= allowed,
            }
        )  # fmt: skip
    return found


def judge_trees(seen: Seen) -> dict[str, Any]:
    """What became of the trees that the actors know to be acknowledged."""
    missing = [tree_id for tree_id in seen.closed if tree_id not in seen.served]
    wrong = [t for t, said in seen.closed.items() if t in seen.served and seen.served[t] != said]
    dropped = sum(seen.dropped.values())
    twice = [tree_id for tree_id, times in seen.times_served.items() if times > 1]
    return {
        "trees_acknowledged": len(seen.closed),
        "turns_acknowledged": sum(len(said) // 8 for said in seen.closed.values()),
        "trees_served": len(seen.served),
        "not_served": len(missing),
        "dropped_by_the_buffer": dict(seen.dropped),
        "lost": max(len(missing) - dropped, 0),
        "changed": len(wrong),
        "served_twice": len(twice),
        "refused": len(seen.refused),
        "kept": not (wrong or twice or seen.refused) and len(missing) <= dropped and bool(seen.closed),
    }


# --- the soak --------------------------------------------------------------------------------------------------


async def learn(link: Client, buffer: BufferProcess, seen: Seen, *, pace_s: float, stop: asyncio.Event) -> None:
    """Batches at a steady pace until ``stop``, then all that is left, one by one and under one version: what is left
    must not grow stale because the batches have become small."""
    step = version = 0
    next_at = time.monotonic()
    rng = np.random.default_rng(0)
    num_trees = TREES_PER_BATCH
    while True:
        if stop.is_set() and not at_work(seen):
            num_trees = 1  # no more are coming: a whole batch may never fill
        request = SampleRequest(
            run=buffer.run, rank=0, num_ranks=1, step=step, version=version, num_trees=num_trees, wait_s=1.0
        )
        batch = await link.request(request, timeout_s=REPLY_S)
        if not isinstance(batch, Batch):
            if num_trees == 1:
                return
            continue
        seen.serve(batch)
        step += 1
        version += num_trees == TREES_PER_BATCH
        next_at = max(next_at + pace_s * len(batch.trees) / TREES_PER_BATCH, time.monotonic() - pace_s)
        await asyncio.sleep(max(next_at - time.monotonic(), 0.0))
        names = [tree.tree_id for tree in batch.trees]
        await link.send(
            Trained(
                run=buffer.run, batch_id=batch.batch_id, version=version,
                priorities=dict(zip(names, rng.random(len(names)).tolist(), strict=True)),
            )
        )  # fmt: skip
        await publish(link, buffer.run, version)
        if step % CHECKPOINT_EVERY == 0:
            await link.send(Checkpointed(run=buffer.run, step=step, version=version))


def at_work(seen: Seen) -> bool:
    """Whether actors are still at work."""
    return len(seen.done) < len(seen.unacked) or not seen.unacked


async def soak(args: argparse.Namespace, buffer: BufferProcess, seen: Seen) -> None:
    each = SPARE * args.turns_per_s / args.actors
    made = plans(
        args.actors, args.processes, endpoint=buffer.rundir.read_endpoints().actors, run=buffer.run,
        config=buffer.config, trees=0, turns_per_tree=args.turns, turn_bytes=args.bytes, turns_per_s=each,
    )  # fmt: skip
    context = get_context("spawn")
    stop = asyncio.Event()
    began = time.monotonic()
    processes, pipes = [], []
    try:
        async with learner_link(buffer) as link:
            for plan in made:
                ours, theirs = context.Pipe()
                process = context.Process(target=act, args=(plan, theirs), daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)

            async def hear(number: int, pipe: Connection) -> None:
                while number not in seen.done:
                    seen.take(number, await asyncio.to_thread(pipe.recv))

            async def note() -> None:
                while True:
                    await asyncio.sleep(args.every)
                    usage = buffer.usage()
                    seen.samples.append(
                        {
                            "at_s": time.monotonic() - began,
                            "memory.private_bytes": usage.private_bytes,
                            "memory_mapped.bytes": usage.mapped_bytes,
                            "disk.journal_bytes": buffer.journal_bytes,
                            "queue.actors.unacked": sum(seen.unacked.values()),
                            **{f"queue.{name}": value for name, value in queues_in_status(buffer).items()},
                            "count.trees_acknowledged": len(seen.closed),
                            "count.trees_served": len(seen.served),
                        }
                    )
                    say(seen.samples[-1])

            pace_s = TREES_PER_BATCH * args.turns / args.turns_per_s
            async with asyncio.TaskGroup() as tasks:
                hearing = [tasks.create_task(hear(i, pipe), name=f"hear {i}") for i, pipe in enumerate(pipes)]
                noting = tasks.create_task(note(), name="notes")
                learning = tasks.create_task(learn(link, buffer, seen, pace_s=pace_s, stop=stop), name="learner")
                await asyncio.sleep(60 * args.minutes)
                noting.cancel()
                stop.set()
                for pipe in pipes:
                    pipe.send("stop")
                await asyncio.wait(hearing)
                await learning
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def configured(folder: Path) -> Config:
    """A run as it is: small batches, admission at work, each tree used once, checkpoints now and then."""
    return configuration(
        folder,
        name="soak",
        staleness={"trees_per_batch": TREES_PER_BATCH, "max_lag": 8, "max_uses": 1},
        buffer={"lease_lifetime_s": 120.0, "max_bytes": 1 << 30},
    )


def report(seen: Seen, judged: Iterable[dict[str, Any]]) -> str:
    rows = [
        (j["series"], j["level"], j["most"], j["growth"], "–" if j["allowed"] is None else j["allowed"],
         "kept" if j["kept"] else "NOT KEPT")
        for j in judged
    ]  # fmt: skip
    return table(("series", "median", "most", "growth over the second half", "allowed", ""), rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--actors", type=int, default=64)
    parser.add_argument("--processes", type=int, default=1, help="that the actors are spread over")
    parser.add_argument("--turns-per-s", type=float, default=2000.0, help="that the learner takes")
    parser.add_argument("--turns", type=int, default=80, help="of a tree")
    parser.add_argument("--bytes", type=int, default=4096, help=BYTES)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two samples")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    say({"machine": machine(), "minutes": args.minutes, "actors": args.actors})
    seen = Seen()
    if args.profile is not None:
        args.profile.mkdir(parents=True, exist_ok=True)
    profile = None if args.profile is None else args.profile / "soak.txt"
    with scratch(args.dir) as folder, BufferProcess(configured(folder), profile=profile) as buffer:
        asyncio.run(soak(args, buffer, seen))
    judged = judge_samples(seen.samples) if seen.samples else []
    trees = judge_trees(seen)
    if args.markdown:
        print(report(seen, judged))
    for reason in seen.refused[:10]:
        print(f"refused: {reason}", file=sys.stderr)
    broken = [j["series"] for j in judged if not j["kept"]] + ([] if trees["kept"] else ["trees"])
    if not any(j["series"].startswith("queue.links") for j in judged):
        broken.append("the buffer gave no status of its links' queues")
    say({"verdict": "kept" if not broken else "NOT KEPT", "broken": broken, "series": judged, "trees": trees})
    sys.exit(1 if broken or not judged else 0)


if __name__ == "__main__":
    main()
