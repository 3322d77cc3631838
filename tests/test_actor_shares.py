"""What the buffer knows of its actors: where they run, how fast they are, and what each is given for it."""

from __future__ import annotations

from typing import Any

import pytest

from atpo_async.config import build
from atpo_async.run.host import as_name
from atpo_async.wire.messages import ActorReport
from buffer.journal.entries import LeaseEntry, TreeStateEntry
from buffer.leases.ledger import Ledger
from buffer.leases.presence import FORGOTTEN_S, ActorPresence, Host
from buffer.leases.rates import HALF_LIFE_S, STRETCH_TURNS, Rates
from buffer.leases.shares import UNKNOWN_TREES, Fleet, Pace, Worker, in_time, most_training, others_sooner
from buffer.leases.table import HeldLease
from tests.buffer_peers_support import hello, running


async def test_the_buffer_keeps_where_an_actor_runs_as_its_hello_or_a_report_says() -> None:
    async with running() as peers:
        presence = peers.service.state.ledger.actors
        await peers.actor.request(hello(peers.config, host="far", host_id="boot:far"), timeout_s=20.0)
        assert presence.host_of("a") == Host("far", "boot:far")
        fields: dict[str, Any] = {"run": "r", "actor": "a", "version": 0, "tree_ids": (), "metrics": {}}
        await peers.send(ActorReport(**fields))
        assert presence.host_of("a") == Host("far", "boot:far")
        await peers.send(ActorReport(**fields, host="near", host_id="boot:near"))
        assert presence.host_of("a") == Host("near", "boot:near")


def test_the_machine_of_an_actor_is_forgotten_with_the_actor() -> None:
    presence = ActorPresence(5.0)
    presence.heard("a", 0.0)
    presence.lives_on("a", Host("far", "boot:far"))
    presence.forget_long_gone(FORGOTTEN_S + 1.0, [])
    assert (len(presence), presence.host_of("a")) == (0, Host())


def test_a_machines_name_fits_a_message() -> None:
    assert as_name("gpu-7") == "gpu-7"
    assert as_name("two\nlines") == ""
    assert len(as_name("é" * 150).encode()) == 200


# --- how fast they are ---------------------------------------------------------------------------------------------


def lease_of(tree: str, holder: str = "a", **changes: Any) -> HeldLease:
    fields: dict[str, Any] = {
        "tree_id": tree, "number": 1, "task_index": 0, "kind": "train", "seed": 0, "epoch": 0, "holder": holder,
        "expires_at": 0.0, "min_version": 0,
    }  # fmt: skip
    return HeldLease(**(fields | changes))


def turns(rates: Rates, held: HeldLease, number: int, *, every_s: float, lag: int = 0) -> None:
    for _ in range(number):
        rates.now += every_s
        rates.turn(held, lag=lag)


def test_a_rate_counts_only_the_time_in_which_an_actor_holds_a_lease() -> None:
    rates, held = Rates(), lease_of("t")
    rates.assigned(held)
    assert rates.turns_per_s("a") is None
    turns(rates, held, STRETCH_TURNS, every_s=0.5)
    assert rates.turns_per_s("a") == pytest.approx(2.0)
    rates.unassigned(held)
    rates.now += 1000.0
    assert rates.turns_per_s("a") == pytest.approx(2.0)
    rates.assigned(held)
    turns(rates, held, STRETCH_TURNS, every_s=0.5)
    assert rates.turns_per_s("a") == pytest.approx(2.0)


def test_one_stretch_of_another_speed_changes_no_rate_and_three_do() -> None:
    rates, held = Rates(), lease_of("t")
    rates.assigned(held)
    for every_s, expected in [(0.5, 2.0), (0.5, 2.0), (0.5, 2.0), (0.125, 2.0), (0.125, 2.0), (0.125, 8.0)]:
        turns(rates, held, STRETCH_TURNS, every_s=every_s)
        assert rates.turns_per_s("a") == pytest.approx(expected)


def test_an_actor_that_stands_still_becomes_slower_before_its_next_turn() -> None:
    rates, held = Rates(), lease_of("t")
    rates.assigned(held)
    turns(rates, held, STRETCH_TURNS, every_s=0.5)
    rates.now += 160.0
    assert rates.turns_per_s("a") == pytest.approx(1 / 160)


def test_what_an_actor_owes_is_what_its_trees_lack_of_those_before() -> None:
    rates, ended, held = Rates(), lease_of("t"), lease_of("u")
    rates.assigned(ended)
    turns(rates, ended, 20, every_s=0.1)
    rates.ended(ended)
    rates.unassigned(ended)
    assert (rates.turns_per_tree("train"), rates.turns_of_long_tree(), rates.owed("a")) == (20.0, 20.0, 0.0)
    rates.assigned(held)
    turns(rates, held, 5, every_s=0.1)
    assert (rates.owed("a"), rates.held("a", "train"), rates.trees("a")) == (15.0, 1, 1)
    turns(rates, held, 30, every_s=0.1)
    assert rates.owed("a") == 1.0


def test_turns_that_came_of_late_and_their_lag_fade() -> None:
    rates, held = Rates(), lease_of("t")
    rates.assigned(held)
    assert rates.received("a") == (0.0, None)
    turns(rates, held, 4, every_s=0.0, lag=3)
    assert rates.received("a") == (4.0, 3.0)
    rates.now += HALF_LIFE_S
    assert rates.received("a") == (2.0, 3.0)


def test_a_new_process_of_a_name_is_measured_anew() -> None:
    rates, held = Rates(), lease_of("t")
    rates.assigned(held)
    turns(rates, held, STRETCH_TURNS, every_s=0.5)
    rates.forget("a")
    rates.unassigned(held)
    assert rates.turns_per_s("a") is None


