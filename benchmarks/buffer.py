"""What the buffer serves to a learner, and what its priorities cost.

  serve     whole trees from a real buffer process over its socket, each turn decoded into arrays and looked at by the
            learner: ``plain``, one request after another, and ``ahead``, the next batch asked for before this one is
            looked at.  The trees come in over the socket first and lie in the journal on disk.
  updates   priorities a second, in batches: what the confirmation of a batch does to the pool (``ReplayPool.confirm``,
            trees by name), and what of it is the sum tree alone.
  growth    one insert, draw of 64, update of 256 and eviction with 1,000 to 1,000,000 trees in the pool.
  ageing    with ``buffer.freshness`` below 1: the first draw of 64 at a version, when all trees are weighed anew, and
            one after it.

Peers, each in an environment of its own (``--peers DIR`` installs them there): Reverb for serving, cpprb and torchrl
for priorities.  References that this file carries: for serving a process that writes trees out of a mapped numpy file
into a TCP connection, for priorities a sum tree in numpy.  Neither knows of acknowledgement, versions or uses.

    .venv/bin/python benchmarks/buffer.py [--part serve updates growth ageing] [--trees 10000] [--peers DIR]
        [--markdown]

Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# A script's own folder comes first on the path, and there this file would be taken for the package `buffer`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray

from atpo_async.core.tree import Turn
from atpo_async.links.client import Client
from atpo_async.wire.messages import Batch, Lease, SampleRequest, Trained
from atpo_async.wire.records import TurnRecords
from benchmarks.load import REPLY_S, BufferProcess, Senders, Turns, configuration, learner_link, plans
from benchmarks.peer_priorities import rate
from benchmarks.peers import CPPRB, REVERB, TORCHRL, found_or_told, measured
from benchmarks.script import BYTES, add_peers, machine, options, say, scratch, table
from buffer.pool.pool import ReplayPool
from buffer.pool.sum_tree import SumTree
from buffer.trees.index import MemoryStore, TreeEntry, entry_from_turns

PARTS = ("serve", "updates", "growth", "ageing")
PEER_TIMEOUT_S = 900.0
USES = 1000
"""Far more than a run of this benchmark makes: no tree is ever used up."""
WARM_BATCHES = 5
EXPONENT = 0.6

Record = dict[str, Any]


# --- serving ---------------------------------------------------------------------------------------------------


def look(turn: Turn) -> float:
    """What a learner at least does with a turn: its arrays are there."""
    return float(turn.logprobs[-1]) + int(turn.action[-1]) + int(turn.observation[-1])


def serve(args: argparse.Namespace, folder: Path) -> list[Record]:
    config = configuration(
        folder,
        name="serve",
        staleness={"max_uses": USES, "max_lag": 10**6},
        learner={"checkpoint_every": 1},
        buffer={"journal_sync": not args.no_sync},
    )
    if args.profile is not None:
        args.profile.mkdir(parents=True, exist_ok=True)
    profile = None if args.profile is None else args.profile / "serve.txt"
    with BufferProcess(config, profile=profile) as buffer:
        return asyncio.run(_serve(args, buffer))


async def _serve(args: argparse.Namespace, buffer: BufferProcess) -> list[Record]:
    async with learner_link(buffer) as link:
        filled = await _fill(args, buffer)
        buffer.end_part()
        learner = Learner(link, buffer.run)
        records: list[Record] = [filled]
        for batch in args.batches:
            for mode in ("plain", "ahead"):
                await learner.read(WARM_BATCHES, batch, ahead=mode == "ahead")
                before, began, cpu = buffer.usage(), time.perf_counter(), time.process_time()
                turns = 0
                waits: list[float] = []
                while time.perf_counter() - began < args.seconds:
                    more, took = await learner.read(10, batch, ahead=mode == "ahead")
                    turns, waits = turns + more, waits + took
                seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
                usage = buffer.usage()
                records.append(
                    {
                        "part": "serve",
                        "side": "ours",
                        "mode": mode,
                        "trees": args.trees,
                        "batch": batch,
                        "turns_per_s": turns / seconds,
                        "batch_p50_ms": 1e3 * float(np.percentile(waits, 50)),
                        "batch_p99_ms": 1e3 * float(np.percentile(waits, 99)),
                        "buffer_us_per_turn": {
                            name: round(1e6 * spent / turns, 1) for name, spent in usage.cpu_since(before).items()
                        },
                        "learner_us_per_turn": round(1e6 * cpu / turns, 1),
                        "buffer_private_bytes": usage.private_bytes,
                    }
                )
                say(records[-1])
        return records


async def _fill(args: argparse.Namespace, buffer: BufferProcess) -> Record:
    """``args.trees`` trees into the buffer, over its socket."""
    senders = min(8, args.trees)
    made = plans(
        senders, 1, endpoint=buffer.rundir.read_endpoints().actors, run=buffer.run, config=buffer.config,
        trees=-(-args.trees // senders), warm_trees=0, turns_per_tree=args.turns, turn_bytes=args.bytes,
    )  # fmt: skip
    with Senders(made) as group:
        await asyncio.to_thread(group.wait_ready)
        sent = await asyncio.to_thread(group.go)
    record = {
        "part": "fill",
        "side": "ours",
        "turns": sent.turns,
        "turns_per_s": sent.turns / (sent.ended_s - sent.began_s),
        "journal_bytes": buffer.journal_bytes,
        "buffer_private_bytes": buffer.usage().private_bytes,
    }
    say(record)
    return record


class Learner:
    """Takes batches, looks at every turn, and confirms them with new priorities."""

    def __init__(self, link: Client, run: str) -> None:
        self._link = link
        self._run = run
        self._step = 0
        self._rng = np.random.default_rng(0)

    async def _ask(self, step: int, trees: int) -> tuple[Batch, float]:
        request = SampleRequest(
            run=self._run, rank=0, num_ranks=1, step=step, version=step, num_trees=trees, wait_s=30.0
        )
        began = time.perf_counter()
        batch = await self._link.request(request, timeout_s=REPLY_S)
        if not isinstance(batch, Batch):
            raise SystemExit(f"the learner asked for {trees} trees and got {batch}")
        return batch, time.perf_counter() - began

    async def read(self, batches: int, trees: int, *, ahead: bool) -> tuple[int, list[float]]:
        """(turns looked at, seconds that each batch took from request to reply)."""
        turns, waits = 0, []
        coming = asyncio.create_task(self._ask(self._step, trees)) if ahead else None
        for i in range(batches):
            batch, took = await (coming if coming is not None else self._ask(self._step, trees))
            self._step += 1
            if ahead:
                coming = asyncio.create_task(self._ask(self._step, trees)) if i + 1 < batches else None
                await asyncio.sleep(0)  # the request leaves before the batch is looked at
            waits.append(took)
            if len(batch.trees) != trees:
                raise SystemExit(f"a batch has {len(batch.trees)} trees; expected {trees}")
            for tree in batch.trees:
                for turn in tree.turns:
                    look(turn)
                turns += len(tree.turns)
            priorities = dict(zip((t.tree_id for t in batch.trees), self._rng.random(trees).tolist(), strict=True))
            await self._link.send(
                Trained(run=self._run, batch_id=batch.batch_id, version=self._step, priorities=priorities)
            )
        return turns, waits


def _mapped_server(pipe: Connection, path: str, trees: int, turns: int, words: int) -> None:
    """Writes trees that are asked for by number out of a mapped file."""
    rng = np.random.default_rng(0)
    kept = np.memmap(path, mode="w+", dtype=np.int32, shape=(trees, turns, words))
    for i in range(trees):
        kept[i] = rng.integers(0, 150_000, (turns, words), dtype=np.int32)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                count = int.from_bytes(await reader.readexactly(4), "little")
                for number in np.frombuffer(await reader.readexactly(4 * count), dtype=np.int32).tolist():
                    writer.write(memoryview(kept[number]).cast("B"))
                await writer.drain()
        except asyncio.IncompleteReadError:
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await asyncio.to_thread(pipe.recv)
        server.close()

    asyncio.run(main())


async def _mapped_client(port: int, args: argparse.Namespace, batch: int) -> float:
    words = args.bytes // 4
    rng = np.random.default_rng(1)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    got, began = 0, time.perf_counter()
    while time.perf_counter() - began < args.seconds:
        writer.write(batch.to_bytes(4, "little") + rng.integers(0, args.trees, batch).astype(np.int32).tobytes())
        for _ in range(batch):
            data = await reader.readexactly(args.turns * args.bytes)
            for turn in np.frombuffer(data, dtype=np.int32).reshape(args.turns, words):
                int(turn[-1])
            got += args.turns
    seconds = time.perf_counter() - began
    writer.close()
    return got / seconds


def mapped(args: argparse.Namespace, folder: Path) -> list[Record]:
    """What loopback and numpy allow a program that knows nothing of what it serves."""
    ours, theirs = get_context("spawn").Pipe()
    path = folder / "trees"
    server = get_context("spawn").Process(
        target=_mapped_server, args=(theirs, str(path), args.trees, args.turns, args.bytes // 4), daemon=True
    )
    server.start()
    records = []
    try:
        port = ours.recv()
        for batch in args.batches:
            rate = asyncio.run(_mapped_client(port, args, batch))
            records.append(
                {"part": "serve", "side": "numpy file", "mode": "plain", "batch": batch, "turns_per_s": rate}
            )
            say(records[-1])
        ours.send("end")
        server.join(5)
    finally:
        server.kill()
        path.unlink(missing_ok=True)
    return records


def reverb_serves(args: argparse.Namespace) -> list[Record]:
    peer = found_or_told(REVERB, args.peers)
    records = []
    for kind, flags in (("a tree an item", []), ("a turn an item", ["--single"])):
        found = measured(
            peer,
            [
                "sample", "--trees", str(args.trees), "--turns", str(args.turns), "--bytes", str(args.bytes),
                "--seconds", str(args.seconds), "--batches", *map(str, args.batches), *flags,
            ],
            timeout_s=PEER_TIMEOUT_S,
        )  # fmt: skip
        for batch in args.batches if found is not None else ():
            assert found is not None
            for mode in ("plain", "fastest"):
                rate = found[f"{mode}_{batch}"]
                records.append(
                    {
                        "part": "serve", "side": f"Reverb, {kind}", "mode": mode, "batch": batch, "turns_per_s": rate,
                        "all": {name: round(value) for name, value in found.items() if f"_{batch}" in name},
                    }
                )  # fmt: skip
                say(records[-1])
    return records


# --- priorities ------------------------------------------------------------------------------------------------


class NumpyPriorities:
    """The reference: a sum tree over a fixed number of priorities, and nothing else."""

    def __init__(self, size: int) -> None:
        self._size = 1 << max(size - 1, 1).bit_length()
        self._nodes = np.zeros(2 * self._size)
        self._levels = self._size.bit_length() - 1

    def update(self, indices: NDArray[np.int64], priorities: NDArray[np.float64]) -> None:
        nodes = indices + self._size
        self._nodes[nodes] = priorities**EXPONENT
        for _ in range(self._levels):
            nodes = nodes >> 1  # twice the same node is the same sum twice
            self._nodes[nodes] = self._nodes[2 * nodes] + self._nodes[2 * nodes + 1]

    def draw(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        target = (np.arange(count) + rng.random(count)) / count * self._nodes[1]
        node = np.ones(count, dtype=np.int64)
        for _ in range(self._levels):
            left = self._nodes[2 * node]
            right = target >= left
            target = np.where(right, target - left, target)
            node = 2 * node + right
        return node - self._size


class Pool:
    """A real ``ReplayPool`` with so many trees of so many turns; their entries share one array, which no cost sees."""

    def __init__(self, size: int, *, turns: int = 80, freshness: float = 1.0) -> None:
        self.pool = ReplayPool(max_uses=10**9, max_lag=10**9, exponent=EXPONENT, freshness=freshness)
        self._rng = np.random.default_rng(0)
        made, store = Turns(64), MemoryStore()
        lease = Lease(
            tree_id="t", task_index=0, kind="train", epoch=0, lifetime_s=1.0, min_version=0, seed=0,
            committed=TurnRecords.of(()),
        )  # fmt: skip
        grown = [made.turn("r", lease, i) for i in range(1, turns + 1)]
        self._one = entry_from_turns("t", 0, made.prompt, grown, store)
        self._next = 0
        for _ in range(size):
            self.insert()
        self._forget()

    def _forget(self) -> None:
        """The pool's owner takes these away after every message."""
        self.pool.drain_changes()

    def insert(self) -> None:
        """Every second tree has been served before."""
        one, number = self._one, self._next
        self._next += 1
        tree = TreeEntry(f"b1-{number:08d}", number, number, one.prompt, one.rows)
        self.pool.add(tree, priority=float(self._rng.random()), uses=number % 2)
        self._forget()

    def evict(self) -> None:
        self.pool.shrink(self.pool.nbytes, len(self.pool) - 1)
        self._forget()

    def draw(self, count: int) -> list[str]:
        return [drawn.tree.tree_id for drawn in self.pool.draw(count, rng=self._rng, beta=0.4)]

    def give_back(self, names: list[str]) -> None:
        self.pool.give_back(names)
        self._forget()

    def to_confirm(self, count: int) -> tuple[list[str], dict[str, float]]:
        names = self.draw(count)
        return names, dict(zip(names, self._rng.random(count).tolist(), strict=True))

    def confirm(self, given: tuple[list[str], dict[str, float]]) -> None:
        self.pool.confirm(*given)
        self._forget()


