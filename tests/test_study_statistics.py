"""The statistics of studies, against printed tables and against simulation."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from atpo_async.study.results.statistics import (
    MOST_SEEDS,
    detectable,
    deviation,
    holm,
    interval,
    power,
    seeds_for,
    t_cdf,
    t_quantile,
    welch,
)


@pytest.mark.parametrize(
    ("p", "freedom", "t"),  # of the tables that every textbook prints
    [
        (0.975, 1, 12.706), (0.975, 4, 2.776), (0.975, 8, 2.306), (0.995, 8, 3.355), (0.9995, 5, 6.869),
        (0.95, 30, 1.697), (0.975, 1e6, 1.960), (0.025, 4, -2.776), (0.5, 7, 0.0),
    ],
)  # fmt: skip
def test_the_quantiles_of_students_t_are_those_of_the_tables(p: float, freedom: float, t: float) -> None:
    assert t_quantile(p, freedom) == pytest.approx(t, abs=6e-4)


def test_a_correction_for_more_comparisons_than_are_at_hand_takes_the_others_to_show_nothing() -> None:
    ps = [0.002, 0.03, 0.4]
    assert holm(ps, among=10) == pytest.approx(holm([*ps, *[1.0] * 7])[:3])
    assert holm(ps, among=2) == holm(ps)


def test_an_interval_may_have_a_least_spread() -> None:
    found = interval([0.9, 0.9, 0.9], least_deviation=0.01)
    assert found is not None
    assert found.high - found.mean == pytest.approx(4.3027 * 0.01 / math.sqrt(3), abs=1e-6)
    assert interval([0.8, 0.9], least_deviation=0.01) == interval([0.8, 0.9])


@given(st.floats(-40, 40), st.floats(0.6, 500))
@example(1.4914809817114443e-07, 256.0)
def test_the_distribution_of_students_t_is_symmetric_and_is_the_inverse_of_its_quantile(
    t: float, freedom: float
) -> None:
    p = t_cdf(t, freedom)
    assert 0 <= p <= 1
    assert p + t_cdf(-t, freedom) == pytest.approx(1, abs=1e-12)
    if 1e-6 < p < 1 - 1e-6:
        assert t_quantile(p, freedom) == pytest.approx(t, rel=1e-5, abs=1e-7)


def test_an_interval_is_students() -> None:
    values = [0.90, 0.92, 0.95, 0.97, 0.96]
    found = interval(values)
    assert found is not None
    half = 2.7764451 * deviation(values) / math.sqrt(5)
    assert (found.mean, found.low, found.high) == pytest.approx((0.94, 0.94 - half, 0.94 + half))
    assert interval([0.9]) is None


def test_welchs_test_is_that_of_a_worked_example() -> None:
    # Two groups of unlike spread; by hand: s² 2/3 and 10, errors² 1/6 and 2, t = −2/sqrt(13/6).
    found = welch([1.0, 2.0, 2.0, 3.0], [0.0, 2.0, 4.0, 6.0, 8.0])
    assert found.value == pytest.approx(-2.0)
    assert found.error == pytest.approx(math.sqrt(13 / 6))
    assert found.freedom == pytest.approx((13 / 6) ** 2 / ((1 / 6) ** 2 / 3 + 2**2 / 4))
    assert found.p == pytest.approx(0.2371, abs=2e-3)
    low, high = found.within()
    assert low < -2 < high
    assert (low + high) / 2 == pytest.approx(-2)


def test_groups_that_do_not_vary_are_measured_by_what_the_measure_tells_apart() -> None:
    with pytest.raises(ValueError, match="neither side varies"):
        welch([1.0, 1.0], [0.0, 0.0])
    assert welch([1.0, 1.0], [0.995, 0.995], least_deviation=0.01).p > 0.5
    assert welch([1.0] * 5, [0.9] * 5, least_deviation=0.01).p < 1e-5
    with pytest.raises(ValueError, match="two values on each side"):
        welch([1.0], [0.9, 0.8])


def test_holms_correction_is_that_of_his_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("spreads", "seeds", "wanted"),  # Cohen (1988), table 2.4.1: two-sided 5 %, power 0.80
    [(0.2, 394, 0.8), (0.5, 64, 0.8), (0.8, 26, 0.8), (1.0, 17, 0.8), (1.4, 10, 0.8), (0.5, 105, 0.95)],
)
def test_the_seeds_that_a_difference_takes_are_those_of_cohens_table(spreads: float, seeds: int, wanted: float) -> None:
    assert seeds_for(spreads, 1.0, wanted=wanted) == pytest.approx(seeds, abs=1)


def test_power_is_what_simulation_finds() -> None:
    dice, rounds = random.Random(1), 3000
    hits = 0
    for _ in range(rounds):
        first, second = ([dice.gauss(mean, 1.0) for _ in range(5)] for mean in (2.0, 0.0))
        hits += welch(first, second).p < 0.05
    assert hits / rounds == pytest.approx(power(2.0, 1.0, 5), abs=0.015)
    # Simulated with numpy, 400,000 rounds: the first of 29 comparisons.
    assert power(3.99, 1.0, 5, alpha=0.05 / 29) == pytest.approx(0.800, abs=2e-3)
    # Welch's test gives away a little for not knowing that the spreads are equal.
    assert power(0.0, 1.0, 5) == pytest.approx(0.0443, abs=2e-3)
    assert power(0.0, 1.0, 200) == pytest.approx(0.05, abs=1e-4)


def test_what_can_be_told_apart_shrinks_with_seeds_and_grows_with_comparisons() -> None:
    assert detectable(1.0, 5) == pytest.approx(2.084, abs=2e-3)
    assert detectable(0.1, 5) == pytest.approx(0.2084, abs=2e-4)
    assert detectable(1.0, 20) < detectable(1.0, 5) < detectable(1.0, 5, alpha=0.05 / 70) < detectable(1.0, 2)
    assert power(detectable(1.0, 7), 1.0, 7) == pytest.approx(0.8)
    assert seeds_for(1e-3, 1.0) is None
    assert seeds_for(0.1, 1.0) is not None
    assert MOST_SEEDS >= 1000
