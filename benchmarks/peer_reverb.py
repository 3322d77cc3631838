"""Reverb's side of the buffer's benchmarks.  Run by the Python of Reverb's own environment; imports nothing of ours.

Its server is a process of its own, so that everything crosses gRPC, as ours crosses a socket.

  ingest   items of one int32 array each from a number of writers; a writer is a thread with a client of its own
  lost     items confirmed before ``kill -9`` of the server, and how many are there after it is started again
  sample   trees of a number of turns, drawn by priority and looked at in the reader, in its ways of reading

Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import reverb

TABLE = "turns"
VOCABULARY = 150_000
FLUSH_EVERY = 64
NEVER_FULL = 10**9


# --- the server ------------------------------------------------------------------------------------------------


def serve(args: argparse.Namespace) -> None:
    """A server until the other end of stdin is gone."""
    table = reverb.Table(
        name=TABLE,
        sampler=reverb.selectors.Prioritized(0.6),
        remover=reverb.selectors.Fifo(),
        max_size=NEVER_FULL,
        rate_limiter=reverb.rate_limiters.MinSize(1),
    )
    server = reverb.Server([table], port=args.port)
    print("ready", flush=True)
    sys.stdin.read()
    server.stop()


def hold_port() -> socket.socket:
    """Bound to a free port and not listening.  Reverb does not report a port that it took itself; gRPC binds with
    SO_REUSEPORT, so it may take this one, also after a kill, and no other process is given it meanwhile."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind(("", 0))
    return holder


class ServerProcess:
    """``serve`` in a process of its own."""

    def __init__(self) -> None:
        self._holder = hold_port()
        self.port = int(self._holder.getsockname()[1])
        self.address = f"127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", __file__, "serve", "--port", str(self.port)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            raise SystemExit(f"reverb's server did not start on port {self.port}")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._holder.close()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


# --- writing ---------------------------------------------------------------------------------------------------


def arrays(num_bytes: int, *, of: int = 1024) -> list[Any]:
    """Arrays like the bytes of a turn: three quarters token ids, a quarter log-probs.

    So many that no chunk holds one twice: the server compresses what it keeps.
    """
    rng = np.random.default_rng(0)
    words = num_bytes // 4
    tokens = words - words // 4
    return [
        np.concatenate(
            [
                rng.integers(0, VOCABULARY, tokens).astype(np.int32),
                -rng.exponential(1.0, words - tokens).astype(np.float32).view(np.int32),
            ]
        )
        for _ in range(of)
    ]


def write(address: str, data: list[Any], items: int, in_flight: int, go: threading.Event, into: list[Any]) -> None:
    """One writer.  ``into`` gets its confirmation times in seconds, each an upper bound: a flush tells of many."""
    client = reverb.Client(address)
    every = min(FLUSH_EVERY, in_flight)
    took: list[float] = []
    began: list[float] = []
    confirmed = 0
    with client.trajectory_writer(num_keep_alive_refs=1) as writer:
        go.wait()
        for i in range(items):
            began.append(time.perf_counter())
            writer.append([data[i % len(data)]])
            writer.create_item(TABLE, priority=1.0, trajectory=[writer.history[0][-1:]])
            if (i + 1) % every == 0 or i + 1 == items:
                left = 0 if i + 1 == items else in_flight - every
                writer.flush(block_until_num_items=left)
                now = time.perf_counter()
                while confirmed < i + 1 - left:
                    took.append(now - began[confirmed])
                    confirmed += 1
    into.append(took)


