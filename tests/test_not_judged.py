"""Chains that end and that a task cannot judge: left out, counted, and, where it is every one, the end of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from actors.evaluate import success
from actors.faults.fault import first_of
from actors.faults.faults import Faults
from actors.hosting.host import HostedEnvironment
from actors.search.tree_search import TreeSearch
from atpo_async.config import SearchConfig, build
from atpo_async.core.errors import EnvironmentBroken
from atpo_async.core.tree import TurnTree
from atpo_async.environments.base import Environment, NotJudged, Split, StepResult
from atpo_async.environments.checked import CheckedEnvironment
from atpo_async.environments.values import Limits
from tests.actor_support import CountingEnvironment, CountingEpisode, ScriptedEngine, lease
from tests.test_environment_host import WAIT_S
from tests.test_search import Sink, search_of

CHAINS = SearchConfig(initial_rollouts=4, strategy="none", max_action_tokens=8)


class Unjudged(CountingEnvironment):
    """Raises at the end of those chains that ``hides`` names by task and number of the chain."""

    def __init__(self, hides: Callable[[int, int], bool] = lambda task, chain: True) -> None:
        super().__init__()
        self.hides = hides

    def num_tasks(self, split: Split) -> int | None:
        return None

    async def start(self, split: Split, task_index: int) -> CountingEpisode:
        hidden = self.hides(task_index, self.started)
        await super().start(split, task_index)

        class Judged(CountingEpisode):
            async def step(self, action: np.ndarray) -> StepResult:
                said = await super().step(action)
                if said.done and hidden:
                    raise NotJudged("the judge is away")
                return said

        return Judged(self, task_index)


async def grown(environment: Environment, trees: int, notices: list[str]) -> list[TurnTree]:
    """One tree after another, until a fault of the task ends them."""
    faults = Faults("mine:make", at_once=4, notify=lambda line, key: notices.append(line), clock=lambda: 0.0)
    found = []
    for number in range(trees):
        given = lease(tree_id=f"t{number}", task_index=number)
        search = TreeSearch(
            run="r", lease=given, engine=ScriptedEngine(), environment=environment, search=CHAINS, expansion=None,
            max_context_tokens=64, emit=Sink(), chain_ended=partial(faults.chain_ended, given.tree_id),
            clock=lambda: 0.0,
        )  # fmt: skip
        with faults.growing(given):
            try:
                found.append(await search.grow())
            except ExceptionGroup as failures:
                raise first_of(failures) from failures
    return found


async def test_a_chain_that_is_not_judged_is_left_out_and_counted_under_its_own_name() -> None:
    sink = Sink()
    search = search_of(environment=Unjudged(lambda task, chain: chain == 1), emit=sink, config=CHAINS)
    tree = (await search.grow()).pruned()
    assert sink.closed.failures == {"not_judged": 1}
    assert search.growth.last_detail == "not_judged: task 0 (train), step: NotJudged: the judge is away"
    assert [leaf.reward for leaf in tree.leaves()] == [1.0] * 3


async def test_the_text_of_a_task_that_names_itself_is_taken_as_it_is() -> None:
    class Named(CountingEnvironment):
        async def start(self, split: Split, task_index: int) -> CountingEpisode:
            raise NotJudged("task 0 (train), train.jsonl, line 7: reward 'exact' returned None")

    search = search_of(environment=Named(), config=CHAINS)
    await search.grow()
    assert search.growth.last_detail == (
        "not_judged: NotJudged: task 0 (train), train.jsonl, line 7: reward 'exact' returned None"
    )


async def test_a_hosted_and_checked_task_may_leave_a_chain_unjudged_too() -> None:
    made = partial(CheckedEnvironment, Unjudged(), name="mine:make", limits=Limits())
    async with HostedEnvironment(made, name="mine:make", step_timeout_s=WAIT_S) as host:
        sink = Sink()
        search = TreeSearch(
            run="r", lease=lease(), engine=ScriptedEngine(), environment=host, search=CHAINS, expansion=None,
            max_context_tokens=64, emit=sink,
        )  # fmt: skip
        await search.grow()
    assert sink.closed.failures == {"not_judged": 4}


async def test_a_task_that_judges_nothing_ends_the_run_with_its_name_within_a_few_trees() -> None:
    notices: list[str] = []
    environment = Unjudged()
    with pytest.raises(EnvironmentBroken) as broken:
        await grown(environment, 100, notices)
    assert str(broken.value).startswith("environment 'mine:make': ")
    assert "trees in a row ended without one finished chain; the latest: task " in str(broken.value)
    assert str(broken.value).endswith(" (train), step: NotJudged: the judge is away")
    assert environment.started <= 8 * CHAINS.initial_rollouts
    assert notices[0] == (
        "a branch failed and is left out, the run goes on: environment 'mine:make', task 0 (train), step: NotJudged: "
        "the judge is away"
    )


async def test_one_task_in_five_that_is_never_judged_and_one_chain_in_three_let_the_run_go_on() -> None:
    trees = await grown(Unjudged(lambda task, chain: task % 5 == 2 or chain % 3 == 1), 60, [])
    assert len(trees) == 60
    assert sum(not tree.leaves() for tree in trees) == 12


async def test_held_out_tasks_that_are_not_judged_are_unknown_and_no_failures() -> None:
    config = build({"search": {"max_action_tokens": 8}, "model": {"max_context_tokens": 64}})
    environment = Unjudged(lambda task, chain: task % 4 == 0)
    found = await success(config, engine=ScriptedEngine(), environment=environment, num_tasks=8)
    assert (found["success"], found["unknown"], found["failed"]) == (1.0, 2.0, 0.0)


async def test_an_evaluation_gives_the_mean_of_each_named_part_over_the_chains_that_have_it() -> None:
    class Parted(CountingEnvironment):
        def num_tasks(self, split: Split) -> int | None:
            return 4

        async def start(self, split: Split, task_index: int) -> CountingEpisode:
            class Told(CountingEpisode):
                async def step(self, action: np.ndarray) -> StepResult:
                    said = await super().step(action)
                    parts = {"exact": float(task_index), **({"judge": 0.5} if task_index % 2 else {})}
                    return replace(said, rewards=parts if said.done else {})

            return Told(self, task_index)

    config = build({"search": {"max_action_tokens": 8}, "model": {"max_context_tokens": 64}})
    found = await success(config, engine=ScriptedEngine(), environment=Parted(), num_tasks=4)
    assert (found["reward/exact"], found["reward/judge"]) == (1.5, 0.5)
