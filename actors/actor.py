"""The actor's loop: lease -> grow trees -> stream turns, and weights in while it generates.

Who waits for whom: a free slot waits for a lease (unblocked by the learner taking trees from the buffer); a finished
turn waits for space in the link's window (unblocked by the buffer's acknowledgements); a lease waits for its least
version (unblocked by the learner's publication).  The first two are what ``time/actor_wait_s`` measures.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from actors.engines.base import Engine
from actors.environments import Environments
from actors.faults.fault import first_of
from actors.faults.faults import Faults
from actors.leases import RETURN_TIMEOUT_S, LeaseSource
from actors.reports import Interval
from actors.search.growing import TreeGrower
from actors.slots import Meter, control_of
from actors.turns.sender import TurnSender
from actors.weights.fetcher import WeightsFetcher
from actors.weights.uptake import WeightsUptake
from atpo_async.config import Config
from atpo_async.core.texts import shortened
from atpo_async.environments.base import Environment
from atpo_async.links.client import Client
from atpo_async.run.host import as_name, host_id, host_name
from atpo_async.run.metrics import Aggregator
from atpo_async.status import waits
from atpo_async.status.facts import publish_facts
from atpo_async.wire.messages import ActorReport, Lease

log = logging.getLogger("atpo.actor")

SAMPLE_S = 0.05
"""How often the engine is looked at where the number of trees in flight is adapted."""

T = TypeVar("T")


async def until_stopped(stopping: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of ``work``, or None, with ``work`` cancelled, once ``stopping`` is set.

    Waits for: whichever comes first.
    """
    task = asyncio.create_task(work, name="until-stopped")
    stop = asyncio.create_task(stopping.wait(), name="stopping")
    try:
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return await task
        return None
    finally:
        stop.cancel()
        task.cancel()
        await asyncio.wait({task, stop})


