"""Whatever the code of an environment does, the actor's loop goes on and the fault stays with its own call."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from actors.hosting import collected, loop_thread
from actors.hosting.calls import EnvironmentTimeout
from actors.hosting.host import HostedEnvironment
from actors.search.tree_search import TreeSearch
from atpo_async.config import SearchConfig
from atpo_async.core.errors import EnvironmentBroken, SetupError
from atpo_async.environments.base import ReplayFork, Split, StepResult
from atpo_async.environments.daemon_threads import DaemonThreads
from atpo_async.ops import notices
from atpo_async.run import processes
from tests.actor_support import STOP, CountingEnvironment, CountingEpisode, ScriptedEngine, ints, lease

WAIT_S = 60.0
LIMIT_S, GRACE_S = 0.3, 0.2
LONG_S = 1000.0

Tool = Callable[[int], Awaitable[None]]
"""What a step does with the number of its task before it answers."""


class Episode:
    def __init__(self, world: World, task: int) -> None:
        self.world = world
        self.task = task
        self.steps = 0
        self.prompt = ints(10, task)

    async def step(self, action: np.ndarray) -> StepResult:
        self.world.steps.append((self.task, int(action[0])))
        await self.world.tool(self.task)
        self.steps += 1
        return StepResult(observation=ints(self.steps), done=False, reward=None, success=None, end="continue")

    async def close(self) -> None:
        self.world.closed.append(self.task)
        await self.world.closing(self.task)


class World(ReplayFork):
    """Tasks whose steps do what ``tool`` does."""

    stop_token_ids = (STOP,)

    def __init__(self, tool: Tool, closing: Tool | None = None) -> None:
        self.tool = tool
        self.closing = closing or self.nothing
        self.steps: list[tuple[int, int]] = []
        self.closed: list[int] = []

    @staticmethod
    async def nothing(task: int) -> None: ...

    def num_tasks(self, split: Split) -> int | None:
        return None

    async def start(self, split: Split, task_index: int) -> Episode:
        return Episode(self, task_index)


@asynccontextmanager
async def hosting(
    tool: Tool = World.nothing,
    closing: Tool | None = None,
    *,
    limit_s: float = LIMIT_S,
    max_lost_loops: int = 32,
    held_up_s: float = 1.0,
) -> AsyncIterator[tuple[HostedEnvironment, list[World]]]:
    """A hosted World, and all that were made, the one in use last."""
    worlds: list[World] = []

    def make() -> World:
        worlds.append(World(tool, closing))
        return worlds[-1]

    host = HostedEnvironment(
        make,
        name="world",
        step_timeout_s=limit_s,
        grace_s=GRACE_S,
        max_lost_loops=max_lost_loops,
        held_up_s=held_up_s,
    )
    async with host:
        yield host, worlds


def only(bad: Callable[[], object], task: int = 0) -> Tool:
    """A tool that does ``bad`` for one task and awaits what comes of it."""

    async def tool(number: int) -> None:
        if number == task:
            found = bad()
            if asyncio.iscoroutine(found):
                await found

    return tool


def cancels_itself() -> object:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    return asyncio.sleep(0)


def raises(error: BaseException) -> Callable[[], object]:
    def bad() -> object:
        raise error

    return bad


async def in_a_task_of_its_own() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(_exits())


async def in_a_thread() -> None:
    await asyncio.to_thread(sys.exit, 3)


async def in_a_callback() -> None:
    asyncio.get_running_loop().call_soon(sys.exit, 3)
    await asyncio.sleep(0)
    raise ValueError("after the callback")


async def _exits() -> None:
    sys.exit(3)


async def stops_the_loop() -> None:
    asyncio.get_running_loop().stop()
    await asyncio.sleep(0)
    raise ValueError("after the stop")


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (lambda: sys.exit(0), "SystemExit: 0"),
        (raises(KeyboardInterrupt()), "KeyboardInterrupt"),
        (raises(GeneratorExit("odd")), "GeneratorExit: odd"),
        (raises(asyncio.CancelledError("leaked")), "CancelledError: leaked"),
        (cancels_itself, "CancelledError"),
        (in_a_task_of_its_own, "SystemExit: 3"),
        (in_a_thread, "SystemExit: 3"),
        (in_a_callback, "after the callback"),
        (stops_the_loop, "after the stop"),
        (raises(StopIteration(1)), "StopIteration"),
        (raises(ValueError("plain")), "plain"),
        (raises(TimeoutError("the database did not answer")), "the database did not answer"),
    ],
)
async def test_whatever_a_step_raises_is_the_answer_to_that_step_alone(bad: Callable[[], object], told: str) -> None:
    async with hosting(only(bad), limit_s=WAIT_S) as (host, worlds):
        harmed, well = await host.start("train", 0), await host.start("train", 1)
        with pytest.raises(Exception, match=told) as caught:
            await harmed.step(ints(5))
        assert isinstance(caught.value, Exception)
        assert not isinstance(caught.value, EnvironmentTimeout)
        assert (await well.step(ints(5))).observation.tolist() == [1]
        assert len(worlds) == 1


async def test_an_exit_while_the_environment_is_made_is_an_error_of_its_making() -> None:
    def make() -> World:
        sys.exit(0)

    with pytest.raises(SetupError, match="environment 'world' could not be made: SystemExit: 0"):
        await HostedEnvironment(make, name="world", step_timeout_s=LIMIT_S).open()


async def test_errors_of_the_making_come_as_they_are() -> None:
    def make() -> World:
        raise SetupError("no index here")

    with pytest.raises(SetupError, match="no index here"):
        await HostedEnvironment(make, name="world", step_timeout_s=LIMIT_S).open()


async def test_all_calls_of_an_environment_run_on_the_loop_and_in_the_thread_that_made_it() -> None:
    seen: set[tuple[int, asyncio.AbstractEventLoop]] = set()

    def here() -> None:
        seen.add((threading.get_ident(), asyncio.get_running_loop()))

    async def tool(task: int) -> None:
        here()

    def make() -> World:
        here()
        return World(tool, tool)

    async with HostedEnvironment(make, name="world", step_timeout_s=WAIT_S) as host:
        episode = await host.start("train", 0)
        await episode.step(ints(5))
        await episode.close()
    assert len(seen) == 1
    assert seen != {(threading.get_ident(), asyncio.get_running_loop())}


async def test_a_step_past_its_limit_is_given_up_and_the_others_go_on() -> None:
    async with hosting(only(lambda: asyncio.sleep(LONG_S))) as (host, worlds):
        hangs, well = await host.start("train", 0), await host.start("train", 1)
        with pytest.raises(EnvironmentTimeout, match=r"step 1 of task 0 \(train\) took over 0.3 s"):
            await hangs.step(ints(5))
        await well.step(ints(5))
        assert len(worlds) == 1
        assert host.caller.given_up == 1


async def test_a_step_that_ignores_its_cancellation_is_left_alone() -> None:
    stubborn = asyncio.Event()

    async def ignores() -> None:
        while not stubborn.is_set():
            try:
                await asyncio.sleep(LONG_S)
            except asyncio.CancelledError:
                stubborn.set()
                await asyncio.sleep(LONG_S)

    async with hosting(only(ignores)) as (host, worlds):
        with pytest.raises(EnvironmentTimeout):
            await (await host.start("train", 0)).step(ints(5))
        well = await host.start("train", 1)
        await well.step(ints(5))
        assert len(worlds) == 1


async def test_an_episode_that_comes_after_its_limit_is_closed() -> None:
    class Late(World):
        async def start(self, split: Split, task_index: int) -> Episode:
            try:
                await asyncio.sleep(LONG_S)
            except asyncio.CancelledError:
                return Episode(self, task_index)
            raise AssertionError

    worlds: list[Late] = []

    def make() -> Late:
        worlds.append(Late(World.nothing))
        return worlds[-1]

    async with HostedEnvironment(make, name="world", step_timeout_s=LIMIT_S) as host:
        with pytest.raises(EnvironmentTimeout):
            await host.start("train", 7)
        await until(lambda: worlds[0].closed == [7])


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_while_a_tool_blocks_the_actors_loop_turns_and_no_other_calls_limit_runs(
    released: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    """It blocks for longer than one limit, and its own limit is long enough."""
    entered = threading.Event()

    def blocks() -> None:
        entered.set()
        released.wait(WAIT_S)

    caplog.set_level(logging.WARNING)
    async with hosting(only(blocks), limit_s=WAIT_S) as (host, worlds):
        slow, well = await host.start("train", 0), await host.start("train", 1)
        blocking = asyncio.create_task(slow.step(ints(5)))
        await until(entered.is_set)
        host.caller.step_timeout_s = LIMIT_S
        waiting = asyncio.create_task(well.step(ints(6)))
        turned_until = time.monotonic() + 1.5
        await until(lambda: time.monotonic() > turned_until)
        assert not waiting.done()
        assert "held_up_by" in host._facts()
        assert "step 1 of task 0" in str(host._facts()["held_up_by"])
        released.set()
        await blocking
        await waiting
        assert len(worlds) == 1
    assert "step 1 of task 0 (train) held up its event loop for" in caplog.text


@pytest.mark.parametrize("where", ["itself", "its task"])
async def test_a_tool_that_blocks_for_ever_costs_its_step_and_the_others_are_brought_elsewhere(
    released: threading.Event, where: str
) -> None:
    def blocks() -> object:
        if where == "its task":
            return _in_a_task(lambda: released.wait(WAIT_S))
        released.wait(WAIT_S)
        return None

    async with hosting(only(blocks)) as (host, worlds):
        hangs, well = await host.start("train", 0), await host.start("train", 1)
        await well.step(ints(5))
        hanging = asyncio.create_task(hangs.step(ints(7)))
        await until(lambda: worlds[0].steps[-1] == (0, 7))
        said = await well.step(ints(6))
        assert said.observation.tolist() == [2]
        with pytest.raises(EnvironmentTimeout, match=r"step 1 of task 0 \(train\)"):
            await hanging
        assert len(worlds) == 2
        assert worlds[1].steps == [(1, 5), (1, 6)]
        await hangs.close()
        await well.close()
        assert worlds[1].closed == [1]


async def test_where_a_loop_was_lost_before_no_call_waits_behind_a_tool_that_blocks(released: threading.Event) -> None:
    """An environment that never lost one is not made twice: it may be large."""
    entered: list[int] = []

    async def tool(task: int) -> None:
        if task < 2:
            entered.append(task)
            released.wait(WAIT_S)

    async with hosting(tool, held_up_s=0.1) as (host, worlds):
        with pytest.raises(EnvironmentTimeout):
            await (await host.start("train", 0)).step(ints(5))
        await until(lambda: host.loops.num_lost == 1)
        host.caller.step_timeout_s = WAIT_S
        blocks, well = await host.start("train", 1), await host.start("train", 2)
        await well.step(ints(6))
        blocking = asyncio.create_task(blocks.step(ints(5)))
        await until(lambda: entered == [0, 1])
        assert (await well.step(ints(7))).observation.tolist() == [2]
        assert not blocking.done()
        assert len(worlds) == 3
        assert worlds[2].steps == [(2, 6), (2, 7)]
        released.set()
        await blocking
        await until(lambda: worlds[1].closed == [2])
        await well.close()
        assert worlds[2].closed == [2]


async def _in_a_task(work: Callable[[], object]) -> None:
    async def body() -> None:
        work()

    await asyncio.create_task(body())


async def test_a_loop_in_python_is_interrupted_and_the_environment_stays_as_it_is() -> None:
    def spins() -> None:
        while True:
            pass

    async with hosting(only(spins)) as (host, worlds):
        spinning, well = await host.start("train", 0), await host.start("train", 1)
        with pytest.raises(EnvironmentTimeout):
            await spinning.step(ints(5))
        host.caller.step_timeout_s = WAIT_S
        await well.step(ints(5))
        assert len(worlds) == 1


async def test_a_loop_in_python_that_catches_everything_ends_at_last() -> None:
    caught = 0

    def spins() -> None:
        nonlocal caught
        while caught < 8:
            try:
                while True:
                    pass
            except BaseException:
                caught += 1

    async with hosting(only(spins)) as (host, worlds):
        with pytest.raises(EnvironmentTimeout):
            await (await host.start("train", 0)).step(ints(5))
        await until(lambda: caught >= 8 and not any(lost.alive for lost in host.loops.lost))
        await (await host.start("train", 1)).step(ints(5))
        assert len(worlds) == 2


async def test_too_many_threads_that_never_come_back_name_the_tool(released: threading.Event) -> None:
    def blocks_for_ever() -> None:
        released.wait(WAIT_S)

    async with hosting(only(blocks_for_ever), max_lost_loops=2) as (host, _):
        for _ in range(2):
            with pytest.raises(EnvironmentTimeout):
                await (await host.start("train", 0)).step(ints(5))
            lost = host.loops.num_lost
            await until(lambda lost=lost: host.loops.num_lost > lost)  # type: ignore[misc]
        with pytest.raises(EnvironmentBroken, match=r"step 1 of task 0 \(train\) blocks its thread .*blocks_for_ever"):
            await host.start("train", 1)


async def test_environments_that_take_much_memory_are_left_behind_less_often(
    released: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = iter([1000.0, 4000.0, 4000.0, 4500.0])
    monkeypatch.setattr(processes, "memory_mb", lambda pids: next(sizes))
    async with hosting(only(lambda: released.wait(WAIT_S))) as (host, worlds):
        for _ in range(2):
            with pytest.raises(EnvironmentTimeout):
                await (await host.start("train", 0)).step(ints(5))
            lost = host.loops.num_lost
            await until(lambda lost=lost: host.loops.num_lost > lost)  # type: ignore[misc]
        with pytest.raises(EnvironmentBroken, match="2 threads hang like this"):
            await host.start("train", 1)
        assert len(worlds) == 2


async def test_hanging_threads_take_no_other_calls_thread(released: threading.Event) -> None:
    """As many as a loop's usual pool has, and more."""

    async def tool(task: int) -> None:
        await asyncio.to_thread(released.wait, WAIT_S if task < 40 else 0)

    async with hosting(tool) as (host, worlds):
        hanging = [asyncio.create_task((await host.start("train", i)).step(ints(5))) for i in range(40)]
        await asyncio.sleep(0)  # they begin, and their limit with them
        host.caller.step_timeout_s = WAIT_S
        await (await host.start("train", 40)).step(ints(5))
        await asyncio.to_thread(lambda: None)
        found = await asyncio.gather(*hanging, return_exceptions=True)
        assert {type(error) for error in found} == {EnvironmentTimeout}
        assert len(worlds) == 1


