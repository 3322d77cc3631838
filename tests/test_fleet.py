"""A fleet of unlike actors on a simulated clock: who grows what, how old it is when it is trained on, and who idles."""

from __future__ import annotations

from typing import Any

import pytest

from atpo_async.config import Config, build
from tests.fleet_support import Virtual, VirtualFleet

NUM_TASKS = 480
MAX_LAG = 4


def configuration(**sections: dict[str, Any]) -> Config:
    made: dict[str, dict[str, Any]] = {
        "run": {"max_tasks": NUM_TASKS, "steps": 10**6},
        "actor": {"count": 4},
        "staleness": {"trees_per_batch": 16, "max_lag": MAX_LAG},
        "search": {"initial_rollouts": 4, "rounds": 0},
    }
    for name, section in sections.items():
        made[name] = made.get(name, {}) | section
    return build(made)


def unlike(**changes: Any) -> list[Virtual]:
    return [Virtual(name=f"x{speed}", turns_per_s=5.0 * speed, **changes) for speed in (1, 2, 4, 8)]


def alike(number: int) -> list[Virtual]:
    return [Virtual(name=f"a{i}", turns_per_s=20.0) for i in range(number)]


def unlimited(fleet: VirtualFleet, *, but_in_time: bool = False) -> VirtualFleet:
    """The same without what limits slow actors; ``but_in_time``: they are given only what they finish in time."""
    limits = fleet.state.ledger.limits
    if not but_in_time:
        limits.why_no_training = lambda *args, **options: None  # type: ignore[method-assign]
    limits.why_left = lambda *args, **options: None  # type: ignore[method-assign]
    return fleet


def scene() -> VirtualFleet:
    comers = [
        Virtual(name="late", turns_per_s=20.0, joins=20.0),
        Virtual(name="leaver", turns_per_s=10.0, leaves=25.0),
        Virtual(name="victim", turns_per_s=10.0, killed=30.0),
    ]
    return VirtualFleet(configuration(), *unlike(), *comers, turns=lambda task: 8 + 2 * (task % 3))


def over(fleet: VirtualFleet) -> float:
    """Share of the turns served that were too old to be trained on."""
    return sum(lag > MAX_LAG for lag in fleet.lags) / len(fleet.lags)


def busy(fleet: VirtualFleet) -> dict[str, float]:
    return {name: actor.busy_share(fleet.now) for name, actor in fleet.actors.items()}


def test_actors_of_unlike_speed_that_come_and_go_are_all_busy_and_every_task_is_trained_on_once() -> None:
    fleet = scene().run()
    assert fleet.trained == dict.fromkeys(range(NUM_TASKS), 1)
    assert fleet.state.ledger.tasks.given_up == 0
    assert min(busy(fleet).values()) >= 0.95
    assert max(max(lags) for tree, lags in fleet.lags_of.items() if "victim" not in fleet.holders[tree]) <= MAX_LAG
    assert over(fleet) < 0.005  # of the trees that the killed actor had begun
    assert any(len(holders) > 1 for holders in fleet.holders.values())
    free = unlimited(scene()).run()
    assert over(free) > 0.08
    assert min(busy(free).values()) < 0.7
    assert free.now > 1.25 * fleet.now


def test_each_actor_grows_about_as_many_trees_as_it_is_fast() -> None:
    fleet = VirtualFleet(configuration(), *unlike()).run()
    done = {actor.name: actor.done for actor in fleet.actors.values()}
    assert sum(done.values()) == NUM_TASKS
    assert {name: number / NUM_TASKS for name, number in done.items()} == pytest.approx(
        {"x1": 1 / 15, "x2": 2 / 15, "x4": 4 / 15, "x8": 8 / 15}, abs=0.02
    )