class Actor:
    """Grows trees until the run is over.

    Args:
        run: run id.
        name: this actor's name, unique among those alive.
        config: the run's configuration.
        engine: started; its first weights are taken before the first lease.
        environment: the tasks: one environment, or several.
        buffer: link to the buffer.
        weights: fetcher towards the learner.
        stopping: set to end early: turns under way are finished, and leases are given back.
        leave_s: for these turns; then they are lost.
        clock: seconds, monotonic.

    Raises ConfigError or SetupError where the expansion strategy that the configuration names cannot be loaded.
    """

    def __init__(
        self,
        *,
        run: str,
        name: str,
        config: Config,
        engine: Engine,
        environment: Environment | Environments,
        buffer: Client,
        weights: WeightsFetcher,
        stopping: asyncio.Event,
        leave_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._name, self._config = run, name, config
        self._engine, self._environments = engine, Environments.of(config, environment)
        self._buffer, self._weights = buffer, weights
        self._stopping, self._clock = stopping, clock
        self._metrics = Aggregator()
        self._leases = LeaseSource(
            run=run, name=name, config=config, buffer=buffer, learner=lambda: weights.endpoint, clock=clock
        )
        self.uptake = WeightsUptake(
            name=name, config=config, engine=engine, fetcher=weights, run_is_over=self._run_is_over,
            metrics=self._metrics, clock=clock,
        )  # fmt: skip
        self._turns = TurnSender(
            run=run, name=name, config=config, buffer=buffer, drain_s=max(RETURN_TIMEOUT_S, leave_s / 2)
        )  # fmt: skip
        self._growing: dict[str, asyncio.Task[None]] = {}
        self._held: dict[str, None] = {}
        """Trees under lease that are not closed: those that are grown, and those that were left as they are."""
        self._begun: set[str] = set()
        """Of those that are grown, the ones that do not wait for weights any more."""
        self._leaving = False
        """It was asked to end."""
        self._leave_s = leave_s
        self._control = control_of(config)
        self._slot_freed = asyncio.Event()
        self._evaluating: set[str] = set()
        """Trees of evaluations, of those that are grown."""
        self._refused = False
        """The buffer admits no further tree, as last heard."""
        self._faults = Faults(self._environments.labels, at_once=self.slots, clock=clock)
        self._grower = TreeGrower(
            run=run, config=config, engine=engine, environments=self._environments, faults=self._faults,
            emit=self._turns.send, metrics=self._metrics, leaving=lambda: self._leaving, clock=clock,
        )  # fmt: skip
        self._given_up: dict[str, str] = {}
        """Trees of which the buffer refused a message -> why: their leases are returned with the next report."""
        self._idle_at = clock()
        buffer.on_refused = self._on_refused
        publish_facts("actor", self._facts)

    async def work(self) -> None:
        """Run until the buffer reports that the run is over, or ``stopping`` is set.

        Waits for: the run's end.  Unblocked by: a lease answer with ``finished``, ``stopping``, or an error, which
        ends all of it.
        """
        await until_stopped(self._stopping, self.uptake.first())
        if self.uptake.version < 0:
            return
        self._idle_at = self._clock()
        try:
            async with self._turns, asyncio.TaskGroup() as tasks:
                loops = [
                    tasks.create_task(self.uptake.follow(), name="weights"),
                    tasks.create_task(self._report(), name="report"),
                    tasks.create_task(self._adapt(), name="slots"),
                ]
                stop = tasks.create_task(self._stopping.wait(), name="stopping")
                leases = tasks.create_task(self._take_leases(tasks), name="leases")
                await asyncio.wait({stop, leases}, return_when=asyncio.FIRST_COMPLETED)
                if not leases.done():
                    leases.cancel()
                    await self._finish_turns()
                for task in (*loops, stop, leases, *self._growing.values()):
                    task.cancel()
        except ExceptionGroup as failures:
            raise first_of(failures) from failures
        finally:
            self._count_idle()
            if self._held or self._leaving:
                await self._leases.give_back(tuple(self._held), within_s=max(RETURN_TIMEOUT_S, self._leave_s / 2))

    async def _finish_turns(self) -> None:
        """The turns under way come to their end and are sent; no tree begins another.

        Waits for: those turns.  Unblocked by: the engine, the environment; given up after ``_leave_s``.
        """
        self._leaving = True
        for tree_id in self._growing.keys() - self._begun:
            self._growing[tree_id].cancel()
        growing = {task for tree_id, task in self._growing.items() if tree_id in self._begun}
        if growing and self._leave_s:
            log.info("asked to end: %d trees finish their turns under way, for %g s", len(growing), self._leave_s)
            with waits.waiting(f"actor {self._name}", "its turns under way", on=waits.ENGINE, limit_s=self._leave_s):
                await asyncio.wait(growing, timeout=self._leave_s)

    def _facts(self) -> dict[str, object]:
        """For the actor's status."""
        return {
            "version": self.uptake.version,
            "trees": len(self._growing),
            "slots": self.slots,
            "requests": self._engine.stats().in_flight,
        }

    @property
    def slots(self) -> int:
        """Trees that may be grown at once."""
        return self._config.actor.trees_in_flight if self._control is None else self._control.slots

    async def _adapt(self) -> None:
        """Keep the engine's batch full, where the configuration leaves it to the actor.  Waits for: the clock."""
        if self._control is None:
            return
        meter, at = Meter(self._engine.stats()), self._clock()
        while True:
            await asyncio.sleep(SAMPLE_S)
            at, seconds = self._clock(), self._clock() - at
            seen = meter.add(
                self._engine.stats(), seconds,
                refused=self._refused and len(self._growing) < self.slots,
                counts=not self._evaluating and not self.uptake.swapping,
            )  # fmt: skip
            self._count_idle()
            change = None if seen is None else self._control.after(seen)
            if change is not None:
                log.info("%s", change)
                self._slot_freed.set()

    # --- leases ------------------------------------------------------------------------------------------------

    async def _take_leases(self, tasks: asyncio.TaskGroup) -> None:
        """Keep every slot growing a tree.

        Waits for: a free slot, then a lease.  Unblocked by: a tree's end; the buffer admitting trees.
        """
        while True:
            free = self.slots - len(self._growing)
            if free <= 0:
                self._slot_freed.clear()
                with waits.waiting(f"actor {self._name}", "a slot without a tree"):
                    await self._slot_freed.wait()
                continue
            answer = await self._leases.ask(free, version=self.uptake.version)
            self._turns.learn(answer.shards)
            for lease in answer.leases:
                self._begin(tasks, lease)
            if answer.finished:
                log.info("the run is over")
                return
            self._refused = len(answer.leases) < free
            if self._refused:
                await self._leases.until_admitted(answer, idle=not self._growing)

    async def _run_is_over(self) -> bool:
        """Ask the buffer whether the run is over.  Raises LearnerMoved."""
        return (await self._leases.ask(0, version=self.uptake.version)).finished

    def _begin(self, tasks: asyncio.TaskGroup, lease: Lease) -> None:
        self._count_idle()
        self._given_up.pop(lease.tree_id, None)  # that was an earlier lease
        task = tasks.create_task(self._grow(lease), name=lease.tree_id)
        self._growing[lease.tree_id] = task
        self._held[lease.tree_id] = None
        if lease.kind == "eval":
            self._evaluating.add(lease.tree_id)
        task.add_done_callback(lambda _: self._ended(lease.tree_id))

    def _ended(self, tree_id: str) -> None:
        self._count_idle()
        self._growing.pop(tree_id, None)
        self._turns.forget(tree_id)
        self._evaluating.discard(tree_id)
        self._begun.discard(tree_id)
        self._slot_freed.set()

    def _count_idle(self) -> None:
        """Called at every change: adds the time that the slots without a tree have waited since the last one."""
        now, slots = self._clock(), self.slots
        idle = max(0, slots - len(self._growing))
        self._metrics.add("time/actor_wait_s", (now - self._idle_at) * idle / slots)
        self._idle_at = now

    async def _grow(self, lease: Lease) -> None:
        await self.uptake.reached(lease.min_version, lease.tree_id)
        self._begun.add(lease.tree_id)
        search = await self._grower.grow(lease)
        if not search.unfinished:
            self._held.pop(lease.tree_id, None)

    def _on_refused(self, message: object, reason: str) -> None:
        """The buffer does not know this tree, or no longer does: further turns of it would be wasted."""
        tree_id = getattr(message, "tree_id", None)
        if not isinstance(tree_id, str):
            return
        # Also for a tree that has been closed meanwhile: it can never be complete.
        self._given_up.setdefault(tree_id, reason)
        task = self._growing.get(tree_id)
        if task is not None:
            log.warning("tree %s is given up: %s", tree_id, shortened(reason))
            self._faults.refused(task.get_name(), message, reason)
            self._metrics.add("actor/abandoned_trees", 1)
            task.cancel()

    # --- reports -----------------------------------------------------------------------------------------------

    async def _report(self) -> None:
        """Heartbeat: renews leases and carries the metrics.  Waits for: the clock, and space in the link's window."""
        interval = Interval(
            slots=lambda: self.slots, engine=self._engine, environments=self._environments,
            waited_s=lambda: self._turns.waited_s, weights=self._weights, metrics=self._metrics, clock=self._clock,
        )  # fmt: skip
        while True:
            await asyncio.sleep(self._config.actor.report_every_s)
            self._count_idle()
            metrics = interval.end(trees=len(self._growing))
            refused, self._given_up = self._given_up, {}
            for tree_id, reason in refused.items():
                self._held.pop(tree_id, None)
                await self._leases.give_up(tree_id, reason)
            if self._turns.is_cut_off:
                self._turns.learn((await self._leases.ask(0, version=self.uptake.version)).shards)
            report = ActorReport(
                run=self._run, actor=self._name, version=self.uptake.version, tree_ids=tuple(self._held),
                metrics=metrics, host=host_name(), host_id=as_name(host_id()),
            )  # fmt: skip
            await self._buffer.send(report)
