"""What the cells of a study say together: intervals, comparisons, sentences, planned power, tables, figures, pages."""

from __future__ import annotations

import csv
import io
import random
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atpo_async.core.errors import SetupError
from atpo_async.study.cells import Cell, CellResult
from atpo_async.study.folder import StudyFolder
from atpo_async.study.grid.axes import Axis
from atpo_async.study.grid.choosing import Choice, Choosing
from atpo_async.study.output import outputs
from atpo_async.study.output.figure import COLORS, all_series, dot_range, panels, write_figure
from atpo_async.study.output.origin import Origin
from atpo_async.study.output.page import page
from atpo_async.study.output.plots import mark
from atpo_async.study.output.tables import choice_lines, choice_table, details, goals, matrices, to_csv
from atpo_async.study.results.comparisons import compare_all, num_comparisons, num_laid_down
from atpo_async.study.results.conclusions import method, sentences
from atpo_async.study.results.planning import Spreading, power_lines, spreading
from atpo_async.study.results.statistics import deviation
from atpo_async.study.results.summary import Summary, to_goal
from tests.study_support import DEMO, FAILED, ROOT, Value, cell, done, plan_of, summary_of

Grid = dict[tuple[object, ...], Sequence[Value]]
LOW, MIDDLE, HIGH = (0.01, 0.02, 0.03, 0.02), (0.70, 0.74, 0.76, 0.72), (0.93, 0.97, 0.95, 0.96)

EXPECTED: Grid = {
    (0, "none"): HIGH, (0, "turn"): (0.96, 0.96, 0.95, 0.94),
    (2, "none"): (0.94, 0.96, 0.95, 0.97), (2, "turn"): HIGH,
    (8, "none"): LOW, (8, "turn"): (0.95, 0.96, 0.94, 0.95),
    (16, "none"): LOW, (16, "turn"): MIDDLE,
}  # fmt: skip


def test_what_staleness_does_and_what_undoes_it_is_stated_with_its_intervals() -> None:
    assert sentences(summary_of(EXPECTED)) == [
        "At lag 8 without a correction, success is 0.02 [4e-03, 0.04]; higher with turn-level truncation (0.95, +0.93 "
        "[+0.91, +0.95]).",
        "At lag 16 without a correction, success is 0.02 [4e-03, 0.04]; higher with turn-level truncation (0.73, +0.71 "
        "[+0.67, +0.75]).",
        "At lags 0 and 2, training with turn-level truncation is not told apart from training without a correction: "
        "the measured difference is 0.00; differences up to 0.06 are not excluded.",
        "At lag 0 without a correction, success is 0.95 [0.93, 0.98]; lower at lag 8 (0.02, -0.93 [-0.96, -0.91]) and "
        "at lag 16 (0.02, -0.93 [-0.96, -0.91]); not told apart at lag 2 (differences up to 0.06 are not excluded).",
        "At lag 0 with turn-level truncation, success is 0.95 [0.94, 0.97]; lower at lag 16 (0.73, -0.22 [-0.26, "
        "-0.18]); not told apart at lag 2 and at lag 8 (equal within 0.05, as far as these runs tell).",
    ]


def test_a_grid_in_which_nothing_differs_says_what_is_not_excluded_and_never_equal() -> None:
    grid: Grid = {(lag, name): (0.6, 0.9) for lag in (0, 2) for name in ("none", "token")}
    found = sentences(summary_of(grid))
    assert found[0].startswith("At lags 0 and 2, training with token-level truncation is not told apart from training ")
    assert "differences up to 1.00 are not excluded" in found[0]
    assert not any("equal" in line for line in found)


def test_equal_is_said_only_where_no_difference_that_matters_is_left() -> None:
    grid: Grid = {(lag, name): (0.95, 0.96) * 5 for lag in (0, 2) for name in ("none", "token")}
    (first, *_) = sentences(summary_of(grid))
    assert re.search(r"equal within 0\.0[1-5], as far as these runs tell", first)


def test_a_difference_within_chance_is_not_stated() -> None:
    found = sentences(summary_of({(8, "none"): (0.2, 0.6), (8, "turn"): (0.65, 0.95)}))
    assert not any("higher" in line or "lower" in line for line in found)