def test_a_pool_of_daemons_starts_a_thread_only_where_all_are_busy(released: threading.Event) -> None:
    pool = DaemonThreads(3, "pool")
    assert [pool.submit(lambda i=i: i).result(WAIT_S) for i in range(20)] == list(range(20))
    before = threading.active_count()
    entered = threading.Barrier(4)
    waiting = [pool.submit(lambda: (entered.wait(WAIT_S), released.wait(WAIT_S))) for _ in range(3)]
    entered.wait(WAIT_S)
    assert threading.active_count() <= before + 2
    beyond = pool.submit(lambda: "later")
    assert pool.busy_over(-1.0) == 3
    assert not beyond.done()
    released.set()
    assert beyond.result(WAIT_S) == "later"
    assert all(future.result(WAIT_S) for future in waiting)
    assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("pool-"))


async def test_what_an_environment_counts_is_added_up_checked_and_limited(caplog: pytest.LogCaptureFixture) -> None:
    told: list[Any] = [{"tool/lookup/calls": 2, "hits": 1.5}, {"tool/lookup/calls": 1, "actor/trees": 7}, {}]
    told += [{"a name": 1}, {"x": float("nan")}, {"y": True}, None, {f"n{i}": 1 for i in range(1000)}]

    class Counting(World):
        def take_counts(self) -> Any:
            return told.pop(0)

    async def nothing(task: int) -> None: ...

    host = HostedEnvironment(lambda: Counting(nothing), name="world", step_timeout_s=WAIT_S)
    async with host:
        for _ in range(7):
            await (await host.start("train", 0)).close()
        assert host.take_counts() == {
            "tool/lookup/calls": 3.0, "environment/hits": 1.5, "environment/actor/trees": 7.0
        }  # fmt: skip
        assert host.take_counts() == {}
        await (await host.start("train", 0)).close()
        assert len(host.take_counts()) == collected.MOST_NAMES - 3
    assert caplog.text.count("take_counts() has the name 'a name'") == 1


