"""The oracle of exactly-once work: scripted actors and a scripted learner around the real buffer, killed at will.

What a task's tree looks like is a function of (seed, task): whatever reaches the learner can be checked to the byte, by
whom and in how many attempts it was made.  The learner's lineage stands for its weights: it lives in its checkpoint and
is lost with what comes after it, and at the end it must hold every task the intended number of times.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import lmdb
import numpy as np

from atpo_async import config as configuration
from atpo_async.core.errors import PeerLost
from atpo_async.core.tree import ROOT, Turn, TurnTree, VersionSpan
from atpo_async.links.client import Client
from atpo_async.run import processes
from atpo_async.run.endpoints import Endpoints
from atpo_async.run.files import write_atomic
from atpo_async.run.rundir import RunDir
from atpo_async.wire import messages
from atpo_async.wire.messages import (
    PROTOCOL,
    ActorHello,
    ActorReport,
    Batch,
    BufferToActor,
    BufferToLearner,
    Lease,
    LeaseRequest,
    LeaseReturned,
    Leases,
    NotYet,
    RunFinished,
    SampleRequest,
    Trained,
    TreeClosed,
    TreeOpened,
    VersionPublished,
    Welcome,
)
from buffer.journal import entries
from tests.fault_support import PATIENCE_S, Proxy, Recovery, Role, Spawner, Tricks, until, until_async
from tests.links_support import free_endpoints

Kind = Literal["plain", "dull", "barren"]
"""A tree to learn from; one whose leaves all earn the same; a task that cannot be started."""

Victims = Literal["buffer", "learner", "actor", "all"]
NOTHING = np.zeros(0, dtype=np.int32)


# --- the script ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """One turn of a scripted tree."""

    turn_id: int
    parent_id: int
    expansion_round: int
    observation: np.ndarray
    action: np.ndarray
    logprobs: np.ndarray
    reward: float | None

    @property
    def is_leaf(self) -> bool:
        return self.reward is not None


@dataclass(frozen=True, slots=True)
class Planned:
    """The tree of one task, whoever grows it."""

    kind: Kind
    prompt: np.ndarray
    parts: tuple[Part, ...]
    failed_branches: int


@functools.cache
def planned(seed: int, task: int) -> Planned:
    """Three or four chains of up to three turns, interleaved; a branch from a turn within; now and then a chain that
    ends in the middle, as a failed one does."""
    rng = np.random.default_rng([seed, task])
    kind: Kind = "barren" if task % 13 == 12 else "dull" if task % 11 == 7 else "plain"
    prompt = rng.integers(0, 500, size=int(rng.integers(2, 9)), dtype=np.int32)
    if kind == "barren":
        return Planned(kind, prompt, (), 1)
    lengths = [int(n) for n in rng.integers(1, 4, size=int(rng.integers(3, 5)))]
    fails = lengths.index(max(lengths)) if max(lengths) > 1 and rng.random() < 0.3 else -1
    last = [ROOT] * len(lengths)
    depth = [0] * len(lengths)
    parts: list[Part] = []
    leaves = 0

    def grow(chain: int, parent: int, number: int, ends: bool) -> None:
        nonlocal leaves
        size = int(rng.integers(2, 13))
        reward = None
        if ends:
            # Two leaves that differ come first: a tree cut short after them is one to learn from too.
            reward = 0.5 if kind == "dull" else float(leaves % 2) if leaves < 2 else float(np.round(rng.random(), 3))
            leaves += 1
        parts.append(
            Part(
                turn_id=len(parts) + 1,
                parent_id=parent,
                expansion_round=number,
                observation=NOTHING if parent == ROOT else rng.integers(0, 500, size=size, dtype=np.int32),
                action=rng.integers(0, 500, size=size, dtype=np.int32),
                logprobs=-rng.random(size, dtype=np.float32),
                reward=reward,
            )
        )
        last[chain] = len(parts)

    while open_chains := [c for c, n in enumerate(lengths) if depth[c] < n - (c == fails)]:
        chain = int(rng.choice(open_chains))
        depth[chain] += 1
        grow(chain, last[chain], 0, ends=depth[chain] == lengths[chain])
    inner = [part.turn_id for part in parts if not part.is_leaf]
    if inner:
        grow(0, int(rng.choice(inner)), 1, ends=True)
    return Planned(kind, prompt, tuple(parts), int(fails >= 0))


def turn_of(part: Part, *, run: str, tree_id: str, epoch: int, version: int) -> Turn:
    return Turn(
        run=run,
        tree_id=tree_id,
        turn_id=part.turn_id,
        parent_id=part.parent_id,
        lease_epoch=epoch,
        expansion_round=part.expansion_round,
        observation=part.observation,
        action=part.action,
        logprobs=part.logprobs,
        spans=(VersionSpan(version, 0, len(part.action)),),
        end="done" if part.is_leaf else "continue",
        reward=part.reward,
        success=None if part.reward is None else part.reward > 0.5,
        generate_s=0.0,
        environment_s=0.0,
    )


def messages_of(lease: Lease, plan: Planned, *, run: str, version: int) -> list[TreeOpened | Turn | TreeClosed]:
    """All that an actor sends for a lease, in order, less the turns that were committed before it."""
    keys: dict[str, Any] = {"run": run, "tree_id": lease.tree_id}
    there = {turn.turn_id for turn in lease.committed}
    found: list[TreeOpened | Turn | TreeClosed] = []
    if plan.kind != "barren":
        found.append(TreeOpened(**keys, lease_epoch=lease.epoch, prompt=plan.prompt))
    found += [
        turn_of(part, **keys, epoch=lease.epoch, version=version) for part in plan.parts if part.turn_id not in there
    ]
    failures = {"environment_failed": plan.failed_branches} if plan.failed_branches else {}
    found.append(
        TreeClosed(
            **keys,
            lease_epoch=lease.epoch,
            num_turns=len(plan.parts),
            failed_branches=plan.failed_branches,
            failures=failures,
        )
    )
    return found


def hash_of(turn: Turn | Part) -> str:
    """Of all that the script decides: not of who made it, when, and under which version."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(repr((turn.turn_id, turn.parent_id, turn.expansion_round, turn.reward)).encode())
    for array in (turn.observation, turn.action, turn.logprobs):
        digest.update(f"{array.dtype.str}{len(array)}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def tree_hashes(prompt: np.ndarray, turns: Iterable[Turn | Part]) -> list[str]:
    first = hashlib.blake2b(np.ascontiguousarray(prompt, dtype=np.int32).tobytes(), digest_size=12).hexdigest()
    return [first, *(hash_of(turn) for turn in turns)]


@functools.cache
def possible_trees(seed: int, task: int) -> dict[tuple[str, ...], int]:
    """What a batch may hold of a task: its hashes -> turns it lacks.

    A tree whose holder was lost is served without the chains it had open, once it has two leaves; nothing else is.
    """
    plan = planned(seed, task)
    found: dict[tuple[str, ...], int] = {}
    for count in range(1, len(plan.parts) + 1):
        turns = [turn_of(p, run="r", tree_id="t", epoch=0, version=0) for p in plan.parts[:count]]
        tree = TurnTree("t", task, plan.prompt, tuple(turns)).pruned()
        if len(tree.leaves()) >= 2:
            found[tuple(tree_hashes(plan.prompt, tree))] = len(plan.parts) - count
    return found


# --- what the scripted roles write -----------------------------------------------------------------------------

LINEAGE = "lineage.json"
TAKEN = "versions.taken"
STEPS = "steps.taken"
PROBLEMS = "problems.txt"
PUBLISHED = "published"
STOP_AT = "stop-at"
STOPPED_AT = "stopped-at"
ALLOWED = "allowed"


@dataclass(kw_only=True)
class Trace:
    """One batch in the lineage."""

    step: int
    version: int
    batch_id: int
    trees: list[str]
    tasks: list[int]
    hashes: list[list[str]]
    fresh_from: list[int]
    """Of each tree: the oldest version of its youngest turn, from which its age counts."""


@dataclass(kw_only=True)
class Lineage:
    """The scripted learner's checkpoint: what its weights would have seen."""

    step: int = 0
    version: int = -1
    traces: list[Trace] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path) -> Lineage:
        try:
            data = json.loads((folder / LINEAGE).read_text())
        except FileNotFoundError:
            return cls()
        return cls(step=data["step"], version=data["version"], traces=[Trace(**t) for t in data["traces"]])


