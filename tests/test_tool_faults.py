"""Faults of tools and rewards cost a branch each, with their names; one in every task stops the run within its first
trees."""

from __future__ import annotations

import asyncio
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from actors.faults.fault import first_of
from actors.faults.faults import Faults
from actors.hosting import printed
from actors.hosting.host import HostedEnvironment
from actors.search.tree_search import TreeSearch
from atpo_async.config import SearchConfig
from atpo_async.core.errors import EnvironmentBroken
from atpo_async.environments import ToolTask, tool
from atpo_async.environments.checked import CheckedEnvironment
from atpo_async.environments.tools import running
from atpo_async.environments.values import Limits
from tests.actor_support import ScriptedEngine, lease
from tests.tool_task_support import ROWS, action, called, correct, tool_task

WAIT_S = 60.0
SEARCH = SearchConfig(initial_rollouts=4, strategy="none", max_action_tokens=64, step_timeout_s=WAIT_S)


@asynccontextmanager
async def hosted(task: ToolTask) -> AsyncIterator[HostedEnvironment]:
    limits = Limits(vocab_size=512, max_context_tokens=2048)
    host = HostedEnvironment(
        lambda: CheckedEnvironment(task, name="my_task:make", limits=limits), name="my_task:make", step_timeout_s=WAIT_S
    )
    async with host:
        yield host


def search(
    host: HostedEnvironment, reply: Callable[[np.ndarray, int], np.ndarray], *, index: int = 0, **more: Any
) -> TreeSearch:
    async def emit(message: object) -> None: ...

    return TreeSearch(
        run="r", lease=lease(task_index=index, tree_id=f"t{index}"), engine=ScriptedEngine(reply), environment=host,
        search=SEARCH, expansion=None, max_context_tokens=2048, emit=emit, **more,
    )  # fmt: skip


# --- tools -------------------------------------------------------------------------------------------------------

blocked = threading.Event()


@tool
def good() -> str:
    return "good"


@tool
def gives_an_object() -> Any:
    return object()


@tool
def raises() -> str:
    raise ConnectionError("the server is down")


@tool(timeout_s=0.1)
async def raises_when_cancelled() -> str:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        raise OSError("a client library that turns a cancellation into an error") from None
    return ""


@tool(timeout_s=0.1)
async def swallows_its_cancellation() -> str:
    for _ in range(3):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            continue
    return "too late"


@tool(timeout_s=0.1)
def blocks() -> str:
    blocked.wait(WAIT_S)
    return ""


@tool(timeout_s=0.1)
def computes_for_ever() -> str:
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until and not blocked.is_set():
        pass
    return ""


@tool
def exits() -> str:
    sys.exit("bye")


@tool
async def exits_on_the_loop() -> str:
    sys.exit("bye")


@tool
async def leaks_a_cancellation() -> str:
    raise asyncio.CancelledError


FAULTS = {
    gives_an_object: ("environment_failed", r"task 0 \(train\), data\[\d\]: tool 'gives_an_object' returned <object"),
    raises: ("environment_failed", r"data\[\d\]: tool 'raises' with {} raised ConnectionError: the server is down"),
    raises_when_cancelled: ("environment_timeout", r"tool 'raises_when_cancelled' with {} took over 0.1 s \(timeout_s"),
    swallows_its_cancellation: ("environment_timeout", "tool 'swallows_its_cancellation' with {} took over 0.1 s"),
    blocks: ("environment_timeout", "tool 'blocks' with {} took over 0.1 s"),
    computes_for_ever: ("environment_timeout", "tool 'computes_for_ever' with {} took over 0.1 s"),
    exits: ("environment_failed", "tool 'exits' with {} raised RuntimeError: SystemExit: bye"),
    exits_on_the_loop: ("environment_failed", "tool 'exits_on_the_loop' .* RuntimeError: SystemExit: bye"),
    leaks_a_cancellation: ("environment_failed", "tool 'leaks_a_cancellation' .* RuntimeError: CancelledError"),
}


@pytest.fixture
def unblocked() -> Iterator[None]:
    """Threads that block in a test end with it."""
    blocked.clear()
    yield
    blocked.set()


@pytest.mark.usefixtures("unblocked")
@pytest.mark.parametrize("bad", FAULTS, ids=lambda bad: bad.name)
async def test_a_tool_that_fails_costs_its_branch_and_the_others_go_on(bad: Any) -> None:
    task = tool_task(tools=[good, bad])
    first = [action(task, called(bad.name)), *[action(task, called("good"))] * 3]

    def reply(context: np.ndarray, number: int) -> np.ndarray:
        return first[number] if number < 4 else action(task, "city")

    async with hosted(task) as host:
        grown = search(host, reply)
        tree = await grown.grow()
        counts = host.take_counts()
    reason, told = FAULTS[bad]
    assert grown.growth.failures == {reason: 1}
    assert re.search(told, grown.growth.last_detail), grown.growth.last_detail
    assert len(tree.leaves()) == 3
    assert (counts["tool/good/calls"], counts[f"tool/{bad.name}/failed"]) == (3, 1)


