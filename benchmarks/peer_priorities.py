"""Prioritized buffers of cpprb and torchrl: how many priorities a second they change, and how that grows with size.

Run by the Python of their own environment; imports nothing of ours.  Indices are drawn by priority outside the timed
part and are then given new priorities in one call, which is what a learner's confirmation does.

    python -I peer_priorities.py cpprb --sizes 1000 10000 --batch 256 --seconds 2

Prints one JSON object: by size, updates/s, and microseconds for one insert, one draw of 64, one update.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def rate(prepare: Callable[[], Any], work: Callable[[Any], object], seconds: float) -> float:
    """Calls/s of ``work`` alone, on what ``prepare`` made."""
    for _ in range(20):
        work(prepare())
    calls, spent = 0, 0.0
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or not calls:
        given = prepare()
        began = time.perf_counter()
        work(given)
        spent += time.perf_counter() - began
        calls += 1
    return calls / spent


def figures(
    insert: Callable[[], None],
    draw: Callable[[int], Any],
    update: Callable[[Any, Any], None],
    *,
    batch: int,
    seconds: float,
    rng: np.random.Generator,
) -> dict[str, float]:
    updates = rate(lambda: (draw(batch), rng.random(batch) + 0.01), lambda given: update(*given), seconds)
    return {
        "updates_per_s": updates * batch,
        "update_us": 1e6 / updates,
        "draw64_us": 1e6 / rate(lambda: None, lambda _: draw(64), seconds),
        "insert_us": 1e6 / rate(lambda: None, lambda _: insert(), seconds),
    }


def with_cpprb(size: int, batch: int, seconds: float, rng: np.random.Generator) -> dict[str, float]:
    import cpprb

    pool = cpprb.PrioritizedReplayBuffer(size, {"tree": {"dtype": np.int64}}, alpha=0.6)
    pool.add(tree=np.arange(size), priorities=rng.random(size) + 0.01)
    return figures(
        lambda: pool.add(tree=0, priorities=0.5),
        lambda count: pool.sample(count, beta=0.4)["indexes"],
        pool.update_priorities,
        batch=batch,
        seconds=seconds,
        rng=rng,
    )


def with_torchrl(size: int, batch: int, seconds: float, rng: np.random.Generator) -> dict[str, float]:
    import torch
    from torchrl.data import LazyTensorStorage, PrioritizedSampler, ReplayBuffer

    torch.set_num_threads(1)
    sampler = PrioritizedSampler(size, alpha=0.6, beta=0.4)
    pool = ReplayBuffer(storage=LazyTensorStorage(size), sampler=sampler, batch_size=batch)
    pool.extend(torch.arange(size))
    pool.update_priority(torch.arange(size), torch.from_numpy((rng.random(size) + 0.01).astype(np.float32)))
    one = torch.tensor(0)
    return figures(
        lambda: pool.add(one),
        lambda count: pool.sample(count, return_info=True)[1]["index"],
        lambda index, priority: pool.update_priority(index, torch.from_numpy(priority.astype(np.float32))),
        batch=batch,
        seconds=seconds,
        rng=rng,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=["cpprb", "torchrl"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=1.0)
    args = parser.parse_args()
    measure = {"cpprb": with_cpprb, "torchrl": with_torchrl}[args.library]
    print(
        json.dumps({str(n): measure(n, args.batch, args.seconds, np.random.default_rng(0)) for n in args.sizes}),
        flush=True,
    )


if __name__ == "__main__":
    main()
