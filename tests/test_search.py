from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from actors.engines.base import Generation, OnRunning, Sampling, Tokens, ignore
from actors.expansion.expansion import Expansion
from actors.faults.fault import Fault
from actors.search.tree_search import ChainEnded, TreeSearch
from atpo_async.config import SearchConfig
from atpo_async.core.errors import EngineDead, GenerationFailed
from atpo_async.core.tree import ROOT, Turn, TurnTree
from atpo_async.environments.base import Split, StepResult
from atpo_async.environments.checked import CheckedEnvironment
from atpo_async.environments.values import Limits
from atpo_async.wire.messages import TreeClosed, TreeOpened
from tests.actor_support import STOP, CountingEnvironment, CountingEpisode, ScriptedEngine, ints, leaf, lease, turn

SEARCH = SearchConfig(initial_rollouts=3, rounds=2, branches=2, max_action_tokens=8)


class Sink(list[object]):
    async def __call__(self, message: object) -> None:
        self.append(message)

    @property
    def turns(self) -> list[Turn]:
        return [m for m in self if isinstance(m, Turn)]

    @property
    def closed(self) -> TreeClosed:
        (only,) = [m for m in self if isinstance(m, TreeClosed)]
        return only


def search_of(
    engine: ScriptedEngine | None = None,
    environment: CountingEnvironment | None = None,
    *,
    emit: Sink | None = None,
    config: SearchConfig = SEARCH,
    max_context_tokens: int = 64,
    chain_ended: ChainEnded = lambda place, fault: None,
    expansion: Expansion | None = None,
    **changes: object,
) -> TreeSearch:
    return TreeSearch(
        run="r",
        lease=lease(**changes),
        engine=engine or ScriptedEngine(),
        environment=environment or CountingEnvironment(),
        search=config,
        expansion=expansion or Expansion.of(config),
        max_context_tokens=max_context_tokens,
        emit=emit if emit is not None else Sink(),
        chain_ended=chain_ended,
        clock=lambda: 0.0,
    )


async def test_a_tree_has_m_plus_l_times_k_leaves_and_every_turn_left_when_it_was_finished() -> None:
    sink = Sink()
    tree = await search_of(emit=sink).grow()
    assert len(tree.leaves()) == 3 + 2 * 2
    assert isinstance(sink[0], TreeOpened)
    assert sink[-1] is sink.closed
    assert [t.turn_id for t in sink.turns] == list(range(1, len(tree) + 1))
    assert sink.closed.num_turns == len(tree)
    assert sink.closed.failures == {}


async def test_a_branch_keeps_parent_and_observation_of_the_turn_it_is_a_sibling_of() -> None:
    environment = CountingEnvironment(turns=3)
    tree = await search_of(environment=environment).grow()
    branched = [t for t in tree if t.expansion_round > 0 and t.parent_id != ROOT]
    assert branched
    for t in branched:
        for sibling in tree.siblings(t.turn_id):
            np.testing.assert_array_equal(t.observation, tree[sibling].observation)


async def test_what_the_engine_sees_is_the_path_token_by_token() -> None:
    engine = ScriptedEngine()
    tree = await search_of(engine, CountingEnvironment(turns=3)).grow()
    expected = {
        tuple(np.concatenate([tree.context(t.parent_id), t.observation]).tolist()) for t in tree
    }  # fmt: skip
    assert {tuple(c.tolist()) for c in engine.contexts} == expected


async def test_a_failed_generation_ends_its_branch_only() -> None:
    engine = ScriptedEngine(lambda c, n: GenerationFailed("no") if n == 1 else ints(100 + n, STOP))
    sink = Sink()
    tree = await search_of(engine, emit=sink).grow()
    assert sink.closed.failures == {"generate_failed": 1}
    assert len(tree.leaves()) == 6
    assert all(t.reward == 1.0 for t in tree.leaves())


async def test_a_tool_that_raises_ends_its_branch_only_and_never_becomes_a_reward() -> None:
    faults = iter([None, RuntimeError("tool down")])
    environment = CountingEnvironment(fault=lambda number, action: next(faults, None))
    sink = Sink()
    search = search_of(environment=environment, emit=sink)
    tree = await search.grow()
    assert sink.closed.failures == {"environment_failed": 1}
    assert "tool down" in search.growth.last_detail
    assert {t.reward for t in tree.leaves()} == {1.0}