def test_a_tool_that_prints_without_end_writes_little_into_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    @tool
    def prints() -> str:
        print("more", file=sys.stderr)
        print("x" * 5_000_000)
        return "printed"

    async def grown() -> Counter[str]:
        task = tool_task(tools=[prints])
        async with hosted(task) as host:
            one = search(host, lambda c, n: action(task, called("prints") if n < 4 else "city"))
            await one.grow()
            return one.growth.failures

    with printed.limited():
        assert asyncio.run(grown()) == {}
        print("the actor's own")
    out, err = capsys.readouterr()
    assert 4 * 2000 < len(out) < 10_000
    assert out.count("(what step 1 of task 0 (train) prints beyond 2000 characters is left out)") == 4
    assert out.endswith("the actor's own\n")
    assert err == "more\n" * 4


def test_what_calls_print_in_all_is_limited_too(capsys: pytest.CaptureFixture[str]) -> None:
    @tool
    def prints() -> str:
        print("y" * 1000)
        return "printed"

    async def grown() -> None:
        task = tool_task(tools=[prints])
        async with hosted(task) as host:
            await search(host, lambda c, n: action(task, called("prints") if n < 4 else "city")).grow()

    before = sys.stdout
    sys.stdout = printed.Printed(before, most_in_all=2500)
    try:
        asyncio.run(grown())
    finally:
        sys.stdout = before
    out = capsys.readouterr().out
    assert out.count("y") == 2500 - 2 or out.count("y") == 2500
    assert out.count("nothing more of it is shown") == 1


async def test_threads_that_hang_end_the_run_before_none_is_left(
    released: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_threads", running.Threads(max_threads=8, max_hanging=2))

    @tool(timeout_s=0.05)
    def hangs() -> str:
        released.wait(WAIT_S)
        return ""

    task = tool_task(tools=[hangs])
    async with hosted(task) as host:
        await search(host, lambda c, n: action(task, called("hangs"))).grow()
        with pytest.raises(ExceptionGroup) as caught:
            await search(host, lambda c, n: action(task, called("hangs")), index=1).grow()
    error = first_of(caught.value)
    assert isinstance(error, EnvironmentBroken)
    assert "threads hang in tools or rewards past their time limits, the latest wanted for tool 'hangs'" in str(error)


async def test_a_thousand_calls_that_block_are_under_way_at_once() -> None:
    """None of them returns before all have begun."""
    together = threading.Barrier(1000)

    def waits() -> int:
        return together.wait(WAIT_S)

    found = await asyncio.gather(
        *(running.run(waits, {}, is_async=False, limit_s=WAIT_S, what="waits") for _ in range(1000))
    )
    assert sorted(found) == list(range(1000))


# --- rewards -----------------------------------------------------------------------------------------------------


async def train(task: ToolTask, trees: int) -> Counter[str]:
    """Failures of so many trees, whose chains all answer at once.  Raises what would end the run."""
    failures: Counter[str] = Counter()
    faults = Faults("my_task:make", at_once=4, notify=lambda line, key: None)
    async with hosted(task) as host:
        for index in range(trees):

            def ended(place: Any, fault: Any, tree_id: str = f"t{index}") -> None:
                faults.chain_ended(tree_id, place, fault)

            one = search(host, lambda c, n: action(task, "city"), index=index, chain_ended=ended)
            with faults.growing(lease(task_index=index, tree_id=f"t{index}")):
                await one.grow()
            failures += one.growth.failures
    return failures


async def test_a_reward_that_is_nan_for_one_row_in_five_costs_its_branches_and_the_run_goes_on() -> None:
    def judge(row: dict[str, Any]) -> float:
        return float("nan") if row["answer"] == "city 3" else 1.0

    assert await train(tool_task(rewards=[judge]), trees=60) == {"environment_failed": 12 * 4}


async def test_a_row_without_the_column_costs_its_branches_and_the_run_goes_on() -> None:
    rows = [{k: v for k, v in row.items() if (i, k) != (3, "answer")} for i, row in enumerate(ROWS)]
    assert await train(tool_task(data=rows, rewards=[correct]), trees=30) == {"environment_failed": 6 * 4}


def always_nan(answer: str) -> float:
    return float("nan")


def needs_a_column(row: dict[str, Any]) -> float:
    return float(row["solution"])


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        (always_nan, r"my_task:make.*task \d \(train\), data\[\d\]: reward 'always_nan' returned nan"),
        (needs_a_column, r"my_task:make.*task \d \(train\), data\[\d\]: reward 'needs_a_column' raised KeyError: 'sol"),
    ],
)
async def test_a_reward_that_always_fails_stops_the_run_within_its_first_trees(reward: Any, told: str) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        await train(tool_task(rewards=[reward]), trees=8)
    error = first_of(caught.value)
    assert isinstance(error, EnvironmentBroken)
    assert re.search(told, str(error)), str(error)


async def test_a_reward_without_a_verdict_drops_its_leaf_and_is_counted_as_not_judged() -> None:
    def judge(row: dict[str, Any]) -> float | None:
        return None if row["answer"] == "city 3" else 1.0

    assert await train(tool_task(rewards=[judge]), trees=10) == {"not_judged": 2 * 4}


async def test_a_reward_past_its_limit_costs_its_branch(released: threading.Event) -> None:
    def judge() -> float:
        released.wait(WAIT_S)
        return 1.0

    task = tool_task(rewards=[judge], reward_timeout_s=0.05)
    async with hosted(task) as host:
        one = search(host, lambda c, n: action(task, "city"))
        await one.grow()
    assert one.growth.failures == {"environment_timeout": 4}
    assert "reward 'judge' took over 0.05 s (reward_timeout_s)" in one.growth.last_detail