def test_more_comparisons_ask_for_more() -> None:
    pair: Grid = {(8, "none"): (0.50, 0.54, 0.52), (8, "turn"): (0.56, 0.62, 0.60)}
    assert "higher" in sentences(summary_of(pair))[0]
    more: Grid = pair | {(8, f"recipe{i}"): (0.5, 0.54, 0.52) for i in range(12)}
    summary = summary_of(more, names=("lag", "recipe"))
    made = {each.value: each for each in compare_all(summary, "sampled")}
    assert num_comparisons(summary.axes) == len(made) == 13
    assert made["turn"].difference is not None
    assert made["turn"].difference.p < 0.05
    assert made["turn"].sign == "open"
    assert made["turn"].p == pytest.approx(13 * made["turn"].difference.p)


def test_a_part_of_a_study_is_corrected_for_all_that_the_study_compares() -> None:
    values = {"at2po": (0.50, 0.54, 0.52), "grpo": (0.56, 0.62, 0.60)} | {f"r{i}": (0.5, 0.54, 0.52) for i in range(10)}
    whole = summary_of({(name,): each for name, each in values.items()}, names=("recipe",))
    part = summary_of({(name,): values[name] for name in ("at2po", "grpo")}, names=("recipe",))
    assert num_laid_down(part.axes, whole.axes) == num_comparisons(whole.axes) == 11
    (alone,) = compare_all(part, "sampled")
    assert alone.sign == "above"
    counted = replace(part, laid_down=11)
    (among,) = compare_all(counted, "sampled")
    of_whole = next(each for each in compare_all(whole, "sampled") if each.value == "grpo")
    assert (among.sign, among.p, among.simultaneous) == ("open", of_whole.p, of_whole.simultaneous)
    assert "corrected for the 11 comparisons of each figure, of which this is one (Holm)" in method(counted)
    assert "corrected for the comparison of each figure (Holm)" in method(part)


def test_other_references_chosen_afterwards_count_every_pair() -> None:
    names = ("at2po", "dapo", "grpo", "gspo")
    whole = (Axis(name="recipe", values=names), Axis(name="task", values=("demo", "demo_agent")))
    assert num_laid_down(whole, whole) == 3 * 2
    assert num_laid_down((replace(whole[0], reference="dapo"), whole[1]), whole) == 6 * 2
    without = (replace(whole[0], values=("dapo", "grpo")), whole[1])  # the study's reference is not among them
    assert num_laid_down(without, whole) == 6 * 2
    assert num_laid_down((replace(whole[0], values=("dapo",)), whole[1]), whole) == 3 * 2


def test_what_was_the_same_run_is_said_to_be() -> None:
    def counted(result: CellResult) -> CellResult:
        return replace(result, tokens=[100.0, 200.0 + (result.cell.seed if dict(result.cell.at)["lag"] == "2" else 0)])

    grid: Grid = {(lag, name): HIGH for lag in (0, 2) for name in ("none", "turn", "token")}
    grid[(2, "token")] = MIDDLE
    tail = "; what correction sets had no effect there."
    assert sentences(summary_of(grid, results=counted))[-2:] == [
        "The same run, step by step and seed by seed, in 1 of 2 places: training with turn-level truncation, with "
        f"token-level truncation and without a correction{tail}",
        "The same run, step by step and seed by seed, in 1 of 2 places: training with turn-level truncation and "
        f"without a correction{tail}",
    ]
    grid[(0, "token")] = LOW
    assert sentences(summary_of(grid, results=counted))[-1] == (
        "The same run, step by step and seed by seed: training with turn-level truncation and without a correction"
        f"{tail}"
    )
    one = summary_of({(0, "none"): HIGH, (0, "turn"): HIGH, (2, "none"): HIGH, (2, "turn"): LOW}, results=counted)
    assert "seed by seed, in 1 of 2 places: training with turn-level truncation and without" in sentences(one)[-1]
    assert not any("same run" in line for line in sentences(summary_of(EXPECTED, results=counted)))


def test_the_rate_of_false_statements_over_a_grid_is_that_of_the_level() -> None:
    dice, wrong, rounds = random.Random(3), 0, 300
    for _ in range(rounds):
        grid: Grid = {
            (lag, name): [dice.gauss(0.6, 0.1 if lag else 0.02) for _ in range(4)]
            for lag in (0, 2)
            for name in ("none", "token", "turn")
        }
        wrong += any(each.sign != "open" for each in compare_all(summary_of(grid), "sampled"))
    assert wrong / rounds < 0.08


