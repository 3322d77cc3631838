"""Grows all trees that the buffer leases, until it leases no more."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from actors.engines.base import EngineStats
from actors.environments import Environments
from actors.faults.fault import first_of
from actors.faults.faults import Faults
from actors.search.growing import TreeGrower
from atpo_async.config import Config
from atpo_async.core.tree import Turn
from atpo_async.run.metrics import Aggregator
from atpo_async.wire import codec
from atpo_async.wire.messages import Lease, TreeClosed, TreeOpened
from buffer.state import BufferState
from inprocess.generation.engine import BatchEngine

ACTOR = "actor-0"
"""The name of what generates: of its leases, its metrics, and the seed of its sampling."""

FIRST_SHARE, LEAST_SHARE = 0.7, 0.05
"""Of trees with a signal: before any is known, and for the estimate of how many are to be grown."""
NEWEST = 0.7
"""Weight of the latest trees in that share."""


def trees_at_once(config: Config) -> int:
    """How many trees are grown side by side: as many chains as the engine decodes at once, a batch's trees at least."""
    fitting = config.actor.max_num_seqs // config.search.initial_rollouts
    return config.actor.trees_in_flight or max(config.staleness.trees_per_batch, fitting)


class Growth:
    """Grows trees for a buffer in the same process.

    Time stands still for both: no lease lapses, and a turn, which is sampled together with all others, has no time of
    its own.

    Args:
        config: of the run.
        run: its id.
        state: leases trees, and takes what is grown.
        engine, environments: where actions and observations come from.
    """

    def __init__(
        self, config: Config, *, run: str, state: BufferState, engine: BatchEngine, environments: Environments
    ) -> None:
        self._state, self._engine, self._environments = state, engine, environments
        self._most = trees_at_once(config)
        assert state.delay_line is not None
        self._line = state.delay_line
        self._messages: dict[str, list[TreeOpened | Turn | TreeClosed]] = {}
        """Tree -> what there is of it, of the trees that are grown."""
        self._signal_share = FIRST_SHARE
        """Of the latest training trees, those that were placed in a batch."""
        self._metrics = Aggregator()
        self._before = engine.stats()
        self._grower = TreeGrower(
            run=run, config=config, engine=engine, environments=environments,
            faults=Faults(environments.labels, at_once=self._most), emit=self._emit, metrics=self._metrics,
            clock=lambda: 0.0,
        )  # fmt: skip

    async def _emit(self, message: TreeOpened | Turn | TreeClosed) -> None:
        self._messages[message.tree_id].append(message)

    async def grow(self, version: int) -> None:
        """Grow trees by the engine's version until the buffer leases none.

        Waits for: the engine and the environments.  Raises EnvironmentBroken, EngineDead, and what a strategy's load
        raises.
        """
        while leases := self._leases(version):
            self._messages = {lease.tree_id: [] for lease in leases}
            try:
                async with asyncio.TaskGroup() as growing:
                    for lease in leases:
                        growing.create_task(self._grower.grow(lease), name=lease.tree_id)
            except ExceptionGroup as failures:
                raise first_of(failures) from failures
            self._deliver(leases)

    def _leases(self, version: int) -> tuple[Lease, ...]:
        line = self._line
        line.ahead = max(min(self._to_be_grown(line.needed), line.most_needed) - line.needed, 0)
        return self._state.lease(ACTOR, self._most, 0.0, engine_version=version).leases

    def _to_be_grown(self, needed: int) -> int:
        """How many trees most likely hold ``needed`` ones with a signal, as far as the latest trees tell."""
        share = max(self._signal_share, LEAST_SHARE)
        spread = math.sqrt(needed * (1 - share)) / share
        return math.ceil(needed / share + spread)

    def _deliver(self, leases: Sequence[Lease]) -> None:
        """Hand grown trees to the buffer in the order of their leases, until it needs no more; the others are as good
        as never begun.  So it gets the trees that it would get if each began when it was known to be needed."""
        needed, given = self._line.needed, 0
        for i, lease in enumerate(leases):
            if lease.kind == "train" and given and not self._line.needed:
                self._state.withdraw([each.tree_id for each in leases[i:]])
                break
            for message in self._messages[lease.tree_id]:
                # Its frames are this process's own: what an environment returned was checked where it came in.
                self._state.take(message, 0.0, codec.encode(message))
            given += lease.kind == "train"
        if given:
            self._signal_share += NEWEST * ((needed - self._line.needed) / given - self._signal_share)

    def take_metrics(self, seconds: float) -> dict[str, float]:
        """Of all trees since this was last called, as an actor reports them; ``seconds`` were spent on them."""
        now, before = self._engine.stats(), self._before
        self._before = now
        found = self._metrics.flush() | self._environments.take_counts()
        return found | _rates(before, now, seconds) | {"actor/slots": float(self._most)}


def _rates(before: EngineStats, now: EngineStats, seconds: float) -> dict[str, float]:
    prompt = now.prompt_tokens - before.prompt_tokens
    found = {"time/actor_interval_s": seconds}
    if seconds > 0:
        found["tokens/generated_per_s"] = (now.generated_tokens - before.generated_tokens) / seconds
    if prompt > 0:
        found["engine/prefix_hit_share"] = (now.cached_prompt_tokens - before.cached_prompt_tokens) / prompt
    return found
