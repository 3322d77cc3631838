"""The front's process: two sockets, a link to each shard, and its loops; see ``buffer.front``.

Who waits for whom: as in one buffer (``buffer.service``), and beside that the front for each shard's answer.  A shard
is a process of the front (``front.children``), which starts it again when it ends or does not answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from atpo_async.config import Config
from atpo_async.core.errors import AtpoError, SetupError
from atpo_async.core.mixture import TaskLabels
from atpo_async.links import ports
from atpo_async.links.addresses import port_of, reached_from_here
from atpo_async.links.frames import limits_of
from atpo_async.links.keys import LEARNERS
from atpo_async.links.server import Server
from atpo_async.ops.role import RoleContext
from atpo_async.run.endpoints import Endpoints
from atpo_async.run.metrics import read_metrics
from atpo_async.run.rundir import RunDir
from atpo_async.status import waits
from atpo_async.status.facts import publish_facts
from atpo_async.status.fleet import FLEET
from atpo_async.wire.messages import LearnerToBuffer
from buffer.front import messages as f
from buffer.front import passing
from buffer.front.actors import FrontActors
from buffer.front.batches import FrontBatches
from buffer.front.children import ShardProcesses
from buffer.front.context import FrontContext
from buffer.front.evaluations import FrontEvaluations
from buffer.front.learner import FrontLearner
from buffer.front.overview import put_together
from buffer.front.shards import Shards
from buffer.handlers.changes import Changes
from buffer.handlers.joined import JoinedHandler
from buffer.metrics_file import MetricsFile

log = logging.getLogger("atpo.buffer")

STARTS_SHARDS = True
ACTORS_S = 2.0
"""How often the shards are asked what they know of each actor."""
RECORDS_S = 0.5
"""How often finished evaluations are looked for."""
END_HEARD_S = 5.0
"""After the run's end: how long actors have to learn of it."""
SETTLE_S = 0.2
"""After the last answer: how long the sockets stay open, for acknowledgements and repeats."""
END_S = 2.0
"""How long a shard has to take the end."""


