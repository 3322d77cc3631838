"""Whether an actor's event loop stays responsive while very many episodes wait for their tools.

``--episodes`` episodes step at the same time through the actor's own hosting of an environment (``actors/hosting``,
values checked).  Each of their tools takes ``--latency`` seconds: awaited (``asyncio.sleep``), blocking in a thread of
the environment's loop (``asyncio.to_thread(time.sleep)``), or called as a ToolTask calls its functions, async and
plain.  Between two steps an episode waits on the actor's loop for as long as an action would take, ``--action`` seconds
on average; with ``--together`` there is no such wait and all tools of a round end at the same instant, which is the
worst that can happen.

A tick is due every ``--tick`` milliseconds on both loops, the actor's and the environment's; what is stated is how late
ticks were.  A tick that could not run since its loop was busy counts with all that were due meanwhile: a loop that is
blocked for 100 ms makes twenty ticks late, not one.  The same ticks are measured on idle loops first, in the same run,
and all the time in a process of its own that does nothing else, which shows what the machine adds.

    .venv/bin/python benchmarks/concurrent_episodes.py
    .venv/bin/python benchmarks/concurrent_episodes.py --together --markdown

Prints one JSON object a line; the last one says whether the 99th percentile stayed below ``--limit`` milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# A script's own folder comes first on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from actors import interpreter
from actors.hosting.host import HostedEnvironment
from atpo_async.environments.base import ReplayFork, Split, StepResult
from atpo_async.environments.checked import CheckedEnvironment
from atpo_async.environments.tools import running
from atpo_async.environments.values import Limits
from benchmarks.script import machine, say, table

Tool = Callable[[float], Awaitable[None]]

VOCABULARY = 1000


async def awaited(latency_s: float) -> None:
    await asyncio.sleep(latency_s)


async def in_a_thread(latency_s: float) -> None:
    await asyncio.to_thread(time.sleep, latency_s)


async def as_an_async_tool(latency_s: float) -> None:
    await running.run(asyncio.sleep, {"delay": latency_s}, is_async=True, limit_s=60.0, what="the tool")


def blocks(latency_s: float) -> None:
    time.sleep(latency_s)


async def as_a_plain_tool(latency_s: float) -> None:
    await running.run(blocks, {"latency_s": latency_s}, is_async=False, limit_s=60.0, what="the tool")


TOOLS: dict[str, Tool] = {
    "awaited": awaited,
    "to_thread": in_a_thread,
    "async-tool": as_an_async_tool,
    "plain-tool": as_a_plain_tool,
}


@dataclass
class Ticks:
    """Ticks that are due at fixed times on one loop."""

    period_s: float
    late_s: list[float] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    """When each was due."""

    async def run(self) -> None:
        """Waits for: the clock.  Unblocked by: its cancellation."""
        due = time.perf_counter() + self.period_s
        try:
            while True:
                await asyncio.sleep(max(due - time.perf_counter(), 0.0))
                due = self._record(due)
        except asyncio.CancelledError:
            self._record(due)  # those that the loop was too busy for until the end
            raise

    def _record(self, due: float) -> float:
        """Ticks from ``due`` on that are due by now; returns when the next one is."""
        now = time.perf_counter()
        while due <= now:
            self.at.append(due)
            self.late_s.append(now - due)
            due += self.period_s
        return due

    def between(self, since: float, until: float) -> dict[str, float]:
        """Milliseconds."""
        late = np.array([late for at, late in zip(self.at, self.late_s, strict=True) if since <= at < until]) * 1e3
        return {
            "ticks": len(late),
            "p50_ms": round(float(np.quantile(late, 0.5)), 2),
            "p99_ms": round(float(np.quantile(late, 0.99)), 2),
            "max_ms": round(float(late.max()), 2),
        }


class World(ReplayFork):
    """Tasks without end whose tools take ``latency_s``."""

    stop_token_ids = (1,)

    def __init__(self, tool: Tool, latency_s: float, ticks: Ticks, observation_tokens: int) -> None:
        self.tool, self.latency_s = tool, latency_s
        self.running = self.most_running = 0
        self.observation = np.arange(observation_tokens, dtype=np.int64) % VOCABULARY
        self.ticking = asyncio.get_running_loop().create_task(ticks.run())

    def num_tasks(self, split: Split) -> int | None:
        return None

    async def start(self, split: Split, task_index: int) -> Episode:
        return Episode(self)


class Episode:
    def __init__(self, world: World) -> None:
        self.world = world
        self.prompt = np.array([3, 4, 5])

    async def step(self, action: np.ndarray) -> StepResult:
        world = self.world
        world.running += 1
        world.most_running = max(world.most_running, world.running)
        await world.tool(world.latency_s)
        world.running -= 1
        return StepResult(observation=world.observation, done=False, reward=None, success=None, end="continue")

    async def close(self) -> None: ...


async def chain(host: HostedEnvironment, index: int, args: argparse.Namespace) -> None:
    """One episode: its steps, with the time that actions take between them."""
    chance = random.Random(index)
    episode = await host.start("train", index)
    action = np.array([7, 8, 9, 1], dtype=np.int32)
    for _ in range(args.steps):
        if not args.together:
            await asyncio.sleep(chance.uniform(0.0, 2 * args.action))
        await episode.step(action)
    await episode.close()


def tick_alone(pipe: Connection, period_s: float) -> None:
    """A process that only ticks, until it is asked for them."""
    ticks = Ticks(period_s)

    async def main() -> None:
        ticking = asyncio.create_task(ticks.run())
        await asyncio.sleep(0)
        pipe.send("ticking")
        await asyncio.to_thread(pipe.recv)
        ticking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ticking

    asyncio.run(main())
    pipe.send((ticks.at, ticks.late_s))


@contextlib.contextmanager
def ticking_alone(ticks: Ticks) -> Iterator[None]:
    """While the block runs; ``ticks`` holds them afterwards."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=tick_alone, args=(theirs, ticks.period_s))
    process.start()
    theirs.close()
    ours.recv()  # it ticks
    try:
        yield
    finally:
        ours.send("end")
        ticks.at, ticks.late_s = ours.recv()
        process.join()


