"""What the buffer's benchmarks share: a real buffer process, and actors that send made-up trees over real links.

The buffer is ``python -m buffer`` on a run folder of its own: its journal is on disk, and nothing is acknowledged
before it is committed.  Actors introduce themselves, lease trees, open them, send every turn and close them, as real
ones do; only the generation is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from atpo_async.config import Config, LinksConfig, build
from atpo_async.core.tree import Turn, VersionSpan
from atpo_async.links.client import Client
from atpo_async.run.endpoints import Endpoints
from atpo_async.run.rundir import RunDir
from atpo_async.wire.messages import (
    PROTOCOL,
    ActorHello,
    ActorReport,
    BufferToActor,
    BufferToLearner,
    Lease,
    LeaseRequest,
    Leases,
    TreeClosed,
    TreeOpened,
    VersionPublished,
    Welcome,
)

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 150_000
CHAIN_TURNS = 5
"""Made-up trees are chains from the prompt, each of so many turns; every second one earns a reward."""
REPLY_S = 120.0
"""A request that takes longer has failed."""
START_S = 60.0
REPORT_EVERY_S = 2.0


# --- trees -----------------------------------------------------------------------------------------------------


class Turns:
    """What turns are made of: arrays of random token ids and log-probs, as many bytes in all as asked for.

    Args:
        num_bytes: observation, action and log-probs of one turn together; a multiple of 16.
        marked: the first tokens of an action tell its task and turn, so that no two turns are alike.
    """

    def __init__(self, num_bytes: int, *, marked: bool = False, of: int = 64, seed: int = 0) -> None:
        if num_bytes < 32 or num_bytes % 16:
            raise ValueError(f"bytes of a turn must be a multiple of 16 and at least 32, got {num_bytes}")
        rng = np.random.default_rng(seed)
        self.num_action = num_bytes // 16
        self.marked = marked
        self.prompt = rng.integers(0, VOCABULARY, 32).astype(np.int32)
        self._spans = (VersionSpan(0, 0, self.num_action),)
        self._made = [
            (
                rng.integers(0, VOCABULARY, 2 * self.num_action).astype(np.int32),
                rng.integers(0, VOCABULARY, self.num_action).astype(np.int32),
                -rng.exponential(1.0, self.num_action).astype(np.float32),
            )
            for _ in range(of)
        ]

    def turn(self, run: str, lease: Lease, turn_id: int, *, version: int = 0, leaf: bool | None = None) -> Turn:
        """Turn ``turn_id`` of a tree; by default the last of each chain is a leaf."""
        chain, place = divmod(turn_id - 1, CHAIN_TURNS)
        if leaf is None:
            leaf = place == CHAIN_TURNS - 1
        observation, action, logprobs = self._made[(lease.task_index * 7 + turn_id) % len(self._made)]
        if self.marked:
            action = action.copy()
            action[0], action[1] = lease.task_index % VOCABULARY, turn_id
        return Turn(
            run=run, tree_id=lease.tree_id, turn_id=turn_id, parent_id=turn_id - 1 if place else 0,
            lease_epoch=lease.epoch, expansion_round=0, observation=observation, action=action, logprobs=logprobs,
            spans=self._spans if not version else (VersionSpan(version, 0, self.num_action),),
            end="done" if leaf else "continue", reward=float(chain % 2) if leaf else None,
            success=bool(chain % 2) if leaf else None, generate_s=0.1, environment_s=0.0,
        )  # fmt: skip


def content(turn: Turn) -> int:
    """What a turn says, as one number, in every process the same: its place in the tree, every byte of its arrays."""
    place = f"{turn.tree_id} {turn.turn_id} {turn.parent_id} {turn.reward} {turn.end} {turn.spans}"
    digest = hashlib.blake2b(place.encode(), digest_size=8)
    for array_ in (turn.observation, turn.action, turn.logprobs):
        digest.update(array_.tobytes())
    return int.from_bytes(digest.digest(), "little")


# --- the buffer ------------------------------------------------------------------------------------------------


def configuration(folder: Path, *, name: str, **sections: dict[str, Any]) -> Config:
    """A run's configuration in which admission is never the limit: what is measured is the buffer."""
    made: dict[str, dict[str, Any]] = {
        "run": {"name": name, "dir": str(folder), "steps": 10**6},
        "staleness": {"trees_per_batch": 64, "max_lag": 10**6},
        "buffer": {"lease_lifetime_s": 3600.0, "max_bytes": 1 << 40},
        "eval": {"at_start": False, "at_end": False},
    }
    for section, fields in sections.items():
        made.setdefault(section, {}).update(fields)
    return build(made)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Of a process, as the kernel counts."""

    cpu_s: dict[str, float]
    """By thread: ``loop`` (the main one), ``sockets`` (libzmq's), ``others`` (the journal's, status)."""
    private_bytes: int
    """Memory that is no page of a file."""
    mapped_bytes: int
    """Resident pages of files, the journal's too; the kernel takes them back when it needs room."""

    @classmethod
    def of(cls, pid: int) -> Usage:
        cpu = {"loop": 0.0, "sockets": 0.0, "others": 0.0}
        tick = os.sysconf("SC_CLK_TCK")
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # a thread may end meanwhile
                name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
                utime, stime = rest.split()[11:13]
                kind = "loop" if task.name == str(pid) else "sockets" if name.startswith("ZMQ") else "others"
                cpu[kind] += (int(utime) + int(stime)) / tick
        sizes = {
            line.split(":")[0]: int(line.split()[1]) * 1024
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("Rss")
        }
        return cls(
            cpu_s=cpu,
            private_bytes=sizes["RssAnon"],
            mapped_bytes=sizes["RssFile"] + sizes["RssShmem"],
        )

    def cpu_since(self, before: Usage) -> dict[str, float]:
        """Processor seconds, by thread."""
        return {name: spent - before.cpu_s[name] for name, spent in self.cpu_s.items()}


