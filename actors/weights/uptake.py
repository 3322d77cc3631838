"""Keeps the engine's weights up to date: fetches every newer version and swaps it in while requests are in flight.

Nothing is generated with the weights of the model folder: the run's own come first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from actors.engines.base import Engine
from actors.weights.copies import NoSpace
from actors.weights.fetcher import WeightsFetcher
from actors.weights.refusals import Refusals
from atpo_async.config import Config
from atpo_async.core.errors import AtpoError, PeerLost, ProbeMismatch, WeightsRejected
from atpo_async.run.metrics import Aggregator
from atpo_async.status import waits
from atpo_async.status.waits import BoundedWait
from atpo_async.transports.base import TransportUnavailable
from atpo_async.wire.messages import WeightsAnnounced

log = logging.getLogger("atpo.actor")


class WeightsUptake:
    """Loads new versions into one engine.

    Args:
        name: of the actor.
        config: the run's configuration.
        engine: started.
        fetcher: towards the learner.
        run_is_over: asks the buffer, which may know that a silent learner has gone elsewhere (LearnerMoved) or that
            the run is over.
        metrics: of the actor.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        name: str,
        config: Config,
        engine: Engine,
        fetcher: WeightsFetcher,
        run_is_over: Callable[[], Awaitable[bool]],
        metrics: Aggregator,
        clock: Callable[[], float],
    ) -> None:
        self._name, self._config = name, config
        self._engine, self._fetcher = engine, fetcher
        self._run_is_over = run_is_over
        self._metrics, self._clock = metrics, clock
        self.version = -1
        """What the engine generates with; -1 before the first weights."""
        self.swapping = False
        """Generation stands still, or is about to, for new weights."""
        self._version_changed = asyncio.Condition()
        self._refusals = Refusals()
        self._logged_refusal = "", 0.0
        """The last log line about weights that were not loaded, and when."""

    async def first(self) -> None:
        """Until there are weights to generate with, or the run is over.

        Waits for: the learner's first publication.  Unblocked by: the publisher, or the run's end; given up after
        ``links.give_up_s``.
        """
        wait = BoundedWait(
            f"actor {self._name}", "the run's first weights", self._config.links, self._clock, log=log, on="learner"
        )
        while self.version < 0:
            announced = await self._fetcher.next()
            if announced is not None:
                await self._take(announced)
                if self.version < 0:
                    wait.again(f"version {announced.version} was not taken up")
                continue
            if self._fetcher.silent and await self._run_is_over():
                log.info("the run was over before this actor had any weights")
                return
            wait.again("none is announced, and the learner names none when asked")

    async def follow(self) -> None:
        """Load every newer version.  Never returns.

        Waits for: an announcement or the poll.  Unblocked by: the learner publishing.
        """
        while True:
            announced = await self._fetcher.next()
            if announced is not None:
                await self._take(announced)
            elif self._fetcher.silent:
                # While every slot waits for weights, no lease request would ask the buffer where the learner is.
                await self._run_is_over()

    async def reached(self, version: int, tree_id: str) -> None:
        """Waits for: the engine to have ``version``.  Unblocked by: a swap; given up after ``links.give_up_s``."""
        if self.version >= version:
            return
        wait = BoundedWait(
            f"tree {tree_id}", f"weights version {version}", self._config.links, self._clock, log=log, on="learner"
        )
        while self.version < version:
            try:
                async with asyncio.timeout(self._config.links.deadline_s), self._version_changed:
                    await self._version_changed.wait_for(lambda: self.version >= version)
            except TimeoutError:
                wait.again(f"the engine has {self.version}")

    async def _take(self, announced: WeightsAnnounced) -> None:
        """Fetch and swap one version; what is refused is counted and comes again at the next poll."""
        began = self._clock()
        try:
            with waits.waiting(
                f"actor {self._name}",
                f"the bytes of version {announced.version}",
                on="learner",
                limit_s=self._fetcher.limit_s,
            ):
                weights = await self._fetcher.fetch(announced)
        except (WeightsRejected, NoSpace, PeerLost, TransportUnavailable) as exc:
            self._not_taken(announced.version, exc)
            return
        if weights is None:
            return
        fetched = self._clock()
        self.swapping = True
        try:
            with waits.waiting(f"actor {self._name}", f"the swap to version {announced.version}", on=waits.ENGINE):
                report = await self._engine.swap(weights)
        except (WeightsRejected, ProbeMismatch) as exc:
            self._fetcher.forget(announced.version)
            self._not_taken(announced.version, exc)
            return
        finally:
            self.swapping = False
            self._fetcher.release(weights)
        self._refusals.over()
        self.version = weights.manifest.version
        self._metrics.mean("weights/fetch_s", fetched - began)
        self._metrics.mean("weights/verify_s", self._fetcher.verify_s)
        self._metrics.add("weights/hashed", float(self._fetcher.hashed))
        self._metrics.mean("weights/swap_s", report.pause_s)
        self._metrics.mean("weights/read_s", report.read_s)
        self._metrics.mean("weights/load_s", report.load_s)
        self._metrics.mean("weights/probe_s", report.probe_s)
        self._metrics.add("weights/swaps", 1)
        self._metrics.mean("weights/in_flight_at_swap", report.in_flight)
        self._metrics.observe("engine/probe_error", [report.probe_error])
        waits.progress("swaps")
        log.info(
            "version %d in use: fetched in %.3f s (%.3f to verify)%s, generation stood still for %.3f s (load %.3f, "
            "probe %.3f) with %d requests in flight, probe off by %.1e nats",
            report.version, fetched - began, self._fetcher.verify_s,
            f", read ahead in {report.read_s:.3f} s" if report.read_s else "", report.pause_s, report.load_s,
            report.probe_s, report.in_flight, report.probe_error,
        )  # fmt: skip
        async with self._version_changed:
            self._version_changed.notify_all()

    def _not_taken(self, version: int, error: AtpoError) -> None:
        """Refused weights are fetched again at the next poll, and the engine goes on with those it has (after
        ProbeMismatch it stands still meanwhile).  Raises ``error`` once it has occurred too often."""
        self._metrics.add("weights/rejected", 1)
        now, text = self._clock(), str(error)
        if text != self._logged_refusal[0] or now - self._logged_refusal[1] > self._config.links.deadline_s:
            self._logged_refusal = text, now
            log.error("weights version %d were not taken, they are fetched again: %s", version, text)
        if isinstance(error, WeightsRejected | ProbeMismatch):
            self._refusals.add(error)
