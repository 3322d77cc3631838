"""Where branches begin at leaves, while a tree grows, or at drawn states, the state that they need has been kept."""

from __future__ import annotations

from typing import Any

import pytest

from actors.expansion.expansion import Expansion
from atpo_async.config import SearchConfig
from atpo_async.core.tree import ROOT
from tests.test_environment_host import until
from tests.test_kept_states import SEARCH, TURNS, Chain, Forking, Snapshotting, at, forked_by, hosting
from tests.test_search import Sink, search_of

VOCAB = 1000


def way_of(kind: type[Chain]) -> str:
    return "snapshot" if issubclass(kind, Snapshotting) else "fork"


@pytest.mark.parametrize("kind", [Snapshotting, Forking])
async def test_a_branch_beside_a_leaf_begins_at_the_state_before_it_and_repeats_no_step(kind: type[Chain]) -> None:
    async with hosting(kind) as (host, (world,)):
        sink = Sink()
        assert await forked_by(host, sink, expansion=at(TURNS)) == {way_of(kind): 2}
        assert world.steps == len(sink.turns)
        branched = [t for t in sink.turns if t.expansion_round == 1]
        assert [t.end for t in branched] == ["done", "done"]
        assert branched[0].parent_id != ROOT


async def test_a_branch_beside_a_leaf_of_a_tree_taken_over_is_replayed_and_checked() -> None:
    async with hosting(Snapshotting) as (host, _):
        sink = Sink()
        await search_of(environment=host, emit=sink, config=SEARCH, expansion=at(TURNS)).grow()  # type: ignore[arg-type]
        chains = tuple(t for t in sink.turns if t.expansion_round == 0)
        changes: dict[str, Any] = {"expansion": at(TURNS), "committed": chains, "epoch": 1}
        assert await forked_by(host, **changes) == {"replay": 2}


@pytest.mark.parametrize("kind", [Snapshotting, Forking])
@pytest.mark.parametrize("rise_of", ["turn", "parent"])
async def test_branches_that_begin_while_the_tree_grows_repeat_no_step(kind: type[Chain], rise_of: str) -> None:
    config = SearchConfig(
        strategy="entropy-rise", expand="online", initial_rollouts=2, rounds=1, branches=4, branch_prob=1.0,
        entropy_weight=0.0, max_action_tokens=8, rise_of=rise_of,
    )  # fmt: skip
    async with hosting(kind) as (host, (world,)):
        sink = Sink()
        expansion = Expansion.of(config, policy_tokens=VOCAB)
        tree = await search_of(environment=host, emit=sink, config=config, expansion=expansion).grow()  # type: ignore[arg-type]
        assert sink.closed.failures == {}
        assert len(tree.leaves()) == 6
        assert world.steps == len(tree)
        assert set(host.take_counts()) == {f"environment/forks/{way_of(kind)}"}
        await until(lambda: world.opened == world.closed)
        assert host.keeper.num_kept == 0


@pytest.mark.parametrize("kind", [Snapshotting, Forking])
async def test_chains_that_go_on_from_drawn_states_repeat_no_step(kind: type[Chain]) -> None:
    config = SearchConfig(strategy="resample", initial_rollouts=4, rounds=2, max_action_tokens=8)
    async with hosting(kind) as (host, (world,)):
        sink = Sink()
        tree = await search_of(
            environment=host, emit=sink, config=config, expansion=Expansion.of(config)  # type: ignore[arg-type]
        ).grow()  # fmt: skip
        assert sink.closed.failures == {}
        assert len(tree.leaves()) == 4
        assert world.steps == len(tree)
        await until(lambda: world.opened == world.closed)
        assert host.keeper.num_kept == 0
