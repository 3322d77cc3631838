"""A simulated actor: it speaks the links' protocol as a real one does, and only its engine is a pace.

Its engine makes so many turns a second in all, over the trees that are in flight in turn: the more trees there are, the
longer each takes.  It leases trees for its free slots, goes on from turns that an earlier holder committed, reports,
and leaves with notice: it finishes the turn under way, hands its leases back, and ends when all of it is acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from actors.turns.sender import TurnSender
from atpo_async.config import Config
from atpo_async.core.errors import PeerLost
from atpo_async.links.client import Client
from atpo_async.wire.messages import (
    PROTOCOL,
    ActorHello,
    ActorReport,
    BufferToActor,
    Lease,
    LeaseRequest,
    LeaseReturned,
    Leases,
    TreeClosed,
    TreeOpened,
    Welcome,
)
from benchmarks.load import REPLY_S, Turns

REPORT_EVERY_S = 2.0
ASKS_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True)
class ActorPlan:
    """How one simulated actor behaves."""

    name: str
    turns_per_s: float | None = None
    """Of all its trees together; None: as fast as the link takes them."""
    slots: int = 4
    """Trees in flight at most."""
    turns_per_tree: int = 20
    host: str = ""
    host_id: str = ""
    joins_s: float = 0.0
    """After the fleet's start."""
    begins_s: float = 0.0
    """After it was let in, so that not all actors of a fleet ask for leases at the same moments."""
    leaves_s: float | None = None
    """After the fleet's start; with notice."""


@dataclass(kw_only=True)
class ActorResult:
    """What came of one actor."""

    name: str
    turns: int = 0
    trees: int = 0
    worked_s: float = 0.0
    """From its first lease to the run's end, or until it left."""
    idle_s: float = 0.0
    """Of that, without a tree."""
    lease_s: array[float] = field(default_factory=lambda: array("d"))
    """From each request for leases to its answer, of those answered with leases."""
    refused: list[str] = field(default_factory=list)
    waited_s: float = 0.0
    """For space in the link's window."""

    @property
    def busy_share(self) -> float:
        return 1.0 - self.idle_s / self.worked_s if self.worked_s else 0.0


@dataclass(slots=True)
class _Tree:
    lease: Lease
    next_turn: int
    turns: int


