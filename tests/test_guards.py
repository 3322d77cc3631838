"""Which updates are skipped, and what a run that must stop says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atpo_async.core.errors import AtpoError
from learner.loss.guards import WARM, WINDOW, GradNorms, SkipCount, UpdatesRefused, fault

ANY_NORM = st.floats(allow_nan=True, allow_infinity=True)


def norms(*values: float) -> GradNorms:
    return GradNorms.of(values)


def usual(count: int = WARM) -> GradNorms:
    return norms(*([2.0] * count))


def judge(grad_norm: float, history: GradNorms, factor: float | None = 10.0) -> tuple[str | None, GradNorms]:
    """As the trainer does it: decide from the norms before this one, then remember it."""
    found = fault(loss=1.0, grad_norm=grad_norm, history=history, max_spike=factor)
    return found, history.after(grad_norm)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_or_norm_that_is_no_number_is_a_fault_whatever_the_history(bad: float) -> None:
    for history in (GradNorms(), usual()):
        for factor in (None, 10.0):
            assert fault(loss=bad, grad_norm=1.0, history=history, max_spike=factor) == f"loss is {bad}"
            assert fault(loss=1.0, grad_norm=bad, history=history, max_spike=factor) == f"gradient norm is {bad}"


def test_a_spike_names_the_norm_the_median_how_many_times_it_is_and_the_setting() -> None:
    found, _ = judge(50.0, usual())
    assert found == ("gradient norm is 50, 25 times the median 2 of the last 10 (learner.max_grad_spike = 10)")


def test_only_more_than_the_factor_is_a_spike() -> None:
    assert judge(20.0, usual())[0] is None
    assert judge(np.nextafter(20.0, 21.0), usual())[0] is not None


def test_without_a_factor_no_finite_norm_is_a_fault() -> None:
    assert judge(1e30, usual(), None)[0] is None


def test_the_first_norms_are_never_spikes() -> None:
    history = GradNorms()
    for i in range(WARM):
        assert history.median is None
        found, history = judge(1000.0**i, history)
        assert found is None
    assert history.median is not None


def test_a_norm_that_is_not_finite_or_zero_never_enters_the_history() -> None:
    history = usual()
    for norm in (math.nan, math.inf, -math.inf, 0.0):
        assert history.after(norm) is history
    # Else batches without signal would make the median zero, and any norm infinitely many times it.
    quiet = norms(*([0.0] * WINDOW), *([2.0] * WARM))
    assert quiet.median == 2.0


def test_the_median_is_over_the_window_and_the_oldest_leave_first() -> None:
    history = norms(*range(1, 101))
    assert history.norms == tuple(float(n) for n in range(51, 101))
    assert history.median == 75.5


def test_one_spike_in_a_while_is_skipped_each_time_and_the_median_hardly_moves() -> None:
    """Skipped spikes enter the history; as long as they are the exception they set no new measure."""
    history, skipped = usual(WINDOW), 0
    for i in range(400):
        found, history = judge(1e6 if i % 3 == 0 else 2.0 + (i % 5) * 0.01, history)
        assert (found is not None) == (i % 3 == 0)
        skipped += found is not None
        assert history.median is not None
        assert 2.0 <= history.median <= 2.04
    assert skipped == 134


def test_norms_that_are_larger_for_good_become_the_measure() -> None:
    """Were skipped spikes kept out, the median would stand for ever at a size that never comes again."""
    history, reasons = usual(WINDOW), []
    for _ in range(WINDOW):
        found, history = judge(100.0, history)
        reasons.append(found)
    first_applied = reasons.index(None)
    assert first_applied == WINDOW // 2  # with half of the window the median lies between: 51, and 100 is no spike
    assert all(found is None for found in reasons[first_applied:])
    assert judge(100.0, history)[0] is None


def test_the_usual_limit_of_skips_stops_the_run_long_before_spikes_become_the_measure() -> None:
    """A run that diverges is stopped, not followed: the limit is 5 in a row, the median needs 10 at the least."""
    history, skips = usual(), SkipCount()
    for _ in range(5):
        skips.check("", limit=5, kept_in="skipped")
        found, history = judge(1e4, history)
        assert found is not None
        skips = skips.after(found)
    with pytest.raises(UpdatesRefused, match="5 updates in a row"):
        skips.check("", limit=5, kept_in="skipped")
    assert judge(1e4, history)[0] is not None


def test_slow_growth_is_no_spike() -> None:
    history, norm = usual(WINDOW), 2.0
    for _ in range(10 * WINDOW):
        norm *= 2 ** (1 / WINDOW)
        found, history = judge(norm, history)
        assert found is None
    assert norm > 1000 * 2.0


@settings(max_examples=200)
@given(st.lists(ANY_NORM, max_size=70), ANY_NORM, st.none() | st.floats(1.0, 1e6, exclude_min=True))
def test_any_history_gives_the_same_verdict_on_every_rank_and_holds_only_sizes(
    past: list[float], norm: float, factor: float | None
) -> None:
    one, other = GradNorms.of(past), GradNorms()
    for value in past:
        other = other.after(value)
    assert one == other == GradNorms.of(one.norms)
    assert len(one.norms) <= WINDOW
    assert all(math.isfinite(value) and value > 0 for value in one.norms)
    found = fault(loss=1.0, grad_norm=norm, history=one, max_spike=factor)
    good = math.isfinite(norm) and (
        factor is None or len(one.norms) < WARM or norm <= factor * float(np.median(one.norms))
    )
    assert (found is None) == good


def test_a_run_that_stops_says_why_how_often_the_limit_where_to_look_and_what_to_change() -> None:
    for reason in ("loss is nan", "gradient norm is inf", judge(50.0, usual())[0]):
        assert reason is not None
        count = SkipCount()
        for _ in range(4):
            count = count.after(reason)
        with pytest.raises(UpdatesRefused) as caught:
            count.check(reason, limit=4, kept_in="runs/x/skipped", checkpoint="runs/x/checkpoints/step-000050-v000051")
        said = str(caught.value)
        assert isinstance(caught.value, AtpoError)  # one line, no traceback
        assert "\n" not in said
        for part in (
            "4 updates in a row were skipped", "learner.max_skipped_updates = 4", f"because its {reason}",
            "kept in runs/x/skipped", "checkpoints/step-000050-v000051 is good", "lower learner.lr",
            "raise learner.max_grad_spike",
        ):  # fmt: skip
            assert part in said


def test_without_a_name_the_last_checkpoint_is_said_to_be_good() -> None:
    with pytest.raises(UpdatesRefused, match="the last checkpoint is good"):
        SkipCount(1, 1).check("loss is nan", limit=1, kept_in="x")


def test_skips_count_in_a_row_and_in_all() -> None:
    count = SkipCount().after("a").after("b").after(None).after("c")
    assert count == SkipCount(1, 3)
    count.check("c", limit=2, kept_in="x")