async def test_an_environment_that_never_starts_closes_the_tree_without_turns() -> None:
    class Broken(CountingEnvironment):
        async def start(self, split: str, task_index: int) -> object:  # type: ignore[override]
            raise OSError("no data")

    sink = Sink()
    tree = await search_of(environment=Broken(), emit=sink).grow()
    assert len(tree) == 0
    assert sink.closed.failures == {"environment_failed": 1}


async def test_a_generation_past_its_time_limit_is_counted_as_such() -> None:
    engine = ScriptedEngine()
    engine.hold = asyncio.Event()
    config = SearchConfig(initial_rollouts=2, strategy="none", max_action_tokens=8, generate_timeout_s=0.01)
    sink = Sink()
    await search_of(engine, emit=sink, config=config).grow()
    assert sink.closed.failures == {"generate_timeout": 2}


class Queued(ScriptedEngine):
    """Its requests wait ``queue_s`` for their turn, for ever where None, and are answered at once after that."""

    def __init__(self, queue_s: float | None) -> None:
        super().__init__()
        self.queue_s = queue_s

    async def generate(
        self, prompt: Tokens, sampling: Sampling, *, request_id: str, on_running: OnRunning = ignore
    ) -> Generation:
        if self.queue_s is None:
            await asyncio.Event().wait()
        await asyncio.sleep(self.queue_s or 0.0)
        return await super().generate(prompt, sampling, request_id=request_id, on_running=on_running)


async def test_the_time_in_the_engines_queue_does_not_count_against_an_action() -> None:
    config = SearchConfig(initial_rollouts=2, strategy="none", max_action_tokens=8, generate_timeout_s=0.2)
    sink = Sink()
    tree = await search_of(Queued(0.3), emit=sink, config=config).grow()
    assert sink.closed.failures == {}
    assert len(tree.leaves()) == 2


async def test_a_queue_that_never_moves_is_given_up_and_named() -> None:
    config = SearchConfig(initial_rollouts=2, strategy="none", max_action_tokens=8, generate_timeout_s=0.01)
    sink = Sink()
    search = search_of(Queued(None), emit=sink, config=config)
    await search.grow()
    assert sink.closed.failures == {"generate_timeout": 2}
    assert "waited over 0.1 s in the engine's queue" in search.growth.last_detail


async def test_a_dead_engine_ends_the_search_and_not_just_branches() -> None:
    engine = ScriptedEngine(lambda c, n: EngineDead("gone"))
    with pytest.raises(ExceptionGroup) as failure:
        await search_of(engine).grow()
    assert failure.group_contains(EngineDead)


async def test_a_chain_without_room_for_another_action_ends_with_length_limit_and_reward_zero() -> None:
    sink = Sink()
    await search_of(environment=CountingEnvironment(turns=9), emit=sink, max_context_tokens=6).grow()
    ends = {t.end for t in sink.turns}
    assert ends == {"length_limit"}
    assert {t.reward for t in sink.turns} == {0.0}


async def test_a_tool_that_fills_the_context_by_itself_fails_the_branch_and_is_no_reward_of_the_policy() -> None:
    class Verbose(CountingEpisode):
        async def step(self, action: np.ndarray) -> StepResult:
            said = await super().step(action)
            return said if said.done else replace(said, observation=np.full(40, 20, dtype=np.int32))

    class Library(CountingEnvironment):
        async def start(self, split: Split, task_index: int) -> CountingEpisode:
            return Verbose(self, task_index)

    sink = Sink()
    search = search_of(environment=Library(turns=9), emit=sink, max_context_tokens=44)
    await search.grow()
    assert sink.closed.failures == {"observation_too_long": 3 + 2 * 2}
    assert not sink.turns
    assert "an observation of 40 tokens leaves no space for an action in model.max_context_tokens = 44" in (
        search.growth.last_detail
    )


async def test_calls_whose_many_answers_fill_the_context_end_their_chain_as_the_policys_doing() -> None:
    class Asked(CountingEpisode):
        async def step(self, action: np.ndarray) -> StepResult:
            said = await super().step(action)
            return replace(said, observation=np.full(40, 20, dtype=np.int32), longest_answer=20)

    class Library(CountingEnvironment):
        async def start(self, split: Split, task_index: int) -> CountingEpisode:
            return Asked(self, task_index)

    sink = Sink()
    await search_of(environment=Library(turns=9), emit=sink, max_context_tokens=44).grow()
    assert not sink.closed.failures
    assert {(t.end, t.reward) for t in sink.turns} == {("length_limit", 0.0)}