def test_the_reference_may_be_another_value() -> None:
    found = sentences(summary_of(EXPECTED, reference="turn"))
    assert any(
        line.startswith("At lag 8 with turn-level truncation, success is 0.95") and "lower without a correction" in line
        for line in found
    )


def test_nothing_is_compared_between_tasks_and_everything_within_one() -> None:
    grid: Grid = {(name, task): HIGH for name in ("at2po", "grpo") for task in ("demo", "demo_agent")}
    grid[("grpo", "demo_agent")] = LOW
    summary = summary_of(grid, names=("recipe", "task"))
    assert num_comparisons(summary.axes) == 2
    found = sentences(summary)
    assert found[0].startswith("With at2po on demo_agent, success is 0.95 [0.93, 0.98]; lower with grpo (0.02, -0.93")
    assert "On demo, training with grpo is not told apart from training with at2po: the measured" in found[1]
    alone = summary_of({("demo",): HIGH, ("other",): LOW}, names=("task",))
    assert sentences(alone) == [
        "Nothing is compared: the values of the axes are different tasks, or there is one of each."
    ]


def test_a_difference_of_success_is_never_said_to_be_more_than_all_of_it() -> None:
    found = sentences(summary_of({(0, "none"): (0.99, 1.0, 0.95, 1.0), (0, "turn"): (0.0, 0.0, 0.03, 0.0)}))
    assert "-0.98 [-1.00, -0.94]" in found[0]


def test_a_group_with_a_failed_cell_is_described_and_never_compared() -> None:
    grid = EXPECTED | {(16, "none"): (FAILED, *LOW[1:]), (8, "none"): (FAILED,) * 4}
    found = sentences(summary_of(grid))
    assert any(
        "At lag 16, without a comparison: without a correction 0.02 [0.00, 0.05] (1 of 4 failed)" in line
        for line in found
    )
    assert any("without a correction no result (4 of 4 failed)" in line for line in found)
    assert found[-1].startswith("Failed, and in no mean: 5 of 32 cells (lag 8, none, seed 1: learner: loss is nan;")


def test_missing_cells_are_counted_and_their_groups_not_compared() -> None:
    found = sentences(summary_of(EXPECTED | {(8, "turn"): (0.95, None, None, None)}))
    assert not any("At lag 8 without a correction, success" in line for line in found)
    assert found[-1] == "Not run to the end yet: 3 of 32 cells."


def test_one_seed_gives_figures_and_no_difference() -> None:
    found = sentences(summary_of({at: values[:1] for at, values in EXPECTED.items()}))
    assert found[0].startswith("With one seed a cell no difference can be told from chance")
    assert "At lag 16, without a comparison: without a correction 0.01 and with turn-level truncation 0.70." in found
    assert not any("higher" in line or "lower" in line for line in found)


def test_without_results_there_is_no_conclusion() -> None:
    assert sentences(summary_of({(8, "none"): (FAILED, None), (8, "turn"): (None, None)})) == [
        "No conclusion: 1 of 4 cells have ended, none with a result."
    ]


success_values = st.floats(0, 1)
groups = st.dictionaries(
    st.tuples(st.sampled_from([0, 2, 8]), st.sampled_from(["none", "token", "turn"])),
    st.lists(st.one_of(success_values, st.just(FAILED), st.none()), min_size=1, max_size=3),
    min_size=1,
)


@settings(max_examples=40)
@given(groups)
def test_every_grid_has_sentences_and_states_only_what_its_own_interval_bears_out(grid: Grid) -> None:
    whole: Grid = {
        (lag, name): grid.get((lag, name), [None]) for lag in (0, 2, 8) for name in ("none", "token", "turn")
    }
    summary = summary_of(whole)
    for each in compare_all(summary, "sampled"):
        if each.sign in ("above", "below"):
            assert each.first.is_whole
            assert each.reference.is_whole
            assert each.difference is not None
            low, high = each.difference.within()
            assert low > 0 if each.sign == "above" else high < 0
            assert each.p >= each.difference.p
    assert sentences(summary)
    assert method(summary)


# --- planned power ------------------------------------------------------------------------------------------------


