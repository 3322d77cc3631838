"""The actor's loop: lease -> grow trees -> stream turns, and weights in while it generates.

Who waits for whom: a free slot waits for a lease (unblocked by the learner taking trees from the buffer); a finished
turn waits for room in the window (unblocked by the buffer's acknowledgements); a lease waits for its least version
(unblocked by the learner's publication).  The first two are what ``time/actor_wait_s`` measures.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from actors.engines.base import Engine
from actors.faults import CutActions, Faults, first_of
from actors.hosting.host import HostedEnvironment
from actors.search import TreeSearch
from actors.weights.fetcher import NoRoom, WeightsFetcher
from actors.weights.refusals import Refusals
from atpo_async.config import Config
from atpo_async.core.errors import AtpoError, PeerLost, ProbeMismatch, WeightsRejected
from atpo_async.core.texts import shortened
from atpo_async.core.tree import TurnTree
from atpo_async.environments.base import Environment
from atpo_async.links.addresses import seen_from
from atpo_async.links.client import Client
from atpo_async.run.metrics import Aggregator
from atpo_async.status import waits
from atpo_async.status.facts import publish_facts
from atpo_async.status.waits import BoundedWait
from atpo_async.wire.messages import (
    ActorReport,
    Lease,
    LeaseRequest,
    LeaseReturned,
    Leases,
    Refused,
    WeightsAnnounced,
)

log = logging.getLogger("atpo.actor")

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


RETURN_TIMEOUT_S = 2.0
"""How long a stopping actor waits for the buffer to take its leases back."""


class LearnerMoved(AtpoError):
    """The learner has come back at another address."""

    def __init__(self, text: str, *, weights_endpoint: str, announce_endpoint: str) -> None:
        super().__init__(text)
        self.weights_endpoint = weights_endpoint
        self.announce_endpoint = announce_endpoint


class Actor:
    """Grows trees until the run is over.

    Args:
        run: run id.
        name: this actor's name, unique among those alive.
        config: the run's configuration.
        engine: started; its first weights are taken before the first lease.
        environment: the task.
        buffer: link to the buffer.
        weights: fetcher towards the learner.
        stopping: set to end early; leases are given back.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        run: str,
        name: str,
        config: Config,
        engine: Engine,
        environment: Environment,
        buffer: Client,
        weights: WeightsFetcher,
        stopping: asyncio.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._name = name
        self._config = config
        self._engine = engine
        self._environment = environment
        self._buffer = buffer
        self._weights = weights
        self._stopping = stopping
        self._clock = clock
        self.version = -1
        """What the engine generates with; -1 before the first weights."""
        self._refusals = Refusals()
        self._refused = "", 0.0
        """What was last said of weights that were not taken, and when."""
        self._metrics = Aggregator()
        self._growing: dict[str, asyncio.Task[None]] = {}
        self._slot_freed = asyncio.Event()
        self._version_changed = asyncio.Condition()
        self._faults = Faults(config.environment.name, at_once=config.actor.trees_in_flight, clock=clock)
        self._cut_actions = CutActions(config.search.max_action_tokens)
        self._no_lease: BoundedWait | None = None
        self._closed_because: str | None = None
        self._given_up: dict[str, str] = {}
        """Trees of which the buffer refused something -> why: their leases go back with the next report."""
        self._idle_at = clock()
        buffer.on_refused = self._on_refused
        publish_facts("actor", self._facts)

    async def work(self) -> None:
        """Run until the buffer says the run is over, or ``stopping`` is set.

        Waits for: the run's end.  Unblocked by: a lease answer with ``finished``, ``stopping``, or an error, which
        ends all of it.
        """
        await until_stopped(self._stopping, self._first_weights())
        if self.version < 0:
            return
        held: tuple[str, ...] = ()
        try:
            async with asyncio.TaskGroup() as tasks:
                loops = [
                    tasks.create_task(self._take_weights(), name="weights"),
                    tasks.create_task(self._report(), name="report"),
                ]
                stop = tasks.create_task(self._stopping.wait(), name="stopping")
                leases = tasks.create_task(self._take_leases(tasks), name="leases")
                await asyncio.wait({stop, leases}, return_when=asyncio.FIRST_COMPLETED)
                held = tuple(self._growing)
                for task in (*loops, stop, leases, *self._growing.values()):
                    task.cancel()
        except ExceptionGroup as failures:
            raise first_of(failures) from failures
        finally:
            self._count_idle()
            await self._give_back(held)

    def _facts(self) -> dict[str, object]:
        """For the actor's status."""
        return {
            "version": self.version,
            "trees": len(self._growing),
            "slots": self._config.actor.trees_in_flight,
            "requests": self._engine.stats().in_flight,
        }

    # --- leases ------------------------------------------------------------------------------------------------

    async def _take_leases(self, tasks: asyncio.TaskGroup) -> None:
        """Keep every slot growing a tree.

        Waits for: a free slot, then a lease.  Unblocked by: a tree's end; the buffer admitting trees.
        """
        while True:
            free = self._config.actor.trees_in_flight - len(self._growing)
            if free <= 0:
                self._slot_freed.clear()
                with waits.waiting(f"actor {self._name}", "a slot without a tree"):
                    await self._slot_freed.wait()
                continue
            answer = await self._ask(free)
            self._look_where_the_learner_is(answer)
            for lease in answer.leases:
                self._begin(tasks, lease)
            if answer.finished:
                log.info("the run is over")
                return
            if len(answer.leases) < free:
                await self._wait_for_room(answer)

    def _look_where_the_learner_is(self, answer: Leases) -> None:
        """Raises LearnerMoved if it is elsewhere than this actor looks for it."""
        if not answer.weights_endpoint or answer.finished:
            return
        said = seen_from(self._buffer.endpoint, answer.weights_endpoint)
        if said != self._weights.endpoint:
            raise LearnerMoved(
                f"the learner is at {said} now, no longer at {self._weights.endpoint}",
                weights_endpoint=said,
                announce_endpoint=seen_from(self._buffer.endpoint, answer.announce_endpoint),
            )

    async def _ask(self, count: int) -> Leases:
        """One answer from the buffer, however long it is away, up to ``links.give_up_s``."""
        began = self._clock()
        while True:
            request = LeaseRequest(run=self._run, actor=self._name, count=count, version=self.version)
            try:
                with waits.waiting(f"actor {self._name}", f"an answer about {count} leases", on="buffer"):
                    answer = await self._buffer.request(request, timeout_s=self._config.links.deadline_s)
            except PeerLost as exc:
                if self._clock() - began > self._config.links.give_up_s:
                    raise
                log.warning("actor %s waits for the buffer to grant leases: %s", self._name, exc)
                continue
            if isinstance(answer, Leases):
                return answer
            if isinstance(answer, Refused):
                raise PeerLost(f"the buffer refuses leases to actor {self._name}: {answer.reason}")
            raise PeerLost(f"the buffer answered a lease request with {type(answer).__name__}")

    async def _wait_for_room(self, answer: Leases) -> None:
        """Waits for: the buffer to admit trees.  Unblocked by: the time it names; given up after ``give_up_s``."""
        if answer.leases or self._growing:
            self._no_lease = None
        else:
            self._no_lease = self._no_lease or BoundedWait(
                f"actor {self._name}", "a lease", self._config.links, self._clock, log=log, on="buffer"
            )
            if answer.closed_because != self._closed_because:
                self._no_lease.moved()  # the buffer waits for something else than before: the run goes on
            self._closed_because = answer.closed_because
            self._no_lease.again(answer.closed_because or "the buffer does not say why")
        await asyncio.sleep(answer.retry_after_s)

    def _begin(self, tasks: asyncio.TaskGroup, lease: Lease) -> None:
        self._count_idle()
        self._given_up.pop(lease.tree_id, None)  # that was an earlier lease
        task = tasks.create_task(self._grow(lease), name=lease.tree_id)
        self._growing[lease.tree_id] = task
        task.add_done_callback(lambda _: self._ended(lease.tree_id))

    def _ended(self, tree_id: str) -> None:
        self._count_idle()
        self._growing.pop(tree_id, None)
        self._slot_freed.set()

    def _count_idle(self) -> None:
        """Called at every change: what the slots without a tree have waited since the last one."""
        now, slots = self._clock(), self._config.actor.trees_in_flight
        idle = slots - len(self._growing)
        self._metrics.add("time/actor_wait_s", (now - self._idle_at) * idle / slots)
        self._idle_at = now

    async def _reached(self, version: int, tree_id: str) -> None:
        """Waits for: the engine to have ``version``.  Unblocked by: a swap; given up after ``links.give_up_s``."""
        if self.version >= version:
            return
        patience = BoundedWait(
            f"tree {tree_id}", f"weights version {version}", self._config.links, self._clock, log=log, on="learner"
        )
        while self.version < version:
            try:
                async with asyncio.timeout(self._config.links.deadline_s), self._version_changed:
                    await self._version_changed.wait_for(lambda: self.version >= version)
            except TimeoutError:
                patience.again(f"the engine has {self.version}")

    async def _grow(self, lease: Lease) -> None:
        await self._reached(lease.min_version, lease.tree_id)
        search = TreeSearch(
            run=self._run,
            lease=lease,
            engine=self._engine,
            environment=self._environment,
            search=self._config.search,
            max_context_tokens=self._config.model.max_context_tokens,
            emit=self._buffer.send,
            chain_ended=partial(self._faults.chain_ended, lease.tree_id),
            clock=self._clock,
        )
        with self._faults.growing(lease):
            tree = await search.grow()
        self._count(lease, tree, search)

    def _count(self, lease: Lease, tree: TurnTree, search: TreeSearch) -> None:
        failed = search.growth.failures
        self._metrics.add("actor/trees", 1)
        self._metrics.add("actor/turns", len(tree) - len(lease.committed))
        self._metrics.add("actor/failed_branches", failed.total())
        for reason, count in failed.items():
            self._metrics.add(f"actor/failed/{reason}", count)
        if failed:
            log.warning(
                "tree %s lost %d branches; the latest: %s", tree.tree_id, failed.total(), search.growth.last_detail
            )
        growth = search.growth
        self._metrics.mean("actions/cut_share", growth.cut_actions / max(growth.actions, 1), weight=growth.actions)
        if lease.kind == "train":
            self._cut_actions.count(growth.actions, growth.cut_actions)

    def _on_refused(self, message: object, reason: str) -> None:
        """The buffer does not know this tree (any more): growing on would be work for nobody."""
        tree_id = getattr(message, "tree_id", None)
        if not isinstance(tree_id, str):
            return
        # Also of a tree that has been closed meanwhile: it can never be whole.
        self._given_up.setdefault(tree_id, reason)
        task = self._growing.get(tree_id)
        if task is not None:
            log.warning("tree %s is given up: %s", tree_id, shortened(reason))
            self._faults.refused(task.get_name(), message, reason)
            self._metrics.add("actor/abandoned_trees", 1)
            task.cancel()

    async def _give_back(self, held: tuple[str, ...]) -> None:
        """Hand leases back so that others need not wait for them to expire."""
        if not held:
            return
        with contextlib.suppress(PeerLost, TimeoutError):
            async with asyncio.timeout(RETURN_TIMEOUT_S):
                await self._buffer.send(LeaseReturned(run=self._run, actor=self._name, tree_ids=held))
                await self._buffer.drain(timeout_s=RETURN_TIMEOUT_S)

    # --- weights -----------------------------------------------------------------------------------------------

    async def _first_weights(self) -> None:
        """Nothing is generated with the model folder's weights: the run's own come first.

        Waits for: the learner's first publication.  Unblocked by: the publisher, or the run's end; given up after
        ``links.give_up_s``.
        """
        patience = BoundedWait(
            f"actor {self._name}", "the run's first weights", self._config.links, self._clock, log=log, on="learner"
        )
        while self.version < 0:
            announced = await self._weights.next()
            if announced is not None:
                await self._take(announced)
                if self.version < 0:
                    patience.again(f"version {announced.version} was not taken up")
                continue
            if self._weights.silent:
                # The buffer may know that it has gone elsewhere, or that it is done.
                answer = await self._ask(0)
                if answer.finished:
                    log.info("the run was over before this actor had any weights")
                    return
                self._look_where_the_learner_is(answer)
            patience.again("none is announced, and the learner names none when asked")
        self._idle_at = self._clock()

    async def _take_weights(self) -> None:
        """Take up every newer version while requests are in flight.

        Waits for: an announcement or the poll.  Unblocked by: the learner publishing.
        """
        while True:
            announced = await self._weights.next()
            if announced is not None:
                await self._take(announced)
            elif self._weights.silent:
                # The buffer may know where it has gone; with every slot waiting for weights nobody else asks.
                self._look_where_the_learner_is(await self._ask(0))

    async def _take(self, announced: WeightsAnnounced) -> None:
        began = self._clock()
        try:
            with waits.waiting(
                f"actor {self._name}",
                f"the bytes of version {announced.version}",
                on="learner",
                limit_s=2 * self._config.weights.fetch_timeout_s,  # of the manifest, and of the bytes
            ):
                weights = await self._weights.fetch(announced)
        except (WeightsRejected, NoRoom, PeerLost) as exc:
            self._not_taken(announced.version, exc)
            return
        if weights is None:
            return
        fetched = self._clock()
        try:
            with waits.waiting(f"actor {self._name}", f"the swap to version {announced.version}", on=waits.ENGINE):
                report = await self._engine.swap(weights)
        except (WeightsRejected, ProbeMismatch) as exc:
            self._weights.forget(announced.version)
            self._not_taken(announced.version, exc)
            return
        finally:
            self._weights.release(weights)
        self._refusals.over()
        self._metrics.mean("weights/fetch_s", fetched - began)
        self.version = weights.manifest.version
        self._metrics.mean("weights/swap_s", report.pause_s)
        self._metrics.add("weights/swaps", 1)
        waits.progress("swaps")
        self._metrics.mean("weights/in_flight_at_swap", report.in_flight)
        self._metrics.observe("engine/probe_error", [report.probe_error])
        log.info(
            "version %d in use: fetched in %.3f s, generation stood still for %.3f s with %d requests in flight, "
            "probe off by %.1e nats",
            report.version, fetched - began, report.pause_s, report.in_flight, report.probe_error,
        )  # fmt: skip
        async with self._version_changed:
            self._version_changed.notify_all()

    def _not_taken(self, version: int, error: AtpoError) -> None:
        """What was refused is fetched again at the next poll, and the engine goes on with what it has (after
        ProbeMismatch it stands still meanwhile).  Raises ``error`` once it has come too often."""
        self._metrics.add("weights/rejected", 1)
        now, text = self._clock(), str(error)
        if text != self._refused[0] or now - self._refused[1] > self._config.links.deadline_s:
            self._refused = text, now
            log.error("weights version %d were not taken, they are fetched again: %s", version, text)
        if isinstance(error, WeightsRejected | ProbeMismatch):
            self._refusals.add(error)

    # --- reports -----------------------------------------------------------------------------------------------

    async def _report(self) -> None:
        """Heartbeat: renews leases and carries the metrics.  Waits for: the clock, and room in the window."""
        before, began = self._engine.stats(), self._clock()
        waited_before = self._buffer.stats.waited_s
        while True:
            await asyncio.sleep(self._config.actor.report_every_s)
            now, stats = self._clock(), self._engine.stats()
            prompt = stats.prompt_tokens - before.prompt_tokens
            # Chains of one tree wait together: a slot cannot have waited longer than the interval.
            waited = self._buffer.stats.waited_s
            for_room_s = min((waited - waited_before) / self._config.actor.trees_in_flight, now - began)
            waited_before = waited
            self._metrics.add("time/actor_wait_s", for_room_s)
            if stats.generated_tokens > before.generated_tokens:
                waits.progress("tokens", stats.generated_tokens - before.generated_tokens)
            self._count_idle()
            metrics = self._metrics.flush()
            # One number per swap is what a reader looks for; mean and p95 of one value add nothing.
            if "engine/probe_error/max" in metrics:
                metrics["engine/probe_error"] = metrics.pop("engine/probe_error/max")
                metrics.pop("engine/probe_error/mean", None)
                metrics.pop("engine/probe_error/p95", None)
            metrics["time/actor_interval_s"] = now - began
            metrics["tokens/generated_per_s"] = (stats.generated_tokens - before.generated_tokens) / (now - began)
            if prompt > 0:
                metrics["engine/prefix_hit_share"] = (stats.cached_prompt_tokens - before.cached_prompt_tokens) / prompt
            metrics["engine/in_flight"] = float(stats.in_flight)
            metrics["actor/trees_in_flight"] = float(len(self._growing))
            if isinstance(self._environment, HostedEnvironment):
                metrics |= self._environment.take_counts()
            before, began = stats, now
            if self._given_up:
                refused, self._given_up = self._given_up, {}
                for tree_id, reason in refused.items():
                    await self._buffer.send(
                        LeaseReturned(run=self._run, actor=self._name, tree_ids=(tree_id,), reason=reason)
                    )
            await self._buffer.send(
                ActorReport(
                    run=self._run,
                    actor=self._name,
                    version=self.version,
                    tree_ids=tuple(self._growing),
                    metrics=metrics,
                )
            )
