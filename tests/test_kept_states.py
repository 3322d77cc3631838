"""Episodes that can be copied are forked so, and replayed wherever that is not possible."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.faults.fault import Fault
from actors.hosting.calls import EnvironmentTimeout
from actors.hosting.host import HostedEnvironment
from actors.hosting.kept import MOST_FAILED
from atpo_async.config import SearchConfig
from atpo_async.core.tree import ROOT
from atpo_async.environments.base import ForkDiverged, ReplayFork, Split, StepResult
from atpo_async.environments.checked import CheckedEnvironment
from atpo_async.environments.values import Limits, ValueRefused
from atpo_async.ops import notices
from tests.actor_support import STOP, ints, leaf, turn
from tests.test_environment_host import GRACE_S, LIMIT_S, WAIT_S, until
from tests.test_search import Sink, keep_in, picks, search_of

TURNS = 3
SEARCH = SearchConfig(initial_rollouts=2, rounds=1, branches=2, max_action_tokens=8)
"""Two chains of three turns, and two branches."""


class Chain:
    """An episode whose state is the list of its actions; each observation names how many there were."""

    def __init__(self, world: World, actions: tuple[int, ...] = ()) -> None:
        self.world = world
        self.actions = list(actions)
        self.prompt = ints(10, 11)
        world.opened += 1

    async def step(self, action: np.ndarray) -> StepResult:
        self.world.steps += 1
        self.actions.append(int(action[0]))
        await self.world.on_step(self)
        if len(self.actions) >= TURNS:
            reward = float(len(set(self.actions)))
            return StepResult(observation=ints(), done=True, reward=reward, success=True, end="done")
        seen = ints(20 + len(self.actions), self.world.shown)
        return StepResult(observation=seen, done=False, reward=None, success=None, end="continue")

    async def close(self) -> None:
        self.world.closed += 1


class Snapshotting(Chain):
    def snapshot(self) -> Any:
        self.world.taken += 1
        return self.world.on_take(self, tuple(self.actions))

    def restore(self, snapshot: Any) -> Any:
        return self.world.on_restore(self, snapshot)


class Forking(Chain):
    def fork(self) -> Any:
        self.world.taken += 1
        return self.world.on_take(self, type(self)(self.world, tuple(self.actions)))


class Coroutines(Snapshotting):
    async def snapshot(self) -> Any:
        return super().snapshot()

    async def restore(self, snapshot: Any) -> Any:
        await asyncio.sleep(0)
        return super().restore(snapshot)


class ForkingLater(Forking):
    async def fork(self) -> Any:
        await asyncio.sleep(0)
        return super().fork()


async def nothing(chain: Chain) -> None: ...


def put_back(chain: Chain, snapshot: Any) -> Any:
    chain.actions = list(snapshot)


class World(ReplayFork):
    stop_token_ids = (STOP,)

    def __init__(self, kind: type[Chain], **hooks: Any) -> None:
        self.kind = kind
        self.opened = self.closed = self.steps = self.taken = 0
        self.shown = 0
        self.on_take: Callable[[Chain, Any], Any] = lambda chain, state: state
        self.on_restore: Callable[[Chain, Any], Any] = put_back
        self.on_step: Callable[[Chain], Any] = nothing
        vars(self).update(hooks)

    def num_tasks(self, split: Split) -> int | None:
        return None

    async def start(self, split: Split, task_index: int) -> Chain:
        return self.kind(self)


@asynccontextmanager
async def hosting(
    kind: type[Chain], *, limit_s: float = WAIT_S, most_kept: int = 100, world: type[World] = World, **hooks: Any
) -> AsyncIterator[tuple[HostedEnvironment, list[World]]]:
    """A hosted World, its values checked, and all that were made."""
    worlds: list[World] = []

    def make() -> CheckedEnvironment:
        worlds.append(world(kind, **hooks))
        return CheckedEnvironment(worlds[-1], name="world", limits=Limits(vocab_size=1000))

    host = HostedEnvironment(make, name="world", step_timeout_s=limit_s, grace_s=GRACE_S, most_kept=most_kept)
    async with host:
        yield host, worlds


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> notices.Tail:
    path = tmp_path / "notices.jsonl"
    monkeypatch.setenv(notices.FILE, str(path))
    monkeypatch.setattr(notices, "_posted", 0)
    return notices.Tail(path)


KINDS = [Snapshotting, Coroutines, Forking, ForkingLater]


@pytest.mark.parametrize("kind", KINDS)
async def test_episodes_that_can_be_copied_are_forked_so_and_repeat_no_step(kind: type[Chain]) -> None:
    way = "snapshot" if issubclass(kind, Snapshotting) else "fork"
    sink = Sink()
    async with hosting(kind) as (host, (world,)):
        tree = await search_of(environment=host, emit=sink, config=SEARCH).grow()  # type: ignore[arg-type]
        branched = [t for t in tree if t.expansion_round == 1 and t.parent_id != ROOT]
        at_root = sum(t.expansion_round == 1 and t.parent_id == ROOT for t in tree)
        heads = [t for t in branched if tree[t.parent_id].expansion_round == 0]
        assert sink.closed.failures == {}
        assert len(tree.leaves()) == 4
        assert heads, "a branch at an inner turn"
        assert world.steps == len(tree)
        assert host.take_counts() == {f"environment/forks/{way}": 2.0 - at_root}
        await until(lambda: world.opened == world.closed)
        assert host.keeper.num_kept == 0
    for turn_ in tree.leaves():
        actions = [int(tree[i.turn_id].action[0]) for i in tree.path(turn_.turn_id)]
        assert turn_.reward == len(set(actions)), "the state is that of the branch's own path"


async def test_only_turns_that_a_later_round_may_branch_at_are_kept() -> None:
    async with hosting(Snapshotting) as (host, (world,)):
        tree = await search_of(environment=host, config=SEARCH).grow()  # type: ignore[arg-type]
        assert world.taken == sum(not t.is_leaf and t.expansion_round == 0 for t in tree)
        world.taken = 0
        await search_of(environment=host, config=SEARCH, kind="eval").grow()  # type: ignore[arg-type]
        assert world.taken == 0


async def forked_by(host: HostedEnvironment, sink: Sink | None = None, **changes: Any) -> dict[str, int]:
    """Way -> number of the branches of one tree that forked so; each branch is at turn 2."""
    sink = Sink() if sink is None else sink
    before = dict(host.keeper.forks)
    changes = {"config": SEARCH, "expansion": at(2)} | changes
    await search_of(environment=host, emit=sink, **changes).grow()  # type: ignore[arg-type]
    return {way: n - before.get(way, 0) for way, n in host.keeper.forks.items() if n - before.get(way, 0)}


def at(*depths: int) -> Any:
    """A strategy that branches off each path's turn of that depth, by turns of the first chain."""

    def choice(tree: Any) -> list[int]:
        leaf_id = tree.leaves()[0].turn_id
        path = tree.path(leaf_id)
        return [path[depth - 1].turn_id for depth in depths for _ in range(2 // len(depths))]

    return picks(choice)


@pytest.mark.parametrize("kind", [Snapshotting, Forking])
async def test_beyond_the_limit_on_how_many_are_kept_branches_are_replayed(kind: type[Chain]) -> None:
    async with hosting(kind, most_kept=1) as (host, (world,)):
        ways = await forked_by(host, expansion=at(2, 3))
        copied = ways.get("snapshot", 0) + ways.get("fork", 0)
        assert copied + ways["replay"] == 2
        assert world.taken == 1 + (copied if kind is Forking else 0)
        assert host.keeper.num_kept == 0
        assert host.take_counts()["environment/replayed_steps"] >= 1


@pytest.mark.parametrize("kind", [Snapshotting, Coroutines, Forking, ForkingLater])
async def test_a_snapshot_that_raises_costs_no_branch_and_is_told_once(
    kind: type[Chain], terminal: notices.Tail
) -> None:
    def on_take(chain: Chain, state: Any) -> Any:
        if len(chain.actions) == 1:
            raise OSError("the disk is full")
        return state

    sink = Sink()
    async with hosting(kind, on_take=on_take) as (host, _):
        ways = await forked_by(host, sink)
        assert ways == {"replay": 2}
        assert host.keeper.failed == 2
        assert host.take_counts()["environment/snapshots_failed"] == 2
    assert sink.closed.failures == {}
    (line,) = terminal.new()
    assert "of task 0 (train) after 1 step failed, the branches there are replayed" in line
    assert "OSError: the disk is full" in line


async def test_a_state_that_cannot_be_had_is_none_and_no_failure() -> None:
    for kind in (Snapshotting, Forking):
        async with hosting(kind, on_take=lambda chain, state: None) as (host, _):
            assert await forked_by(host) == {"replay": 2}
            assert (host.keeper.failed, host.keeper.num_kept) == (0, 0)


async def test_where_an_episode_makes_no_copy_of_itself_its_snapshot_is_kept() -> None:
    class Both(Snapshotting):
        def fork(self) -> Any:
            return None

    async with hosting(Both) as (host, _):
        assert await forked_by(host) == {"snapshot": 2}


async def test_snapshots_that_fail_again_and_again_are_no_longer_made(terminal: notices.Tail) -> None:
    def on_take(chain: Chain, state: Any) -> Any:
        raise OSError("the disk is full")

    sink = Sink()
    async with hosting(Snapshotting, on_take=on_take) as (host, (world,)):
        for _ in range(MOST_FAILED):
            await forked_by(host, sink := Sink())
        assert world.taken == MOST_FAILED
        assert sink.closed.failures == {}
    first, last = terminal.new()
    assert "as many failed in a row, no more are made" in last
    assert "no more are made" not in first


async def test_a_restore_that_raises_is_replaced_by_a_replay() -> None:
    def on_restore(chain: Chain, snapshot: Any) -> Any:
        raise LookupError("no such image")

    sink = Sink()
    async with hosting(Snapshotting, on_restore=on_restore) as (host, (world,)):
        assert await forked_by(host, sink) == {"replay": 2}
        assert host.keeper.failed == 2
        await until(lambda: world.opened == world.closed)
    assert sink.closed.failures == {}


@pytest.mark.parametrize("nonsense", [lambda chain: 5, lambda chain: chain, lambda chain: object()])
async def test_a_fork_that_returns_nonsense_costs_the_branches_there_and_names_itself(
    nonsense: Callable[[Chain], object],
) -> None:
    sink = Sink()
    faults: list[Fault] = []
    async with hosting(Forking, on_take=lambda chain, state: nonsense(chain)) as (host, _):
        await forked_by(host, sink, chain_ended=keep_in(faults))
    assert sink.closed.failures == {"environment_failed": 2}, "and none of the chains that it was asked of"
    assert {fault.kind for fault in faults} == {"value of what fork() returned"}
    assert faults[0].detail.startswith("environment 'world', task 0 (train)")
    assert "what fork() returned is" in faults[0].detail


async def test_a_restore_that_returns_another_episode_is_refused_by_name() -> None:
    sink = Sink()
    faults: list[Fault] = []
    async with hosting(Snapshotting, on_restore=lambda chain, snapshot: Chain(chain.world, snapshot)) as (host, _):
        await forked_by(host, sink, chain_ended=keep_in(faults))
    assert sink.closed.failures == {"environment_failed": 2}
    assert "expected nothing: restore changes the episode it belongs to" in faults[0].detail


async def hangs(*args: Any) -> Any:
    await asyncio.sleep(1000)


@pytest.mark.parametrize(("kind", "part"), [(Coroutines, "snapshot"), (ForkingLater, "fork")])
async def test_a_snapshot_that_hangs_ends_by_the_time_limit_and_its_branches_are_replayed(
    kind: type[Chain], part: str
) -> None:
    one_chain = SEARCH.model_copy(update={"initial_rollouts": 1})
    sink = Sink()
    async with hosting(type("Hangs", (kind,), {part: hangs}), limit_s=LIMIT_S) as (host, worlds):
        assert await forked_by(host, sink, config=one_chain) == {"replay": 2}
        assert host.keeper.failed == 2
        assert len(worlds) == 1
    assert sink.closed.failures == {}


@pytest.mark.parametrize(("kind", "part"), [(Coroutines, "restore"), (ForkingLater, "fork")])
async def test_a_fork_that_hangs_costs_its_branch_by_the_time_limit(kind: type[Chain], part: str) -> None:
    odd = type("Hangs", (kind,), {})
    async with hosting(odd, limit_s=LIMIT_S) as (host, _):
        episode = await host.start("train", 0)
        await episode.step(ints(5))
        kept = await episode.keep()
        assert kept is not None
        setattr(odd, part, hangs)
        with pytest.raises(EnvironmentTimeout, match=rf"{part} of task 0 \(train\) after 1 step took over"):
            await host.forked("train", 0, kept)
        host.keeper.release(kept)


@pytest.mark.parametrize("kind", [Snapshotting, Forking])
async def test_what_was_kept_on_a_loop_that_is_lost_is_replaced_by_a_checked_replay(
    kind: type[Chain], released: threading.Event
) -> None:
    async def on_step(chain: Chain) -> None:
        if chain.actions[-1] == 99:
            released.wait(WAIT_S)

    async with hosting(kind, limit_s=LIMIT_S, on_step=on_step) as (host, worlds):
        episode = await host.start("train", 0)
        await episode.step(ints(5))
        kept = await episode.keep()
        assert kept is not None
        with pytest.raises(EnvironmentTimeout):
            await (await host.start("train", 1)).step(ints(99))
        await until(lambda: host.loops.num_lost == 1)
        assert await host.forked("train", 0, kept) is None
        host.keeper.release(kept)
        assert host.keeper.num_kept == 0
        await episode.step(ints(6))
        assert [world.steps for world in worlds] == [2, 2]
        again = await episode.keep()
        assert again is not None, "the environment that was made anew keeps states as well"
        host.keeper.release(again)


async def test_an_episode_that_is_brought_to_another_loop_is_held_to_what_it_has_shown(
    released: threading.Event,
) -> None:
    async def on_step(chain: Chain) -> None:
        if chain.actions[-1] == 99:
            released.wait(WAIT_S)

    async with hosting(Chain, limit_s=LIMIT_S, on_step=on_step) as (host, worlds):
        episode = await host.start("train", 0)
        worlds[0].shown = 3
        await episode.step(ints(5))
        with pytest.raises(EnvironmentTimeout):
            await (await host.start("train", 1)).step(ints(99))
        await until(lambda: host.loops.num_lost == 1)
        with pytest.raises(ForkDiverged, match=r"task 0 \(train\), step 1: replayed, the observation .* from token 1"):
            await episode.step(ints(6))


async def test_a_branch_that_was_forked_is_replayed_from_its_whole_path_where_its_loop_is_lost(
    released: threading.Event,
) -> None:
    async def on_step(chain: Chain) -> None:
        if chain.actions[-1] == 99:
            released.wait(WAIT_S)

    async with hosting(Forking, limit_s=LIMIT_S, on_step=on_step) as (host, worlds):
        episode = await host.start("train", 0)
        await episode.step(ints(5))
        kept = await episode.keep()
        assert kept is not None
        branch = await host.forked("train", 0, kept)
        assert branch is not None
        with pytest.raises(EnvironmentTimeout):
            await (await host.start("train", 1)).step(ints(99))
        await until(lambda: host.loops.num_lost == 1)
        assert (await branch.step(ints(7))).observation.tolist() == [22, 0]
        assert worlds[1].steps == 2


async def test_a_tree_that_another_actor_began_is_replayed() -> None:
    begun = (
        turn(1, ROOT),
        turn(2, 1, observation=ints(21, 0)),
        leaf(3, 2, observation=ints(22, 0)),
        turn(4, ROOT),
    )
    sink = Sink()
    async with hosting(Snapshotting) as (host, _):
        ways = await forked_by(host, sink, committed=begun, epoch=1)
    assert sink.closed.failures == {}
    assert ways == {"replay": 3}, "the chain that goes on, and both branches"


async def test_where_no_replay_is_allowed_only_what_is_kept_is_branched_at() -> None:
    class Never(World):
        replay = None  # type: ignore[assignment]

    sink = Sink()
    async with hosting(Snapshotting, world=Never) as (host, _):
        assert await forked_by(host, sink) == {"snapshot": 2}
        assert sink.closed.failures == {}
        begun = (turn(1, ROOT), turn(2, 1, observation=ints(21, 0)), leaf(3, 2, observation=ints(22, 0)))
        taken_over = search_of(
            environment=host,  # type: ignore[arg-type]
            emit=(sink := Sink()),
            config=SEARCH.model_copy(update={"initial_rollouts": 1}),
            expansion=at(2),
            committed=begun,
            epoch=1,
        )
        await taken_over.grow()
    assert sink.closed.failures == {"environment_failed": 2}
    assert "the environment's replay is None, and no snapshot or copy" in taken_over.growth.last_detail


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"fork": 5}, r"fork is 5 \(int\); expected a method fork\(\), or no attribute of that name"),
        ({"fork": lambda self, deep: None}, r"fork\(deep\) is called as fork\(\): missing a required argument: 'deep'"),
        ({"snapshot": lambda self: 1}, r"an episode with snapshot\(\) needs restore\(\) as well"),
        ({"restore": lambda self, snapshot: None}, r"an episode with restore\(\) needs snapshot\(\) as well"),
        (
            {"snapshot": lambda self: 1, "restore": lambda self: None},
            r"restore\(\) is called as restore\(snapshot\): too many positional arguments",
        ),
        ({"replay_step": lambda self, action: None}, r"is called as replay_step\(action, observation\)"),
    ],
)
async def test_optional_parts_of_an_episode_are_checked_when_it_is_started(parts: dict[str, Any], told: str) -> None:
    async with hosting(type("Odd", (Chain,), parts)) as (host, (world,)):
        with pytest.raises(ValueRefused, match=told):
            await host.start("train", 0)
        assert world.opened == world.closed


async def test_an_optional_part_that_is_none_is_none() -> None:
    class Plain(Forking):
        fork = None  # type: ignore[assignment]

    async with hosting(Plain) as (host, _):
        episode = await host.start("train", 0)
        assert await episode.keep() is None