async def load(host: HostedEnvironment, ticks: Ticks, args: argparse.Namespace) -> tuple[float, float, float]:
    """When the idle loops began, the loaded ones, and when all was over."""
    async with host:
        interpreter.divide_time()
        interpreter.spare_what_is_loaded()
        ticking = asyncio.create_task(ticks.run())
        idle_since = time.perf_counter()
        await asyncio.sleep(args.idle)
        loaded_since = time.perf_counter()
        async with asyncio.TaskGroup() as chains:
            for index in range(args.episodes):
                chains.create_task(chain(host, index, args))
        over = time.perf_counter()
        ticking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ticking
    return idle_since, loaded_since, over


async def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Idle loops first, then loaded ones."""
    here, there, alone = (Ticks(args.tick / 1e3) for _ in range(3))
    worlds: list[World] = []

    def make() -> CheckedEnvironment:
        worlds.append(World(TOOLS[name], args.latency, there, args.observation))
        return CheckedEnvironment(worlds[-1], name="benchmark", limits=Limits(vocab_size=VOCABULARY))

    with ticking_alone(alone), tempfile.TemporaryDirectory(prefix="atpo-bench-") as folder:
        # As in an actor: a file names the call in progress.
        host = HostedEnvironment(make, name="benchmark", step_timeout_s=60.0, doing=Path(folder, "doing"))
        idle_since, loaded_since, over = await load(host, here, args)
    loops = {"actor": here, "environment": there, "another process": alone}
    took_s = over - loaded_since
    own_s = args.steps * args.latency
    return {
        "tools": name,
        "episodes": args.episodes,
        "together": args.together,
        "steps": args.episodes * args.steps,
        "seconds": round(took_s, 2),
        "seconds_of_one_episode": round(own_s + (0 if args.together else args.steps * args.action), 2),
        "calls_per_s": round(args.episodes * (args.steps + 2) / took_s, 1),
        "tools_at_once": worlds[0].most_running,
        "idle": {name: ticks.between(idle_since, loaded_since) for name, ticks in loops.items()},
        "loaded": {name: ticks.between(loaded_since, over) for name, ticks in loops.items()},
    }


def rows(found: list[dict[str, Any]]) -> list[list[Any]]:
    return [
        [f"{one['tools']}, {load}", loop, *(one[load][loop][f"{what}_ms"] for what in ("p50", "p99", "max"))]
        for one in found
        for load in ("idle", "loaded")
        for loop in one[load]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=5, help="of each episode")
    parser.add_argument("--latency", type=float, default=1.0, help="seconds that a tool takes")
    parser.add_argument("--action", type=float, default=0.5, help="seconds between two steps, on average")
    parser.add_argument("--observation", type=int, default=200, help="tokens")
    parser.add_argument("--together", action="store_true", help="no time between steps: all tools end at once")
    parser.add_argument("--idle", type=float, default=3.0, help="seconds of idle loops")
    parser.add_argument("--tick", type=float, default=5.0, help="milliseconds between ticks")
    parser.add_argument("--limit", type=float, default=50.0, help="milliseconds, for the 99th percentile")
    parser.add_argument("--tools", choices=[*TOOLS], nargs="*", default=[*TOOLS])
    parser.add_argument("--markdown", action="store_true", help="a table at the end")
    args = parser.parse_args()
    say({"machine": machine()})
    found = []
    for name in args.tools:
        found.append(asyncio.run(measure(name, args)))
        say(found[-1])
    worst = max(one["loaded"]["actor"]["p99_ms"] for one in found)
    say({"actor_p99_ms": worst, "limit_ms": args.limit, "within": worst < args.limit})
    if args.markdown:
        print(table(["tools", "loop", "p50, ms late", "p99", "max"], rows(found)))


if __name__ == "__main__":
    main()