def test_the_spread_comes_from_the_option_then_from_cells_that_ended_else_it_is_not_known() -> None:
    results = [done(cell(seed=seed, lag=lag), 0.5 + seed / 10 + lag) for lag in (0, 1) for seed in (1, 2, 3)]
    axes = [Axis(name=name, values=values) for name, values in results_axes(results).items()]
    assert spreading(results, 0.2, axes=axes) == Spreading(value=0.2, source="--spread")
    found = spreading(results, None, axes=axes)
    assert found is not None
    assert found.value == pytest.approx(0.101)
    assert found.source == "pooled over 2 groups of cells that have ended in this folder"
    assert spreading(results[:1], None, axes=axes) is None


def results_axes(results: Sequence[CellResult]) -> dict[str, tuple[str, ...]]:
    """Axis -> its values, as the cells have them."""
    found: dict[str, tuple[str, ...]] = {}
    for result in results:
        for name, value in result.cell.at:
            found[name] = tuple(dict.fromkeys((*found.get(name, ()), value)))
    return found


def test_power_is_planned_by_the_task_whose_runs_differ_most_and_at_equal_tokens_where_they_are_compared() -> None:
    axes = [Axis(name="recipe", values=("a",)), Axis(name="task", values=("demo", "demo_agent"))]

    def ended(task: str, seed: int, late: float) -> CellResult:
        at = (("recipe", "a"), ("task", task))
        curve = [(step, 0.5 + seed * late if step < 4 else 0.9 + seed / 100) for step in range(1, 7)]
        return CellResult(
            cell=Cell(at=at, seed=seed), status="done", figures={"sampled": curve[-1][1]}, curve=curve,
            tokens=[1000.0 * step for step, _ in curve[:3]] + [9e4 * seed] * 3,
        )  # fmt: skip

    results = [ended("demo", seed, 0.0) for seed in (1, 2, 3)]
    results += [ended("demo_agent", seed, 0.1) for seed in (1, 2, 3)]
    found = spreading(results, None, axes=axes)
    assert found is not None
    assert found.value == pytest.approx(0.01)
    results[-1] = replace(results[-1], curve=[(step, 0.2) for step in range(1, 7)])
    found = spreading(results, None, axes=axes)
    assert found is not None
    assert found.value == pytest.approx(deviation([0.91, 0.92, 0.2]))
    assert found.source.endswith("groups of cells that have ended in this folder on demo_agent, which differ most")
    by_tokens = spreading(results, None, axes=axes, by_tokens=True)
    assert by_tokens is not None
    assert by_tokens.value == pytest.approx(deviation([0.91, 0.7, 0.2]))  # two of them were cut after three steps


def test_levels_are_compared_after_as_many_updates_of_every_cell_of_a_task() -> None:
    axes = [Axis(name="recipe", values=("a", "b")), Axis(name="task", values=("demo", "demo_agent"))]

    def ended(recipe: str, task: str, last: int) -> CellResult:
        curve = [(step, step / 10) for step in range(1, last + 1)]
        figures = {"sampled": last / 10, "area": 0.9, "steps": 10.0, "steps_to_goal": 9.0}
        at = (("recipe", recipe), ("task", task))
        return CellResult(cell=Cell(at=at, seed=1), status="done", figures=figures, curve=curve)

    results = [
        ended("a", "demo", 10),
        ended("b", "demo", 8),
        ended("a", "demo_agent", 10),
        ended("b", "demo_agent", 10),
    ]
    summary = Summary.of(results, axes=axes, seeds=[1])
    found = {tuple(v for _, v in at): group.results[0].figures for at, group in summary.groups.items()}
    assert found["a", "demo"]["sampled"] == found["b", "demo"]["sampled"] == pytest.approx(0.7)  # steps 6, 7 and 8
    assert found["a", "demo"]["area"] == pytest.approx(0.45)
    assert found["a", "demo_agent"]["sampled"] == pytest.approx(0.9)
    assert [found[name, "demo"]["steps"] for name in "ab"] == [10, 8]
    assert found["a", "demo"]["steps_to_goal"] == 9  # it is known to have got there


def test_what_the_seeds_can_tell_apart_is_said_with_the_number_of_comparisons() -> None:
    axes = [Axis(name="lag", values=("0", "2", "8")), Axis(name="correction", values=("none", "turn"))]
    head, apart, needed = power_lines(axes, 5, Spreading(value=0.1, source="--spread"), wanted=0.1)
    assert head.startswith(
        "power: 7 comparisons of 5 seeds with 5, two-sided, 5% over all of them (Holm; 0.0071 for the"
    )
    assert "told apart from 0.31 on; were it the only comparison, from 0.21 on" in apart
    assert needed == "  a difference of 0.1 would take 27 seeds a group; were it the only comparison, 17"
    assert "0.1 → 0.31 (alone 0.21)" in power_lines(axes, 5, None, wanted=0.1)[1]
    assert "with one seed no difference" in power_lines(axes, 1, None, wanted=0.1)[0]
    assert "compares nothing" in power_lines([Axis(name="task", values=("a", "b"))], 5, None, wanted=0.1)[0]


