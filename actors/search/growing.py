"""Grows the tree of a lease with everything that a run has for it, and counts what was grown and what failed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from actors.engines.base import Engine
from actors.environments import Environments
from actors.expansion.expansion import Expansion
from actors.faults.faults import Faults
from actors.faults.notices import CutActions
from actors.search.tree_search import Emit, TreeSearch
from actors.teams.search import search_of
from atpo_async.config import Config
from atpo_async.core.tree import TurnTree
from atpo_async.run.metrics import Aggregator
from atpo_async.wire.messages import Lease

log = logging.getLogger("atpo.actor")


class TreeGrower:
    """Grows trees, any number of them at once.

    Args:
        run: run id.
        config: of the run.
        engine, environments: where actions and observations come from.
        faults: is told of every chain's end.
        emit: takes every message for the buffer.
        metrics: counts are added to them.
        leaving: as of ``TreeSearch``.
        clock: seconds, monotonic.

    Raises ConfigError or SetupError where the strategy that the configuration names cannot be loaded.
    """

    def __init__(
        self,
        *,
        run: str,
        config: Config,
        engine: Engine,
        environments: Environments,
        faults: Faults,
        emit: Emit,
        metrics: Aggregator,
        leaving: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._config = run, config
        self._engine, self._environments = engine, environments
        self._faults, self._emit, self._metrics = faults, emit, metrics
        self._leaving, self._clock = leaving, clock
        self._expansion = Expansion.of(config.search, policy_tokens=environments.policy_tokens)
        self._cut_actions = CutActions(config.search.max_action_tokens)

    async def grow(self, lease: Lease) -> TreeSearch:
        """Grow the tree of a lease; returns its search, which is at its end or ``unfinished``.

        Waits for: the engine, the environment, ``emit``.  Raises as ``TreeSearch.grow``.
        """
        task = self._environments.task(lease.kind, lease.task_index)
        search = search_of(
            self._config,
            run=self._run,
            lease=lease,
            task_index=task.task,
            engine=self._engine,
            environment=task.environment,
            search=self._config.search,
            expansion=self._expansion,
            max_context_tokens=self._config.model.max_context_tokens,
            emit=self._emit,
            chain_ended=partial(self._faults.chain_ended, lease.tree_id),
            leaving=self._leaving,
            clock=self._clock,
        )
        with self._faults.growing(lease, task.label):
            tree = await search.grow()
        if not search.unfinished:
            self._metrics.add("actor/trees", 1)
        self._count(lease, task.label, tree, search)
        return search

    def _count(self, lease: Lease, label: str, tree: TurnTree, search: TreeSearch) -> None:
        failed = search.growth.failures
        if self._environments.several:
            self._metrics.add(f"actor/{label}/trees", 1)
            self._metrics.add(f"actor/{label}/failed_branches", failed.total())
        self._metrics.add("actor/turns", len(tree) - len(lease.committed))
        self._metrics.add("actor/failed_branches", failed.total())
        if self._config.search.prune_duplicates:
            self._metrics.add("actor/pruned_branches", search.growth.pruned)
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
        if search.gains is not None:
            for name, value, weight in search.gains.counts.means():
                self._metrics.mean(name, value, weight=weight)
            self._metrics.add("time/actor_score_s", search.gains.counts.seconds)
            self._metrics.add("igpo/scores", search.gains.counts.scores)