class BufferProcess:
    """A buffer as a run has it, in a process of its own.  Use as a context; what it wrote goes at the end.

    Args:
        config: the run's; its folder is made here.
        profile: where ``benchmarks/profiled.py`` writes what the process was doing; None: it is not watched.
    """

    def __init__(self, config: Config, *, profile: Path | None = None) -> None:
        self.config = config
        self.rundir = RunDir.create(config)
        self.profile = profile
        self.process: subprocess.Popen[bytes] | None = None
        loopback = "tcp://127.0.0.1:0"
        self.rundir.write_endpoints(Endpoints(actors=loopback, learner=loopback))

    @property
    def run(self) -> str:
        return self.rundir.run_id

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> Path:
        return self.rundir.path / "logs" / "buffer.log"

    @property
    def journal_bytes(self) -> int:
        """On disk."""
        place = self.config.buffer.journal_dir or self.rundir.path / "journal"
        return sum(p.stat().st_blocks * 512 for p in Path(place).rglob("*") if p.is_file()) if place.exists() else 0

    def start(self) -> Endpoints:
        """Start it, or start it again after ``kill``; returns once it listens."""
        watched = [str(ROOT / "benchmarks" / "profiled.py"), str(self.profile)] if self.profile else ["-m"]
        with self.log.open("ab") as log:
            begin = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, *watched, "buffer", str(self.rundir.path)], cwd=ROOT, stdout=log, stderr=log
            )
        until = time.monotonic() + START_S
        while True:
            said = self.log.read_bytes()[begin:]
            if b"actors at" in said:
                return self.rundir.read_endpoints()
            if self.process.poll() is not None or time.monotonic() > until:
                tail = said.decode(errors="replace")[-2000:]
                raise SystemExit(f"the buffer does not listen after {START_S:.0f} s; its log {self.log}:\n{tail}")
            time.sleep(0.02)

    def usage(self) -> Usage:
        return Usage.of(self.pid)

    def end_part(self) -> None:
        """What is profiled from now on is another part (``benchmarks/profiled.py``)."""
        if self.profile is not None:
            os.kill(self.pid, signal.SIGUSR2)

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if exc is not None:
            with contextlib.suppress(OSError):
                print(self.log.read_text(errors="replace")[-4000:], file=sys.stderr)
        shutil.rmtree(self.rundir.path, ignore_errors=True)


def settings_of(config: Config) -> LinksConfig:
    return config.links


@contextlib.asynccontextmanager
async def learner_link(buffer: BufferProcess) -> AsyncIterator[Client]:
    """The learner's link, with version 0 published: actors may begin."""
    endpoint = buffer.rundir.read_endpoints().learner
    async with Client(
        endpoint,
        peer="buffer",
        identity="learner-0",
        receives=BufferToLearner,
        settings=settings_of(buffer.config),
    ) as link:
        await publish(link, buffer.run, 0)
        yield link


async def publish(link: Client, run: str, version: int) -> None:
    await link.send(
        VersionPublished(
            run=run, version=version, weights_endpoint="tcp://127.0.0.1:9", announce_endpoint="tcp://127.0.0.1:9"
        )
    )
    await link.drain(timeout_s=REPLY_S)