async def test_a_close_that_fails_is_counted_and_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def closing(task: int) -> None:
        raise ConnectionError("the sandbox is gone")

    async with hosting(closing=closing) as (host, _):
        for task in range(3):
            await (await host.start("train", task)).close()
        assert host.reporting.failed_closes == 3
        assert host.take_counts() == {"environment/closes_failed": 3.0}
        assert host.take_counts() == {}
    assert caplog.text.count("the sandbox is gone") == 2


async def test_a_close_that_fails_is_reported_once_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "notices.jsonl"
    monkeypatch.setenv(notices.FILE, str(path))
    monkeypatch.setattr(notices, "_posted", 0)
    tail = notices.Tail(path)

    async def closing(task: int) -> None:
        raise ConnectionError("the sandbox is gone")

    async with hosting(closing=closing) as (host, _):
        for task in range(3):
            await (await host.start("train", task)).close()
    (line,) = tail.new()
    assert "close of task 0 (train) failed, the branch counts all the same" in line
    assert "ConnectionError: the sandbox is gone" in line


async def test_a_tool_that_blocks_below_its_limit_is_reported_once_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "notices.jsonl"
    monkeypatch.setenv(notices.FILE, str(path))
    monkeypatch.setattr(notices, "_posted", 0)
    monkeypatch.setattr(loop_thread, "HELD_UP_S", 0.0)  # every slice holds the loop up for long
    tail = notices.Tail(path)
    caplog.set_level(logging.WARNING)
    async with hosting(limit_s=WAIT_S) as (host, _):
        assert tail.new() == [], "making an environment may take its time"
        for task in range(3):
            await (await host.start("train", task)).step(ints(5))
    (line,) = tail.new()
    assert line.startswith("environment 'world': start of task 0 (train) held up its event loop for 0.0 s")
    assert "asyncio.to_thread" in line
    assert caplog.text.count("held up its event loop") > 2, "the log has more of them"