def ingest(args: argparse.Namespace) -> dict[str, Any]:
    with ServerProcess() as server:
        data = arrays(args.bytes)

        def all_of(items: int) -> tuple[float, list[float]]:
            go = threading.Event()
            into: list[Any] = []
            threads = [
                threading.Thread(
                    target=write,
                    args=(server.address, data, items // args.senders, args.in_flight, go, into),
                    daemon=True,
                )
                for _ in range(args.senders)
            ]
            for thread in threads:
                thread.start()
            time.sleep(0.5)  # connections first
            began = time.perf_counter()
            go.set()
            for thread in threads:
                thread.join()
            return time.perf_counter() - began, [t for took in into for t in took]

        all_of(max(args.items // 20, args.senders))
        seconds, took = all_of(args.items)
        each = args.items // args.senders * args.senders
        return {
            "turns_per_s": each / seconds,
            "ack_p50_ms": 1e3 * float(np.percentile(took, 50)),
            "ack_p99_ms": 1e3 * float(np.percentile(took, 99)),
            "turns": each,
        }


def lost(args: argparse.Namespace) -> dict[str, Any]:
    with ServerProcess() as server:
        go = threading.Event()
        into: list[Any] = []
        go.set()
        write(server.address, arrays(args.bytes), args.items, 256, go, into)
        confirmed = len(into[0])
        server.kill()
        server.start()
        info = reverb.Client(server.address).server_info(timeout=30)
        return {"acknowledged": confirmed, "present": info[TABLE].current_size}


# --- reading ---------------------------------------------------------------------------------------------------


def fill(address: str, data: list[Any], trees: int, turns: int, *, whole: bool) -> None:
    """``trees`` of ``turns``; an item is a tree, or a turn."""
    client = reverb.Client(address)
    with client.trajectory_writer(num_keep_alive_refs=turns) as writer:
        for i in range(trees):
            for j in range(turns):
                writer.append([data[(i * turns + j) % len(data)]])
                if not whole:
                    writer.create_item(TABLE, priority=1.0, trajectory=[writer.history[0][-1:]])
            if whole:
                writer.create_item(TABLE, priority=1.0, trajectory=[writer.history[0][-turns:]])
            writer.flush(block_until_num_items=64)


def look(array: Any) -> int:
    """What a reader at least does with a turn: its bytes are there, in an array."""
    return int(array.ravel()[-1])


def read_plain(address: str, batch: int, turns: int, seconds: float) -> float:
    """Turns/s over ``Client.sample``, whole trees."""
    client = reverb.Client(address)
    got, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for sample in client.sample(TABLE, num_samples=batch, emit_timesteps=False):
            for turn in sample.data[0].reshape(turns, -1):
                look(turn)
                got += 1
    return got / (time.perf_counter() - began)


def read_dataset(address: str, batch: int, turns: int, words: int, seconds: float, *, workers: int) -> float:
    """Turns/s over ``TrajectoryDataset`` with prefetching workers, whole trees, in batches."""
    import tensorflow as tf

    made = reverb.TrajectoryDataset(
        server_address=address, table=TABLE, dtypes=[tf.int32], shapes=[tf.TensorShape([turns, words])],
        max_in_flight_samples_per_worker=2 * batch, num_workers_per_iterator=workers,
    )  # fmt: skip
    batches = iter(made.map(lambda sample: sample.data[0]).batch(batch).prefetch(2))
    next(batches)
    got, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for turn in next(batches).numpy().reshape(batch * turns, -1):
            look(turn)
            got += 1
    return got / (time.perf_counter() - began)


def read_timesteps(address: str, batch: int, turns: int, words: int, seconds: float, *, workers: int) -> float:
    """Turns/s over ``TimestepDataset``: turns of whole trees, one after another, in batches of as many."""
    import tensorflow as tf

    made = reverb.TimestepDataset(
        server_address=address, table=TABLE, dtypes=[tf.int32], shapes=[tf.TensorShape([words])],
        max_in_flight_samples_per_worker=2 * batch, num_workers_per_iterator=workers,
    )  # fmt: skip
    batches = iter(made.map(lambda sample: sample.data[0]).batch(batch * turns).prefetch(2))
    next(batches)
    got, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for turn in next(batches).numpy():
            look(turn)
            got += 1
    return got / (time.perf_counter() - began)


def sample(args: argparse.Namespace) -> dict[str, Any]:
    data = arrays(args.bytes)
    words = args.bytes // 4
    found: dict[str, Any] = {}
    with ServerProcess() as server:
        # What is drawn: whole trees, or as many turns one by one.
        turns = 1 if args.single else args.turns
        fill(server.address, data, args.trees, args.turns, whole=not args.single)
        for trees in args.batches:
            batch = trees * args.turns // turns
            found[f"plain_{trees}"] = read_plain(server.address, batch, turns, args.seconds)
            for name, read in (("trajectories", read_dataset), ("timesteps", read_timesteps)):
                for workers in (1, 2, 4):
                    rate = read(server.address, batch, turns, words, args.seconds, workers=workers)
                    found[f"{name}_{trees}_workers{workers}"] = rate
            found[f"fastest_{trees}"] = max(v for k, v in found.items() if f"_{trees}_" in k)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("serve", "ingest", "lost", "sample"):
        command = commands.add_parser(name)
        command.add_argument("--port", type=int, default=0)
        command.add_argument("--bytes", type=int, default=4096)
        command.add_argument("--items", type=int, default=20_000)
        command.add_argument("--senders", type=int, default=1)
        command.add_argument("--in-flight", type=int, default=256)
        command.add_argument("--trees", type=int, default=1000)
        command.add_argument("--turns", type=int, default=80)
        command.add_argument("--batches", type=int, nargs="+", default=[8, 64])
        command.add_argument("--single", action="store_true", help="items are turns and not trees")
        command.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    if args.command == "serve":
        serve(args)
        return
    found = {"ingest": ingest, "lost": lost, "sample": sample}[args.command](args)
    print(json.dumps(found), flush=True)
    os._exit(0)  # TensorFlow's threads may keep a finished reader alive


if __name__ == "__main__":
    main()
