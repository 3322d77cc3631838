"""Fleet of Agents as expansion: how states are weighed, and chains that stop together and go on from what was drawn."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from actors.engines.base import Generation, OnRunning, Sampling, Tokens, ignore
from actors.expansion.expansion import Expansion
from actors.expansion.resampling import age, probabilities, value_of
from atpo_async.config import SearchConfig
from atpo_async.core.errors import GenerationFailed
from atpo_async.core.tree import ROOT, TurnTree
from atpo_async.environments.base import Split, StepResult
from tests.actor_support import CountingEnvironment, CountingEpisode, ints, leaf, turn
from tests.expansion_support import ByContext, Uneven, content, search_of, settings
from tests.test_search import Sink


def fleet(**fields: object) -> SearchConfig:
    return settings(**{"strategy": "resample", "initial_rollouts": 5, "rounds": 3, **fields})


VALUES = (1.0, 3.0, 4.0, 0.0)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("linear", (0.125, 0.375, 0.5, 0.0)),
        ("max", (0.0, 0.0, 1.0, 0.0)),
        ("percentile", (0.0, 0.0, 1.0, 0.0)),
        ("above-half", (0.0, 3 / 7, 4 / 7, 0.0)),
        ("logistic", tuple(np.exp([1 / (1 + math.exp(-v)) for v in VALUES]) / sum(
            math.exp(1 / (1 + math.exp(-v))) for v in VALUES
        ))),
    ],
)  # fmt: skip
def test_values_become_probabilities(how: str, expected: tuple[float, ...]) -> None:
    assert probabilities(VALUES, how) == pytest.approx(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [(0.0, 0.0), (-1.0, -3.0)])
def test_where_nothing_is_worth_anything_all_states_are_equally_likely(values: tuple[float, ...]) -> None:
    assert probabilities(values, "linear").tolist() == [0.5, 0.5]
    assert probabilities((1e300, 1e300, -1e300), "linear").tolist() == [0.5, 0.5, 0.0]


def test_what_a_state_is_worth_is_the_environments_word_else_what_was_earned() -> None:
    path = (turn(1, ROOT, turn_reward=0.25), turn(2, 1, turn_reward=0.5), turn(3, 1, state_value=-2.0, turn_reward=9.0))
    tree = TurnTree("t0", 0, ints(1), path)
    said = [value_of(tree, each, fleet()) for each in tree]
    assert said == [0.25, 0.75, -2.0]
    assert value_of(tree, tree[3], fleet(resample_value="turn-rewards")) == 9.25
    assert value_of(tree, tree[3], fleet(resample_value="certainty")) == pytest.approx(math.exp(-0.5))


def test_the_age_of_a_state_is_the_turns_that_the_chains_have_taken_since() -> None:
    tree = TurnTree(
        "t0", 0, ints(1),
        (turn(1, ROOT), turn(2, 1), turn(3, 2, expansion_round=1), turn(4, 3, expansion_round=1), leaf(5, 1)),
    )  # fmt: skip
    config = fleet(resample_every=2)
    assert [age(tree, tree[n], config, round_number=2) for n in (1, 2, 3, 4)] == [3, 2, 1, 0]
    assert [age(tree, tree[n], config, round_number=1) for n in (1, 2)] == [1, 0]


def test_states_are_drawn_in_proportion_to_their_decayed_values() -> None:
    tree = TurnTree(
        "t0", 0, ints(1),
        (turn(1, ROOT, state_value=4.0), turn(2, 1, state_value=2.0, expansion_round=1), leaf(3, ROOT)),
    )  # fmt: skip
    expansion = Expansion.of(fleet(resample_decay=0.25))
    drawn = Counter(expansion.choose(tree, count=6000, rng=np.random.default_rng(1), round_number=2))
    assert set(drawn) == {1, 2}
    assert drawn[1] / 6000 == pytest.approx(1 / 3, abs=0.02), "4 * 0.25 against 2"


# --- through the search ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2])
async def test_chains_go_on_from_drawn_states_and_a_tree_has_as_many_leaves_as_chains(every: int) -> None:
    config = fleet(resample_every=every, rounds=2)
    tree = await search_of(config, environment=CountingEnvironment(turns=6)).grow()
    assert len(tree.leaves()) == config.max_leaves == 5
    for number in range(2):
        wave = [t for t in tree if t.expansion_round == number]
        assert len(wave) == 5 * every, "every chain takes as many turns"
    heads = Counter(t.parent_id for t in tree if t.parent_id and tree[t.parent_id].expansion_round != t.expansion_round)
    assert max(heads.values()) > 1, "one state was gone on with twice"
    left = [t for t in tree if not t.is_leaf and not tree.children(t.turn_id)]
    assert left, "and one was left"
    assert set(tree.pruned()) == set(tree) - set(left) or len(tree.pruned()) < len(tree) - len(left)


@pytest.mark.parametrize("every", [1, 2])
async def test_a_tree_taken_over_at_any_turn_draws_the_same_states(every: int) -> None:
    config = fleet(resample_every=every)
    whole = await search_of(config).grow()
    for number in range(1, len(whole) + 1):
        resumed = await search_of(config, committed=whole.turns[:number]).grow()
        assert len(resumed.leaves()) == 5
        done = max(t.expansion_round for t in whole.turns[:number])
        for earlier in range(done):
            assert content(before(resumed, earlier + 1)) == content(before(whole, earlier + 1)), (number, earlier)
        assert drawn_in(resumed, done) == drawn_in(whole, done)


def drawn_in(tree: TurnTree, number: int) -> Counter[int]:
    """Turn of an earlier wave -> chains that go on after it."""
    parents = (t.parent_id for t in tree if t.expansion_round == number)
    return Counter(p for p in parents if p == ROOT or tree[p].expansion_round != number)


def before(tree: TurnTree, number: int) -> TurnTree:
    return TurnTree("t0", 0, tree.prompt, tuple(t for t in tree if t.expansion_round < number))


class Promising(CountingEpisode):
    """Each state is worth more than the one before."""

    async def step(self, action: np.ndarray) -> StepResult:
        return replace(await super().step(action), state_value=float(self._actions))


class Counts(CountingEnvironment):
    """How often a step was taken: replayed ones too."""

    steps = 0

    async def start(self, split: Split, task_index: int) -> CountingEpisode:
        self.started += 1
        self.fault = self.count
        return Promising(self, task_index)

    def count(self, number: int, action: np.ndarray) -> None:
        self.steps += 1


async def test_a_chain_that_goes_on_itself_keeps_its_episode_and_all_are_closed() -> None:
    environment = Counts(turns=8)
    config = fleet(initial_rollouts=1, rounds=4, resample_weights="max")
    await search_of(config, environment=environment).grow()
    assert (environment.started, environment.closed, environment.steps) == (1, 1, 8)
    environment = Counts(turns=5)
    await search_of(fleet(), environment=environment).grow()
    assert environment.started == environment.closed


async def test_a_chain_that_fails_is_drawn_anew_from_the_states_that_there_are() -> None:
    class FailsEarly(ByContext):
        async def generate(
            self, prompt: Tokens, sampling: Sampling, *, request_id: str, on_running: OnRunning = ignore
        ) -> Generation:
            if len(self.contexts) in (1, 2):
                self.contexts.append(np.asarray(prompt))
                raise GenerationFailed("no")
            return await super().generate(prompt, sampling, request_id=request_id, on_running=on_running)

    sink = Sink()
    tree = await search_of(fleet(), engine=FailsEarly(), environment=CountingEnvironment(turns=6), sink=sink).grow()
    assert sink.closed.failures == {"generate_failed": 2}
    assert len(tree.leaves()) == 5
    assert sum(t.expansion_round == 1 for t in tree) == 5


async def test_a_wave_that_fails_as_a_whole_ends_the_tree() -> None:
    sink = Sink()
    environment = CountingEnvironment(turns=6, fault=lambda number, action: OSError("down") if number == 2 else None)
    tree = await search_of(fleet(), environment=environment, sink=sink).grow()
    assert sink.closed.failures == {"environment_failed": 5}
    assert not tree.leaves()


async def test_chains_that_have_ended_are_not_drawn_again() -> None:
    config = fleet(rounds=6)
    tree = await search_of(config, environment=Uneven(turns=5)).grow()
    assert len(tree.leaves()) == 5
    for number in range(1, 6):
        ended = sum(t.is_leaf and t.expansion_round < number for t in tree)
        heads = [t for t in tree if t.expansion_round == number]
        assert len(heads) <= 5 - ended


async def test_an_actor_that_is_asked_to_end_stops_between_two_waves_too() -> None:
    whole = await search_of(fleet()).grow()
    for number in range(1, len(whole), 2):
        sink = Sink()
        search = search_of(fleet(), sink=sink, leaving=lambda sink=sink, number=number: len(sink.turns) >= number)  # type: ignore[misc]
        left = await search.grow()
        assert search.unfinished is (len(left.leaves()) < 5)
        assert len((await search_of(fleet(), committed=left.turns).grow()).leaves()) == 5


async def test_chains_that_all_end_at_once_need_no_state() -> None:
    tree = await search_of(fleet(), environment=CountingEnvironment(turns=1)).grow()
    assert len(tree) == 5
    assert len((await search_of(fleet(), kind="eval").grow()).leaves()) == 1


def test_fresh_chains_begin_where_there_is_no_state() -> None:
    tree = TurnTree("t0", 0, ints(1), (leaf(1, ROOT),))
    assert Expansion.of(fleet()).choose(tree, count=2, rng=np.random.default_rng(0)) == (ROOT, ROOT)
