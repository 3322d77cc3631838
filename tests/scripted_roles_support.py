"""A scripted actor and a scripted learner, real processes around the real buffer, and the files in which they note what
they did.

The learner's lineage stands for its weights: it lives in its checkpoint and is lost with what comes after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from actors.slots import START
from atpo_async.config import Config
from atpo_async.core.errors import PeerLost
from atpo_async.core.tree import Turn
from atpo_async.links.client import Client
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
    Leases,
    NotYet,
    RunFinished,
    SampleRequest,
    Trained,
    VersionPublished,
    Welcome,
)
from tests.scripted_trees_support import hash_of, messages_of, planned, tree_hashes

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


class _Scripted:
    """What the scripted roles have in common: their run, and a link to its buffer.

    Args:
        folder: of the run.
        endpoint: where the buffer is.
    """

    def __init__(self, folder: Path, endpoint: str) -> None:
        self._folder = folder
        self._rundir = RunDir.open(folder)
        self._config = self._rundir.config
        self._run = self._rundir.run_id
        self._endpoint = endpoint

    def _link(self, name: str, receives: Any, on_refused: Callable[[Any, str], None]) -> Client:
        return Client(
            self._endpoint,
            peer="buffer",
            identity=name,
            receives=receives,
            settings=self._config.links,
            on_refused=on_refused,
        )


def hello_of(config: Config, *, run: str, actor: str) -> ActorHello:
    return ActorHello(
        protocol=PROTOCOL,
        run=run,
        actor=actor,
        environment=config.environment.name,
        search_leaves=config.search.max_leaves,
    )


class _Actor(_Scripted):
    """Leases, grows by the script, goes on from committed turns, gives up what is refused.

    Args:
        folder: of the run.
        name: of this actor.
        seed: of the script.
        turn_s: an action takes up to twice this long.
        endpoint: where the buffer is; by the run's folder if empty.
    """

    def __init__(self, folder: Path, name: str, *, seed: int, turn_s: float = 0.001, endpoint: str = "") -> None:
        super().__init__(folder, endpoint or RunDir.open(folder).read_endpoints().actors)
        self._name = name
        self._seed = seed
        self._turn_s = turn_s
        self._rng = random.Random(f"{seed}/{name}/{os.getpid()}")
        self._growing: dict[str, asyncio.Task[None]] = {}
        self._turns_sent: deque[bool] = deque()
        """Of each send that is not done with: whether it is a turn."""
        self._in_order = asyncio.Lock()
        self._done_with = 0
        self._refused_now = 0

    async def work(self) -> None:
        """Waits for: leases.  Unblocked by: the buffer; ends when it says that the run is over."""
        self._buffer = self._link(self._name, BufferToActor, self._on_refused)
        self._buffer.on_acked = self._on_acked
        async with self._buffer:
            await self._join()
            async with asyncio.TaskGroup() as tasks:
                report = tasks.create_task(self._report(), name="report")
                await self._take_leases(tasks)
                report.cancel()

    async def _join(self) -> None:
        hello = hello_of(self._config, run=self._run, actor=self._name)
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
            free = (self._config.actor.trees_in_flight or START) - len(self._growing)
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


class _Learner(_Scripted):
    """Asks for batches, notes what it was given, checkpoints, and goes on from its checkpoint when started again.

    Args:
        folder: of the run.
        checkpoint_every: batches.
        step_s: a batch takes up to twice this long.
        endpoint: where the buffer is; by the run's folder if empty.
    """

    def __init__(self, folder: Path, *, checkpoint_every: int, step_s: float = 0.002, endpoint: str = "") -> None:
        super().__init__(folder, endpoint or RunDir.open(folder).read_endpoints().learner)
        self._every = checkpoint_every
        self._step_s = step_s
        self._lineage = Lineage.load(folder)
        self._checkpointed = self._lineage.step
        self._version = -1

    async def work(self) -> None:
        """Waits for: batches.  Unblocked by: the buffer; ends when there are no more."""
        self._buffer = self._link(
            "learner",
            BufferToLearner,
            lambda message, reason: note(self._folder, PROBLEMS, f"learner refused: {reason}"),
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