# --- actors ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the actors of one process do."""

    endpoint: str
    run: str
    config: Config
    names: tuple[str, ...]
    """One actor each, with a link of its own."""
    trees: int
    """Of each actor."""
    warm_trees: int = 1
    """Of each actor, before the clock runs."""
    turns_per_tree: int = 80
    turn_bytes: int = 4096
    turns_per_s: float | None = None
    """Of each actor; None: as fast as the window lets it."""
    one_at_a_time: bool = False
    """The next message only once the one before is acknowledged."""


@dataclass(kw_only=True)
class Sent:
    """What came of a plan."""

    began_s: float
    ended_s: float
    """Monotonic; the last acknowledgement is in."""
    turns: int
    ack_s: np.ndarray
    """float64[N]: from the call of ``send`` to the acknowledgement, of every message in the timed part."""
    waited_s: float
    """Summed over actors: for space in the window."""
    cpu_s: float
    """Of the senders' processes."""
    refused: int = 0


class Actor:
    """One simulated actor.  Use as an async context.

    Args:
        plan: whose run, buffer and turns.
        name: its identity.
        turns: what its turns are made of.
        on_tree: called with every tree once its last message is acknowledged: lease, content by turn id.  Then every
            turn's content is computed, which costs.
    """

    def __init__(
        self, plan: Plan, name: str, turns: Turns, *, on_tree: Callable[[Lease, dict[int, int]], None] | None = None
    ) -> None:
        self.plan = plan
        self.name = name
        self.turns = turns
        self.ack_s = array("d")
        self.turns_sent = 0
        self.refused: list[str] = []
        self.timed = False
        self._on_tree = on_tree
        self._due: deque[tuple[float, Callable[[], None] | None]] = deque()
        self._done = 0
        self._held: dict[str, Lease] = {}
        self._stock: deque[Lease] = deque()
        self._reporting: asyncio.Task[None] | None = None
        self.link = Client(
            plan.endpoint,
            peer="buffer",
            identity=name,
            receives=BufferToActor,
            settings=settings_of(plan.config),
            on_refused=lambda message, reason: self.refused.append(f"{type(message).__name__}: {reason}"),
        )
        self.link.on_acked = self._acked

    async def __aenter__(self) -> Self:
        await self.link.__aenter__()
        config = self.plan.config
        hello = ActorHello(
            protocol=PROTOCOL,
            run=self.plan.run,
            actor=self.name,
            environment=config.environment.name,
            search_leaves=config.max_leaves,
        )
        welcome = await self.link.request(hello, timeout_s=REPLY_S)
        if not isinstance(welcome, Welcome):
            raise SystemExit(f"the buffer does not take {self.name}: {welcome}")
        self._reporting = asyncio.create_task(self._report(), name=f"{self.name} reports")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reporting is not None:
            self._reporting.cancel()
        await self.link.close()

    async def lease(self, count: int, *, stopping: asyncio.Event | None = None) -> list[Lease]:
        """At least one lease; none once ``stopping`` is set.  Waits for: admission."""
        while stopping is None or not stopping.is_set():
            answer = await self.link.request(
                LeaseRequest(run=self.plan.run, actor=self.name, count=count, version=0), timeout_s=REPLY_S
            )
            if not isinstance(answer, Leases) or answer.finished:
                raise SystemExit(f"{self.name} asked for leases and got {answer}")
            if answer.leases:
                return list(answer.leases)
            await asyncio.sleep(answer.retry_after_s)
        return []

    async def grow_trees(self, count: int) -> None:
        """``count`` whole trees, and everything acknowledged.  Leases are asked for while trees are sent."""
        more: asyncio.Task[list[Lease]] | None = None
        left = count - len(self._stock)
        try:
            for _ in range(count):
                if more is None and left > 0 and len(self._stock) < 4:
                    asked = min(left, 8)
                    more = asyncio.create_task(self.lease(asked), name=f"{self.name} leases")
                if more is not None and (more.done() or not self._stock):
                    got = await more
                    left, more = left - len(got), None
                    self._stock.extend(got)
                await self.grow(self._stock.popleft())
        finally:
            if more is not None:
                self._stock.extend(await more)
        await self.link.drain(timeout_s=REPLY_S)

    async def grow(self, lease: Lease, *, version: int = 0) -> None:
        """One whole tree, at the plan's pace."""
        plan, run = self.plan, self.plan.run
        self._held[lease.tree_id] = lease
        contents: dict[int, int] = {}
        began = time.perf_counter()
        await self._send(TreeOpened(run=run, tree_id=lease.tree_id, lease_epoch=lease.epoch, prompt=self.turns.prompt))
        for turn_id in range(1, plan.turns_per_tree + 1):
            if plan.turns_per_s is not None:
                early = began + turn_id / plan.turns_per_s - time.perf_counter()
                await asyncio.sleep(max(early, 0.0))
            turn = self.turns.turn(run, lease, turn_id, version=version)
            if self._on_tree is not None:
                contents[turn_id] = content(turn)
            await self._send(turn)
            self.turns_sent += 1
        closed = TreeClosed(
            run=run, tree_id=lease.tree_id, lease_epoch=lease.epoch, num_turns=plan.turns_per_tree,
            failed_branches=0, failures={},
        )  # fmt: skip

        def done() -> None:
            del self._held[lease.tree_id]
            if self._on_tree is not None:
                self._on_tree(lease, contents)

        await self._send(closed, done)

    async def _send(self, message: Any, done: Callable[[], None] | None = None) -> None:
        self._due.append((time.perf_counter(), done))
        await self.link.send(message)
        if self.plan.one_at_a_time:
            await self.link.drain(timeout_s=REPLY_S)

    def _acked(self, handled: int) -> None:
        now = time.perf_counter()
        due, took = self._due, self.ack_s
        for _ in range(handled - self._done):
            sent_at, done = due.popleft()
            if self.timed:
                took.append(now - sent_at)
            if done is not None:
                done()
        self._done = handled

    async def _report(self) -> None:
        """Keep the leases.  Waits for: the clock."""
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            held = (*self._held, *(lease.tree_id for lease in self._stock))
            await self._send(ActorReport(run=self.plan.run, actor=self.name, version=0, tree_ids=held, metrics={}))