# --- equal tokens, and what it took -------------------------------------------------------------------------------


def tokens_of(result: CellResult) -> CellResult:
    """Of each seed its curve over tokens: none's trees cost twice as many."""
    each = 200.0 if dict(result.cell.at)["config"] == "none" else 100.0
    curve = [(step, step / 10) for step in range(1, 11)]
    return replace(
        result, curve=curve, tokens=[each * step for step, _ in curve],
        figures=dict(result.figures) | {"steps": 10.0, "tokens": 10 * each, "trained_s": 20.0},
    )  # fmt: skip


def test_many_recipes_are_named_in_one_breath() -> None:
    names = ("at2po", "grpo", "dapo", "gspo")
    summary = summary_of({(name,): (0.9, 0.92, 0.91 + i / 1000) for i, name in enumerate(names)}, names=("recipe",))
    assert "is told apart from training with at2po" in sentences(summary)[0]
    far = summary_of({(name,): (0.2, 0.21) if name == "grpo" else (0.9, 0.92) for name in names}, names=("recipe",))
    assert "not told apart with dapo and gspo (" in sentences(far)[0]


def test_success_is_compared_at_the_tokens_that_every_cell_of_the_task_sampled() -> None:
    grid: Grid = {(name, task): (0.9, 0.9) for name in ("entropy", "none") for task in ("demo", "demo_agent")}
    summary = summary_of(grid, names=("config", "task"), results=tokens_of, by_tokens=True)
    assert set(summary.token_budgets.values()) == {1000.0}
    equal = {dict(at)["config"]: group.values("at_tokens") for at, group in summary.groups.items()}
    assert equal["entropy"] == pytest.approx([0.9, 0.9])  # mean of 0.8, 0.9, 1.0
    assert equal["none"] == pytest.approx([0.4, 0.4])  # at half of its steps
    assert summary.final == "at_tokens"
    said = sentences(summary)
    assert any("success at equal tokens is 0.90" in line and "lower with none (0.40" in line for line in said)
    text = outputs.markdown(summary, ORIGIN, figure="p.png")
    assert "Equal tokens are what every cell of a task sampled in all (demo: 1,000; demo_agent: 1,000)" in text
    assert "Sampled success at equal tokens" in text


def reaching(result: CellResult) -> CellResult:
    """The goal at step 4 + seed, but never in seeds above 3; runs of ten steps, and 100 tokens each."""
    figures = {"steps": 10.0, "tokens": 1000.0 + result.cell.seed, "trained_s": 60.0}
    if result.cell.seed <= 3:
        at = 4 + result.cell.seed
        figures |= {"steps_to_goal": at, "tokens_to_goal": 100.0 * at, "seconds_to_goal": 6.0 * at}
    curve = [(step, 0.5) for step in range(1, 11)]
    return replace(result, figures=dict(result.figures) | figures, curve=curve)


def test_runs_that_never_got_there_count_as_long_as_all_such_were_watched() -> None:
    summary = summary_of({("a",): (0.9,) * 3, ("b",): (0.9,) * 5}, names=("recipe",), results=reaching)
    whole, some = (to_goal(summary, group, "steps_to_goal") for group in summary.groups.values())
    assert whole is not None
    assert some is not None
    assert (whole.reached, whole.count, whole.spread.mean) == (3, 3, 6.0)
    assert whole.text() == "6 [4, 8]"
    assert (some.reached, some.count, some.limit) == (3, 5, 10.0)
    assert some.spread.mean == pytest.approx((5 + 6 + 7 + 10 + 10) / 5)
    assert some.text() == "3 of 5; 8 [5, 10] within 10"
    tokens = to_goal(summary, summary[(("recipe", "b"),)], "tokens_to_goal")
    assert tokens is not None
    assert tokens.limit == 1004  # of those that never got there the one that was watched least
    rows = goals(summary)
    assert rows[0] == ["recipe", "steps to 0.9", "tokens to 0.9", "seconds to 0.9"]
    assert rows[1][2] == "600 [352, 848]"


