"""What long chains cost, which trees are kept for their spread, and what the batch is told of those left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from actors.sampled import rewards
from actors.search.tree_search import OVERLONG
from atpo_async.api.evaluation import tasks_of_a_run
from atpo_async.api.notes import of_another_policy
from atpo_async.cli import main
from atpo_async.config import SearchConfig, build, load
from atpo_async.config.credit_rule import check_rewards, tasks_rewards
from atpo_async.core.credit.overlong import overlong_penalty
from atpo_async.core.errors import ConfigError, EnvironmentBroken
from atpo_async.wire.messages import Batch
from buffer.batches.delay_line import DelayLine
from buffer.counters import left_out
from buffer.front.messages import Part
from buffer.front.metrics import merged
from buffer.state import BufferState
from buffer.trees.spread_filter import SpreadFilter
from tests.actor_support import STOP, CountingEnvironment, ScriptedEngine, ints
from tests.buffer_peers_support import SOON_S, ask, configured, grown, published, stateful, take
from tests.buffer_support import Disk
from tests.shards_support import cluster_of, sharded
from tests.test_search import search_of

# --- DAPO's overlong shaping -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "expected"), [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (101, -1.0), (900, -1.0)]
)
def test_a_chain_is_punished_linearly_from_the_beginning_of_the_buffer_to_the_limit(
    tokens: int, expected: float
) -> None:
    assert overlong_penalty(tokens, limit=100, buffer=20) == pytest.approx(expected)
    assert overlong_penalty(tokens, limit=100, buffer=20, factor=0.5) == pytest.approx(expected / 2)


LENGTHS = SearchConfig(initial_rollouts=3, rounds=0, overlong_tokens=8, overlong_buffer=4, max_action_tokens=8)


def of_growing_length(context: np.ndarray, number: int) -> np.ndarray:
    """Actions of two tokens; of two, three and four at the end of a chain."""
    last = 20 < context[-1] < 30
    return ints(*range(100, 101 + (number % 3 if last else 0)), STOP)


async def test_the_reward_of_a_finished_chain_holds_what_its_action_tokens_cost() -> None:
    plain = await search_of(
        ScriptedEngine(of_growing_length), config=LENGTHS.model_copy(update={"overlong_buffer": 0})
    ).grow()
    tree = await search_of(ScriptedEngine(of_growing_length), config=LENGTHS).grow()
    spent = {leaf.turn_id: sum(len(turn.action) for turn in tree.path(leaf.turn_id)) for leaf in tree.leaves()}
    assert sorted(spent.values()) == [4, 5, 6]
    for leaf in tree.leaves():
        cost = overlong_penalty(spent[leaf.turn_id], limit=8, buffer=4)
        assert leaf.reward == pytest.approx(1.0 + cost)
        assert leaf.rewards == {OVERLONG: cost}
    assert [(leaf.reward, leaf.rewards) for leaf in plain.leaves()] == [(1.0, {})] * 3


async def test_a_chain_cut_by_the_context_is_punished_too_and_an_evaluation_is_not() -> None:
    settings = LENGTHS.model_copy(update={"initial_rollouts": 1, "truncated_reward": -1.0})
    cut = await search_of(
        ScriptedEngine(lambda context, number: ints(1, 2, 3, 4, 5, STOP)), CountingEnvironment(turns=9),
        config=settings, max_context_tokens=16,
    ).grow()  # fmt: skip
    (leaf,) = cut.leaves()
    assert (leaf.end, leaf.reward) == ("length_limit", -2.0)
    share = settings.model_copy(update={"overlong_tokens": 0, "overlong_buffer": 0.25})
    of_context = await search_of(
        ScriptedEngine(lambda context, number: ints(1, 2, 3, 4, 5, STOP)), CountingEnvironment(turns=2),
        config=share, max_context_tokens=16,
    ).grow()  # fmt: skip
    assert [leaf.reward for leaf in of_context.leaves()] == [1.0], "12 of 16 tokens are where the last quarter begins"
    judged = await search_of(ScriptedEngine(of_growing_length), config=LENGTHS, kind="eval").grow()
    assert [leaf.reward for leaf in judged.leaves()] == [1.0]


# --- a share of the trees, by their spread -------------------------------------------------------------------------


def kept(share: float, spreads: list[float], window: int, *, by_variance: bool = False) -> list[bool]:
    chosen = SpreadFilter(share, by_variance=by_variance, window=window)
    return [chosen.keeps(spread) for spread in spreads]


def test_a_tree_is_kept_if_it_is_among_the_share_of_those_that_ended_lately() -> None:
    assert kept(0.5, [0.1, 0.2, 0.3, 0.25], 4) == [True, True, True, True], "each was among the upper half when it came"
    assert kept(0.5, [0.3, 0.2, 0.1, 0.25, 0.4], 4) == [True, False, False, True, True]
    assert kept(0.25, [0.4, 0.3, 0.2, 0.1, 0.35], 4) == [True, False, False, False, True], "the first is out of sight"


def test_of_trees_alike_as_many_are_kept_as_the_share_has_places() -> None:
    """Rewards of 0 and 1 give few different spreads."""
    assert sum(kept(0.25, [0.5] * 40, 8)) == 10
    assert sum(kept(0.5, [0.5, 0.0] * 20, 8)) == 20


def test_trees_without_a_spread_count_among_those_that_are_not_kept() -> None:
    assert kept(0.5, [0.0, 0.0, 0.5, 0.5], 4)[2:] == [True, True]


def test_a_share_of_the_variance_is_held_by_the_fewest_trees() -> None:
    """Variances 0.81, 0.09, 0.05 and 0.05: the first two hold 90 %."""
    spreads = [0.3, 0.9, 0.05**0.5, 0.05**0.5]
    assert kept(0.9, spreads, 4, by_variance=True) == [True, True, False, False]
    assert kept(0.9, [0.0, 0.0], 4, by_variance=True) == [False, False]
    assert kept(0.9, [0.0, 0.1, 0.1], 4, by_variance=True) == [False, True, True]


KEEPING: dict[str, Any] = {"buffer": {"keep_share": 0.5}, "staleness": {"trees_per_batch": 2, "max_lag": 4}}
WIDE, NARROW = (1.0, 0.0), (1.0, 1.0, 1.0, 0.0)


def ends(state: BufferState, *rewards: tuple[float, ...]) -> None:
    for lease, earned in zip(state.lease("a", len(rewards), 0.0).leases, rewards, strict=True):
        take(state, grown(lease, earned))


def test_a_tree_that_is_not_kept_is_a_drop_and_its_task_is_settled() -> None:
    state = stateful(configured(**KEEPING))
    ends(state, WIDE, NARROW, (1.0, 1.0), WIDE)
    assert len(state.trees.pool) == 2
    batch = state.batch_server.draw(ask(), 0.0, np.random.default_rng(0))
    assert batch is not None
    metrics = state.batches.by_step[0].metrics
    assert (metrics["buffer/dropped_filtered"], metrics["buffer/no_signal_trees"]) == (1, 1)
    assert metrics["tasks/filtered"] == 1
    assert metrics["train/trees"] == 4, "all are counted as produced"
    assert "1 not kept (buffer.keep_share)" in state.counters.describe_tasks(0)


@pytest.mark.parametrize(("step", "kept"), [(0, 2), (1, 1)])
def test_rewards_of_turns_that_have_faded_make_no_tree_more_unlike_than_another(step: int, kept: int) -> None:
    fades = {"kind": "linear", "start": 1.0, "end": 0.0, "steps": 1}
    state = stateful(configured(**KEEPING, credit={"normalise_leaves": False, "turn_reward_scale": fades}))
    state.trees.step = step
    ends(state, WIDE)
    (lease,) = state.lease("a", 1, 0.0).leases
    # Its outcomes hardly differ, and what its first chain earned on the way does.
    begun, first, second, closing = grown(lease, (0.1, 0.0))
    take(state, [begun, structs.replace(first, turn_reward=5.0), second, closing])
    assert len(state.trees.pool) == kept


def test_a_buffer_that_starts_again_goes_on_with_the_trees_that_ended_before() -> None:
    config, disk = configured(**KEEPING), Disk()
    state = disk.open(config)
    state.publish(published())
    ends(state, WIDE, WIDE)
    assert len(state.trees.pool) == 1, "of two alike one"
    disk.commit()
    again = disk.open(config, now=1.0)
    again.publish(published())
    ends(again, WIDE)
    assert len(again.trees.pool) == 2, "two of three"
    whole = Disk().open(configured())
    whole.publish(published())
    ends(whole, WIDE, WIDE)
    assert len(whole.trees.pool) == 2


def test_with_an_exact_lag_a_tree_that_is_not_kept_is_one_that_was_grown_in_vain() -> None:
    staleness = {"exact_lag": 0, "trees_per_batch": 2, "max_oversampling": 2.0, "max_lag": 0}
    config = configured(staleness=staleness, buffer={"keep_share": 0.5})
    state = stateful(config)
    rng = np.random.default_rng(0)
    assert state.batch_server.draw(ask(), 0.0, rng) is None
    for earned in (WIDE, NARROW, WIDE):
        ends(state, earned)
    assert isinstance(state.delay_line, DelayLine)
    served = state.batch_server.draw(ask(), 0.0, rng)
    assert served is not None
    assert state.batches.by_step[0].metrics["buffer/dropped_filtered"] == 1
    assert len(state.batches.by_step[0].drawn) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"buffer.keep_share": "0.2"},
            "buffer.keep_share = 0.2 with staleness.max_oversampling = 4 would make every batch short: of that many "
            "times trees_per_batch trees too few are kept; set --staleness.max_oversampling 5 or more",
        ),
        (
            {"buffer.keep_share": "0.5", "buffer.ready": "partial"},
            "buffer.keep_share = 0.5 with buffer.ready = 'partial'",
        ),
        (
            {"search.overlong_buffer": "9", "search.overlong_tokens": "8"},
            "search.overlong_buffer = 9 exceeds search.overlong_tokens = 8: every chain would be punished",
        ),
        (
            {"search.overlong_buffer": "9", "search.overlong_tokens": "800"},
            "search.overlong_tokens = 800 exceeds model.max_context_tokens = 512, which no chain reaches",
        ),
    ],
)
def test_what_contradicts_is_named_with_the_way_out(options: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load([], options)
    assert said in str(raised.value)
    load([], {"buffer.keep_share": "0.2", "buffer.keep_by": "variance"})


# --- the deviation of the whole batch --------------------------------------------------------------------------------


def batch_of_state(state: BufferState) -> Batch:
    share = state.batch_server.draw(ask(), 0.0, np.random.default_rng(0))
    assert share is not None
    return share.head  # type: ignore[union-attr]


def test_a_batch_tells_the_rewards_of_trees_without_a_signal_where_the_learner_needs_them() -> None:
    state = stateful(configured(staleness=KEEPING["staleness"], credit={"normalise_leaves": "batch"}))
    ends(state, WIDE, (2.0, 2.0), (0.5, 0.5, 0.5), WIDE)
    head = batch_of_state(state)
    assert (head.left_out_leaves, head.left_out_rewards, head.left_out_squares) == pytest.approx((5.0, 5.5, 8.75))
    plain = stateful(configured(staleness=KEEPING["staleness"]))
    ends(plain, WIDE, (2.0, 2.0), WIDE)
    head = batch_of_state(plain)
    assert (head.left_out_leaves, head.left_out_rewards, head.left_out_squares) == (0.0, 0.0, 0.0)
    assert "buffer/left_out_leaves" not in head.metrics


def test_of_several_shards_the_trees_left_out_add_up() -> None:
    def part(leaves: float, mean: float, square: float) -> Part:
        names = ("buffer/left_out_reward", "buffer/left_out_reward_square")
        return Part(
            batch_id=1, step=0, version=0, num_ranks=1, trees=(), means=dict.fromkeys(names, leaves),
            metrics={"buffer/left_out_leaves": leaves, names[0]: mean, names[1]: square},
        )  # fmt: skip

    found = left_out(merged([part(2.0, 2.0, 4.0), part(3.0, 0.5, 0.25)]))
    assert (found.count, found.total, found.squares) == pytest.approx((5.0, 5.5, 8.75))


async def test_each_shard_keeps_the_trees_it_finds_most_unlike_and_the_front_tells_of_all(tmp_path: Path) -> None:
    buffer, credit = {"keep_share": 0.5}, {"normalise_leaves": "batch"}
    config = sharded(buffer=buffer, credit=credit, staleness=KEEPING["staleness"])
    async with cluster_of(config, tmp_path) as peers:
        leases = sorted((await peers.leases(6)).leases, key=lambda lease: lease.task_index)
        for lease, earned in zip(leases, (WIDE, WIDE, NARROW, NARROW, (2.0, 2.0), (0.5, 0.5, 0.5)), strict=True):
            await peers.send(*grown(lease, earned))
        answer = await peers.learner.request(ask(), timeout_s=SOON_S)
    assert isinstance(answer, Batch), answer
    assert {tree.task_index for tree in answer.trees} == {0, 1}
    assert (answer.metrics["buffer/dropped_filtered"], answer.metrics["tasks/filtered"]) == (2, 2)
    found = (answer.left_out_leaves, answer.left_out_rewards, answer.left_out_squares)
    assert found == pytest.approx((5.0, 5.5, 8.75))


# --- trees of one chain, and what chains of a fixed policy earn ------------------------------------------------------


def test_trees_of_one_chain_are_served_to_a_mode_that_compares_none() -> None:
    credit = {"advantage_mode": "optimal_value", "normalise_leaves": False}
    state = stateful(configured(credit=credit, search={"initial_rollouts": 1, "rounds": 0}))
    ends(state, (1.0,), (0.0,))
    assert len(batch_of_state(state).metrics) > 0
    assert len(state.batches.by_step[0].drawn) == 2
    with pytest.raises(ConfigError, match="gives trees of one leaf, which never have a signal; use at least 2, or"):
        configured(search={"initial_rollouts": 1, "rounds": 0})


async def test_what_sampled_chains_of_a_policy_earn_is_told_by_training_task() -> None:
    config = build({"search": {"max_action_tokens": 8}, "model": {"max_context_tokens": 64}, "run": {"seed": 3}})
    failing = CountingEnvironment(fault=lambda number, action: OSError("no page") if action[0] == 101 else None)
    found = await rewards(config, engine=ScriptedEngine(), environment=failing, num_tasks=2, rollouts=3)
    assert {task: len(earned) for task, earned in found.items()} in ({0: 2, 1: 3}, {0: 3, 1: 2})
    assert {each for earned in found.values() for each in earned} == {1.0}
    broken = CountingEnvironment(fault=lambda number, action: OSError("no page"))
    with pytest.raises(EnvironmentBroken):
        await rewards(config, engine=ScriptedEngine(), environment=broken, num_tasks=1, rollouts=2)


def test_a_file_of_rewards_of_another_policy_is_said_and_one_that_is_missing_refused(tmp_path: Path) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    first.mkdir()
    other.mkdir()
    file = tmp_path / "rewards.json"
    credit = {"advantage_mode": "optimal_value", "advantage_options": {"rewards": str(file)}, "normalise_leaves": False}
    config = build({"credit": credit, "model": {"path": str(first)}})
    with pytest.raises(ConfigError, match=r"rewards\.json' cannot be read .* atpo eval MODEL --rewards FILE makes one"):
        check_rewards(config.credit)
    assert of_another_policy(config) == []
    for model, lines in ((first, 0), (other, 1), (tmp_path / "gone", 0)):
        file.write_text(json.dumps({"model": str(model), "rewards": {"0": [1.0]}}))
        check_rewards(config.credit)
        assert len(of_another_policy(config)) == lines
    file.write_text(json.dumps({"model": str(other), "rewards": {"0": [1.0]}}))
    (line,) = of_another_policy(config)
    assert f"has what chains of {other} earned, and this run's first policy is {first}" in line
    check_rewards(build({}).credit)


def test_a_finite_set_of_tasks_is_gone_through_again(tmp_path: Path) -> None:
    file = tmp_path / "rewards.json"
    file.write_text(json.dumps({"period": 2, "rewards": {"0": [1.0], "1": [0.0]}}))
    known = tasks_rewards(file, "credit.advantage_options.rewards")
    assert [known.get(task) for task in range(4)] == [(1.0,), (0.0,), (1.0,), (0.0,)]
    file.write_text(json.dumps({"period": 3, "rewards": {"0": [1.0], "1": [0.0]}}))
    with pytest.raises(ConfigError, match="has the period 3 with 2 tasks"):
        tasks_rewards(file, "credit.advantage_options.rewards")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rollouts", "4"], "--rollouts goes with --rewards: atpo eval MODEL CONFIG --rewards rewards.json"),
        (
            ["--rewards", "r.json", "--benchmarks", "all"],
            "--rewards and --benchmarks: one is of training tasks, the other",
        ),
    ],
)
def test_options_of_sampled_rewards_that_do_not_go_together_are_named(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["eval", "models/none", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_number_of_tasks_is_what_a_run_takes_at_most() -> None:
    config = build({"staleness": {"trees_per_batch": 4, "max_lag": 1}, "run": {"steps": 10}})
    assert tasks_of_a_run(config) == 4 * 10 + 8
    assert tasks_of_a_run(build({"staleness": {"trees_per_batch": 4}, "run": {"steps": 10, "max_tasks": 7}})) == 7
