"""Tasks of several environments: exactly by weight, the same in every process, each of an environment's own in turn."""

from __future__ import annotations

from collections import Counter

import pytest

from atpo_async.core.mixture import MOST_IN_A_BLOCK, STRETCH, Mixture, Place, block_counts

WEIGHTS = [(1, 1), (2, 1), (0.7, 0.3), (0.1, 0.2, 0.7), (5,), (1, 100), (3.5, 2.25, 0.25)]


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ((1, 1), (1, 1)), ((2.0, 1.0), (2, 1)), ((0.7, 0.3), (7, 3)), ((50, 25, 25), (2, 1, 1)), ((0.1, 0.2), (1, 2)),
        ((7,), (1,)), ((1e-3, 1), (1, 999)), ((1e-9, 1.0), (1, 999)), ((1 / 3, 2 / 3), (1, 2)),
        ((2**0.5, 1), (293, 207)),
    ],
)  # fmt: skip
def test_a_block_holds_whole_numbers_of_tasks_in_proportion_to_the_weights(
    weights: tuple[float, ...], counts: tuple[int, ...]
) -> None:
    assert block_counts(weights) == counts
    assert sum(counts) <= MOST_IN_A_BLOCK


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_block_is_exact_and_an_environments_own_tasks_come_once_each_and_in_order(
    weights: tuple[float, ...],
) -> None:
    mixture = Mixture(weights, seed=3)
    blocks = 5
    places = [mixture.place("train", task) for task in range(blocks * mixture.block)]
    for number, count in enumerate(mixture.counts):
        assert [place.task for place in places if place.environment == number] == list(range(blocks * count))
        for block in range(blocks):
            inside = places[block * mixture.block : (block + 1) * mixture.block]
            assert sum(place.environment == number for place in inside) == count


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_stretch_of_tasks_has_them_by_weight_to_within_a_few(weights: tuple[float, ...]) -> None:
    mixture = Mixture(weights, seed=1)
    seen: Counter[int] = Counter()
    for task in range(1000):
        seen[mixture.place("train", task).environment] += 1
        for number, weight in enumerate(weights):
            assert abs(seen[number] - (task + 1) * weight / sum(weights)) <= STRETCH / 4 + 1


def test_a_task_has_one_place_whatever_was_asked_before() -> None:
    forwards, anywhere = Mixture((0.7, 0.3), seed=9), Mixture((0.7, 0.3), seed=9)
    places = [forwards.place("train", task) for task in range(2000)]
    assert [anywhere.place("train", task) for task in range(1999, -1, -1)] == places[::-1]
    assert anywhere.place("train", 10**12).task > 10**11


def test_the_seed_decides_the_order_and_it_is_that_of_these_numbers_on_every_machine() -> None:
    orders = {seed: [Mixture((2, 1), seed).place("train", t).environment for t in range(30)] for seed in (0, 1)}
    assert orders[0] != orders[1]
    assert orders[0][:12] == [0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0]


def test_two_actors_that_take_turns_both_get_both_environments() -> None:
    mixture = Mixture((1, 1), seed=0)
    taken = [[mixture.place("train", task).environment for task in range(first, 400, 2)] for first in (0, 1)]
    assert all(60 < sum(own) < 140 for own in taken)


def test_held_out_tasks_go_round_evenly_whatever_the_weights() -> None:
    mixture = Mixture((9, 1, 1), seed=4)
    places = [mixture.place("eval", task) for task in range(8)]
    assert places == [
        Place(0, 0),
        Place(1, 0),
        Place(2, 0),
        Place(0, 1),
        Place(1, 1),
        Place(2, 1),
        Place(0, 2),
        Place(1, 2),
    ]
    assert mixture.num_held_out(8) == (3, 3, 2)
    assert mixture.num_held_out(2) == (1, 1, 0)