def test_what_every_run_of_a_group_took_is_known_however_short_others_were() -> None:
    def costly(result: CellResult) -> CellResult:
        found = reaching(result)
        if dict(result.cell.at)["recipe"] == "costly":
            return replace(found, figures=dict(found.figures) | {"tokens": 9000.0, "tokens_to_goal": 5000.0})
        return found

    summary = summary_of({("costly",): (0.9,) * 3, ("in vain",): (0.9,) * 5}, names=("recipe",), results=costly)
    assert [row[2] for row in goals(summary)[1:]] == [
        "5,000 [5,000, 5,000]", "3 of 5; 762 [473, 1,004] within 1,004",
    ]  # fmt: skip


def test_a_group_none_of_which_got_there_says_never() -> None:
    late = summary_of({("a",): (None, None, None, 0.5, 0.5)}, names=("recipe",), results=reaching)
    assert goals(late)[1] == ["a", "never within 10", "never within 1,004", "never within 60"]


# --- tables, figure, page ----------------------------------------------------------------------------------------

ORIGIN = Origin(
    name="staleness", title="Staleness", command="atpo study staleness --lags 0,8", settings=(("task", "hopqa <3>"),),
    machine="2 cores", made="2026-01-02", cell_seconds=3661.0,
)  # fmt: skip
MIXED = EXPECTED | {(16, "none"): (FAILED, 0.02, 0.02, 0.02), (2, "turn"): (0.95, 0.95, 0.96, None)}
CHOOSING = Choosing(field="learner.lr", values=("0.0003", "0.0006"), by="correction", at={"lag": ("8",)}, seeds=2)


def test_the_csv_has_a_line_for_every_cell_also_for_those_that_failed_or_are_missing() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(summary_of(MIXED), choosing=CHOOSING, chosen={"turn": "0.0006"}))))
    assert len(rows) == 32
    by_cell = {(row["lag"], row["correction"], row["seed"]): row for row in rows}
    assert by_cell["8", "turn", "2"]["sampled"] == "0.96"
    assert (by_cell["8", "turn", "2"]["learner.lr"], by_cell["8", "none", "2"]["learner.lr"]) == ("0.0006", "")
    assert (by_cell["16", "none", "1"]["status"], by_cell["16", "none", "1"]["sampled"]) == ("failed", "")
    assert by_cell["16", "none", "1"]["reason"] == "learner: loss is nan"
    assert by_cell["2", "turn", "4"]["status"] == "missing"


def test_the_markdown_has_every_group_with_its_interval() -> None:
    text = outputs.markdown(summary_of(MIXED), ORIGIN, figure="p.png")
    assert "| 8 | 0.02 [4e-03, 0.04] | 0.95 [0.93, 0.97] |" in text
    assert "| 16 | 0.02 [0.00, 0.04], 1 of 4 failed | 0.73 [0.69, 0.77] |" in text
    assert "0.95 [0.93, 0.98], 1 of 4 not run |" in text
    assert "- lag 16, none, seed 1: learner: loss is nan" in text
    assert "corrected for the 10 comparisons of each figure (Holm)" in text
    assert "learning curves](p.png)" in text


def test_small_tables_stand_for_a_third_axis_and_numbers_go_down() -> None:
    grid: Grid = {
        (name, lr, task): HIGH for name in ("a", "b") for lr in (1e-4, 2e-4) for task in ("demo", "demo_agent")
    }
    summary = summary_of(grid, names=("recipe", "learner.lr", "task"))
    found = matrices(summary, "sampled")
    assert [place for place, _ in found] == ["demo", "demo_agent"]
    assert found[0][1][0] == ["learner.lr", "a", "b"]
    assert [row[0] for row in found[0][1][1:]] == ["0.0001", "0.0002"]
    assert details(summary)[0][:3] == ["recipe", "learner.lr", "task"]
    assert [series.name for series in all_series(summary)] == ["a, demo", "a, demo_agent", "b, demo", "b, demo_agent"]


