"""The model of a fleet on cases whose answers are known, and how it is calibrated."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simpy

from atpo_async.config import StalenessConfig, build
from atpo_async.run.metrics import Record
from benchmarks.model_parts import calibration, gpus, questions, validation
from benchmarks.model_parts.buffer import Counts, SimulatedBuffer, Tree
from benchmarks.model_parts.engine import Engine
from benchmarks.model_parts.figure import draw
from benchmarks.model_parts.parameters import Buffer, EngineRate, Fleet, Learner, Links, Tools, Trees
from benchmarks.model_parts.simulation import Outcome, simulate
from benchmarks.real_runs import RealRun

FLAT = EngineRate(first_s=0.01, more_s=0.0)
"""As fast for many requests as for one."""
PLAIN = Fleet(
    trees=Trees(chains=2, branches=1, chain_turns=(3,), branch_turns=(2,), action_tokens=10.0),
    engine=FLAT,
    learner=Learner(step_s=1.0),
    slots=4,
    staleness=StalenessConfig(trees_per_batch=4, max_lag=0),
)
"""A tree takes (3 + 2) turns of 10 tokens one after another: 0.5 s."""


def lag(max_lag: int) -> StalenessConfig:
    return StalenessConfig(trees_per_batch=4, max_lag=max_lag)


# --- parts ------------------------------------------------------------------------------------------------------------


def engine_log(rate: EngineRate, arrivals: list[tuple[float, float]], pauses: list[tuple[float, float]]) -> list[float]:
    """When requests of (time, tokens) were done, with the engine standing still over (from, to)."""
    env = simpy.Environment()
    engine, ended = Engine(env, rate), [0.0] * len(arrivals)

    def request(number: int, at: float, tokens: float) -> Generator[simpy.Event, Any, None]:
        yield env.timeout(at)
        yield engine.generate(tokens)
        ended[number] = env.now

    def pause(begin: float, end: float) -> Generator[simpy.Event, Any, None]:
        yield env.timeout(begin)
        engine.pause()
        yield env.timeout(end - begin)
        engine.resume()

    for number, (at, tokens) in enumerate(arrivals):
        env.process(request(number, at, tokens))
    for begin, end in pauses:
        env.process(pause(begin, end))
    env.run()
    return ended


def test_requests_share_an_engine_and_the_ones_that_stay_go_on_faster() -> None:
    rate = EngineRate(first_s=0.0, more_s=0.1)
    # 5 s for 5 tokens each of both at 0.2 s a token; then the second one's other 5 tokens at 0.1.
    assert engine_log(rate, [(0.0, 5.0), (0.0, 10.0)], []) == pytest.approx([1.0, 1.5])
    # The second joins when the first has 5 of its 10 tokens.
    assert engine_log(rate, [(0.0, 10.0), (0.5, 5.0)], []) == pytest.approx([1.5, 1.5])


def test_an_engine_queues_what_it_has_no_seat_for_and_stands_still_while_it_is_paused() -> None:
    rate = replace(FLAT, seats=1)
    assert engine_log(rate, [(0.0, 100.0), (0.0, 100.0)], []) == pytest.approx([1.0, 2.0])
    assert engine_log(FLAT, [(0.0, 100.0)], [(0.5, 0.7), (0.6, 0.9)]) == pytest.approx([1.4])


def test_turns_wait_in_the_buffer_as_in_a_queue_with_one_server_of_constant_service() -> None:
    """M/D/1: busy for rho = rate x service, and the mean wait is rho x service / (2 (1 - rho))."""
    env, rng = simpy.Environment(), np.random.default_rng(0)
    buffer = SimulatedBuffer(env, replace(PLAIN, buffer=Buffer(turn_s=0.01)), rng)
    waits: list[float] = []

    def arrive(rate: float, count: int) -> Generator[simpy.Event, Any, None]:
        tree = Tree(1, 0)
        for gap in rng.exponential(1 / rate, size=count):
            yield env.timeout(float(gap))
            waits.append(buffer.take(tree, 0) - env.now - 0.01)

    env.process(arrive(80.0, 40_000))
    env.run()
    assert buffer.counts.served_s / env.now == pytest.approx(0.8, rel=0.02)
    assert np.mean(waits) == pytest.approx(0.8 * 0.01 / (2 * 0.2), rel=0.07)


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_without_lag_a_step_takes_generation_training_and_the_way_of_a_version_one_after_another() -> None:
    assert simulate(PLAIN, steps=5).step_s == pytest.approx(0.5 + 1.0)
    slower = replace(
        PLAIN,
        learner=Learner(step_s=1.0, write_s=0.25, ask_s=0.05),
        links=Links(version_bytes=100.0, uplink=1000.0, downlink=500.0, copies=2, hops=2, verify_s=0.1, pause_s=0.03),
        tools=Tools(latency_s=0.2, sigma=0.0, overhead_s=0.01),
        buffer=Buffer(commit_s=0.02),
    )
    # The last turn of a chain asks no tool: 3 of 5 turns do.
    generation = 0.5 + 3 * 0.2 + 5 * 0.01 + 0.02
    way = 0.25 + (0.2 + 0.2 + 0.1) + 0.03
    assert simulate(slower, steps=5).step_s == pytest.approx(generation + 0.05 + 1.0 + way, rel=1e-6)


def test_with_lag_the_slower_of_engine_and_learner_sets_the_pace() -> None:
    learner_bound = simulate(replace(PLAIN, slots=12, staleness=lag(2)), steps=20)
    assert learner_bound.step_s == pytest.approx(1.0)
    assert learner_bound.learner_busy == pytest.approx(1.0)
    # 4 trees of 8 turns of 10 tokens a batch; the engine makes 100 tokens a second, however many requests there are.
    shared = EngineRate(first_s=0.0, more_s=0.01)
    engine_bound = simulate(replace(PLAIN, engine=shared, slots=12, staleness=lag(2)), steps=40, settling=6)
    assert engine_bound.step_s == pytest.approx(4 * 8 * 10 / 100, rel=0.05)
    assert engine_bound.engine_busy == pytest.approx(1.0)


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_no_tree_is_lost_or_made_up_and_no_turn_is_older_than_allowed(max_lag: int) -> None:
    noisy = replace(
        PLAIN,
        trees=replace(PLAIN.trees, chain_turns=(1, 2, 6), exponential=True, no_signal=0.4),
        tools=Tools(latency_s=0.5),
        actors=3,
        slots=3,
        staleness=lag(max_lag),
    )
    done = simulate(noisy, steps=30)
    trees = done.trees
    assert trees.leased == trees.trained + trees.no_signal + trees.stale + done.left
    assert trees.no_signal > 0
    assert trees.trained == 30 * 4
    assert done.lag_max <= max_lag
    assert (done.lag > 0) == (max_lag > 0)


def test_the_same_seed_gives_the_same_run_and_another_one_another() -> None:
    noisy = replace(PLAIN, tools=Tools(latency_s=0.5), staleness=lag(2))
    assert simulate(noisy, steps=10, seed=3) == simulate(noisy, steps=10, seed=3)
    assert simulate(noisy, steps=10, seed=3).seconds != simulate(noisy, steps=10, seed=4).seconds


def test_a_buffer_that_is_too_slow_holds_the_fleet_up_and_shards_end_that() -> None:
    fleet = replace(PLAIN, slots=12, staleness=lag(2))
    turns = 4 * 8  # of a step, which takes 1 s
    slow = replace(fleet, buffer=Buffer(turn_s=2 / turns))
    assert simulate(slow, steps=20).step_s == pytest.approx(2.0, rel=0.1)
    sharded = simulate(replace(fleet, buffer=Buffer(turn_s=2 / turns, shards=4)), steps=20)
    assert sharded.step_s == pytest.approx(1.0, rel=0.05)
    assert sharded.buffer_busy == pytest.approx(0.5, rel=0.1)


def test_a_fleet_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="a fleet needs actors and slots, got 0 and 4"):
        replace(PLAIN, actors=0)


# --- calibration ------------------------------------------------------------------------------------------------------


def test_an_engines_rate_is_found_again_in_the_notes_of_its_requests() -> None:
    rate, rng = EngineRate(first_s=0.004, more_s=0.0006), np.random.default_rng(1)
    at, arrivals = 0.0, []
    for _ in range(600):
        at += float(rng.exponential(0.02))
        arrivals.append((at, float(rng.integers(3, 30))))
    ended = engine_log(rate, arrivals, [])
    requests = [
        calibration.Request(began, done, int(tokens)) for (began, tokens), done in zip(arrivals, ended, strict=True)
    ]
    found = calibration.fitted_rate(requests, seats=256)
    assert found.first_s == pytest.approx(rate.first_s, rel=0.15)
    assert found.more_s == pytest.approx(rate.more_s, rel=0.05)
    assert found.request_s < 0.005
    with pytest.raises(ValueError, match="9 requests are too few"):
        calibration.fitted_rate(requests[:9], seats=256)


def test_the_company_of_a_request_is_averaged_over_its_time() -> None:
    requests = [calibration.Request(0.0, 4.0, 1), calibration.Request(2.0, 3.0, 1), calibration.Request(2.0, 8.0, 1)]
    assert calibration.mean_in_flight(requests) == pytest.approx([(2 + 3 + 2) / 4, 3.0, (3 + 2 + 4) / 6])


def test_branches_at_the_root_are_told_from_chains_by_how_many_there_are() -> None:
    episodes = [calibration.Episode(0, [(0.0, 1.0, 0.5)] * 4)] * 7 + [calibration.Episode(2, [(0.0, 1.0, 0.5)] * 2)] * 2
    assert calibration.shapes(episodes, chains=6, branches=3) == ((4,) * 7, (2, 2, 4))


def test_a_run_and_its_notes_give_the_parameters_of_its_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with (tmp_path / calibration.ENGINE_LOG).open("w") as file:
        for i in range(40):
            file.write(json.dumps([i, i + 0.5 + 0.1 * rng.random(), 5]) + "\n")
        file.write("[41, 4")  # cut short by the end of the run
    steps = [[0.0, 1.01, 1.0], [1.57, 2.58, 1.0]]
    (tmp_path / calibration.TASK_LOG).write_text(
        "".join(json.dumps([replayed, steps]) + "\n" for replayed in [0] * 6 + [1] * 3) + "[0, []]\n"
    )
    config = build({"search": {"initial_rollouts": 6, "branches": 3, "rounds": 1}, "actor": {"trees_in_flight": 20}})
    metrics = {
        "train/success": 0.5, "train/trees": 20.0, "buffer/no_signal_trees": 5.0, "time/step_s": 0.3,
        "time/between_steps_s": 1.0, "time/learner_wait_s": 0.6, "weights/publish_s": 0.08,
        "buffer/commit_s/mean": 0.001,
    }  # fmt: skip
    records = [Record(time=float(i), source="learner", step=i, version=i, metrics=metrics) for i in range(6)]
    records += [
        Record(time=9.0, source="learner", step=5, version=5, metrics={"weights/write_s": 0.2}),
        Record(time=9.0, source="actor-0", step=5, version=5, metrics={"weights/fetch_s/mean": 0.02}),
    ]
    fleet = calibration.fleet_of(config, RealRun(records), tmp_path, latency_s=1.0, sigma=0.5)
    assert (fleet.trees.chains, fleet.trees.chain_turns, fleet.trees.branch_turns) == (6, (2,) * 6, (2,) * 3)
    assert (fleet.trees.no_signal, fleet.trees.action_tokens, fleet.slots) == (0.25, 5.0, 20)
    learner = fleet.learner
    assert (learner.step_s, learner.held_s, learner.write_s) == pytest.approx((0.3, 0.08, 0.2))
    assert learner.ask_s == pytest.approx(0.02)
    assert fleet.links.delivery_s == 0.02
    assert fleet.tools.overhead_s == pytest.approx(0.01 + 0.01, abs=0.005)
    assert len(calibration.told(fleet, "a run")) == 10


def test_errors_are_of_the_real_figures_and_both_count() -> None:
    found = validation.Checked(max_lag=2, real_step_s=1.1, model_step_s=1.0, real_lag=2.0, model_lag=2.2)
    assert (found.throughput_error, found.lag_error) == pytest.approx((0.1, 0.1))
    assert found.within(0.15)
    assert not replace(found, model_lag=1.6).within(0.15)
    assert replace(found, real_lag=0.0, model_lag=0.0).within(0.15)
    assert len(validation.rows([found])[0]) == len(validation.HEADER)


# --- fleets of GPUs ---------------------------------------------------------------------------------------------------


def test_gpus_are_divided_around_the_split_that_keeps_both_sides_busy() -> None:
    plan = gpus.Plan(gpus=64, learner=1, max_lag=4)
    guess = gpus.balance(plan)
    rate = gpus.engine().tokens_per_s(gpus.SEATS)
    assert rate == pytest.approx(gpus.TOKENS_PER_S)
    sampled = plan.trees / 0.8 * gpus.trees().turns * gpus.trees().action_tokens
    learner_s = gpus.STEP_S * plan.trees / gpus.STEP_TREES / (gpus.EFFICIENCY * guess)
    assert sampled / (rate * (64 - guess)) == pytest.approx(learner_s)
    assert [each.learner for each in gpus.splits(plan, (0.5, 1.0))] == [round(guess / 2), round(guess)]
    with pytest.raises(ValueError, match="8 of 8 GPUs"):
        gpus.fleet(gpus.Plan(gpus=8, learner=8, max_lag=0))


def outcome(step_s: float, *, turns: int = 1000) -> Outcome:
    return Outcome(
        steps=1, seconds=step_s, lag=1.0, lag_max=2, trees=Counts(turns=turns), left=0, engine_busy=0.5, requests=9.0,
        tokens_per_s=1.0, learner_busy=0.5, buffer_busy=0.1,
    )  # fmt: skip


def test_the_best_division_is_the_fastest_or_the_one_with_fewer_learners_where_it_is_as_fast(tmp_path: Path) -> None:
    answers = questions.Answers(buffer=[(0.5, 1.0), (2.0, 0.5)])
    for latency_s in questions.TOOLS_S:
        for max_lag, times in ((0, (9.0, 8.0, 7.9)), (4, (4.0, 2.0, 1.0))):
            answers.sweep += [
                questions.Answer(
                    gpus.Plan(gpus=8, learner=learner, max_lag=max_lag, latency_s=latency_s), outcome(step_s)
                )
                for learner, step_s in zip((1, 2, 3), times, strict=True)
            ]
    answers.whole = [questions.Answer(replace(answers.sweep[5].plan, deltas=False), outcome(1.5))]
    assert answers.best(8, 0, 0.3).plan.learner == 2
    assert answers.best(8, 4, 0.3).plan.learner == 3
    rows = questions.split_rows(answers, [8], [0, 4])
    assert [row[6] for row in rows] == ["1.0 ×", "8.0 ×"] * 2
    assert all(len(row) == len(questions.SPLIT_HEADER) for row in rows)
    (buffer,) = questions.buffer_rows(answers, [8], [0, 4])
    assert buffer[:5] == ["8", "4", "1,000", "3%", "232"]
    assert len(buffer) == len(questions.BUFFER_HEADER)
    assert questions.weights_rows(answers) == [["8", "1", "1.0, 1.0", "1.5, 1.0"]]
    assert all(len(row) == len(questions.PARAMETERS_HEADER) for row in questions.parameters())
    draw(answers, [8], tmp_path / "figure.png", [0, 4])
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_eight_gpus_are_faster_with_lag_than_without() -> None:
    plan = gpus.Plan(gpus=8, learner=3, max_lag=0)
    slow, fast = (questions.answered(replace(plan, max_lag=each)).outcome for each in (0, 2))
    assert slow.step_s > 2 * fast.step_s
    assert 1 < fast.lag < 2
