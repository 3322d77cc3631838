"""Durable turns a second into the buffer, over its socket, and how long an acknowledgement takes.

Everything on our side is real: a buffer process on a run folder, its journal committed to disk before a turn is
acknowledged, and actors that lease trees and send them turn by turn over real links, each with a window of its own.
Only the generation is missing.  For each size of turn and number of senders:

  flat out   every sender sends as fast as its window lets it.  An acknowledgement then takes about as long as the
             window is deep: it is a measure of how much is under way and not of the way.
  one        one sender, the next turn only once the one before is acknowledged: the way itself, commit included.

Beside them, in the same run: Reverb over gRPC (``--peers DIR`` installs it there), its items one array of as many
bytes, its server in a process of its own and its writers threads; and ``plain``, the reference that this file carries:
the same bytes over one TCP connection into one file, written out before each group is acknowledged.  ``kill -9`` of
each server shows what it keeps of what it has acknowledged.

    .venv/bin/python benchmarks/transport.py [--bytes 4096 16384] [--senders 1 8 64] [--peers DIR] [--markdown]

Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import struct
import sys
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# A script's own folder comes first on the path, and there `buffer.py` would be taken for the package `buffer`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from atpo_async.config import Config
from atpo_async.wire.messages import Lease, TreeOpened
from benchmarks.load import (
    REPLY_S,
    Actor,
    BufferProcess,
    Plan,
    Senders,
    Sent,
    Turns,
    configuration,
    content,
    learner_link,
    plans,
)
from benchmarks.peers import REVERB, Peer, found_or_told, measured
from benchmarks.script import BYTES, add_peers, machine, options, say, scratch, table

PEER_TIMEOUT_S = 600.0
WINDOW = 256
GROUP = 256
"""Messages that the plain reference acknowledges at once."""

Record = dict[str, Any]


# --- ours ------------------------------------------------------------------------------------------------------


def ingest(
    config: Config, *, senders: int, processes: int, turns: int, turn_bytes: int, one_at_a_time: bool = False,
    turns_per_tree: int = 80, profile: Path | None = None,
) -> Record:  # fmt: skip
    """Send about ``turns`` turns in whole trees, and say how fast they were acknowledged."""
    trees = max(1, turns // turns_per_tree // senders)
    with BufferProcess(config, profile=profile) as buffer:
        sent, used, size = asyncio.run(
            _send(buffer, senders, processes, trees, turn_bytes, one_at_a_time, turns_per_tree)
        )
    return {
        "side": "ours",
        "bytes": turn_bytes,
        "senders": senders,
        "mode": "one" if one_at_a_time else "flat out",
        **summary(sent),
        "buffer_us_per_turn": {name: round(1e6 * spent / sent.turns, 1) for name, spent in used.items()},
        "senders_us_per_turn": round(1e6 * sent.cpu_s / sent.turns, 1),
        "journal_bytes": size,
    }


async def _send(
    buffer: BufferProcess, senders: int, processes: int, trees: int, turn_bytes: int, one_at_a_time: bool,
    turns_per_tree: int,
) -> tuple[Sent, dict[str, float], int]:  # fmt: skip
    async with learner_link(buffer):
        made = plans(
            senders, processes, endpoint=buffer.rundir.read_endpoints().actors, run=buffer.run, config=buffer.config,
            trees=trees, turn_bytes=turn_bytes, one_at_a_time=one_at_a_time, turns_per_tree=turns_per_tree,
        )  # fmt: skip
        with Senders(made) as group:
            await asyncio.to_thread(group.wait_ready)
            buffer.end_part()
            before = buffer.usage()
            sent = await asyncio.to_thread(group.go)
            return sent, buffer.usage().cpu_since(before), buffer.journal_bytes


def summary(sent: Sent) -> Record:
    if sent.refused:
        raise SystemExit(f"{sent.refused} messages were refused: this is no measurement")
    seconds = sent.ended_s - sent.began_s
    return {
        "turns": sent.turns,
        "seconds": seconds,
        "turns_per_s": sent.turns / seconds,
        "ack_p50_ms": 1e3 * float(np.percentile(sent.ack_s, 50)),
        "ack_p99_ms": 1e3 * float(np.percentile(sent.ack_s, 99)),
    }


# --- what a kill leaves ----------------------------------------------------------------------------------------


def lost(config: Config, *, turns: int, turn_bytes: int, trees: int = 16) -> Record:
    """``kill -9`` of the buffer while turns come in; what it had acknowledged must be there when it is back."""
    with BufferProcess(config) as buffer:
        return asyncio.run(_lost(buffer, turns, turn_bytes, trees))


async def _lost(buffer: BufferProcess, turns: int, turn_bytes: int, trees: int) -> Record:
    made = Turns(turn_bytes, marked=True)
    name = "sender-0"
    plan = Plan(
        endpoint=buffer.rundir.read_endpoints().actors, run=buffer.run, config=buffer.config, names=(name,), trees=trees
    )
    sent: list[tuple[str, int, int]] = []
    acked = 0
    enough = asyncio.Event()

    def count(handled: int) -> None:
        nonlocal acked
        acked = handled
        if acked >= turns:
            enough.set()

    async with learner_link(buffer), Actor(plan, name, made) as actor:
        actor.link.on_acked = count
        leases: list[Lease] = []
        while len(leases) < trees:
            leases += await actor.lease(trees - len(leases))
        for lease in leases:
            await actor.link.send(
                TreeOpened(run=buffer.run, tree_id=lease.tree_id, lease_epoch=lease.epoch, prompt=made.prompt)
            )

        async def stream() -> None:
            # Without leaves: a tree with two of them would count as finished once its holder is gone.
            for i in range(10 * turns):
                turn = made.turn(buffer.run, leases[i % trees], i // trees + 1, leaf=False)
                sent.append((turn.tree_id, turn.turn_id, content(turn)))
                await actor.link.send(turn)

        streaming = asyncio.create_task(stream())
        async with asyncio.timeout(REPLY_S):
            await enough.wait()
        buffer.kill()
        await asyncio.sleep(0.2)  # acknowledgements that were on their way count
        streaming.cancel()
        await asyncio.gather(streaming, return_exceptions=True)
        acknowledged = sent[: max(acked - trees, 0)]
    began = time.monotonic()
    buffer.start()
    back_s = time.monotonic() - began
    async with learner_link(buffer), Actor(plan, name, made) as actor:
        present: dict[tuple[str, int], int] = {}
        seen: set[str] = set()
        until = time.monotonic() + REPLY_S
        while len(seen) < trees and time.monotonic() < until:
            for lease in await actor.lease(trees):
                if lease.tree_id in {one.tree_id for one in leases}:
                    seen.add(lease.tree_id)
                    present |= {(lease.tree_id, turn.turn_id): content(turn) for turn in lease.committed}
    intact = sum(present.get((tree, turn)) == said for tree, turn, said in acknowledged)
    return {"side": "ours", "bytes": turn_bytes, "acknowledged": len(acknowledged), "present": intact, "back_s": back_s}


# --- the reference ---------------------------------------------------------------------------------------------


def _plain_server(pipe: Connection, path: str) -> None:
    """Appends what comes over one connection to one file, and acknowledges once it is written out."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        loop = asyncio.get_running_loop()
        try:
            while True:
                parts = []
                for _ in range(GROUP):
                    (size,) = struct.unpack("<I", await reader.readexactly(4))
                    parts.append(await reader.readexactly(size))
                os.writev(fd, parts)
                await loop.run_in_executor(None, os.fdatasync, fd)
                writer.write(b"k")
        except asyncio.IncompleteReadError:
            pass
        finally:
            os.close(fd)
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0, limit=1 << 22)
        pipe.send(server.sockets[0].getsockname()[1])
        await asyncio.to_thread(pipe.recv)
        server.close()

    asyncio.run(main())