@pytest.mark.parametrize("where", ["start", "step"])
async def test_the_text_of_an_error_is_cut_to_a_line(where: str) -> None:
    class Wordy(CountingEnvironment):
        async def start(self, split: Split, task_index: int) -> CountingEpisode:
            if where == "start":
                raise ValueError("a page\n" * 1_000_000)
            return await super().start(split, task_index)

    environment = Wordy(fault=lambda number, action: ValueError("a page\n" * 1_000_000))
    search = search_of(environment=environment)
    await search.grow()
    assert f"task 0 (train), {where}: ValueError: a page a page" in search.growth.last_detail
    assert len(search.growth.last_detail) < 500
    assert "\n" not in search.growth.last_detail


async def test_a_value_that_is_refused_fails_its_branch_under_the_name_of_its_field() -> None:
    class Odd(CountingEpisode):
        async def step(self, action: np.ndarray) -> StepResult:
            said = await super().step(action)
            return replace(said, reward=float("nan")) if said.done else said

    class World(CountingEnvironment):
        async def start(self, split: Split, task_index: int) -> CountingEpisode:
            return Odd(self, task_index)

    sink = Sink()
    environment = CheckedEnvironment(World(), name="odd_world:make", limits=Limits(vocab_size=1000))
    search = search_of(environment=environment, emit=sink)  # type: ignore[arg-type]
    await search.grow()
    assert set(sink.closed.failures) == {"environment_failed"}
    assert {t.reward for t in sink.turns} == {None}
    assert "environment 'odd_world:make', task 0 (train), step 2: reward is nan (float)" in search.growth.last_detail


async def test_an_action_never_outgrows_the_context() -> None:
    engine = ScriptedEngine()
    await search_of(engine, CountingEnvironment(turns=9), max_context_tokens=10).grow()
    assert all(len(c) + s.max_tokens <= 10 for c, s in zip(engine.contexts, engine.samplings, strict=True))


async def test_evaluation_is_one_greedy_chain() -> None:
    engine = ScriptedEngine()
    tree = await search_of(engine, kind="eval").grow()
    assert len(tree.leaves()) == 1
    assert {s.temperature for s in engine.samplings} == {0.0}


@pytest.mark.parametrize("faulty", [(), (5,), (8, 9), tuple(range(4, 30))])
async def test_every_episode_is_closed_also_when_a_step_or_a_replay_fails(faulty: tuple[int, ...]) -> None:
    calls = iter(range(10_000))
    environment = CountingEnvironment(
        turns=3, fault=lambda number, action: RuntimeError("tool down") if next(calls) in faulty else None
    )
    await search_of(environment=environment).grow()
    assert environment.started == environment.closed


async def test_a_number_missing_from_a_tree_taken_over_is_not_given_again() -> None:
    held = (turn(1, ROOT), turn(3, ROOT))
    sink = Sink()
    await search_of(emit=sink, committed=held, epoch=1).grow()
    assert min(t.turn_id for t in sink.turns) == 4


async def test_training_goes_through_a_finite_split_again() -> None:
    class Finite(CountingEnvironment):
        def num_tasks(self, split: str) -> int | None:
            return 5

    tree = await search_of(environment=Finite(), task_index=12).grow()
    np.testing.assert_array_equal(tree.prompt, ints(10, 11, 12 + 2))


def committed(tree: TurnTree, number: int) -> tuple[Turn, ...]:
    return tree.turns[:number]


@pytest.mark.parametrize("number", range(15))
async def test_a_reissued_tree_goes_on_from_any_prefix_of_its_turns_to_the_same_shape(number: int) -> None:
    whole = await search_of().grow()
    sink = Sink()
    resumed = await search_of(emit=sink, committed=committed(whole, number), epoch=1).grow()
    assert len(resumed.leaves()) == len(whole.leaves())
    assert [t.turn_id for t in sink.turns] == list(range(min(number, len(whole)) + 1, len(resumed) + 1))
    assert sink.closed.num_turns == len(resumed)
    per_round = [sum(t.is_leaf and t.expansion_round == r for t in resumed) for r in range(3)]
    assert per_round == [3, 2, 2]