def ours_by_size(size: int, batch: int, seconds: float) -> Record:
    """Microseconds of each operation on a pool of ``size`` trees."""
    pool = Pool(size)
    updates = rate(lambda: pool.to_confirm(batch), pool.confirm, seconds)
    drawn: list[list[str]] = []

    def back() -> None:
        if drawn:
            pool.give_back(drawn.pop())

    draws = rate(back, lambda _: drawn.append(pool.draw(64)), seconds)
    back()

    # Alternately, so that the number of trees stays the same.
    def one_less() -> None:
        if len(pool.pool) > size:
            pool.evict()

    inserts = rate(one_less, lambda _: pool.insert(), seconds)
    evictions = rate(pool.insert, lambda _: pool.evict(), seconds)
    return {
        "updates_per_s": updates * batch,
        "update_us": 1e6 / updates,
        "draw64_us": 1e6 / draws,
        "insert_us": 1e6 / inserts,
        "evict_us": 1e6 / evictions,
    }


def ageing_by_size(size: int, seconds: float) -> Record:
    """Microseconds of a draw of 64 from trees whose priorities age: the first at a version, and a later one."""
    pool = Pool(size, freshness=0.999)
    drawn: list[list[str]] = []
    version = 0

    def back() -> None:
        if drawn:
            pool.give_back(drawn.pop())

    def one_on() -> None:
        nonlocal version
        back()
        version += 1
        pool.pool.advance(version)

    def draw(_: None) -> None:
        drawn.append(pool.draw(64))

    first = rate(one_on, draw, seconds)
    later = rate(back, draw, seconds)
    return {"part": "ageing", "side": "ours", "trees": size, "first_draw64_us": 1e6 / first, "draw64_us": 1e6 / later}