def test_what_was_chosen_is_shown_with_the_criterion_and_an_edge_is_said() -> None:
    chosen = {
        "none": Choice(
            of="none",
            value="0.0003",
            means={"0.0003": 0.6, "0.0006": 0.4},
            num_failed={"0.0003": 0, "0.0006": 1},
            edge="lowest",
        ),
        "turn": Choice(
            of="turn",
            value="0.0006",
            means={"0.0003": 0.6, "0.0006": 0.7},
            num_failed={"0.0003": 0, "0.0006": 0},
            edge="",
        ),
    }
    assert choice_table(CHOOSING, chosen) == [
        ["correction", "learner.lr 0.0003", "learner.lr 0.0006", "chosen"],
        ["none", "0.600", "0.400, 1 failed", "0.0003 (the lowest candidate)"],
        ["turn", "0.600", "0.700", "0.0006"],
    ]
    lead, edge = choice_lines(CHOOSING, chosen)
    assert lead == (
        "learner.lr was chosen for each correction by the mean of the area under the curve of sampled success over 2 "
        "seeds that are none of the results', at lag 8; a failed cell counts as 0."
    )
    assert edge == "For none the lowest candidate was chosen; a lower one was not tried, and may be better."
    origin = replace(ORIGIN, choices=choice_table(CHOOSING, chosen), choices_said=choice_lines(CHOOSING, chosen))
    for text in (outputs.markdown(summary_of(MIXED), origin, figure="p.png"), page(summary_of(MIXED), origin)):
        assert "0.0003 (the lowest candidate)" in text


def test_a_section_is_filled_between_its_marks_again_and_again() -> None:
    begin, end = outputs.marks("mine")
    text = f"# A\n\nabove\n\n{begin}\nold\n{end}\n\nbelow\n"
    once = outputs.fill(text, "new\n", name="mine", where="x.md")
    assert once == f"# A\n\nabove\n\n{begin}\n\nnew\n\n{end}\n\nbelow\n"
    assert outputs.fill(once, "new\n", name="mine", where="x.md") == once
    for broken in ("no marks", end + begin, text + text):
        with pytest.raises(SetupError, match=r"x\.md needs one line <!-- study:mine:begin -->"):
            outputs.fill(broken, "new", name="mine", where="x.md")


def test_the_documents_of_this_repository_have_the_marks() -> None:
    for name, file in (("staleness", "staleness.md"), ("methods", "methods.md"), ("placement", "methods.md")):
        text = (ROOT / "docs" / file).read_text(encoding="utf-8")
        assert outputs.fill(text, "new", name=name, where=file) != text