@pytest.mark.parametrize("how", ["awaits", "blocks"])
async def test_a_close_that_hangs_is_given_up(how: str, released: threading.Event) -> None:
    async def closing(task: int) -> None:
        if how == "blocks":
            released.wait(WAIT_S)
        else:
            await asyncio.sleep(LONG_S)

    async with hosting(closing=closing) as (host, _):
        await (await host.start("train", 0)).close()
        assert host.reporting.failed_closes == 1
        await (await host.start("train", 1)).step(ints(5))


async def test_a_cancelled_caller_leaves_at_once_and_the_episode_is_closed_all_the_same(
    released: threading.Event,
) -> None:
    entered = threading.Event()

    async def tool(task: int) -> None:
        entered.set()
        while not released.is_set():
            try:
                await asyncio.sleep(LONG_S)
            except asyncio.CancelledError:
                continue

    async def chain(host: HostedEnvironment) -> None:
        episode = await host.start("train", 3)
        try:
            await episode.step(ints(5))
        finally:
            await episode.close()

    async with hosting(tool, limit_s=WAIT_S) as (host, worlds):
        walking = asyncio.create_task(chain(host))
        await until(entered.is_set)
        walking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await walking
        await until(lambda: worlds[0].closed == [3])


async def test_a_replay_may_take_the_time_of_its_start_and_all_its_steps() -> None:
    """Each step takes two thirds of the limit."""

    async def tool(task: int) -> None:
        await asyncio.sleep(LIMIT_S * 2 / 3)

    async with hosting(tool, limit_s=LIMIT_S) as (host, _):
        episode = await host.replay("train", 0, (ints(5), ints(6), ints(7), ints(8)))
        assert episode.prompt.tolist() == [10, 0]
        host.caller.step_timeout_s = 0.001
        with pytest.raises(EnvironmentTimeout, match=r"replay of 2 steps of task 0 \(train\) took over 0.003 s"):
            await host.replay("train", 0, (ints(5), ints(6)))