def sums_by_size(size: int, batch: int, seconds: float) -> Record:
    """The pool's sum tree alone, by index."""
    rng = np.random.default_rng(0)
    sums = SumTree(size)
    sums.set(np.arange(size), rng.random(size))
    updates = rate(
        lambda: (rng.choice(size, batch, replace=False), rng.random(batch)), lambda given: sums.set(*given), seconds
    )
    return {"updates_per_s": updates * batch, "update_us": 1e6 / updates}


def numpy_by_size(size: int, batch: int, seconds: float) -> Record:
    rng = np.random.default_rng(0)
    pool = NumpyPriorities(size)
    pool.update(np.arange(size), rng.random(size))
    updates = rate(lambda: (pool.draw(batch, rng), rng.random(batch)), lambda given: pool.update(*given), seconds)
    draws = rate(lambda: None, lambda _: pool.draw(64, rng), seconds)
    return {"updates_per_s": updates * batch, "update_us": 1e6 / updates, "draw64_us": 1e6 / draws}


def priorities(args: argparse.Namespace, sizes: list[int], part: str) -> list[Record]:
    records: list[Record] = []
    sides = {
        "ours": ours_by_size,
        "ours, the sum tree alone": sums_by_size,
        "numpy reference": numpy_by_size,
    }
    for side, measure in sides.items():
        for size in sizes:
            records.append({"part": part, "side": side, "trees": size, **measure(size, args.updates, args.seconds)})
            say(records[-1])
    for peer in (CPPRB, TORCHRL):
        flags = ["--batch", str(args.updates), "--seconds", str(args.seconds), "--sizes", *map(str, sizes)]
        found = measured(found_or_told(peer, args.peers), [peer.name, *flags], timeout_s=PEER_TIMEOUT_S)
        for trees, figures in (found or {}).items():
            records.append({"part": part, "side": peer.name, "trees": int(trees), **figures})
            say(records[-1])
    return records


