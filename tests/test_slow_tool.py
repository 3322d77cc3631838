"""The task of the benchmarks of asynchrony, and how they read a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from atpo_async.core.errors import ConfigError
from atpo_async.environments.hopqa.world import Answer, Look, World, save_tokenizer
from atpo_async.run.metrics import Record
from benchmarks.async_speedup import HEADER, Comparison, Side, rows, side_of, verdict
from benchmarks.real_runs import RealRun, goal_at, seconds_per_step
from benchmarks.slow_tool import SlowHopQA, draw_s


def test_latencies_have_the_mean_that_is_asked_for_and_are_none_where_it_is_0() -> None:
    rng = np.random.default_rng(0)
    for sigma in (0.0, 1.0):
        assert np.mean([draw_s(rng, mean_s=0.3, sigma=sigma) for _ in range(20_000)]) == pytest.approx(0.3, rel=0.05)
    assert draw_s(rng, mean_s=0.0, sigma=1.0) == 0.0


class Waits(SlowHopQA):
    """Counts calls of its tool, which take no time."""

    calls = 0

    async def tool(self) -> float:
        self.calls += 1
        return 0.25


async def test_look_ups_take_the_tools_time_answers_and_replays_do_not(tmp_path: Path) -> None:
    save_tokenizer(World(seed=0), tmp_path)
    environment = Waits(tmp_path, seed=0)
    task = environment.hopqa.world.task("train", 0)

    def words(action: Look | Answer) -> np.ndarray:
        said = ("look", action.relation, "of", action.name) if isinstance(action, Look) else ("answer", action.name)
        return environment.hopqa.encode((*said, "<end>"))

    look = words(Look(relation=task.relations[-1], name=task.question[-2]))
    first, second = [await environment.start("train", 0) for _ in range(2)]
    seen = await first.step(look)
    assert (environment.calls, seen.done) == (1, False)
    replayed = await second.replay_step(look, seen.observation)
    assert (environment.calls, replayed.observation.tolist()) == (1, seen.observation.tolist())
    assert (await second.step(words(Answer(name=task.answer)))).success
    assert (environment.calls, first.waited_s, second.waited_s) == (1, 0.25, 0.0)


def test_a_latency_that_is_none_is_refused(tmp_path: Path) -> None:
    for latency_s, sigma in ((-1.0, 1.0), (float("nan"), 1.0), (0.3, 4.0)):
        with pytest.raises(ConfigError, match="latency_s"):
            SlowHopQA(tmp_path, latency_s=latency_s, latency_sigma=sigma)


# --- reading a run ----------------------------------------------------------------------------------------------------


def steps_of(success: Sequence[float], *, each_s: float) -> list[Record]:
    return [
        Record(
            time=100 + each_s * i, source="learner", step=i, version=i,
            metrics={"train/success": value, "lag/mean": 1.0, "train/trees": 18.0},
        )
        for i, value in enumerate(success)
    ]  # fmt: skip


def run_of(success: Sequence[float], *, each_s: float) -> RealRun:
    lease = Record(time=95.0, source="buffer", step=0, version=0, metrics={"time/first_lease": 95.0})
    records = steps_of(success, each_s=each_s)
    end = records[-1].time
    return RealRun([lease, *records], {"actors": [(t, 0.5 * t) for t in np.arange(90.0, end + 1, 0.5).tolist()]})


def test_the_goal_is_reached_when_three_steps_have_it_on_average() -> None:
    assert goal_at(steps_of([0.2, 0.95, 0.95, 0.8, 0.95, 0.97], each_s=1)) == 4
    assert goal_at(steps_of([0.95, 0.95], each_s=1)) is None
    assert goal_at(steps_of([0.5] * 9, each_s=1)) is None


def test_the_first_steps_do_not_count_for_the_seconds_of_one() -> None:
    assert seconds_per_step([*steps_of([0.1] * 2, each_s=50), *steps_of([0.1] * 4, each_s=2)]) == 2.0
    with pytest.raises(ValueError, match="3 steps are too few"):
        seconds_per_step(steps_of([0.1] * 3, each_s=1))


def test_sides_are_compared_over_the_steps_that_both_made_and_by_their_own_goals() -> None:
    slow, fast = run_of([0.1, 0.5, 0.9, 0.9, 0.9], each_s=8.0), run_of([0.1, 0.1, 0.1, 0.5, 0.9, 0.9, 0.9], each_s=1.0)
    sides = {"synchronous": slow, "asynchronous": fast}
    compared = Comparison(1, 0.3, {name: side_of(run, common=5, trees=12) for name, run in sides.items()})
    assert compared.per_step == 8.0
    assert compared.sides["synchronous"] == Side(
        steps=5, step_s=8.0, goal_steps=5, goal_s=37.0, lag=1.0, actor_cores=0.5, learner_cores=0.0, produced=1.5
    )
    assert compared.to_goal == pytest.approx(37 / 11)
    assert verdict([compared], per_step=6.0, to_goal=3.0)["reached"]
    assert not verdict([compared], per_step=6.0, to_goal=4.0)["reached"]
    never = Comparison(
        2, 0.3, compared.sides | {"asynchronous": side_of(run_of([0.1] * 5, each_s=1.0), common=5, trees=12)}
    )
    assert never.to_goal is None
    found = verdict([compared, never], per_step=6.0, to_goal=3.0)
    assert found == {"per_step": 8.0, "to_goal": None, "reached": False}
    lines = rows([compared, never])
    assert all(len(line) == len(HEADER) for line in lines)
    assert [line[-2] for line in lines] == ["", "8.0 ×", "", "8.0 ×"]
