"""Grows all trees that the buffer leases, until it leases no more."""

from __future__ import annotations

import asyncio

from actors.engines.base import EngineStats
from actors.environments import Environments
from actors.faults.fault import first_of
from actors.faults.faults import Faults
from actors.search.growing import TreeGrower
from atpo_async.config import Config
from atpo_async.core.tree import Turn
from atpo_async.run.metrics import Aggregator
from atpo_async.wire.messages import Lease, TreeClosed, TreeOpened
from buffer.state import BufferState
from inprocess.generation.engine import BatchEngine

ACTOR = "actor-0"
"""The name of what generates: of its leases, its metrics, and the seed of its sampling."""


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
        self._metrics = Aggregator()
        self._before = engine.stats()
        self._grower = TreeGrower(
            run=run, config=config, engine=engine, environments=environments,
            faults=Faults(environments.labels, at_once=self._most), emit=self._emit, metrics=self._metrics,
            clock=lambda: 0.0,
        )  # fmt: skip

    async def _emit(self, message: TreeOpened | Turn | TreeClosed) -> None:
        self._state.take(message, 0.0)

    async def grow(self, version: int) -> None:
        """Grow trees by the engine's version until the buffer leases none.

        Waits for: the engine and the environments.  Raises EnvironmentBroken, EngineDead, and what a strategy's load
        raises.
        """
        growing: set[asyncio.Task[object]] = set()
        try:
            while True:
                for lease in self._leases(self._most - len(growing), version):
                    growing.add(asyncio.create_task(self._grower.grow(lease), name=lease.tree_id))
                if not growing:
                    return
                ended, growing = await asyncio.wait(growing, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    task.result()
        except ExceptionGroup as failures:
            raise first_of(failures) from failures
        finally:
            for task in growing:
                task.cancel()
            await asyncio.gather(*growing, return_exceptions=True)

    def _leases(self, count: int, version: int) -> tuple[Lease, ...]:
        return self._state.lease(ACTOR, count, 0.0, engine_version=version).leases

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