def note(folder: Path, name: str, line: object) -> None:
    """Append a line; whole or not at all where it is short."""
    fd = os.open(folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(fd, f"{line}\n".encode())
    finally:
        os.close(fd)


def lines(folder: Path, name: str) -> list[str]:
    path = folder / name
    return path.read_text().splitlines() if path.exists() else []


def acked_file(actor: str) -> str:
    """Where an actor notes how many turns of it were acknowledged at a time."""
    return f"acked.{actor}"


def published(folder: Path) -> int:
    """The newest version that the scripted learner has given out; stands for the weights link."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int((folder / PUBLISHED).read_text())
    return -1


# --- the scripted actor ----------------------------------------------------------------------------------------


def run_actor(run_dir: str, name: str, options: Mapping[str, Any]) -> None:
    _log_to_stderr()
    asyncio.run(_Actor(Path(run_dir), name, **options).work())


def _log_to_stderr() -> None:
    import logging

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


class _Actor:
    """Leases, grows by the script, goes on from committed turns, gives up what is refused.

    Args:
        folder: of the run.
        name: of this actor.
        seed: of the script.
        turn_s: an action takes up to twice this long.
        endpoint: where the buffer is; by the run's folder if empty.
    """

    def __init__(self, folder: Path, name: str, *, seed: int, turn_s: float = 0.001, endpoint: str = "") -> None:
        self._folder = folder
        self._name = name
        self._seed = seed
        self._turn_s = turn_s
        self._rundir = RunDir.open(folder)
        self._config = self._rundir.config
        self._run = self._rundir.run_id
        self._endpoint = endpoint or self._rundir.read_endpoints().actors
        self._rng = random.Random(f"{seed}/{name}/{os.getpid()}")
        self._growing: dict[str, asyncio.Task[None]] = {}
        self._turns_sent: deque[bool] = deque()
        """Of each send that is not done with: whether it is a turn."""
        self._in_order = asyncio.Lock()
        self._done_with = 0
        self._refused_now = 0

    async def work(self) -> None:
        """Waits for: leases.  Unblocked by: the buffer; ends when it says that the run is over."""
        settings = self._config.links
        self._buffer = Client(
            self._endpoint,
            peer="buffer",
            identity=self._name,
            receives=BufferToActor,
            settings=settings,
            on_refused=self._on_refused,
        )
        self._buffer.on_acked = self._on_acked
        async with self._buffer:
            await self._join()
            async with asyncio.TaskGroup() as tasks:
                report = tasks.create_task(self._report(), name="report")
                await self._take_leases(tasks)
                report.cancel()

    async def _join(self) -> None:
        hello = ActorHello(
            protocol=PROTOCOL,
            run=self._run,
            actor=self._name,
            environment=self._config.environment.name,
            search_leaves=self._config.search.max_leaves,
        )
        while True:
            with contextlib.suppress(PeerLost):
                answer = await self._buffer.request(hello, timeout_s=5.0)
                if isinstance(answer, Welcome) and answer.weights_endpoint:
                    return
                if not isinstance(answer, Welcome):
                    raise AssertionError(f"{self._name}: {answer}")
            await asyncio.sleep(0.02)

    async def _take_leases(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            free = self._config.actor.trees_in_flight - len(self._growing)
            if free <= 0:
                await asyncio.wait(self._growing.values(), return_when=asyncio.FIRST_COMPLETED)
                await asyncio.sleep(0)
                continue
            request = LeaseRequest(run=self._run, actor=self._name, count=free, version=published(self._folder))
            try:
                answer = await self._buffer.request(request, timeout_s=5.0)
            except PeerLost:
                continue
            if not isinstance(answer, Leases):
                raise AssertionError(f"{self._name}: {answer}")
            for lease in answer.leases:
                task = tasks.create_task(self._grow(lease), name=lease.tree_id)
                self._growing[lease.tree_id] = task
                task.add_done_callback(lambda ended: self._growing.pop(ended.get_name(), None))
            if answer.finished:
                for task in list(self._growing.values()):
                    task.cancel()
                return
            if len(answer.leases) < free:
                await asyncio.sleep(answer.retry_after_s)

    async def _grow(self, lease: Lease) -> None:
        plan = planned(self._seed, lease.task_index)
        there = {turn.turn_id for turn in lease.committed}
        for turn in lease.committed:
            if hash_of(turn) != hash_of(plan.parts[turn.turn_id - 1]):
                note(self._folder, PROBLEMS, f"lease of {lease.tree_id}: committed turn {turn.turn_id} is not its own")
        if there != set(range(1, len(there) + 1)):
            # Sends keep their order, so what is kept of a tree has no gaps.
            note(self._folder, PROBLEMS, f"lease of {lease.tree_id} lacks turns: {sorted(there)}")
        while published(self._folder) < lease.min_version:  # noqa: ASYNC110  (another process writes the file)
            await asyncio.sleep(0.002)
        version = published(self._folder)
        for message in messages_of(lease, plan, run=self._run, version=version):
            if isinstance(message, Turn):
                await asyncio.sleep(self._turn_s * 2 * self._rng.random())
            await self._send(message)

    async def _send(self, message: object) -> None:
        # Noted first: the send may wait for room, and others' sends do not overtake it.
        async with self._in_order:
            self._turns_sent.append(isinstance(message, Turn))
            try:
                await self._buffer.send(message)
            except BaseException:
                self._turns_sent.pop()
                raise

    def _on_acked(self, done_with: int) -> None:
        new, self._done_with = done_with - self._done_with, done_with
        turns = sum(self._turns_sent.popleft() for _ in range(new)) - self._refused_now
        self._refused_now = 0
        if turns > 0:
            note(self._folder, acked_file(self._name), turns)

    def _on_refused(self, message: object, reason: str) -> None:
        self._refused_now += isinstance(message, Turn)
        task = self._growing.get(getattr(message, "tree_id", ""))
        if task is not None:
            task.cancel()

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(self._config.actor.report_every_s)
            await self._send(
                ActorReport(
                    run=self._run,
                    actor=self._name,
                    version=published(self._folder),
                    tree_ids=tuple(self._growing),
                    metrics={"actor/trees_in_flight": float(len(self._growing))},
                )
            )


# --- the scripted learner --------------------------------------------------------------------------------------

KILL_POINTS = ("begun", "batch", "numbered", "told", "aside", "renamed", "checkpointed", "finishing")
"""Where the learner can be made to stand still: resumed and published; a batch in hand; its version taken; the batch
confirmed; a checkpoint written but not in place; in place but the buffer not told; told; its last message sent."""


def run_learner(run_dir: str, options: Mapping[str, Any]) -> None:
    _log_to_stderr()
    asyncio.run(_Learner(Path(run_dir), **options).work())


class _Learner:
    """Asks for batches, notes what it was given, checkpoints, and goes on from its checkpoint when started again.

    Args:
        folder: of the run.
        checkpoint_every: batches.
        step_s: a batch takes up to twice this long.
        endpoint: where the buffer is; by the run's folder if empty.
    """

    def __init__(self, folder: Path, *, checkpoint_every: int, step_s: float = 0.002, endpoint: str = "") -> None:
        self._folder = folder
        self._every = checkpoint_every
        self._step_s = step_s
        self._rundir = RunDir.open(folder)
        self._config = self._rundir.config
        self._run = self._rundir.run_id
        self._endpoint = endpoint or self._rundir.read_endpoints().learner
        self._lineage = Lineage.load(folder)
        self._checkpointed = self._lineage.step
        self._version = -1

    async def work(self) -> None:
        """Waits for: batches.  Unblocked by: the buffer; ends when there are no more."""
        settings = self._config.links
        self._buffer = Client(
            self._endpoint,
            peer="buffer",
            identity="learner",
            receives=BufferToLearner,
            settings=settings,
            on_refused=lambda message, reason: note(self._folder, PROBLEMS, f"learner refused: {reason}"),
        )
        async with self._buffer:
            self._version = self._next_version()
            await self._publish()
            if self._lineage.step:
                await self._say_checkpointed()  # the last attempt may not have come to it
            await self._kill_point("begun")
            while (batch := await self._next_batch()) is not None:
                await self._train(batch)
            await self._checkpoint()
            await self._buffer.send(RunFinished(run=self._run))
            await self._kill_point("finishing")
            with contextlib.suppress(PeerLost):
                await self._buffer.drain(timeout_s=5.0)

    async def _next_batch(self) -> Batch | None:
        lineage = self._lineage
        told_at = time.monotonic()
        while lineage.step < self._config.run.steps:
            while not self._may_go_on():  # noqa: ASYNC110  (another process writes the file)
                await asyncio.sleep(0.002)
            request = SampleRequest(
                run=self._run,
                rank=0,
                num_ranks=1,
                step=lineage.step,
                version=self._version,
                num_trees=self._config.staleness.trees_per_batch,
                wait_s=0.5,
            )
            try:
                answer = await self._buffer.request(request, timeout_s=5.0)
            except PeerLost:
                continue
            if isinstance(answer, Batch):
                return answer
            if isinstance(answer, messages.Exhausted):
                note(self._folder, STEPS, f"exhausted: {answer.reason}")
                return None
            if not isinstance(answer, NotYet):
                raise AssertionError(f"learner: {answer}")
            if answer.checkpoint_wanted:
                await self._checkpoint()
            if time.monotonic() - told_at > 0.5:
                told_at = time.monotonic()
                await self._publish()
        return None

    def _may_go_on(self) -> bool:
        """Whether the driver, if there is one, lets this run have a further step: it must not end before its kills."""
        path = self._folder / ALLOWED
        try:
            allowed = int(path.read_text())
        except FileNotFoundError:  # or it goes just now
            return True
        return len(lines(self._folder, STEPS)) < allowed

    async def _train(self, batch: Batch) -> None:
        await self._kill_point("batch")
        lineage = self._lineage
        if batch.step != lineage.step:
            note(self._folder, PROBLEMS, f"asked for batch {lineage.step}, got {batch.step}")
        await asyncio.sleep(self._step_s * 2 * random.random())
        hashes = [tree_hashes(tree.prompt, tree.turns) for tree in batch.trees]
        self._version = self._next_version()
        lineage.traces.append(
            Trace(
                step=lineage.step,
                version=self._version,
                batch_id=batch.batch_id,
                trees=[tree.tree_id for tree in batch.trees],
                tasks=[tree.task_index for tree in batch.trees],
                hashes=hashes,
                fresh_from=[max(turn.oldest_version for turn in tree.turns) for tree in batch.trees],
            )
        )
        lineage.step += 1
        note(self._folder, STEPS, lineage.step)
        await self._kill_point("numbered")
        if lineage.step % self._config.staleness.publish_every == 0:
            await self._publish()
        await self._buffer.send(
            Trained(
                run=self._run,
                batch_id=batch.batch_id,
                version=self._version,
                priorities={tree.tree_id: 0.1 + random.random() for tree in batch.trees},
            )
        )
        await self._kill_point("told")
        if lineage.step % self._every == 0 or batch.checkpoint_wanted:
            await self._checkpoint()

    async def _checkpoint(self) -> None:
        if self._checkpointed == self._lineage.step:
            return
        self._lineage.version = self._version
        aside = self._folder / f".{LINEAGE}"
        with aside.open("w") as file:
            json.dump(asdict(self._lineage), file)
            file.flush()
            os.fsync(file.fileno())
        await self._kill_point("aside")
        aside.replace(self._folder / LINEAGE)
        fd = os.open(self._folder, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        self._checkpointed = self._lineage.step
        await self._kill_point("renamed")
        await self._say_checkpointed()
        await self._kill_point("checkpointed")

    async def _say_checkpointed(self) -> None:
        step, version = self._lineage.step, self._lineage.version
        await self._buffer.send(messages.Checkpointed(run=self._run, step=step, version=version))

    def _next_version(self) -> int:
        version = self._rundir.next_version()
        note(self._folder, TAKEN, version)
        return version

    async def _publish(self) -> None:
        """Twice for the same version is no harm: the buffer may have started anew."""
        write_atomic(self._folder / PUBLISHED, f"{self._version}\n")
        await self._buffer.send(
            VersionPublished(
                run=self._run,
                version=self._version,
                weights_endpoint="tcp://127.0.0.1:1",
                announce_endpoint="tcp://127.0.0.1:2",
            )
        )

    async def _kill_point(self, name: str) -> None:
        """Stand still here if the driver wants it, as a machine that loses its power does."""
        path = self._folder / STOP_AT
        wanted = ""
        with contextlib.suppress(FileNotFoundError):  # the driver may take it back at any time
            wanted = path.read_text()
        if wanted == name:
            path.unlink(missing_ok=True)
            if name in ("told", "checkpointed"):
                with contextlib.suppress(PeerLost):
                    await self._buffer.drain(timeout_s=5.0)
            (self._folder / STOPPED_AT).write_text(name)
            os.kill(os.getpid(), signal.SIGSTOP)


# --- the run ---------------------------------------------------------------------------------------------------

BASE: dict[str, dict[str, Any]] = {
    "run": {"steps": 100_000},
    "search": {"initial_rollouts": 4, "rounds": 1, "branches": 2},
    "staleness": {"trees_per_batch": 4, "max_lag": 4, "max_uses": 1},
    "buffer": {"max_reissues": 1000, "lease_lifetime_s": 2.0, "max_bytes": 4 << 20},
    "actor": {"trees_in_flight": 3, "report_every_s": 0.1},
    "links": {"heartbeat_s": 0.1, "deadline_s": 10.0, "give_up_s": 60.0, "window": 32},
    "eval": {"at_start": False, "at_end": False, "every_steps": 0},
}


def make_run(folder: Path, **sections: dict[str, Any]) -> RunDir:
    """A run folder with its endpoints chosen: what ``atpo train`` makes, without the list of installed packages."""
    data = {name: {**BASE.get(name, {}), **sections.get(name, {})} for name in {*BASE, *sections}}
    data["run"] |= {"name": folder.name, "dir": str(folder.parent)}
    config = configuration.build(data)
    for name in ("logs", "checkpoints"):
        (folder / name).mkdir(parents=True)
    write_atomic(folder / "config.json", json.dumps(config.model_dump(mode="json")))
    write_atomic(
        folder / "run.json", json.dumps({"run_id": f"{folder.name}-0", "name": folder.name, "created": time.time()})
    )
    rundir = RunDir.open(folder)
    rundir.write_endpoints(free_endpoints())
    return rundir


@dataclass(frozen=True, slots=True)
class Kill:
    """Whom to kill, and when: where the learner stands still, or some time after it got so far."""

    victims: Victims
    point: str
    """One of ``KILL_POINTS``; empty: at a moment."""
    after_steps: int
    """Further steps of the learner before this kill is prepared."""
    after_s: float
    """And then this long, where no kill point is named."""


def plan_kills(seed: int, count: int) -> list[Kill]:
    """``count`` kills, the last of them sometimes at the very end of the run."""
    rng = random.Random(seed)
    found = []
    everyone: tuple[Victims, ...] = ("buffer", "learner", "actor", "all")
    for i in range(count):
        victims = rng.choice(everyone)
        point = rng.choice(KILL_POINTS[1:-1]) if rng.random() < 0.5 else ""
        if i == count - 1 and seed % 3 == 0:
            # Not an actor alone: the others may be done with it by then.
            victims, point = rng.choice([name for name in everyone if name != "actor"]), "finishing"
        found.append(Kill(victims, point, rng.randint(0, 2), rng.uniform(0.0, 0.03)))
    return found


@dataclass(kw_only=True)
class Verdict:
    """What came of a run."""

    problems: list[str]
    exceptions: list[str]
    """Tasks that were rightly not trained on as they were meant to be, one by one."""
    kills: Counter[str]
    """Victim, and victim at kill point -> how often."""
    steps: int
    lost_steps: int
    """Steps trained and lost with a learner."""
    seconds: float


class Roles:
    """The processes of one scripted run.

    Args:
        rundir: made by ``make_run``.
        spawner: forks them.
        seed: of the script.
        actors: how many.
        checkpoint_every: batches.
        turn_s, step_s: an action and a batch take up to twice as long.
        endpoints: where actors and learner look for the buffer, if not where it binds.
        tricks: played on the buffer.
        env: for all of them.
    """

    def __init__(
        self,
        rundir: RunDir,
        spawner: Spawner,
        *,
        seed: int,
        actors: int = 2,
        checkpoint_every: int = 3,
        turn_s: float = 0.001,
        step_s: float = 0.002,
        endpoints: Endpoints | None = None,
        tricks: Tricks | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.rundir = rundir
        self.checkpoint_every = checkpoint_every
        self._spawner = spawner
        self._env = dict(env or {})
        there = endpoints or rundir.read_endpoints()
        folder = str(rundir.path)
        self._how: dict[str, tuple[str, tuple[Any, ...]]] = {
            "buffer": ("tests.fault_support:buffer_role", (folder, asdict(tricks or Tricks()))),
            "learner": (
                "tests.oracle_support:run_learner",
                (folder, {"checkpoint_every": checkpoint_every, "step_s": step_s, "endpoint": there.learner}),
            ),
        }
        for i in range(actors):
            how = {"seed": seed, "turn_s": turn_s, "endpoint": there.actors}
            self._how[f"actor-{i}"] = ("tests.oracle_support:run_actor", (folder, f"actor-{i}", how))
        self.alive: dict[str, Role] = {}

    @property
    def names(self) -> list[str]:
        return list(self._how)

    def start(self, *names: str) -> None:
        for name in names or self._how:
            target, args = self._how[name]
            log = self.rundir.log_path(name, self.rundir.next_attempt(name))
            self.alive[name] = self._spawner.start(name, target, *args, log=log, **self._env)

    def kill(self, *names: str) -> None:
        """All at once: a signal to each first, then the waiting."""
        chosen = [self.alive.pop(name) for name in names or list(self.alive) if name in self.alive]
        for role in chosen:
            if role.poll() is None:
                os.kill(role.pid, signal.SIGKILL)
        for role in chosen:
            role.kill()

    @property
    def steps(self) -> int:
        """Steps trained so far over all attempts, those lost again included."""
        return len(lines(self.rundir.path, STEPS))

    def story(self) -> str:
        """What a failure should show."""
        parts = [f"alive: {sorted(self.alive)}; steps: {self.steps}"]
        for log in sorted((self.rundir.path / "logs").glob("*.log")):
            parts.append(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")
        return "\n".join(parts)


GRACE_S = 1.0
"""After the buffer's end, for the others."""
NUM_KILLS = 5
NUM_STEPS = 40
"""Of a run that nobody disturbs: more than its kills let it have before they have struck."""


def run_oracle(folder: Path, spawner: Spawner, *, seed: int, num_kills: int = NUM_KILLS) -> Verdict:
    """One scripted run with kills, and what came of it."""
    rng = random.Random(f"run {seed}")
    max_uses = 1 + seed % 2
    num_tasks = NUM_STEPS * BASE["staleness"]["trees_per_batch"] // max_uses
    publish_every = 1 + (seed // 2) % 2
    # Where every tree is used twice, most seeds let none grow too old: then none may be left out.
    max_lag = rng.choice((2, 4, 8)) if max_uses == 1 or seed % 8 == 7 else 500
    rundir = make_run(
        folder,
        run={"seed": seed, "max_tasks": num_tasks},
        staleness={"max_uses": max_uses, "publish_every": publish_every, "max_lag": max_lag},
    )
    roles = Roles(rundir, spawner, seed=seed, actors=rng.randint(1, 3), checkpoint_every=rng.randint(1, 3))
    driver = _Driver(roles, rng)
    try:
        driver.run(plan_kills(seed, num_kills))
    finally:
        roles.kill()
    return judge(rundir, seed=seed, problems=driver.problems, kills=driver.kills, began=driver.began)


class _Driver:
    """Kills and starts again, as a supervisor and its user would."""

    def __init__(self, roles: Roles, rng: random.Random) -> None:
        self.roles = roles
        self.rng = rng
        self.kills: Counter[str] = Counter()
        self.problems: list[str] = []
        self.began = time.monotonic()
        self._folder = roles.rundir.path
        self._ended: set[str] = set()
        self._buffer_ended_at: float | None = None

    def run(self, kills: Sequence[Kill]) -> None:
        self._allow(0)
        self.roles.start()
        for kill in kills:
            if not self._prepared(kill):
                break
            self._strike(kill)
        (self._folder / ALLOWED).unlink(missing_ok=True)
        self._until(lambda: self._ended >= set(self.roles.names), "the run's end")

    def _until(self, condition: Callable[[], Any], what: str) -> bool:
        """True once ``condition`` holds; False once the run is over without.  Who dies by itself is a problem."""

        def look() -> bool:
            for name, role in list(self.roles.alive.items()):
                code = role.poll()
                if code is None:
                    continue
                del self.roles.alive[name]
                self._ended.add(name)
                if code != 0:
                    self.problems.append(f"{name} ended with {code} by itself: {role.said()[-1500:]}")
                    if len(self.problems) > 3:
                        raise AssertionError(f"the roles do not stay up\n{self.roles.story()}")
                    self._start(name)
            self._look_after_the_end()
            return bool(condition()) or self._ended >= set(self.roles.names)

        try:
            until(look, what, story=self.roles.story)
        except AssertionError as exc:
            self.problems.append(str(exc))
            return False
        return bool(condition())

    def _look_after_the_end(self) -> None:
        """What a supervisor and its user do when not everybody learnt that the run is over."""
        if "buffer" not in self._ended:
            self._buffer_ended_at = None
            return
        now = time.monotonic()
        self._buffer_ended_at = self._buffer_ended_at or now
        if now - self._buffer_ended_at < GRACE_S:
            return
        if "learner" in self._ended:
            left = list(self.roles.alive)
            self.roles.kill(*left)
            self._ended |= set(left)
        else:
            self._start(*self._ended)

    def _start(self, *names: str) -> None:
        self._ended -= set(names)
        self.roles.start(*names)

    def _allow(self, steps: int) -> None:
        write_atomic(self._folder / ALLOWED, str(steps))

    def _prepared(self, kill: Kill) -> bool:
        goal = self.roles.steps + kill.after_steps
        if kill.point == "finishing":
            (self._folder / ALLOWED).unlink(missing_ok=True)
        else:
            # Enough to come by every kill point once, with a checkpoint; or to be in the middle of something.
            self._allow(goal + self.roles.checkpoint_every + 1)
            if not self._until(lambda: self.roles.steps >= goal, f"step {goal}"):
                return False
        if not kill.point:
            return True
        (self._folder / STOPPED_AT).unlink(missing_ok=True)
        (self._folder / STOP_AT).write_text(kill.point)
        there = self._until(
            lambda: (self._folder / STOPPED_AT).exists() and self.roles.alive["learner"].frozen,
            f"the learner at {kill.point!r}",
        )
        (self._folder / STOP_AT).unlink(missing_ok=True)
        return there

    def _strike(self, kill: Kill) -> None:
        if not kill.point:
            time.sleep(kill.after_s)  # a moment of chance: nothing is waited for
        actors = [name for name in self.roles.alive if name.startswith("actor")]
        victims = {
            "all": list(self.roles.alive),
            "actor": [self.rng.choice(actors)] if actors else [],
        }.get(kill.victims, [kill.victims])
        victims = [name for name in victims if name in self.roles.alive]
        self.roles.kill(*victims)
        self.kills[kill.victims] += bool(victims)
        if kill.point:
            self.kills[f"{kill.victims} at {kill.point}"] += bool(victims)
            learner = self.roles.alive.get("learner")
            if learner is not None:
                learner.thaw()
        time.sleep(self.rng.choice((0.0, 0.01, 0.05)))  # how long the supervisor happens to take
        self.rng.shuffle(victims)
        self._start(*victims)


def judge(
    rundir: RunDir, *, seed: int, problems: Sequence[str], kills: Counter[str] | None = None, began: float = 0.0
) -> Verdict:
    """Every task exactly as often as intended, every byte as the script has it, no version twice."""
    config, folder = rundir.config, rundir.path
    problems = [*problems, *lines(folder, PROBLEMS)]
    exceptions: list[str] = []
    lineage = Lineage.load(folder)
    uses: Counter[int] = Counter()
    fresh_from: dict[int, int] = {}
    for expected, trace in enumerate(lineage.traces):
        if trace.step != expected:
            problems.append(f"batch {trace.step} stands in the lineage where {expected} should")
        if len(set(trace.trees)) != len(trace.trees) or len(set(trace.tasks)) != len(trace.tasks):
            problems.append(f"batch {trace.step} holds a tree twice: {trace.trees}")
        uses.update(trace.tasks)
        fresh_from.update(zip(trace.tasks, trace.fresh_from, strict=True))
        for tree_id, task, hashes in zip(trace.trees, trace.tasks, trace.hashes, strict=True):
            lacking = possible_trees(seed, task).get(tuple(hashes))
            if lacking is None:
                problems.append(f"tree {tree_id} of batch {trace.step} is not what task {task} makes")
            elif lacking:
                exceptions.append(f"tree {tree_id} of task {task} lacks {lacking} turns of a lost holder")
    versions = [trace.version for trace in lineage.traces]
    if sorted(set(versions)) != versions:
        problems.append(f"versions of the lineage do not rise: {versions}")
    latest = max(versions, default=0)
    taken = [int(line) for line in lines(folder, TAKEN)]
    if len(set(taken)) != len(taken):
        problems.append(f"version numbers were used twice: {[v for v, n in Counter(taken).items() if n > 1]}")
    for task in range(config.run.max_tasks or 0):
        kind = planned(seed, task).kind
        wanted = config.staleness.max_uses if kind == "plain" else 0
        too_old = latest - fresh_from.get(task, latest) > config.staleness.max_lag
        if 0 < uses[task] < wanted and too_old:
            exceptions.append(f"task {task} was trained on {uses[task]} times, then its tree was too old")
        elif uses[task] != wanted:
            problems.append(f"task {task} ({kind}) was trained on {uses[task]} times, not {wanted}")
        elif kind != "plain":
            exceptions.append(f"task {task} has nothing to learn from: {kind}")
    strangers = {task for task in uses if task >= (config.run.max_tasks or 0)}
    if strangers:
        problems.append(f"tasks that the run does not have: {sorted(strangers)}")
    problems += _contradictions(rundir, steps=len(lineage.traces))
    return Verdict(
        problems=problems,
        exceptions=exceptions,
        kills=kills or Counter(),
        steps=len(lineage.traces),
        lost_steps=len([s for s in lines(folder, STEPS) if s.isdecimal()]) - len(lineage.traces),
        seconds=time.monotonic() - began,
    )


def _contradictions(rundir: RunDir, *, steps: int) -> list[str]:
    """What the buffer's journal says after the run and the lineage does not."""
    with lmdb.open(str(rundir.path / "journal"), readonly=True, lock=False, max_dbs=4) as env:
        table = env.open_db(b"state", create=False)
        with env.begin() as txn:
            state = {bytes(key): bytes(value) for key, value in txn.cursor(db=table)}
    rest = entries.read(state, entries.RUN, entries.RunEntry)
    assert rest is not None
    found = [
        f"the journal still has {key.decode()} after a run that used it up and has a checkpoint of it"
        for key in state
        if key.startswith((entries.TREE, entries.BATCH))
    ]
    if (rest.step, rest.again) != (steps - 1, ()) and rest.step != steps:
        found.append(f"the journal ends at step {rest.step} ({rest.again=}), the lineage at {steps}")
    if rest.next_task != rundir.config.run.max_tasks or rest.given_up:
        found.append(f"the journal has leased tasks below {rest.next_task} and given up {rest.given_up} trees")
    return found


# --- faults ----------------------------------------------------------------------------------------------------


class Scene:
    """A scripted run into which a test brings one fault; the test is its supervisor.  Use as an async context.

    The learner trains ``allowed`` steps and then waits, until ``ended_well`` lets it go.

    Args:
        folder: for the run.
        spawner: forks the roles.
        proxied: actors and learner reach the buffer through ``actors_proxy`` and ``learner_proxy``.
        allowed: steps before the learner waits.
        how: as of ``Roles``.
        sections: of the configuration.
    """

    def __init__(
        self,
        folder: Path,
        spawner: Spawner,
        *,
        seed: int = 0,
        num_tasks: int = 48,
        proxied: bool = False,
        allowed: int = 2,
        how: Mapping[str, Any] | None = None,
        sections: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        self.seed = seed
        given = {name: dict(section) for name, section in (sections or {}).items()}
        given["run"] = {"seed": seed, "max_tasks": num_tasks} | given.get("run", {})
        self.rundir = make_run(folder, **given)
        self._spawner = spawner
        self._how = dict(how or {})
        self._proxied = proxied
        there = self.rundir.read_endpoints()
        self.actors_proxy, self.learner_proxy = Proxy(there.actors), Proxy(there.learner)
        self._open = contextlib.AsyncExitStack()
        self.allow(allowed)

    async def __aenter__(self) -> Self:
        endpoints = None
        if self._proxied:
            for proxy in (self.actors_proxy, self.learner_proxy):
                await self._open.enter_async_context(proxy)
            endpoints = Endpoints(actors=self.actors_proxy.endpoint, learner=self.learner_proxy.endpoint)
        self.roles = Roles(self.rundir, self._spawner, seed=self.seed, endpoints=endpoints, **self._how)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.roles.kill()
        await self._open.aclose()

    def __getitem__(self, name: str) -> Role:
        return self.roles.alive[name]

    @property
    def steps(self) -> int:
        return self.roles.steps

    def allow(self, steps: int) -> None:
        """The learner may have trained so many steps in all."""
        write_atomic(self.rundir.path / ALLOWED, str(steps))

    async def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Waits for what the roles bring about; a role that ends meanwhile, not killed by the test, fails it."""

        def look() -> Any:
            for role in self.roles.alive.values():
                assert role.poll() in (None, 0), f"{role.name} ended with {role.poll()} by itself\n{self.roles.story()}"
            return condition()

        return await until_async(look, what, story=self.roles.story)

    def resident_mb(self, name: str) -> float:
        return processes.memory_mb([self[name].pid])

    async def stepped(self, count: int = 1) -> None:
        """``count`` further batches are trained."""
        goal = self.steps + count
        self.allow(goal)
        await self.until(lambda: self.steps >= goal, f"step {goal}")

    def move_buffer(self) -> Endpoints:
        """The next buffer binds other ports."""
        moved = free_endpoints()
        self.rundir.write_endpoints(moved)
        return moved

    async def recovered(self, recovery: Recovery, *actors: str) -> None:
        """The next batch is trained, and of each of ``actors`` (all that run, where none is named) a further turn is
        acknowledged: the measured end of a fault."""
        names = actors or tuple(name for name in self.roles.alive if name.startswith("actor"))
        before = {name: self.acked(name) for name in names}
        allowed = goal = self.steps + 1

        def works() -> bool:
            return self.steps >= goal and all(self.acked(name) > before[name] for name in names)

        while True:
            self.allow(allowed)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await self.until(works, "work to go on")
                    return recovery.recovered()
            allowed += 1  # they were waiting for room: the next batch makes some

    def acked(self, actor: str) -> int:
        """Turns of an actor that were acknowledged, over all its attempts."""
        return sum(int(line) for line in lines(self.rundir.path, acked_file(actor)))

    async def ended_well(self) -> Verdict:
        """The run goes to its end, and every task was trained on as often as intended."""
        (self.rundir.path / ALLOWED).unlink(missing_ok=True)
        await self.until(lambda: all(r.poll() == 0 for r in self.roles.alive.values()), "the run's end")
        verdict = judge(self.rundir, seed=self.seed, problems=())
        assert not verdict.problems, "\n".join([*verdict.problems, self.roles.story()])
        return verdict


def starts_slowly(plan: Planned) -> bool:
    """Three turns come before its second leaf: cut off there, the tree goes to another actor."""
    leaves = [part.turn_id for part in plan.parts if part.is_leaf]
    return plan.kind == "plain" and len(leaves) > 1 and leaves[1] > 3


class Hand:
    """An actor whose every message the test sends itself.  Use as an async context.

    Args:
        scene: the run.
        name: of this actor.
        endpoint: of the buffer, if not where it binds.
        max_message_bytes: what this sender takes for the limit.
    """

    def __init__(
        self, scene: Scene, name: str = "by-hand", *, endpoint: str = "", max_message_bytes: int | None = None
    ) -> None:
        self._scene = scene
        self._rundir = scene.rundir
        self.name = name
        self.run = self._rundir.run_id
        self.refusals: list[str] = []
        self._held: set[str] = set()
        settings = self._rundir.config.links
        if max_message_bytes is not None:
            settings = settings.model_copy(update={"max_message_bytes": max_message_bytes})
        self.link = Client(
            endpoint or self._rundir.read_endpoints().actors,
            peer="buffer",
            identity=name,
            receives=BufferToActor,
            settings=settings,
            on_refused=lambda message, reason: self.refusals.append(reason),
        )

    async def __aenter__(self) -> Self:
        await self.link.__aenter__()
        config = self._rundir.config
        hello = ActorHello(
            protocol=PROTOCOL,
            run=self.run,
            actor=self.name,
            environment=config.environment.name,
            search_leaves=config.search.max_leaves,
        )
        while True:
            with contextlib.suppress(PeerLost):
                answer = await self.link.request(hello, timeout_s=5.0)
                assert isinstance(answer, Welcome), answer
                if answer.weights_endpoint:
                    return self
            await asyncio.sleep(0.01)

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._held:
            with contextlib.suppress(PeerLost):
                await self.return_all()
        await self.link.close()

    async def return_all(self) -> None:
        """Hands back what it holds: nobody has to wait until its leases lapse."""
        await self.send(LeaseReturned(run=self.run, actor=self.name, tree_ids=tuple(self._held)))
        self.forget()

    def forget(self) -> None:
        """Leave its leases to lapse, or to its successor."""
        self._held.clear()

    async def leases(self, count: int = 1) -> tuple[Lease, ...]:
        """One answer; maybe none."""
        request = LeaseRequest(run=self.run, actor=self.name, count=count, version=published(self._rundir.path))
        answer = await self.link.request(request, timeout_s=PATIENCE_S)
        assert isinstance(answer, Leases), answer
        self._held |= {lease.tree_id for lease in answer.leases}
        return answer.leases

    async def lease(self, *, of: Callable[[Planned], bool] = lambda plan: plan.kind == "plain") -> Lease:
        """A lease of a task that ``of`` takes; the others are grown on the way."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                for lease in await self.leases():
                    if of(self.plan(lease)):
                        return lease
                    await self.grow(lease)

    async def begin_slow_tree(self, num_turns: int) -> tuple[Lease, list[Turn], TreeClosed]:
        """A lease of a tree that ``starts_slowly``, opened, with so many of its turns sent; and all its turns."""
        lease = await self.lease(of=starts_slowly)
        opened, *turns, closed = self.messages(lease)
        assert isinstance(closed, TreeClosed)
        await self.send(opened, *turns[:num_turns])
        return lease, [turn for turn in turns if isinstance(turn, Turn)], closed

    def plan(self, lease: Lease) -> Planned:
        return planned(self._scene.seed, lease.task_index)

    def messages(self, lease: Lease) -> list[TreeOpened | Turn | TreeClosed]:
        """All that an actor sends for a lease, in order."""
        return messages_of(lease, self.plan(lease), run=self.run, version=published(self._rundir.path))

    async def grow(self, lease: Lease) -> None:
        await self.send(*self.messages(lease))

    async def send(self, *messages: object) -> None:
        """Sent, and acknowledged or refused."""
        for message in messages:
            await self.link.send(message)
        await self.link.drain(timeout_s=PATIENCE_S)