def verdict(records: list[Record]) -> list[Record]:
    """Of each operation, what it costs with the most trees over what it costs with the fewest.

    Logarithmic at most means that this is at most what the logarithm itself has grown by, log2(most) / log2(fewest);
    ``over_log`` is the quotient of the two.  Counted in steps ours is that by construction; in time a tree that has
    outgrown the processor's caches costs more a step, the reference's too, so its quotient stands beside ours.
    ``power`` is p where the cost grows as N^p: 0 where it is constant, 1 where it is linear.
    """
    found: list[Record] = []
    for side in dict.fromkeys(r["side"] for r in records if r["part"] == "growth"):
        mine = sorted(
            (r for r in records if r["part"] == "growth" and r["side"] == side), key=lambda r: int(r["trees"])
        )
        few, most = mine[0], mine[-1]
        if few["trees"] == most["trees"]:
            continue
        allowed = math.log2(most["trees"]) / math.log2(few["trees"])
        for name in (n for n in few if n.endswith("_us")):
            ratio = most[name] / few[name]
            found.append(
                {
                    "part": "verdict", "side": side, "operation": name.removesuffix("_us"), "few": few["trees"],
                    "most": most["trees"], "ratio": ratio, "log_ratio": allowed, "over_log": ratio / allowed,
                    "power": math.log(ratio) / math.log(most["trees"] / few["trees"]),
                }
            )  # fmt: skip
            say(found[-1])
    return found