async def test_the_file_of_what_runs_says_it_while_it_runs(tmp_path: Path, released: threading.Event) -> None:
    async def tool(task: int) -> None:
        await asyncio.to_thread(released.wait, WAIT_S)

    doing = tmp_path / "actor-0.0.doing"
    async with HostedEnvironment(lambda: World(tool), name="world", step_timeout_s=WAIT_S, doing=doing) as host:
        episode = await host.start("train", 4)
        stepping = asyncio.create_task(episode.step(ints(5)))
        await until(lambda: doing.read_text().strip() == "step 1 of task 4 (train)")
        released.set()
        await stepping
        await until(lambda: not doing.read_text().strip())


async def test_a_tree_loses_the_branches_of_a_tool_that_exits_and_says_so() -> None:
    config = SearchConfig(initial_rollouts=3, strategy="none", max_action_tokens=8)
    calls = iter(range(100))

    class Exits(CountingEnvironment):
        async def start(self, split: Split, task_index: int) -> CountingEpisode:
            if next(calls) == 1:
                sys.exit(0)
            return await super().start(split, task_index)

    async with HostedEnvironment(Exits, name="world", step_timeout_s=WAIT_S) as host:
        sent: list[object] = []

        async def emit(message: object) -> None:
            sent.append(message)

        search = TreeSearch(
            run="r",
            lease=lease(),
            engine=ScriptedEngine(),
            environment=host,
            search=config,
            expansion=None,
            max_context_tokens=64,
            emit=emit,
        )
        tree = await search.grow()
    assert search.growth.failures == {"environment_failed": 1}
    assert search.growth.last_detail == "environment_failed: task 0 (train), start: SystemExit: 0"
    assert len(tree.leaves()) == 2


class _Entered:
    """Counts in place of a loop's thread."""

    def __init__(self) -> None:
        self.inside = 0

    def _enter(self, call: object) -> None:
        self.inside += 1

    def _leave(self) -> None:
        self.inside -= 1


@pytest.mark.parametrize("closed_first", [True, False])
def test_a_call_that_becomes_garbage_is_closed_in_whichever_order(closed_first: bool) -> None:
    ended = []

    async def waits() -> None:
        try:
            await asyncio.Future(loop=asyncio.new_event_loop())
        finally:
            ended.append(True)

    coro, thread = waits(), _Entered()
    waiting = loop_thread._Timed(coro, cast(Any, thread), cast(Any, None)).__await__()
    future = next(waiting)
    if closed_first:
        coro.close()
    waiting.close()
    future.get_loop().close()
    assert (ended, thread.inside) == ([True], 0)
