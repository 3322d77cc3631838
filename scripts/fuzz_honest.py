"""An honest actor and an honest learner that work beside the fuzzing peers and report whatever goes otherwise than it
should.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from atpo_async.config import Config, LinksConfig
from atpo_async.core.tree import Turn, VersionSpan
from atpo_async.links.client import Client
from atpo_async.wire import messages as m
from scripts.fuzz_corpus import Door, example_turn

STALL_S = 30.0
"""No single step of honest work may take longer."""


@dataclass
class HonestReport:
    """What the honest peers did and saw."""

    faults: list[str] = field(default_factory=list)
    """What went otherwise than it should."""
    trees: int = 0
    turns: int = 0
    batches: int = 0
    trees_trained: int = 0
    slowest_s: float = 0.0
    """Of all answers that were waited for; ``slowest`` says which."""
    slowest: str = ""
    bad_messages: int = 0
    """That the buffer had counted when it made the last batch."""


def hello_of(config: Config, run: str) -> m.ActorHello:
    """What the honest actor says first."""
    name, leaves = config.environment.name, config.search.max_leaves
    return m.ActorHello(protocol=m.PROTOCOL, run=run, actor="honest-actor", environment=name, search_leaves=leaves)


class Honest:
    """An actor and a learner that work as they should, and note whatever goes otherwise than it should.

    Args:
        run: the run's id.
        doors: endpoints of the buffer.
        hello: the actor's.
        trees_per_batch: what the learner asks for.
        settings: of the links.
        pause_s: between two trees; leaves the machine to the others.
    """

    def __init__(
        self,
        run: str,
        doors: dict[Door, str],
        *,
        hello: m.ActorHello,
        trees_per_batch: int,
        settings: LinksConfig,
        pause_s: float = 0.02,
    ) -> None:
        self.report = HonestReport()
        self._run, self._doors, self._hello = run, doors, hello
        self._trees_per_batch, self._settings, self._pause_s = trees_per_batch, settings, pause_s
        self._stopping = asyncio.Event()
        self._version = 0
        self._grown: dict[str, int] = {}
        self._progressed_at = time.monotonic()

    def stop(self) -> None:
        self._stopping.set()

    async def work(self) -> HonestReport:
        """Waits for: ``stop``.  Faults are in the report."""
        try:
            async with self._client("learner", "honest-learner", m.BufferToLearner) as learner:
                await self._timed("publish", self._send(learner, self._published()))
                async with (
                    self._client("actors", self._hello.actor, m.BufferToActor) as actor,
                    asyncio.TaskGroup() as group,
                ):
                    group.create_task(self._grow(actor))
                    group.create_task(self._train(learner))
        except* Exception as group_of:
            for exc in group_of.exceptions:
                self.report.faults.append("".join(traceback.format_exception_only(exc)).strip())
        return self.report

    def _client(self, door: Door, name: str, receives: Any) -> Client:
        def refused(message: Any, reason: str) -> None:
            self.report.faults.append(f"{type(message).__name__} of {name} was refused: {reason}")

        return Client(
            self._doors[door],
            peer="buffer",
            identity=name,
            receives=receives,
            settings=self._settings,
            on_refused=refused,
        )

    def _published(self) -> m.VersionPublished:
        return m.VersionPublished(
            run=self._run, version=self._version, weights_endpoint="tcp://w:1", announce_endpoint="tcp://n:1"
        )

    async def _send(self, client: Client, *messages: Any) -> None:
        for message in messages:
            await client.send(message)
        await client.drain(timeout_s=STALL_S)

    async def _timed(self, what: str, doing: Any) -> Any:
        begun = time.monotonic()
        async with asyncio.timeout(STALL_S):
            result = await doing
        took_s = time.monotonic() - begun
        if took_s > self.report.slowest_s:
            self.report.slowest_s, self.report.slowest = took_s, what
        if isinstance(result, m.Refused):
            raise AssertionError(f"{what} was refused: {result.reason}")
        return result

    async def _grow(self, client: Client) -> None:
        """Lease, open, turns, close.  Waits for: leases.  Ended by: ``stop``."""
        await self._timed("hello", client.request(self._hello, timeout_s=STALL_S))
        actor, reported_at = self._hello.actor, 0.0
        while not self._stopping.is_set():
            asked = m.LeaseRequest(run=self._run, actor=actor, count=2, version=self._version)
            leases = await self._timed("lease", client.request(asked, timeout_s=STALL_S))
            for lease in leases.leases:
                await self._timed("a tree's acknowledgement", self._send(client, *self._tree(lease)))
                self._grown[lease.tree_id] = lease.task_index
                self.report.trees += 1
                await asyncio.sleep(self._pause_s)
            if time.monotonic() - reported_at > 1.0:
                reported_at = time.monotonic()
                report = m.ActorReport(run=self._run, actor=actor, version=self._version, tree_ids=(), metrics={})
                await self._timed("report", self._send(client, report))

    def _tree(self, lease: m.Lease) -> list[Any]:
        turns = [self._turn(lease.tree_id, i, lease.epoch) for i in range(1 + len(lease.committed), 5)]
        self.report.turns += len(turns)
        opened = m.TreeOpened(
            run=self._run, tree_id=lease.tree_id, lease_epoch=lease.epoch, prompt=np.arange(8, dtype=np.int32)
        )
        closed = m.TreeClosed(
            run=self._run, tree_id=lease.tree_id, lease_epoch=lease.epoch, num_turns=4, failed_branches=0, failures={}
        )
        return [opened, *turns, closed]

    def _turn(self, tree_id: str, turn_id: int, epoch: int) -> Turn:
        return example_turn(self._run, tree_id, turn_id, epoch=epoch, spans=(VersionSpan(self._version, 0, 12),))

    async def _train(self, client: Client) -> None:
        """Sample, confirm, publish.  Waits for: batches.  Ended by: ``stop``."""
        step, waited_since = 0, time.monotonic()
        while not self._stopping.is_set():
            asked = m.SampleRequest(
                run=self._run,
                rank=0,
                num_ranks=1,
                step=step,
                version=self._version,
                num_trees=self._trees_per_batch,
                wait_s=1.0,
            )
            reply = await self._timed("batch", client.request(asked, timeout_s=STALL_S))
            if isinstance(reply, m.NotYet):
                if time.monotonic() - waited_since > STALL_S:
                    raise AssertionError(f"no batch for {STALL_S:.0f} s: the buffer waits for {reply.waiting_for}")
                continue
            assert isinstance(reply, m.Batch), reply
            for tree in reply.trees:
                self._look_at(tree)
            step, waited_since = step + 1, time.monotonic()
            self._version += 1
            priorities = {tree.tree_id: 0.5 for tree in reply.trees}
            trained = m.Trained(run=self._run, batch_id=reply.batch_id, version=self._version, priorities=priorities)
            checkpointed = m.Checkpointed(run=self._run, step=step, version=self._version)
            await self._timed("trained", self._send(client, trained, checkpointed, self._published()))
            self.report.batches += 1
            self.report.bad_messages += int(reply.metrics.get("buffer/bad_messages", 0))
            self.report.trees_trained += len(reply.trees)

    def _look_at(self, tree: m.BatchTree) -> None:
        if tree.tree_id not in self._grown and len(tree.turns) != 4:
            raise AssertionError(f"a batch has tree {tree.tree_id}, which was not grown")
        for turn in tree.turns:
            grown = example_turn(self._run, tree.tree_id, turn.turn_id)
            same = np.array_equal(turn.action, grown.action) and np.array_equal(turn.logprobs, grown.logprobs)
            if not same or turn.reward != grown.reward:
                raise AssertionError(f"turn {turn.turn_id} of tree {tree.tree_id} came back otherwise than it was sent")


def honest_process(
    run: str, doors: dict[Door, str], hello: m.ActorHello, trees_per_batch: int, heartbeat_s: float, pipe: Connection
) -> None:
    """Honest peers in a process of their own: ends on any word from the pipe, and answers with the report."""

    async def main() -> HonestReport:
        settings = LinksConfig(heartbeat_s=heartbeat_s, give_up_s=2 * STALL_S)
        honest = Honest(run, doors, hello=hello, trees_per_batch=trees_per_batch, settings=settings)
        asyncio.get_running_loop().add_reader(pipe.fileno(), honest.stop)
        working = asyncio.create_task(honest.work())
        return await working

    pipe.send(asyncio.run(main()))