# --- all of it -------------------------------------------------------------------------------------------------


def markdown(records: list[Record]) -> str:
    parts = []
    served = [r for r in records if r["part"] == "serve"]
    if served:
        header = (
            "side", "mode", "trees a batch", "turns/s", "batch p50, ms", "p99, ms", "us a turn: the buffer", "learner",
        )  # fmt: skip
        rows = [
            (
                r["side"], r["mode"], r["batch"], r["turns_per_s"], r.get("batch_p50_ms", ""),
                r.get("batch_p99_ms", ""),
                ", ".join(f"{name} {us:.0f}" for name, us in r.get("buffer_us_per_turn", {}).items()),
                r.get("learner_us_per_turn", ""),
            )
            for r in served
        ]  # fmt: skip
        parts.append(table(header, rows))
    for part in ("updates", "growth"):
        names = ("updates_per_s", "insert_us", "draw64_us", "update_us", "evict_us")
        rows_ = [(r["side"], r["trees"], *(r.get(n, "") for n in names)) for r in records if r["part"] == part]
        if rows_:
            parts.append(
                table(("side", "trees", "updates/s", "insert, us", "draw 64, us", "update, us", "evict, us"), rows_)
            )
    ages = [(r["trees"], r["first_draw64_us"], r["draw64_us"]) for r in records if r["part"] == "ageing"]
    if ages:
        parts.append(table(("trees", "first draw of 64 at a version, us", "a later one, us"), ages))
    verdicts = [
        (r["side"], r["operation"], r["ratio"], r["log_ratio"], r["over_log"], r["power"])
        for r in records
        if r["part"] == "verdict"
    ]
    if verdicts:
        parts.append(table(("side", "operation", "most over fewest", "of the logarithm", "over it", "power"), verdicts))
    return "\n\n".join(parts)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--trees", type=int, default=10_000, help="in the buffer while it serves")
    parser.add_argument("--turns", type=int, default=80, help="of a tree")
    parser.add_argument("--bytes", type=int, default=4096, help=BYTES)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 64], help="trees of a batch")
    parser.add_argument("--updates", type=int, default=256, help="priorities changed at once")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    add_peers(parser)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    say({"machine": machine(), "sync": not args.no_sync})
    records: list[Record] = []
    if "serve" in args.part:
        with scratch(args.dir) as folder:
            records += serve(args, folder)
        with scratch(args.dir) as folder:
            records += mapped(args, folder)
        records += reverb_serves(args)
    if "updates" in args.part:
        records += priorities(args, [args.trees], "updates")
    if "growth" in args.part:
        records += priorities(args, args.sizes, "growth")
        records += verdict(records)
    if "ageing" in args.part:
        for size in args.sizes:
            records.append(ageing_by_size(size, args.seconds))
            say(records[-1])
    if args.markdown:
        print(markdown(records))


if __name__ == "__main__":
    main()