def test_the_last_trees_of_a_run_are_left_to_the_fast_actor() -> None:
    """Of a slow one they would be the end of the run."""
    late = []
    for num_tasks in range(80, 85):
        config = configuration(run={"max_tasks": num_tasks}, actor={"count": 2})
        pair = [Virtual(name=f"x{speed}", turns_per_s=speed) for speed in (2.0, 20.0)]
        pairs = [Virtual(name=f"x{speed}", turns_per_s=speed) for speed in (2.0, 20.0)]
        fleet = VirtualFleet(config, *pair).run()
        free = unlimited(VirtualFleet(config, *pairs), but_in_time=True).run()
        assert fleet.actors["x2.0"].finished_at[-1] <= fleet.actors["x20.0"].finished_at[-1] + 0.5
        late.append(free.now - fleet.now)
    assert min(late) > -0.5
    assert max(late) > 3.0


def evaluated(fleet: VirtualFleet, num_tasks: int) -> float:
    """Seconds that an evaluation takes in mid-run, when the actors know what its chains are like."""
    fleet.run(until=lambda: fleet.step == 4)
    for number in (5, num_tasks):
        began, step = fleet.now, fleet.step
        fleet.evaluate(number)
        fleet.run(until=lambda step=step: fleet.state.eval_result(step).done)  # type: ignore[misc]
        fleet.step += 1
    return fleet.now - began


@pytest.mark.parametrize("num_tasks", [10, 60])
def test_an_evaluation_ends_as_soon_as_the_actors_allow(num_tasks: int) -> None:
    took = evaluated(VirtualFleet(configuration(), *unlike()), num_tasks)
    assert took <= 0.75 * evaluated(unlimited(VirtualFleet(configuration(), *unlike())), num_tasks)


def test_where_all_actors_are_alike_none_is_limited() -> None:
    config = configuration(run={"max_tasks": 200}, actor={"count": 3})
    fleet, free = VirtualFleet(config, *alike(3)).run(), unlimited(VirtualFleet(config, *alike(3))).run()
    assert fleet.now <= free.now
    assert busy(fleet) == pytest.approx(busy(free), abs=0.01)


def test_a_single_actor_is_given_all_that_it_asks_for() -> None:
    one = configuration(actor={"count": 1}, run={"max_tasks": 64})
    fleet, free = VirtualFleet(one, *alike(1)).run(), unlimited(VirtualFleet(one, *alike(1))).run()
    assert (fleet.now, fleet.batch_times, fleet.lags) == (free.now, free.batch_times, free.lags)


def test_a_slow_actor_that_is_left_alone_finishes_the_run() -> None:
    actors = [Virtual(name="slow", turns_per_s=2.5), Virtual(name="fast", turns_per_s=40.0, killed=12.0)]
    fleet = VirtualFleet(configuration(run={"max_tasks": 60}, actor={"count": 2}), *actors).run()
    assert fleet.trained == dict.fromkeys(range(60), 1)
    assert fleet.actors["slow"].done > 5


def test_the_last_trees_are_not_left_for_ever_to_fast_actors_that_do_not_take_them() -> None:
    """As one does whose engine hangs: its link lives on."""
    config = configuration(run={"max_tasks": 100}, actor={"count": 2}, buffer={"lease_lifetime_s": 3600.0})
    fleet = VirtualFleet(config, Virtual(name="slow", turns_per_s=2.5), Virtual(name="fast", turns_per_s=40.0))
    fleet.run(until=lambda: fleet.step == 4)
    fast = fleet.actors["fast"]
    fast.slots = len(fast.trees)  # it takes no more
    fleet.keep_alive("fast")
    fleet.run()
    assert fleet.trained == dict.fromkeys(range(100), 1)


@pytest.mark.parametrize("staleness", [{"max_lag": 0}, {"max_lag": 2, "exact_lag": 2}], ids=["no lag", "exact lag"])
def test_runs_without_lag_and_with_an_exact_one_stay_as_they_are_and_end_sooner(staleness: dict[str, int]) -> None:
    config = configuration(staleness=staleness, run={"max_tasks": None, "steps": 10})
    fleet, free = VirtualFleet(config, *unlike()).run(), unlimited(VirtualFleet(config, *unlike())).run()
    assert set(fleet.lags) == set(free.lags)
    assert fleet.step == free.step == 10
    assert fleet.trained.total() == free.trained.total()
    assert fleet.now < 0.8 * free.now