async def test_a_replay_that_ends_where_the_tree_went_on_is_a_failed_branch() -> None:
    first = (turn(1, ROOT), leaf(2, ROOT), leaf(3, ROOT))
    sink = Sink()
    config = SearchConfig(initial_rollouts=3, strategy="none", max_action_tokens=8)
    await search_of(environment=CountingEnvironment(turns=1), emit=sink, config=config, committed=first).grow()
    assert sink.closed.failures == {"fork_diverged": 1}


class Wavering(CountingEnvironment):
    """Shows something else each time that a task is started: in the prompt, or in the observations."""

    def __init__(self, what: str) -> None:
        super().__init__(turns=3)
        self.what = what

    async def start(self, split: Split, task_index: int) -> CountingEpisode:
        episode = await super().start(split, task_index)
        number, plain = self.started, episode.step
        if self.what == "prompt":
            episode.prompt = ints(10, number)

        async def step(action: np.ndarray) -> StepResult:
            said = await plain(action)
            return said if said.done or self.what == "prompt" else replace(said, observation=ints(number))

        episode.step = step  # type: ignore[method-assign]
        return episode


async def test_a_fork_that_is_shown_another_observation_than_its_siblings_is_left_out() -> None:
    sink = Sink()
    faults: list[Fault] = []
    search = search_of(environment=Wavering("observation"), emit=sink, chain_ended=keep_in(faults))
    tree = await search.grow()
    assert sink.closed.failures == {"fork_diverged": len(faults)}
    for parent in tree:
        assert len({tuple(t.observation) for t in tree if t.parent_id == parent.turn_id}) <= 1
    assert "step 1: replayed, the observation (1 token) differs from the recorded one (1) from token 0 on" in (
        faults[0].detail
    )


async def test_a_chain_that_is_shown_another_prompt_than_its_tree_has_is_left_out_as_a_wrong_value() -> None:
    sink = Sink()
    faults: list[Fault] = []
    environment = Wavering("prompt")
    tree = await search_of(environment=environment, emit=sink, chain_ended=keep_in(faults)).grow()
    assert len(tree.leaves()) == 1
    assert {fault.reason for fault in faults} == {"fork_diverged"}
    assert {fault.share for fault in faults} == {0.25}
    assert "another prompt than in the tree's first chain" in faults[0].detail
    assert environment.closed == environment.started


def keep_in(faults: list[Fault]) -> ChainEnded:
    return lambda place, fault: faults.append(fault) if fault is not None else None


# --- an expansion strategy that fails --------------------------------------------------------------------------


def picks(choice: Callable[[TurnTree], Sequence[int]]) -> Expansion:
    return Expansion(lambda tree, count, rng, settings: choice(tree), SEARCH)


async def test_a_strategy_that_fails_costs_its_tree_the_further_branches_and_nothing_else() -> None:
    calls: list[int] = []

    def fails_in_the_first_round(tree: TurnTree) -> Sequence[int]:
        calls.append(len(tree))
        raise LookupError("no turn is good enough")

    sink, ended = Sink(), list[tuple[str, Fault | None]]()
    search = search_of(
        emit=sink,
        expansion=picks(fails_in_the_first_round),
        chain_ended=lambda place, fault: ended.append((place, fault)),
    )
    tree = await search.grow()
    assert len(tree.leaves()) == SEARCH.initial_rollouts
    assert sink.closed.failures == {"expansion_failed": SEARCH.branches}
    assert len(calls) == 1
    assert "LookupError: no turn is good enough" in search.growth.last_detail
    faults = [fault for place, fault in ended if place == "branch" and fault is not None]
    assert {fault.source for fault in faults} == {"search.strategy = 'entropy'"}
    assert len(faults) == SEARCH.branches


async def test_a_strategy_may_choose_fewer_turns_or_one_of_them_twice() -> None:
    few = await search_of(expansion=picks(lambda tree: [1])).grow()
    assert len(few.leaves()) == SEARCH.initial_rollouts + SEARCH.rounds
    twice = await search_of(expansion=picks(lambda tree: [1, 1])).grow()
    assert len(twice.siblings(1)) == SEARCH.initial_rollouts - 1 + 2 * SEARCH.rounds
