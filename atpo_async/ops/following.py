"""Passes on to the terminal what a run writes: metrics, notices, which roles start, the address at which actors join.

It also writes the memory that the roles use into the run's metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence

from atpo_async.core.errors import SetupError
from atpo_async.links import advertised
from atpo_async.ops import notices
from atpo_async.ops.attempts import Attempt
from atpo_async.ops.watching import RoleWatch
from atpo_async.run.metrics import MetricsTail, MetricsWriter, Record
from atpo_async.run.rundir import RunDir
from atpo_async.status import snapshot
from atpo_async.status.loading import RoleStart, starts
from atpo_async.status.reporter import EVERY_S

NOTICES = "notices.jsonl"
"""In the run's scratch folder: the roles' lines for the terminal."""

TAIL_S = 0.25
"""Between two looks at the metrics file."""


class Follower:
    """Passes on what a run writes.  Each loop waits for nothing but the clock, and ends by being cancelled.

    Args:
        rundir: the run.
        say: one line to the user.
        on_records: new records of the metrics file, as they come.
        on_starts: the roles that are starting, about once a second.
    """

    def __init__(
        self,
        rundir: RunDir,
        *,
        say: Callable[[str], None],
        on_records: Callable[[Sequence[Record]], None],
        on_starts: Callable[[Sequence[RoleStart]], None],
    ) -> None:
        self._rundir = rundir
        self._say = say
        self._on_records = on_records
        self._on_starts = on_starts
        self._step = 0
        self._version = 0
        self._tail = MetricsTail(rundir.metrics_path)
        self._notices = notices.Tail(rundir.scratch / NOTICES)

    def pass_on(self) -> None:
        """Pass on the notices and records written since the last call."""
        records = self._tail.new()
        for record in records:
            self._step = max(self._step, record.step)
            self._version = max(self._version, record.version)
        for line in self._notices.new():
            self._say(line)
        self._on_records(records)

    async def follow_records(self) -> None:
        while True:
            self.pass_on()
            await asyncio.sleep(TAIL_S)

    async def tell_the_addresses(self, *, learner: bool) -> None:
        """Announce where further actors can join, once the buffer listens and whenever it has moved.

        Args:
            learner: announce where the learner can join, too.
        """
        told: dict[str, str] = {}
        advertise = self._rundir.config.links.advertise
        while True:
            with contextlib.suppress(SetupError, OSError):
                now = self._rundir.listening.now()
                ways = {"the learner joins": now.learner if learner else "", "actors join": now.actors}
                for who, found in ways.items():
                    if found and found != told.get(who):
                        moved = ": the buffer is no longer where it was" if who in told else ""
                        self._say(f"{who} with --join {advertised.sentence(found, advertise=advertise)}{moved}")
                        told[who] = found
            await asyncio.sleep(TAIL_S)

    async def follow_starts(self, attempts: Mapping[str, Attempt]) -> None:
        """Pass on which of ``attempts`` (role -> the one that runs) are still starting."""
        while True:
            statuses, _ = await asyncio.to_thread(snapshot.read, self._rundir.path / snapshot.FOLDER)
            marks = {attempt.mark for attempt in attempts.values()}
            own = [status for status in statuses.values() if status.mark in marks]
            self._on_starts(starts(own, now=time.monotonic(), wall=time.time()))
            await asyncio.sleep(EVERY_S)

    async def sample_memory(self, roles: RoleWatch, *, every_s: float, restarts: Callable[[], int]) -> None:
        """Write the memory of each role, and how many ``restarts`` there were, into the run's metrics."""
        with MetricsWriter(self._rundir.metrics_path, source="supervisor") as writer:
            while True:
                await asyncio.sleep(every_s)
                sizes = await asyncio.to_thread(roles.memory)
                if sizes:
                    metrics = {**sizes, "supervisor/restarts": restarts()}
                    writer.write(step=self._step, version=self._version, metrics=metrics)