async def _plain_client(port: int, turns: int, turn_bytes: int) -> Record:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    message = struct.pack("<I", turn_bytes) + np.random.default_rng(0).bytes(turn_bytes)
    groups = turns // GROUP
    sent_at: list[float] = []
    took: list[float] = []
    began = time.perf_counter()

    async def acks() -> None:
        for i in range(groups):
            await reader.readexactly(1)
            took.append(time.perf_counter() - sent_at[i])

    reading = asyncio.create_task(acks())
    for _ in range(groups):
        sent_at.append(time.perf_counter())
        for _ in range(GROUP):
            writer.write(message)
        await writer.drain()
    await reading
    seconds = time.perf_counter() - began
    writer.close()
    return {
        "turns": groups * GROUP,
        "seconds": seconds,
        "turns_per_s": groups * GROUP / seconds,
        "ack_p50_ms": 1e3 * statistics.median(took),
        "ack_p99_ms": 1e3 * float(np.percentile(took, 99)),
    }


def plain(folder: Path, *, turns: int, turn_bytes: int) -> Record:
    """What loopback and the disk allow a Python program that does nothing with what comes."""
    ours, theirs = get_context("spawn").Pipe()
    server = get_context("spawn").Process(target=_plain_server, args=(theirs, str(folder / "plain")), daemon=True)
    server.start()
    try:
        found = asyncio.run(_plain_client(ours.recv(), turns, turn_bytes))
        ours.send("end")
        server.join(5)
    finally:
        server.kill()
        (folder / "plain").unlink(missing_ok=True)
    return {"side": "plain", "bytes": turn_bytes, "senders": 1, "mode": "flat out", **found}


