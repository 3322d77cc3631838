"""Simulated actors by the hundred: a few processes, each with many on its event loop, told what to do over a pipe."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

from atpo_async.config import Config
from benchmarks.fleet_parts.actors import ActorPlan, ActorResult, SimulatedActor
from benchmarks.load import Turns

MOST_CONNECTING = 64
"""Actors of one process that introduce themselves at a time."""
LINK_FILES = 12
"""Descriptors that the link of one actor takes, generously."""


@dataclass(frozen=True, kw_only=True)
class FleetPlan:
    """What the actors of one process do."""

    endpoint: str
    run: str
    config: Config
    actors: tuple[ActorPlan, ...]
    turn_bytes: int = 4096
    direct: bool = True
    """Where the buffer has shards, actors send turns straight to them."""
    equal_shares: bool = False
    """Each actor is given as many trees as the slowest one takes, however fast it is."""


@dataclass(kw_only=True)
class Marked:
    """Counted in one process since the mark before."""

    at_s: float
    turns: int
    lease_s: list[float]
    cpu_s: float
    refused: int
    acked: list[str]
    """Actors of which anything was acknowledged."""


ABSENT = 1 << 30
"""As a number of trees begun: of an actor that is not there."""


class Shared:
    """What all actors of a fleet see: the version that is published, and how many trees each has begun."""

    def __init__(self, number: int) -> None:
        context = get_context("spawn")
        self.version: Any = context.Value("i", 0)
        self.begun: Any = context.Array("i", number)


async def _actors(plan: FleetPlan, shared: Shared, numbers: Sequence[int], pipe: Connection) -> list[ActorResult]:
    made = Turns(plan.turn_bytes)
    connecting = asyncio.Semaphore(MOST_CONNECTING)
    started = asyncio.Event()
    actors: list[SimulatedActor] = []
    all_there = asyncio.Event()
    there = 0

    def is_there() -> None:
        nonlocal there
        there += 1
        if there == len(plan.actors):
            all_there.set()

    def may_lease(number: int, slots: int) -> Callable[[ActorResult], int]:
        def most(result: ActorResult) -> int:
            begun = shared.begun.get_obj()
            return int(min(begun)) + slots - int(begun[number])

        return most

    async def one(each: ActorPlan, number: int) -> ActorResult:
        begun = shared.begun.get_obj()
        if each.joins_s:
            begun[number] = ABSENT
            is_there()
            await started.wait()
            await asyncio.sleep(each.joins_s)
            begun[number] = min(begun)
        actor = SimulatedActor(
            each, endpoint=plan.endpoint, run=plan.run, config=plan.config, turns=made,
            version=lambda: int(shared.version.value), direct=plan.direct,
            may_lease=may_lease(number, each.slots) if plan.equal_shares else None,
        )  # fmt: skip
        actor.on_begun = lambda trees: _count(shared, number, trees)
        async with contextlib.AsyncExitStack() as stack:
            async with connecting:
                await stack.enter_async_context(actor)
            actors.append(actor)
            if not each.joins_s:
                is_there()
                await started.wait()
            if each.leaves_s is not None:
                asyncio.get_running_loop().call_later(each.leaves_s, actor.leave)
            result = await actor.work()
            begun[number] = ABSENT
            return result

    async def told() -> None:
        before, cpu, acked = [0] * len(actors), time.process_time(), [0] * len(actors)
        while True:
            word = await asyncio.to_thread(pipe.recv)
            if word == "leave":
                for actor in actors:
                    actor.leave()
                return
            now = [actor.result.turns for actor in actors]
            before += [0] * (len(now) - len(before))
            acked += [0] * (len(now) - len(acked))
            acked_now = [actor.link.stats.acked for actor in actors]
            pipe.send(
                Marked(
                    at_s=time.monotonic(),
                    turns=sum(now) - sum(before),
                    cpu_s=time.process_time() - cpu,
                    lease_s=[took for actor in actors for took in actor.result.lease_s],
                    refused=sum(len(actor.result.refused) for actor in actors),
                    acked=[a.plan.name for a, new, old in zip(actors, acked_now, acked, strict=True) if new > old],
                )
            )
            before, cpu, acked = now, time.process_time(), acked_now
            for actor in actors:
                del actor.result.lease_s[:]

    async with asyncio.TaskGroup() as tasks:
        works = [tasks.create_task(one(each, i), name=each.name) for each, i in zip(plan.actors, numbers, strict=True)]
        await all_there.wait()
        pipe.send("ready")
        await asyncio.to_thread(pipe.recv)
        started.set()
        telling = asyncio.create_task(told(), name="told")
        results = [await work for work in works]
        telling.cancel()
    return results


def _count(shared: Shared, number: int, trees: int) -> None:
    shared.begun.get_obj()[number] += trees


def _process(plan: FleetPlan, shared: Shared, numbers: Sequence[int], pipe: Connection) -> None:
    raise_file_limit(LINK_FILES * len(plan.actors))

    async def main() -> None:
        pipe.send(await _actors(plan, shared, numbers, pipe))
        os._exit(0)  # a thread may still wait at the pipe, and the loop's end for it

    asyncio.run(main())


def raise_file_limit(needed: int) -> None:
    """Raise this process's limit of descriptors as far as it may be, and to ``needed`` at least.

    Raises SystemExit with both numbers where that is not allowed.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SystemExit(f"these actors need {needed} file descriptors, the limit is {hard} (it was {soft}): ulimit -n")