class FrontService:
    """The front of one buffer, serving.  Use as an async context; ``serve`` runs until the run is over or ``stopping``
    is set.

    Args:
        config: the run's.
        run: run id.
        endpoints: where to bind, as of ``BufferService``.
        rundir: for the metrics; None writes none.
        stopping: set to end early.
        locate: where a shard listens now, by its index; empty while that is not known.
        starts_shards: whether the shards are processes of this one; others have started them where not.
        former: where it was bound before.
        clock: seconds, monotonic.

    Raises:
        ConfigError, SetupError: the sampler cannot be used.
    """

    def __init__(
        self,
        config: Config,
        *,
        run: str,
        endpoints: Endpoints,
        rundir: RunDir | None,
        stopping: asyncio.Event,
        locate: Callable[[int], str],
        former: Endpoints | None = None,
        starts_shards: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        former = former or Endpoints()
        self._config, self._stopping = config, stopping
        self._metrics = MetricsFile(None if rundir is None else rundir.metrics_path)
        self.shards = Shards(config.buffer.shards, settings=config.links, locate=locate)
        self._processes = ShardProcesses(config, rundir, self.shards) if rundir is not None and starts_shards else None
        self._changes = Changes(stopping)
        self._context = context = FrontContext(
            config=config, run=run, shards=self.shards, metrics=self._metrics, changes=self._changes, clock=clock
        )
        several = config.environments
        labels = TaskLabels([each.label for each in several], [each.weight for each in several], config.run.seed)
        self._actor_rows: dict[str, dict[str, object]] = {}
        self._evaluations = FrontEvaluations(self.shards, labels, recorded=_recorded(rundir))
        self._actors = FrontActors(context)
        self._joined = JoinedHandler(context, rundir=rundir, peers=lambda: self.learner.peers)
        learner = FrontLearner(
            context, FrontBatches(context), self._evaluations, joined=self._joined, endpoints=endpoints
        )  # fmt: skip
        shared: dict[str, Any] = {"name": "buffer", "settings": config.links}
        self.actors = Server(
            endpoints.actors, receives=passing.ToFront, handler=self._actors.handle, with_frames=True,
            read=passing.reader(limits_of(config.links)), former_port=port_of(former.actors),
            setting="links.actors_port", **shared,
        )  # fmt: skip
        context.server_counters = self._counters
        context.num_unreadable = lambda: self.actors.bad_messages + self.learner.bad_messages
        self._actors.relayed.is_relay = self.actors.is_relay
        self.learner = Server(
            endpoints.learner, receives=LearnerToBuffer, handler=learner.handle, only=LEARNERS,
            former_port=port_of(former.learner), setting="links.learner_port", **shared,
        )  # fmt: skip

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            for link in self.shards:
                await stack.enter_async_context(link.client)
            await stack.enter_async_context(self.actors)
            await stack.enter_async_context(self.learner)
            self._opened = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._actors.close()
        await asyncio.gather(self.actors.close(), self.learner.close())
        self._joined.close()
        if self._processes is not None:
            await self._processes.end()
        await self._opened.aclose()
        self._metrics.close()

    async def serve(self) -> None:
        """Waits for: the run's end.  Unblocked by: ``RunFinished``, once the actors know of it, or ``stopping``.

        Raises:
            PeerLost: a shard is away for longer than ``links.give_up_s``.
            SetupError, RoleCrashed: it ended with what only the user can mend, or does not come up.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                loops = [
                    *(
                        tasks.create_task(link.follow(self._heard, self._changed), name=f"follow {link.name}")
                        for link in self.shards
                    ),
                    tasks.create_task(self._record_evaluations(), name="evaluations"),
                    tasks.create_task(self._look_at_actors(), name="actors"),
                ]
                if self._processes is not None:
                    loops += [tasks.create_task(self._processes.keep(link), name=link.name) for link in self.shards]
                stop = tasks.create_task(self._stopping.wait(), name="stopping")
                over = tasks.create_task(self._tell_the_end(), name="tell the end")
                await asyncio.wait({stop, over}, return_when=asyncio.FIRST_COMPLETED)
                for task in (*loops, stop, over):
                    task.cancel()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        log.info("buffer ends: %s", "the run is over" if self._context.finished else "asked to stop")

    def facts(self) -> dict[str, object]:
        """For the buffer's status."""
        shards = self.shards
        failing = next((state.failing for state in shards.states if state.failing is not None), None)
        relays = self._actors.relayed.facts(list(self._heard()), time.monotonic())
        return {
            **({"relays": relays} if relays else {}),
            "step": self._context.step,
            "version": self._context.version,
            "published": max((s.published for s in shards.states if s.published is not None), default=None),
            "ready trees": shards.total("ready"),
            "leased trees": shards.total("under_lease"),
            "actors alive": len(self._heard()),
            "shards": f"{sum(link.alive for link in shards)} of {len(shards)} answer",
            "journal failing": failing or "no",
        }

    def actor_facts(self) -> dict[str, dict[str, object]]:
        """Of each actor, for the run's status, as the shards said of late."""
        return self._actor_rows

    async def _look_at_actors(self) -> None:
        """Keep what the shards say of each actor.  Waits for: the clock."""
        while True:
            await asyncio.sleep(ACTORS_S)
            with contextlib.suppress(AtpoError):  # a shard that is away; later then
                looks: list[f.Question] = [f.LookAtActors()] * len(self.shards)
                found = await self.shards.ask_all(looks, f.ActorRows, timeout_s=END_S)
                self._actor_rows = put_together([each.rows for each in found])

    def _counters(self) -> dict[str, float]:
        """Of both sockets, as the metrics of a batch have them."""
        actors, learner = self.actors.counters, self.learner.counters
        return {f"buffer/{name}": actors[name] + learner[name] for name in actors}

    def _heard(self) -> dict[str, float]:
        """Actor -> seconds since its last sign of life here."""
        soon = 2 * self._config.links.heartbeat_s
        return {
            name: silent_s
            for name, silent_s in self.actors.silences()
            if silent_s < soon and not self._actors.relayed.is_known(name)
        }

    def _changed(self) -> None:
        if any(state.finished for state in self.shards.states):
            # Told to an earlier front.
            self._context.finished = True
        self._changes.notify()

    async def _record_evaluations(self) -> None:
        """Write the results of evaluations to the run's metrics.  Waits for: the clock."""
        while True:
            await asyncio.sleep(RECORDS_S)
            with contextlib.suppress(AtpoError):  # a shard that is away; later then
                for step, version, metrics in await self._evaluations.records():
                    self._metrics.write(step, version, metrics)

    async def _tell_the_end(self) -> None:
        """Waits for: every live actor to be sent the end of the run, then the shards to take theirs.  Unblocked by:
        their next requests for leases; given up after ``END_HEARD_S``."""
        await self._changes.until(lambda: self._context.finished or None, timeout_s=None)
        ends = time.monotonic() + END_HEARD_S
        while (not_told := self._not_told()) and time.monotonic() < ends:
            # Actors fall silent without a message.
            await self._changes.until(lambda: not self._not_told() or None, timeout_s=0.1)
        if not_told:
            log.warning("the run is over; not heard by %s", ", ".join(sorted(not_told)))
        await asyncio.sleep(SETTLE_S)
        with contextlib.suppress(AtpoError):
            for step, version, metrics in await self._evaluations.records():
                self._metrics.write(step, version, metrics)
        ended = (link.ask(f.End(), f.Done, timeout_s=END_S) for link in self.shards)
        for link, answer in zip(self.shards, await asyncio.gather(*ended, return_exceptions=True), strict=True):
            if isinstance(answer, BaseException):
                log.warning("%s did not take the end of the run: %s", link.name, answer)

    def _not_told(self) -> set[str]:
        """Live actors that were not sent the run's end yet, and ranks of a joined learner that pass on their last
        lines."""
        soon = 2 * self._config.links.heartbeat_s
        silences = self.actors.silences()
        not_told = {name for name, silent_s in silences if silent_s < soon and not self._actors.knows_the_end(name)}
        return not_told | self._joined.still_passing_on


def _recorded(rundir: RunDir | None) -> set[int]:
    """Steps whose evaluation is in the run's metrics."""
    if rundir is None or not rundir.metrics_path.exists():
        return set()
    return {record.step for record in read_metrics(rundir.metrics_path) if "eval/failed" in record.metrics}


async def serve(ctx: RoleContext) -> None:
    """The role ``buffer`` where there are shards: bind, record the addresses, serve until the end.

    Raises:
        SetupError: the port is taken, or there is no run folder.
    """
    rundir = ctx.rundir
    if rundir is None:
        raise SetupError("the buffer needs the run's folder; start it through `atpo train` or on a run folder")
    listening, links = rundir.listening, ctx.config.links

    def locate(index: int) -> str:
        found = ""
        with contextlib.suppress(SetupError, OSError):
            shard = listening.shards().get(index)
            found = "" if shard is None else shard.front
        return reached_from_here(found)

    now = listening.now()
    asked = replace(now, actors=ports.to_bind(links, "actors"), learner=ports.to_bind(links, "learner"))
    service = FrontService(
        ctx.config, run=ctx.run_id, endpoints=asked, rundir=rundir, stopping=ctx.stopping, locate=locate,
        former=listening.former(), starts_shards=STARTS_SHARDS,
    )  # fmt: skip
    async with service:
        listening.note(actors=service.actors.endpoint, learner=service.learner.endpoint)
        ctx.log.info(
            "run %s: actors at %s, learner at %s, %d shards", ctx.run_id, service.actors.endpoint,
            service.learner.endpoint, len(service.shards),
        )  # fmt: skip
        publish_facts("buffer", service.facts)
        publish_facts(FLEET, service.actor_facts)
        waits.phase("serving")
        await service.serve()
