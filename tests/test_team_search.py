"""Groups of teams as an actor grows them: proposers, then synthesizers, late rewards, and a group taken over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.environments import Environments
from actors.evaluate import success
from actors.hosting.host import HostedEnvironment
from actors.teams.rules import Proposal, dealt, hybrid_rewards, shortened_by
from actors.teams.search import TeamSearch
from atpo_async.config import Config, SearchConfig, TeamConfig, build
from atpo_async.core.errors import ConfigError, GenerationFailed
from atpo_async.core.tree import ROOT, LeafReward, Turn
from atpo_async.environments.checked import CheckedEnvironment
from atpo_async.environments.values import Limits
from atpo_async.wire.messages import TreeOpened
from tests.actor_support import ScriptedEngine, ints, leaf, lease
from tests.team_support import PROPOSE, SYNTHESIZE, ClueTask, roles, said
from tests.test_search import Sink

TWO = TeamConfig(proposers=2, teams=2, cue_tokens=2)
RIGHT, WRONG = 20, 30
Reply = Callable[[np.ndarray, int], Any]


def scripted(context: np.ndarray, number: int) -> np.ndarray:
    """Seat 0 is right, seat 1 is not; a synthesizer says what the first cue says."""
    if context[0] == PROPOSE:
        return said(9, RIGHT if context[2] == 14 else WRONG)
    return said(int(context[2]))


def team_search(
    reply: Reply = scripted, *, team: TeamConfig = TWO, task: Any = None, emit: Sink | None = None,
    engine: ScriptedEngine | None = None, leaving: Callable[[], bool] = lambda: False,
    max_context_tokens: int = 64, **changes: object,
) -> TeamSearch:  # fmt: skip
    return TeamSearch(
        team=team, run="r", lease=lease(**changes), engine=engine or ScriptedEngine(reply),
        environment=task if task is not None else ClueTask(), search=SearchConfig(max_action_tokens=8),
        expansion=None, max_context_tokens=max_context_tokens, emit=emit if emit is not None else Sink(),
        leaving=leaving, clock=lambda: 0.0,
    )  # fmt: skip


async def test_a_group_is_proposers_then_synthesizers_whose_prompts_hold_the_cues() -> None:
    sink, task = Sink(), ClueTask()
    tree = await team_search(emit=sink, task=task).grow()
    assert roles(sink.turns) == ["proposer"] * 4 + ["synthesizer"] * 2
    assert isinstance(sink[0], TreeOpened)
    assert len(sink[0].prompt) == 0
    assert task.read == [((RIGHT,), (WRONG,))] * 2, "what is thought, 9, is no part of a cue"
    synthesizers = [turn for turn in tree if turn.role == "synthesizer"]
    assert [turn.observation.tolist() for turn in synthesizers] == [[SYNTHESIZE, 12, RIGHT, 8, WRONG, 8]] * 2
    assert [turn.expansion_round for turn in tree] == list(range(6))
    assert all(turn.parent_id == ROOT for turn in tree)


async def test_what_the_engine_sees_is_the_path_of_each_member_and_nothing_of_the_others() -> None:
    engine = ScriptedEngine(scripted)
    tree = await team_search(engine=engine, task=ClueTask(looks=True)).grow()
    seen = {tuple(np.concatenate([tree.context(t.parent_id), t.observation]).tolist()) for t in tree}
    assert {tuple(context.tolist()) for context in engine.contexts} == seen


async def test_the_closing_carries_what_proposers_earned_once_their_teams_were_judged() -> None:
    sink = Sink()
    tree = await team_search(emit=sink, team=TWO.model_copy(update={"local_share": 0.25})).grow()
    proposers = [turn for turn in tree.leaves() if turn.role == "proposer"]
    assert [turn.reward for turn in proposers] == [1.0, 0.0, 1.0, 0.0], "on the turns stands their own"
    assert sink.closed.leaf_rewards == tuple(
        LeafReward(turn.turn_id, 0.25 * (turn.reward or 0.0) + 0.75) for turn in proposers
    )
    assert sink.closed.num_turns == len(tree)


async def test_a_cue_over_the_limit_is_cut_and_costs_its_proposer() -> None:
    task = ClueTask()
    long = said(RIGHT, 21, 22)
    tree = await team_search(lambda c, n: long if c[0] == PROPOSE else said(RIGHT), task=task).grow()
    assert task.read[0] == ((RIGHT, 21), (RIGHT, 21))
    assert [turn.reward for turn in tree if turn.role == "proposer"] == [1.0 - 0.5 * 0.5] * 4


async def test_a_proposer_that_gives_no_cue_leaves_its_place_empty() -> None:
    task = ClueTask()
    await team_search(lambda c, n: said(9) if c[0] == PROPOSE and c[2] == 14 else said(WRONG), task=task).grow()
    assert task.read == [((), (WRONG,))] * 2


async def test_a_synthesizer_is_told_apart_by_metrics_of_its_team() -> None:
    tree = await team_search(lambda c, n: scripted(c, n) if c[0] == PROPOSE else said(WRONG)).grow()
    parts = [turn.rewards for turn in tree if turn.role == "synthesizer"]
    assert parts == [{"cue_tokens": 1.0, "proposer_reward": 0.5, "proposer_right": 1.0, "team_gap": 1.0}] * 2


async def test_a_team_without_one_of_its_proposers_does_not_answer_and_the_others_do() -> None:
    sink = Sink()
    engine = ScriptedEngine(lambda c, n: GenerationFailed("no") if n == 1 else scripted(c, n))
    tree = await team_search(engine=engine, emit=sink).grow()
    assert roles(tree.turns) == ["proposer"] * 3 + ["synthesizer"]
    assert sink.closed.failures == {"generate_failed": 1, "team_incomplete": 1}
    late = {each.turn_id: each.reward for each in sink.closed.leaf_rewards}
    lone = next(turn for turn in tree if turn.expansion_round == 0)
    assert late[lone.turn_id] == 0.5 * 1.0 + 0.5 * 1.0, "its team gave no answer: it is paid the other teams' mean"


async def test_without_any_answer_no_proposer_is_paid() -> None:
    sink = Sink()
    await team_search(lambda c, n: scripted(c, n) if c[0] == PROPOSE else GenerationFailed("no"), emit=sink).grow()
    assert sink.closed.leaf_rewards == ()
    assert sink.closed.failures == {"generate_failed": 2}


async def test_a_pool_is_read_by_more_teams_than_it_has_proposers_for_and_each_takes_part() -> None:
    task = ClueTask()
    team = TeamConfig(proposers=2, teams=4, pooled=4, cue_tokens=2)
    tree = await team_search(team=team, task=task).grow()
    assert roles(tree.turns).count("proposer") == 4
    assert len(task.read) == 4
    assert all(read == ((RIGHT,), (WRONG,)) for read in task.read), "a proposer of each seat in every team"


async def test_an_evaluation_is_one_team_at_temperature_zero() -> None:
    engine = ScriptedEngine(scripted)
    tree = await team_search(engine=engine, kind="eval").grow()
    assert roles(tree.turns) == ["proposer", "proposer", "synthesizer"]
    assert {sampling.temperature for sampling in engine.samplings} == {0.0}


@pytest.mark.parametrize("looks", [False, True], ids=["one turn", "two turns"])
async def test_a_group_taken_over_at_any_turn_goes_on_as_it_was(looks: bool) -> None:
    team = TeamConfig(proposers=2, teams=3, pooled=4, cue_tokens=2)

    def reply(context: np.ndarray, number: int) -> np.ndarray:
        if context[0] == PROPOSE:
            return said(20 + int(context[2]) - 14 + len(context))
        return said(int(context[2]))

    sink = Sink()
    whole = await team_search(reply, team=team, task=ClueTask(looks=looks), emit=sink).grow()
    late = {each.turn_id: each.reward for each in sink.closed.leaf_rewards}
    for cut in range(len(sink.turns) + 1):
        again = Sink()
        committed = tuple(sink.turns[:cut])
        tree = await team_search(
            reply, team=team, task=ClueTask(looks=looks), emit=again, committed=committed, epoch=1
        ).grow()
        assert _chains(tree.turns) == _chains(whole.turns), cut
        assert len(again.turns) == len(whole) - cut, "nothing is grown twice"
        assert sorted(late.values()) == sorted(each.reward for each in again.closed.leaf_rewards)


def _chains(turns: Sequence[Turn]) -> list[tuple[Any, ...]]:
    """What was said by whom, whatever the order in which it ended."""
    return sorted((t.expansion_round, t.role, tuple(t.observation.tolist()), tuple(t.action.tolist())) for t in turns)


async def test_once_a_synthesizer_has_begun_a_proposer_that_failed_is_not_tried_again() -> None:
    sink = Sink()
    engine = ScriptedEngine(lambda c, n: GenerationFailed("no") if n == 0 else scripted(c, n))
    team = TeamConfig(proposers=1, teams=3, pooled=2, cue_tokens=2)
    await team_search(engine=engine, team=team, emit=sink).grow()
    assert roles(sink.turns) == ["proposer"] + ["synthesizer"] * 3
    taken = Sink()
    tree = await team_search(team=team, emit=taken, committed=tuple(sink.turns[:2]), epoch=1).grow()
    assert roles(tree.turns) == ["proposer"] + ["synthesizer"] * 3
    assert [t.observation.tolist() for t in tree][1:] == [t.observation.tolist() for t in sink.turns][1:]


async def test_an_actor_asked_to_end_leaves_the_group_open_for_another() -> None:
    sink = Sink()
    search = team_search(emit=sink, leaving=lambda: len(sink.turns) >= 2)
    await search.grow()
    assert search.unfinished
    assert not any(type(message).__name__ == "TreeClosed" for message in sink)
    assert set(roles(sink.turns)) == {"proposer"}
    rest = Sink()
    await team_search(emit=rest, committed=tuple(sink.turns), epoch=1).grow()
    assert rest.closed.num_turns == 6


async def test_a_hosted_environment_grows_the_same_group() -> None:
    def checked() -> CheckedEnvironment:
        made = CheckedEnvironment(ClueTask(looks=True), name="clues", limits=Limits(max_context_tokens=64))
        made.check_team("team.proposers = 2")
        return made

    plain = await team_search(task=ClueTask(looks=True)).grow()
    async with HostedEnvironment(checked, name="clues", step_timeout_s=30.0) as hosted:
        sink = Sink()
        grown = await team_search(task=hosted, emit=sink).grow()
        taken = await team_search(task=hosted, committed=tuple(sink.turns[:3]), epoch=1).grow()
    assert _chains(grown.turns) == _chains(plain.turns) == _chains(taken.turns)


async def test_greedy_evaluation_outside_a_run_judges_the_synthesizer() -> None:
    config = team_config()
    environments = Environments(config, (ClueTask(),))
    found = await success(config, engine=ScriptedEngine(by_task), environment=environments, num_tasks=4)
    assert found["success"] == 1.0
    assert found["reward/team_gap"] == 0.0
    assert found["failed"] == 0.0


def by_task(context: np.ndarray, number: int) -> np.ndarray:
    return said(20 + int(context[1]) - 12)


def team_config(**sections: dict[str, object]) -> Config:
    data: dict[str, Any] = {
        "team": {"proposers": 2, "teams": 2, "cue_tokens": 2},
        "search": {"max_action_tokens": 8},
        "model": {"max_context_tokens": 64},
    }
    for name, section in sections.items():
        data[name] = {**data.get(name, {}), **section}
    return build(data)


# --- what a configuration and an environment may be --------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"team": {"pooled": 1}}, "team.pooled = 1 proposers are fewer than the team.proposers = 2"),
        ({"team": {"pooled": 5}}, "team.pooled = 5 is no multiple of team.proposers = 2.*use 6"),
        ({"team": {"cue_tokens": 40}}, "team.cue_tokens = 40 fill model.max_context_tokens = 64"),
        ({"buffer": {"ready": "partial"}}, "buffer.ready = 'partial' with team.proposers = 2"),
        ({"search": {"turn_reward": "information-gain"}}, "turn_reward = 'information-gain' with team.proposers"),
        ({"search": {"prune_duplicates": True}}, "search.prune_duplicates = true with team.proposers = 2"),
        ({"credit": {"normalise_leaves": "batch"}}, "credit.normalise_leaves = 'batch' with team.proposers = 2"),
        ({"credit": {"whiten_advantages": True}}, "credit.whiten_advantages = true with team.proposers = 2"),
        ({"buffer": {"keep_share": 0.5}}, "buffer.keep_share = 0.5 with team.proposers = 2"),
        ({"implicit_reward": {"enabled": True}}, "implicit_reward.enabled = true with team.proposers = 2"),
        ({"imitation": {"rows": 8}}, "imitation.rows = 8 with team.proposers = 2"),
        ({"team": {"teams": 1}}, "team.teams"),
        ({"team": {"local_share": 1.5}}, "team.local_share"),
        ({"team": {"proposer_weight": -0.1}}, "team.proposer_weight"),
        ({"team": {"cues": 3}}, "team.cues"),
    ],
)
def test_what_contradicts_a_team_is_refused_by_name(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        team_config(**sections)


def test_a_group_has_as_many_leaves_as_members() -> None:
    assert team_config().max_leaves == 6
    assert team_config(team={"pooled": 8}).max_leaves == 10
    assert team_config(team={"proposers": 0}).max_leaves == team_config().search.max_leaves


def test_an_environment_without_roles_is_refused_when_it_is_made() -> None:
    class Lone(ClueTask):
        cue = None  # type: ignore[assignment]

    made = CheckedEnvironment(Lone(), name="lone", limits=Limits())
    with pytest.raises(ConfigError, match=r"team.proposers = 2 needs .* environment 'lone' lacks cue"):
        made.check_team("team.proposers = 2")


def test_a_role_that_cannot_be_called_is_refused_when_it_is_made() -> None:
    class Other(ClueTask):
        async def start_proposer(self, split: Any, task_index: int) -> Any: ...  # type: ignore[override]

    made = CheckedEnvironment(Other(), name="other", limits=Limits())
    with pytest.raises(ConfigError, match=r"is called as start_proposer\(split, task_index, seat\): too many"):
        made.check_team("team.proposers = 2")


@pytest.mark.parametrize(
    ("cue", "says"),
    [
        ("a text", "cue is 'a text'"),
        ([1.5], r"cue[0] is 1.5"),
        ([99], "99"),
        ([1] * 65, "cue has 65 tokens; expected at most 64"),
    ],
    ids=["text", "fraction", "unknown token", "too long"],
)
async def test_a_cue_that_is_none_costs_its_chain_and_says_what_it_was(cue: Any, says: str) -> None:
    class Bad(ClueTask):
        def cue(self, *_: Any) -> Any:
            return cue

    made = CheckedEnvironment(Bad(), name="bad", limits=Limits(vocab_size=50, max_context_tokens=64))
    search = team_search(task=made)
    await search.grow()
    assert search.growth.failures == {"environment_failed": 4, "team_incomplete": 2}
    assert says in search.growth.last_detail


# --- who reads whom, and what that earns -------------------------------------------------------------------------


def proposal(turn_id: int, reward: float) -> Proposal:
    return Proposal(leaf(turn_id, ROOT, reward), ints())


def test_the_published_example_of_hybrid_rewards() -> None:
    proposals = {number: proposal(number + 1, reward) for number, reward in enumerate([1.0, 0.0, 0.0, 0.0])}
    found = hybrid_rewards(proposals, {4: (0, 1), 5: (2, 3)}, {4: 1.0, 5: 0.0}, local_share=0.5)
    assert [each.reward for each in found] == [1.0, 0.5, 0.0, 0.0]


@given(seats=st.integers(1, 3), each=st.integers(1, 4), teams=st.integers(1, 6), seed=st.integers(0, 9), data=st.data())
def test_teams_have_a_proposer_of_each_seat_and_all_take_part_about_as_often(
    seats: int, each: int, teams: int, seed: int, data: st.DataObject
) -> None:
    pool = seats * each
    there = set(data.draw(st.lists(st.integers(0, pool - 1), unique=True)))
    found = dealt(pool, teams, seats=seats, there=there, rng=np.random.default_rng(seed))
    again = dealt(pool, teams, seats=seats, there=there, rng=np.random.default_rng(seed))
    assert found == again
    assert len(found) == teams
    complete = [team for team in found if team is not None]
    for team in complete:
        assert [number % seats for number in team] == list(range(seats))
        assert there.issuperset(team)
    if pool != seats * teams and complete:
        for seat in range(seats):
            counts = [sum(team[seat] == number for team in complete) for number in there if number % seats == seat]
            assert max(counts) - min(counts) <= 1


def test_the_penalty_of_a_cue_grows_to_its_whole_at_twice_the_limit() -> None:
    last = leaf(1, ROOT, 1.0)
    rewards = [shortened_by(last, np.zeros(length), TWO).reward for length in (0, 2, 3, 4, 9)]
    assert rewards == [1.0, 1.0, 0.75, 0.5, 0.5]