@dataclass
class Fleet:
    """The processes of a fleet.  Use as a context: every actor is connected inside it, and begins at ``go``.

    Args:
        plan: of all actors.
        processes: that they are spread over.
    """

    plan: FleetPlan
    processes: int = 2
    shared: Shared = field(init=False)
    _pipes: list[Connection] = field(default_factory=list)
    _running: list[BaseProcess] = field(default_factory=list)

    def __enter__(self) -> Self:
        actors = self.plan.actors
        self.shared = Shared(len(actors))
        context = get_context("spawn")
        for first in range(min(self.processes, len(actors))):
            numbers = range(first, len(actors), self.processes)
            part = replace(self.plan, actors=tuple(actors[i] for i in numbers))
            ours, theirs = context.Pipe()
            process = context.Process(target=_process, args=(part, self.shared, list(numbers), theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._running.append(process)
        for pipe in self._pipes:
            if (word := _receive(pipe)) != "ready":
                raise SystemExit(f"a process of simulated actors said {word!r} and not that it is ready")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._running:
            process.join(10 if exc is None else 0)
            if process.is_alive():
                process.kill()
                process.join()

    def pid_of(self, actor: str) -> int:
        """The process of an actor; it has it for itself where there are as many processes as actors."""
        names = [each.name for each in self.plan.actors]
        pid = self._running[names.index(actor) % len(self._running)].pid
        assert pid is not None
        return pid

    def go(self) -> None:
        """Every actor begins."""
        for pipe in self._pipes:
            pipe.send("go")

    def mark(self) -> list[Marked]:
        """What was counted since the mark before, of each process."""
        for pipe in self._pipes:
            pipe.send("mark")
        return [_receive(pipe) for pipe in self._pipes]

    def leave(self) -> list[ActorResult]:
        """Every actor leaves with notice; what came of each."""
        for pipe in self._pipes:
            pipe.send("leave")
        return self.results()

    def results(self, *, but: int | None = None) -> list[ActorResult]:
        """What came of each actor, once all have ended.  ``but``: of those in this process there is no word."""
        found: list[ActorResult] = []
        for pipe, process in zip(self._pipes, self._running, strict=True):
            if process.pid != but:
                found += _receive(pipe)
        return found


def _receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise SystemExit(
            "a process of simulated actors ended before its work was done; its error stands above"
        ) from None