def test_an_actor_that_goes_on_under_another_name_keeps_its_rate_and_its_leases() -> None:
    made = Ledger(
        staleness=build({"staleness": {"trees_per_batch": 8, "max_lag": 4}}).staleness, lifetime_s=10.0, silent_s=6.0,
        max_reissues=1, seed=0, prefix="b1",
    )  # fmt: skip
    made.progress.publish(0)
    held = made.grant("a", 2, now=0.0, ready=0).leases
    for i in range(STRETCH_TURNS):
        made.turn(held[0].tree_id, now=0.5 * (i + 1), lag=0)
    assert made.goes_on("a", "b", 9.0) == 2
    assert (made.rates.turns_per_s("b"), made.rates.held("b", "train")) == (2.0, 2)
    assert (made.rates.turns_per_s("a"), made.rates.held("a", "train")) == (None, 0)
    made.end(held[0].tree_id)
    assert (made.rates.held("b", "train"), made.rates.trees("b")) == (1, 1)


def test_the_time_before_a_buffer_was_started_again_is_no_work_of_those_that_hold_leases() -> None:
    made = Ledger(
        staleness=build({}).staleness, lifetime_s=10.0, silent_s=6.0, max_reissues=1, seed=0, prefix="b2"
    )  # fmt: skip
    lease = LeaseEntry(holder="a", seed=0, epoch=0, min_version=0, lost=0, waiting=False, eval_step=-1)
    made.restore_lease("t", TreeStateEntry(number=1, task_index=0, kind="train", lease=lease, growing=True), now=9e4)
    for i in range(STRETCH_TURNS):
        made.turn("t", now=9e4 + 0.5 * (i + 1), lag=0)
    assert made.rates.turns_per_s("a") == pytest.approx(2.0)


def test_an_actor_is_no_slower_for_the_time_in_which_the_buffer_stood_still() -> None:
    made = Ledger(
        staleness=build({"staleness": {"trees_per_batch": 8, "max_lag": 4}}).staleness, lifetime_s=10.0, silent_s=6.0,
        max_reissues=1, seed=0, prefix="b1",
    )  # fmt: skip
    made.progress.publish(0)
    (held,) = made.grant("a", 1, now=0.0, ready=0).leases
    made.excuse(100.0, 100.0)
    for i in range(STRETCH_TURNS):
        made.turn(held.tree_id, now=100.0 + 0.5 * (i + 1), lag=0)
    assert made.rates.turns_per_s("a") == pytest.approx(2.0)


# --- what each is given --------------------------------------------------------------------------------------------


def test_an_actor_holds_as_many_trees_as_end_in_time_and_one_at_least() -> None:
    assert in_time(10.0, turns_per_tree=20.0, left_s=10.0) == 3  # 70 % of 5
    assert in_time(0.1, turns_per_tree=20.0, left_s=1.0) == 1


@pytest.mark.parametrize(
    ("rate", "fastest", "number", "limit"),
    [
        (None, None, 1, None),
        (None, 8.0, 2, UNKNOWN_TREES),
        (8.0, 8.0, 2, None),
        (5.4, 8.0, 2, None),
        (4.0, 8.0, 2, 2),
    ],
    ids=["alone", "unknown", "fastest", "alike", "slow"],
)
def test_only_a_slow_actor_and_an_unknown_one_among_others_are_limited(
    rate: float | None, fastest: float | None, number: int, limit: int | None
) -> None:
    fleet = Fleet(rate=rate, fastest=fastest, number=number)
    assert most_training(fleet, turns_per_tree=10.0, left_s=8.0, fastest_holds=99) == limit


def test_as_long_as_neither_trees_nor_the_learner_are_known_a_slow_actor_holds_its_part_of_what_the_fastest_does() -> (
    None
):
    fleet = Fleet(rate=1.0, fastest=8.0, number=2)
    assert most_training(fleet, turns_per_tree=None, left_s=5.0, fastest_holds=32) == 4
    assert most_training(fleet, turns_per_tree=9.0, left_s=None, fastest_holds=3) == 1


def test_others_finish_the_last_trees_sooner_only_if_they_finish_all_of_them() -> None:
    slow, fast = Worker(1.0, 0.0), Worker(8.0, 20.0)
    assert [others_sooner(slow, [fast], turns=10.0, remaining=left) for left in (1, 6, 7)] == [True, True, False]
    assert not others_sooner(slow, [], turns=10.0, remaining=1)
    busy = Worker(8.0, 80.0)
    assert not others_sooner(slow, [busy], turns=10.0, remaining=1)


def test_the_learners_pace_is_the_median_of_its_intervals() -> None:
    pace = Pace()
    for version, now in [(1, 10.0), (2, 12.0), (3, 14.0), (4, 30.0)]:
        pace.taken(version, now)
        pace.taken(version, now + 0.5)
    assert pace.step_s == 2.0
    assert pace.until(3, 31.0) == 1.0 + 3 * 2.0
    assert pace.until(0, 99.0) == 0.0
    assert pace.until(-1, 31.0) == 0.0
    assert Pace().until(3, 0.0) is None


def test_an_actor_that_has_left_is_not_there_until_it_asks_again() -> None:
    presence = ActorPresence(5.0)
    presence.heard("a", 0.0)
    presence.leaves("a")
    presence.heard("a", 1.0)
    assert (presence.is_there("a", 1.0), presence.num_there, presence.num_alive(1.0)) == (False, 0, 0)
    presence.asks("a")
    assert (presence.is_there("a", 1.0), presence.num_there, presence.num_alive(1.0)) == (True, 1, 1)
    assert not presence.is_there("a", 7.0)