def send_in_process(plan: Plan, pipe: Connection) -> None:
    """All actors of ``plan``; says ``ready`` when they are warm, begins at the answer, and ends with ``Sent``."""

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            turns = Turns(plan.turn_bytes)
            actors = [await stack.enter_async_context(Actor(plan, name, turns)) for name in plan.names]
            await asyncio.gather(*(actor.grow_trees(plan.warm_trees) for actor in actors))
            pipe.send("ready")
            await asyncio.to_thread(pipe.recv)
            waited = sum(actor.link.stats.waited_s for actor in actors)
            for actor in actors:
                actor.timed, actor.turns_sent = True, 0
            cpu, began = time.process_time(), time.monotonic()
            await asyncio.gather(*(actor.grow_trees(plan.trees) for actor in actors))
            pipe.send(
                Sent(
                    began_s=began,
                    ended_s=time.monotonic(),
                    turns=sum(actor.turns_sent for actor in actors),
                    ack_s=np.concatenate([np.frombuffer(actor.ack_s, dtype=np.float64) for actor in actors]),
                    waited_s=sum(actor.link.stats.waited_s for actor in actors) - waited,
                    cpu_s=time.process_time() - cpu,
                    refused=sum(len(actor.refused) for actor in actors),
                )
            )

    asyncio.run(main())


@dataclass
class Senders:
    """Processes of actors.  Use as a context."""

    plans: Sequence[Plan]
    _pipes: list[Connection] = field(default_factory=list)
    _processes: list[BaseProcess] = field(default_factory=list)

    def __enter__(self) -> Self:
        context = get_context("spawn")
        for plan in self.plans:
            ours, theirs = context.Pipe()
            process = context.Process(target=send_in_process, args=(plan, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.join(10 if exc is None else 0)
            if process.is_alive():
                process.kill()
                process.join()

    def wait_ready(self) -> None:
        for pipe in self._pipes:
            if (word := self._receive(pipe)) != "ready":
                raise SystemExit(f"a sender said {word!r} and not that it is ready")

    def go(self) -> Sent:
        """Begin; what all of them did together, once the last acknowledgement is in."""
        for pipe in self._pipes:
            pipe.send("go")
        parts: list[Sent] = [self._receive(pipe) for pipe in self._pipes]
        return Sent(
            began_s=min(p.began_s for p in parts),
            ended_s=max(p.ended_s for p in parts),
            turns=sum(p.turns for p in parts),
            ack_s=np.concatenate([p.ack_s for p in parts]),
            waited_s=sum(p.waited_s for p in parts),
            cpu_s=sum(p.cpu_s for p in parts),
            refused=sum(p.refused for p in parts),
        )

    def _receive(self, pipe: Connection) -> Any:
        try:
            return pipe.recv()
        except EOFError:
            raise SystemExit("a sender ended before its work was done; its error stands above") from None


def plans(count: int, processes: int, **fields: Any) -> list[Plan]:
    """``count`` actors over ``processes`` processes, ``processes`` at most one each."""
    names = [f"sender-{i}" for i in range(count)]
    processes = min(processes, count)
    return [Plan(names=tuple(names[i::processes]), **fields) for i in range(processes)]