class SimulatedActor:
    """One actor.  Use as an async context, then ``work``.

    Args:
        plan: how it behaves.
        endpoint, run, config: of the buffer.
        turns: what its turns are made of; may be shared.
        version: that it generates with now.
        direct: where the buffer has shards, turns are sent straight to them.
        may_lease: how many further trees it may ask for, for a fleet that is dealt out in another way than by asking.
    """

    def __init__(
        self,
        plan: ActorPlan,
        *,
        endpoint: str,
        run: str,
        config: Config,
        turns: Turns,
        version: Callable[[], int] = lambda: 0,
        direct: bool = True,
        may_lease: Callable[[ActorResult], int] | None = None,
    ) -> None:
        self.plan = plan
        self.result = ActorResult(name=plan.name)
        self._run, self._config, self._made, self._version = run, config, turns, version
        self._may_lease = may_lease
        self.on_begun: Callable[[int], None] = lambda trees: None
        """Called with the number of trees of each answer."""
        self._trees: deque[_Tree] = deque()
        self._changed = asyncio.Event()
        self._over = asyncio.Event()
        """The run is over, or it was asked to leave."""
        self._run_is_over = False
        self._asks_at = 0.0
        self._began_s = self._idle_since = 0.0
        self.link = Client(
            endpoint,
            peer="buffer",
            identity=plan.name,
            receives=BufferToActor,
            settings=config.links,
            on_refused=lambda message, reason: self.result.refused.append(f"{type(message).__name__}: {reason}"),
        )
        self._direct = direct
        self.turns = TurnSender(run=run, name=plan.name, config=config, buffer=self.link)

    async def __aenter__(self) -> Self:
        await self.link.__aenter__()
        hello = ActorHello(
            protocol=PROTOCOL, run=self._run, actor=self.plan.name, environment=self._config.task_name,
            search_leaves=self._config.max_leaves, host=self.plan.host, host_id=self.plan.host_id,
        )  # fmt: skip
        answer = await self.link.request(hello, timeout_s=REPLY_S)
        if not isinstance(answer, Welcome):
            raise SystemExit(f"the buffer does not take {self.plan.name}: {answer}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.result.waited_s = self.turns.waited_s
        await self.turns.__aexit__(kind, exc, trace)
        await self.link.close()

    def leave(self) -> None:
        """Finish the turn under way, hand the leases back and end."""
        self._over.set()
        self._changed.set()

    async def work(self) -> ActorResult:
        """Grow trees.  Waits for: the run's end.  Unblocked by: the buffer's word that it is over, ``leave``."""
        async with asyncio.TaskGroup() as tasks:
            leasing = tasks.create_task(self._lease(), name=f"{self.plan.name} leases")
            reporting = tasks.create_task(self._report(), name=f"{self.plan.name} reports")
            await self._grow()
            leasing.cancel()
            reporting.cancel()
        if self._run_is_over:
            return self.result  # the buffer may have ended by now
        held = tuple(tree.lease.tree_id for tree in self._trees)
        await self.link.send(LeaseReturned(run=self._run, actor=self.plan.name, tree_ids=held))
        await self.link.drain(timeout_s=REPLY_S)
        return self.result

    # --- leases ------------------------------------------------------------------------------------------------

    async def _lease(self) -> None:
        """Keep every slot growing a tree.  Waits for: a free slot, then a lease."""
        await asyncio.sleep(self.plan.begins_s)
        while not self._over.is_set():
            free = self.plan.slots - len(self._trees)
            if self._may_lease is not None:
                free = min(free, self._may_lease(self.result))
            if free <= 0:
                self._changed.clear()
                if self._may_lease is None:
                    await self._changed.wait()
                elif await self._hears_the_end():
                    return
                continue
            asked = time.perf_counter()
            answer = await self.link.request(
                LeaseRequest(run=self._run, actor=self.plan.name, count=free, version=self._version()),
                timeout_s=REPLY_S,
            )
            if not isinstance(answer, Leases):
                raise SystemExit(f"{self.plan.name} asked for leases and got {answer}")
            if answer.leases:
                self.result.lease_s.append(time.perf_counter() - asked)
                if self._direct:
                    self.turns.learn(answer.shards)
                self._begin(answer.leases)
            elif answer.finished:
                self._end()
            else:
                await asyncio.sleep(answer.retry_after_s)

    async def _hears_the_end(self) -> bool:
        """One that may ask for no leases asks now and then whether the run is over.  Waits for: the clock."""
        await asyncio.sleep(0.01)
        if time.monotonic() < self._asks_at:
            return False
        self._asks_at = time.monotonic() + ASKS_EVERY_S
        request = LeaseRequest(run=self._run, actor=self.plan.name, count=0, version=self._version())
        with contextlib.suppress(PeerLost):
            answer = await self.link.request(request, timeout_s=0.05)
            if isinstance(answer, Leases) and answer.finished:
                self._end()
        return self._run_is_over

    def _end(self) -> None:
        """The buffer has said that the run is over."""
        self._run_is_over = True
        self.leave()

    def _begin(self, leases: tuple[Lease, ...]) -> None:
        now = time.monotonic()
        if not self._trees:
            if self._began_s:
                self.result.idle_s += now - self._idle_since
            else:
                self._began_s = now
        for lease in leases:
            self._trees.append(_Tree(lease, len(lease.committed) + 1, self.plan.turns_per_tree))
        self.on_begun(len(leases))
        self._changed.set()

    # --- the engine --------------------------------------------------------------------------------------------

    async def _grow(self) -> None:
        """One turn after another, of all trees in turn.  Waits for: the pace; a tree; space in the window."""
        due = time.monotonic()
        while not self._over.is_set():
            if not self._trees:
                self._changed.clear()
                await self._changed.wait()
                due = time.monotonic()
                continue
            tree = self._trees[0]
            self._trees.rotate(-1)
            if self.plan.turns_per_s is not None:
                due += 1.0 / self.plan.turns_per_s
                await asyncio.sleep(max(due - time.monotonic(), 0.0))
            await self._turn(tree)
        now = time.monotonic()
        if self._began_s:
            self.result.worked_s = now - self._began_s
            if not self._trees:
                self.result.idle_s += now - self._idle_since

    async def _turn(self, tree: _Tree) -> None:
        lease, run = tree.lease, self._run
        if tree.next_turn == 1:
            await self.turns.send(
                TreeOpened(run=run, tree_id=lease.tree_id, lease_epoch=lease.epoch, prompt=self._made.prompt)
            )
        if tree.next_turn <= tree.turns:
            await self.turns.send(self._made.turn(run, lease, tree.next_turn, version=self._version()))
            tree.next_turn += 1
            self.result.turns += 1
        if tree.next_turn <= tree.turns:
            return
        await self.turns.send(
            TreeClosed(
                run=run,
                tree_id=lease.tree_id,
                lease_epoch=lease.epoch,
                num_turns=tree.turns,
                failed_branches=0,
                failures={},
            )
        )
        self._trees.remove(tree)
        self.result.trees += 1
        if not self._trees:
            self._idle_since = time.monotonic()
        self._changed.set()

    async def _report(self) -> None:
        """Keep the leases.  Waits for: the clock, and space in the window."""
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            held = tuple(tree.lease.tree_id for tree in self._trees)
            metrics: dict[str, Any] = {"actor/trees_in_flight": float(len(held))}
            await self.link.send(
                ActorReport(
                    run=self._run,
                    actor=self.plan.name,
                    version=self._version(),
                    tree_ids=held,
                    metrics=metrics,
                    host=self.plan.host,
                    host_id=self.plan.host_id,
                )
            )