# --- all of it -------------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace, folder: Path, reverb: Peer | None) -> list[Record]:
    records: list[Record] = []

    def note(record: Record | None) -> None:
        if record is not None:
            records.append(record)
            say(record)

    def ours(name: str) -> Config:
        return configuration(
            folder, name=name, links={"window": args.window}, buffer={"journal_sync": not args.no_sync}
        )

    for size in args.bytes:
        turns = args.turns * 4096 // size
        for senders in args.senders:
            for again in range(args.rounds):
                common = {"bytes": size, "senders": senders}
                note(
                    ingest(
                        ours(f"in-{size}-{senders}-{again}"),
                        senders=senders,
                        processes=args.processes,
                        turns=turns,
                        turn_bytes=size,
                        profile=_profile(args.profile, f"{size}-{senders}"),
                    )
                )
                flags = ["--bytes", str(size), "--items", str(turns), "--senders", str(senders)]
                theirs = measured(reverb, ["ingest", *flags, "--in-flight", str(args.window)], timeout_s=PEER_TIMEOUT_S)
                if theirs is not None:
                    note({"side": "reverb", **common, "mode": "flat out", **theirs})
        few = max(turns // 40, 80)
        note(ingest(ours(f"one-{size}"), senders=1, processes=1, turns=few, turn_bytes=size, one_at_a_time=True))
        theirs = measured(
            reverb, ["ingest", "--bytes", str(size), "--items", str(few), "--in-flight", "1"], timeout_s=PEER_TIMEOUT_S
        )
        if theirs is not None:
            note({"side": "reverb", "bytes": size, "senders": 1, "mode": "one", **theirs})
        note(plain(folder, turns=turns, turn_bytes=size))
    size = args.bytes[0]
    note(lost(ours("lost"), turns=args.turns // 10, turn_bytes=size))
    theirs = measured(
        reverb, ["lost", "--bytes", str(size), "--items", str(args.turns // 10)], timeout_s=PEER_TIMEOUT_S
    )
    if theirs is not None:
        note({"side": "reverb", "bytes": size, **theirs})
    return records


def _profile(folder: Path | None, name: str) -> Path | None:
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"ingest-{name}.txt"


def markdown(records: list[Record]) -> str:
    timed = [r for r in records if "turns_per_s" in r]
    rows = [
        (
            r["side"], r["bytes"], r["senders"], r["mode"], r["turns_per_s"], r["ack_p50_ms"], r["ack_p99_ms"],
            ", ".join(f"{name} {us:.0f}" for name, us in r.get("buffer_us_per_turn", {}).items()),
            r.get("senders_us_per_turn", ""),
        )
        for r in timed
    ]  # fmt: skip
    header = (
        "side",
        "bytes",
        "senders",
        "mode",
        "turns/s",
        "ack p50, ms",
        "ack p99, ms",
        "us a turn: the buffer",
        "senders",
    )
    kept = [(r["side"], r["acknowledged"], r["present"]) for r in records if "present" in r]
    return table(header, rows) + "\n\n" + table(("side", "acknowledged before kill -9", "there after it"), kept)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--bytes", type=int, nargs="+", default=[4096, 16384], help=BYTES)
    parser.add_argument("--senders", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--processes", type=int, default=1, help="that the senders are spread over")
    parser.add_argument("--turns", type=int, default=160_000, help="of 4 KB in each case; fewer of larger ones")
    parser.add_argument("--rounds", type=int, default=1, help="both sides in turn, so often")
    parser.add_argument("--window", type=int, default=WINDOW, help="links.window, and Reverb's items in flight")
    add_peers(parser)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    say({"machine": machine(), "window": args.window, "sync": not args.no_sync, "sender_processes": args.processes})
    reverb = found_or_told(REVERB, args.peers)
    with scratch(args.dir) as folder:
        records = compare(args, folder, reverb)
    if args.markdown:
        print(markdown(records))


if __name__ == "__main__":
    main()
