"""One greedy chain for a held-out task, outside any run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from actors.engines.base import Engine
from actors.faults.fault import first_of
from actors.faults.faults import Faults
from actors.search.calls import NOT_JUDGED
from actors.teams.search import search_of
from atpo_async.config import Config
from atpo_async.core.tree import Turn, TurnTree
from atpo_async.environments.base import Environment
from atpo_async.wire.messages import Lease, TreeClosed, TreeOpened
from atpo_async.wire.records import TurnRecords


@dataclass(frozen=True, slots=True)
class Grown:
    """A tree of one chain; without a turn where the chain failed."""

    tree: TurnTree
    failure: str
    """Why it failed; empty where it did not."""
    judged: bool = True
    """Whether the task said what its end is worth, or it failed before that."""


async def grow_greedy(
    config: Config,
    *,
    engine: Engine,
    environment: Environment,
    faults: Faults,
    index: int,
    task_index: int | None = None,
    label: str = "",
) -> Grown:
    """The greedy chain of held-out task ``index``; of several environments, of ``task_index`` of the one of ``label``.

    Raises EnvironmentBroken where ``faults`` finds too many failures in a row, EngineDead.
    """

    async def drop(message: TreeOpened | Turn | TreeClosed) -> None:
        """Discards the turns of an evaluation: the search itself has them."""

    lease = Lease(
        tree_id=f"eval-{index}", task_index=index, kind="eval", epoch=0, lifetime_s=0.0, min_version=0,
        seed=index, committed=TurnRecords.of(()),
    )  # fmt: skip
    search = search_of(
        config,
        run="eval",
        lease=lease,
        task_index=task_index,
        engine=engine,
        environment=environment,
        search=config.search,
        expansion=None,
        max_context_tokens=config.model.max_context_tokens,
        emit=drop,
        chain_ended=partial(faults.chain_ended, lease.tree_id),
    )
    try:
        with faults.growing(lease, label):
            tree = await search.grow()
    except ExceptionGroup as failures:
        raise first_of(failures) from failures
    return Grown(tree, search.growth.last_detail, judged=NOT_JUDGED not in search.growth.failures)