class Checker(HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href", "srcset")]


RECIPES: Grid = {(name, task): HIGH for name in ("at2po", "grpo", "dapo") for task in ("demo", "demo_agent")}


@pytest.mark.parametrize(("grid", "names"), [(MIXED, ("lag", "correction")), (RECIPES, ("recipe", "task"))])
def test_the_page_is_one_file_that_fetches_nothing_and_is_readable_in_light_and_in_dark(
    grid: Grid, names: Sequence[str]
) -> None:
    summary = summary_of(grid, names=names, greedy=0.5)
    text = page(summary, ORIGIN)
    checker = Checker()
    checker.feed(text)
    assert checker.fetched == []
    assert not {"script", "link", "img", "iframe"} & checker.tags
    assert "url(" not in text
    assert "@media (prefers-color-scheme:dark)" in text
    assert "hopqa &lt;3&gt;" in text
    drawings = re.findall(r"<svg .*?</svg>", text, re.S)
    assert len(drawings) == len(all_series(summary)) + len(panels(summary)) + len(summary.rows.values)
    for drawing in drawings:
        ET.fromstring(drawing)
        # Words and lines take the page's colours; only the lines of a figure have colours of their own.
        assert set(re.findall(r'(?:fill|stroke)="(#\w+)"', drawing)) <= set(COLORS)


def test_every_correction_has_a_colour_and_a_mark_that_no_other_has() -> None:
    grid: Grid = {(8, name): (0.5,) for name in ("none", "token", "turn", "turn+ess", "m2po", "topr", "clip-keep")}
    found = all_series(summary_of(grid))
    assert len({each.color for each in found}) == len({(each.color, each.marker) for each in found}) == len(found)
    for each in found:
        ET.fromstring(mark(1, 2, each))
    alone = all_series(summary_of({(8, "turn"): (0.5,), (8, "m2po"): (0.5,)}))
    assert {each.name: each.color for each in alone}.items() <= {each.name: each.color for each in found}.items()


@pytest.mark.parametrize(
    ("grid", "names"),
    [(MIXED, ("lag", "correction")), ({("turn",): (0.5,)}, ("correction",)), (RECIPES, ("recipe", "task"))],
)
def test_the_figure_is_drawn_of_whole_and_of_small_grids(tmp_path: Path, grid: Grid, names: Sequence[str]) -> None:
    (path,) = write_figure(summary_of(grid, names=names), tmp_path / "p.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def test_nothing_is_drawn_where_no_cell_gave_a_result(tmp_path: Path) -> None:
    empty: Summary = summary_of({(8, "turn"): (FAILED, None)})
    assert write_figure(empty, tmp_path / "p.png") == []
    assert "nothing recorded" in page(empty, ORIGIN)
    text = outputs.markdown(empty, ORIGIN, figure="p.png")
    assert "- lag 8, turn, seed 1: learner: loss is nan" in text
    assert "p.png" not in text


def test_curves_by_tokens_are_drawn_to_where_all_seeds_reach(tmp_path: Path) -> None:
    grid: Mapping[tuple[object, ...], Sequence[Value]] = {("entropy",): (0.9, 0.9), ("none",): (0.9, 0.9)}
    summary = summary_of(grid, names=("config",), results=tokens_of, by_tokens=True)
    assert write_figure(summary, tmp_path / "p.png")
    assert "tokens generated, thousands" in page(summary, ORIGIN)


@pytest.mark.parametrize(
    ("in_process", "said"),
    [
        ((True, True, True), "each in one process"),
        ((False, False), "each as a run of several processes"),
        ((True, False, None), "1 in one process, 1 as a run of several processes, 1 not recorded"),
        ((None, None), None),
        ((), None),
    ],
)
def test_an_origin_says_how_the_cells_were_run(
    tmp_path: Path, in_process: Sequence[bool | None], said: str | None
) -> None:
    plan, folder = plan_of(), StudyFolder(tmp_path / "s")
    with folder.held(plan):
        for cell, one in zip(plan.cells(), in_process, strict=False):
            folder.write_result(plan, CellResult(cell=cell, status="done", curve=[(1, 0.1)], in_process=one))
    assert dict(Origin.of(folder, plan, "atpo study").settings).get("cells") == said


def test_the_axis_of_a_figure_by_name_begins_at_the_tenth_below_what_it_shows() -> None:
    def ends(*values: float) -> tuple[float, float] | None:
        summary = summary_of({("at2po",): values, ("grpo",): HIGH}, names=("recipe",))
        return dot_range(summary, panels(summary)[0])

    assert ends(0.93, 0.94, 0.95) == (0.9, 1.0)
    assert ends(0.72, 0.74, 0.73) == (0.7, 1.0)
    assert ends(0.0, 0.9, 0.2) == (0.0, 1.0)
    assert ends(1.0, 1.0, 1.0) == (0.9, 1.0)


def test_an_origin_names_the_task_and_what_the_objective_is_made_of(tmp_path: Path) -> None:
    def said(**options: str) -> dict[str, str]:
        given = {name.replace("__", "."): value for name, value in options.items()}
        return dict(Origin.of(StudyFolder(tmp_path), plan_of(options=given), "atpo study").settings)

    layer = tmp_path / "layer.toml"
    layer.write_text('[search]\nstrategy = "random"\n')
    varied = plan_of(axes=[f"config={DEMO},{layer}"], files=[DEMO])
    assert "tree" not in dict(Origin.of(StudyFolder(tmp_path), varied, "atpo study").settings)
    recipes = plan_of(axes=["recipe=at2po,dapo,a_star_po"], files=[DEMO])
    assert dict(Origin.of(StudyFolder(tmp_path), recipes, "atpo study").settings)["learner"].startswith(
        "lr 0.0002 to 0.0006, linear, 1 to 4 optimizer step(s) a batch"
    )
    assert said()["tree"].startswith("entropy: M = ")
    assert said(environment__name="passage_qa")["task"].startswith("passage_qa")
    assert not said()["task"].endswith(" ")
    assert said()["objective"] == "turn ratio, clip 0.2 / 0.28, seq-mean-token-mean"
    more = said(
        objective__terms='["epo", "kl-cov"]',
        objective__entropy_coef="0.001",
        objective__token_weights='["clip-cov"]',
        objective__surrogate="policy-gradient",
    )
    assert more["objective"] == (
        "turn ratio, policy-gradient, seq-mean-token-mean, terms epo + kl-cov, token weights clip-cov"
    )
