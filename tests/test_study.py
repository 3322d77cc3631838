"""Studies: the grid, what a cell's run says, what the cells say together, resuming, and stopping without a trace."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import sys
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from atpo_async.cli import main
from atpo_async.cli.study import Request, jobs_here, left_out, study
from atpo_async.config import Config, build, load
from atpo_async.core.errors import ConfigError, RunMismatch, SetupError
from atpo_async.run import processes
from atpo_async.run.metrics import MetricsWriter, Record
from atpo_async.run.rundir import RunDir
from atpo_async.study import outputs
from atpo_async.study.cells import COLUMNS, Cell, CellResult, figures_of, from_json, to_json, unfinished
from atpo_async.study.conclusions import conclusions
from atpo_async.study.figure import COLORS, MARKERS, PANELS, write_figure
from atpo_async.study.folder import StudyFolder
from atpo_async.study.origin import Origin
from atpo_async.study.page import page
from atpo_async.study.plan import CORRECTIONS, DEFAULT_CORRECTIONS, Plan
from atpo_async.study.plots import mark
from atpo_async.study.progress import StudyProgress, outcome
from atpo_async.study.runner import Job, OnStep, TrainProcess, clear_run, read_result, run_cells, until_interrupted
from atpo_async.study.summary import RESOLUTION, Summary, Yardstick, compare
from atpo_async.study.tables import to_csv

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / "configs" / "demo.toml", ROOT / "configs" / "staleness.toml"]
DEADLINE_S = 60.0


def base(**options: object) -> Config:
    return load(FILES, {name.replace("__", "."): str(value) for name, value in options.items()})


def plan_of(config: Config | None = None, /, **grid: object) -> Plan:
    options: dict[str, object] = {"lags": "0,4", "corrections": "none,turn", "seeds": 2} | grid
    return Plan.of(config or base(run__steps=6), **options)  # type: ignore[arg-type]


# --- the grid -----------------------------------------------------------------------------------------------------


def test_every_cell_of_every_named_correction_is_a_run_that_a_configuration_allows() -> None:
    plan = Plan.of(base(), lags="16,0,2,8,2", corrections=",".join(CORRECTIONS), seeds=2)
    cells = plan.cells()
    assert plan.lags == (0, 2, 8, 16)
    assert plan.seeds == (1, 2)
    assert len(cells) == len({cell.name for cell in cells}) == 4 * len(CORRECTIONS) * 2
    for cell in cells:
        config = plan.config(cell, runs=Path("somewhere"))
        assert (config.run.name, config.run.seed, config.run.dir) == (cell.name, cell.seed, Path("somewhere"))
        assert (config.staleness.exact_lag, config.staleness.max_lag) == (cell.lag, cell.lag)
        assert config.correction.ess_floor == 0
        assert config.supervisor.max_restarts == 0


def test_the_names_of_corrections_mean_what_they_say() -> None:
    plan = Plan.of(base(), lags="4", corrections="none,token,turn,turn+ess", seeds=1)
    found = {cell.correction: plan.config(cell, runs=Path("r")).correction for cell in plan.cells()}
    assert found["none"].action == "none"
    assert found["none"].accept_bias
    assert (found["token"].action, found["token"].level, found["token"].exponent) == ("truncate", "token", "fixed")
    assert (found["turn"].action, found["turn"].level, found["turn"].exponent) == ("truncate", "turn", "fixed")
    assert (found["turn+ess"].level, found["turn+ess"].exponent) == ("turn", "ess")
    assert not any(found[name].accept_bias for name in ("token", "turn", "turn+ess"))


def test_every_lag_grows_as_many_batches_whose_success_counts() -> None:
    plan = plan_of(lags="0,3,5")
    assert [plan.config(cell, runs=Path("r")).run.steps for cell in plan.cells()[::2][:3]] == [6, 9, 11]


def test_the_whole_grid_comes_once_before_a_second_seed() -> None:
    assert [cell.seed for cell in plan_of().cells()] == [1] * 4 + [2] * 4


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"lags": "0,two"}, "--lags 0,two: 'two' is no lag; lags are learner versions from 0 on"),
        ({"lags": "-1"}, "'-1' is no lag"),
        ({"lags": "0,6"}, "lag 6 with run.steps = 6 would never be reached"),
        ({"seeds": 2**31}, "seeds are below 2147483648"),
        ({"lags": " , "}, "--lags names nothing"),
        ({"corrections": "turn,tokens"}, f"'tokens' is unknown; known: {', '.join(CORRECTIONS)}"),
        ({"corrections": ""}, "--corrections names nothing"),
        ({"seeds": 0}, "--seeds must be >= 1, got 0"),
        ({"options": ["correction.level"]}, "--correction.level: the grid of the study sets it; use --corrections"),
        ({"options": ["staleness.max_lag"]}, "the grid of the study sets it; use --lags"),
        ({"options": ["run.name"]}, "the grid of the study sets it; use --out"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused_with_the_way_out(grid: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        plan_of(**grid)


def test_a_schedule_that_ends_with_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"use --learner\.schedule constant"):
        Plan.of(base(learner__schedule="linear"))


def test_a_configuration_that_cannot_be_exactly_that_old_is_refused_before_anything_runs() -> None:
    twice = load(FILES[0], {"staleness.max_uses": "2", "learner.schedule": "constant"})
    with pytest.raises(ConfigError, match=r"cell lag 4, none, seed 1: staleness\.exact_lag = 4 needs .*max_uses = 1"):
        Plan.of(twice, lags="4")


def test_what_bears_on_a_cell_is_in_its_settings_and_where_it_lies_is_not() -> None:
    cell = Cell(lag=4, correction="turn", seed=1)
    settings = plan_of().settings(cell)
    assert settings == plan_of(lags="4,5", corrections="turn", seeds=5).settings(cell)
    assert settings["staleness.exact_lag"] == 4
    assert settings["run.seed"] == 1
    assert not {"run.dir", "run.name", "model.path"} & set(settings)
    assert settings != plan_of().settings(replace(cell, seed=2))
    other = Plan.of(base(run__steps=6, learner__lr="0.5"), lags="4", corrections="turn", seeds=1).settings(cell)
    assert {name for name in settings if settings[name] != other[name]} == {"learner.lr"}


# --- a cell's figures ---------------------------------------------------------------------------------------------

T0 = 1_700_000_000.0


def records_of(success: Sequence[float | None], *, lag: int = 0, greedy: float | None = 1.0) -> list[Record]:
    """A run's: one record a step, its batch ``min(step - 1, lag)`` old, then the evaluation."""
    found = []
    for step, value in enumerate(success, 1):
        age = min(step - 1, lag)
        metrics = {
            "train/loss": 0.1, "lag/mean": float(age), "lag/max": float(age), "is/ess_frac_turn": 1 - age / 10,
            "is/ess_frac": 1 - age / 20, "kl/mu_prox_k1": -0.01 * age, "kl/mu_prox_k3": 0.02 * age,
            "is/truncated_share": age / 100, "train/trees": 4.0, "buffer/dropped_stale": 1.0 if step == 1 else 0.0,
            "guard/skipped_updates": 2.0,
        }  # fmt: skip
        if value is not None:
            metrics["train/success"] = value
        found.append(Record(time=T0 + step, source="learner", step=step, version=step, metrics=metrics))
    if greedy is not None:
        metrics = {"eval/success": greedy, "eval/failed": 0.0}
        found.append(Record(time=T0 + 99, source="learner", step=len(success), version=len(success), metrics=metrics))
    return found


def test_the_figures_of_a_cell_follow_from_its_records() -> None:
    success = [0.1, 0.2, 0.9, 0.8, 1.0, 0.9, None, None]
    found = figures_of(records_of(success, lag=2, greedy=0.97), steps=6, lag=2)
    assert found["sampled"] == pytest.approx(0.9)
    assert found["area"] == pytest.approx(3.9 / 6)
    assert found["steps_to_goal"] == 5
    assert found["greedy"] == 0.97
    # Only the batches that were exactly so old count.
    assert (found["lag_mean"], found["lag_max"]) == (2, 2)
    assert found["ess_turn"] == pytest.approx(0.8)
    assert found["ess_applied"] == pytest.approx(0.9)
    assert (found["kl_k1"], found["kl_k3"]) == pytest.approx((-0.02, 0.04))
    assert found["truncated"] == pytest.approx(0.02)
    assert found["dropped"] == pytest.approx(1 / 32)
    assert found["skipped_updates"] == 2
    assert set(found) | {"seconds"} == {column.key for column in COLUMNS}


def test_success_that_never_gets_there_has_no_step_at_which_it_did() -> None:
    assert "steps_to_goal" not in figures_of(records_of([0.9, 0.8, 0.9]), steps=3, lag=0)


def test_steps_that_only_use_up_what_is_under_way_count_for_nothing() -> None:
    late = records_of([0.5, 0.5, 0.5, 0.9, 0.9, 0.9], lag=3)
    assert figures_of(late, steps=3, lag=3)["sampled"] == pytest.approx(0.5)
    assert figures_of(late, steps=3, lag=3)["area"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (records_of([0.1] * 7, lag=2), None),
        (records_of([0.1] * 5, lag=2), "it ended after 5 of 7 steps"),
        (records_of([0.1, 0.1, 0.1, 0.1, None, None, None], lag=2), "sampled success is not known at step 5 of 5"),
        (records_of([0.1] * 7, lag=2, greedy=None), "it ended without its last evaluation"),
        ([], "it ended after 0 of 7 steps"),
    ],
)
def test_a_run_that_ended_too_early_says_what_is_missing(records: list[Record], reason: str | None) -> None:
    assert unfinished(records, steps=5, lag=2, evaluates=True) == reason


def test_an_evaluation_that_was_not_asked_for_is_not_missing() -> None:
    records = records_of([0.1] * 5, greedy=None)
    assert unfinished(records, steps=5, lag=0, evaluates=False) is None
    assert "greedy" not in figures_of(records, steps=5, lag=0)


# --- what the cells say together ------------------------------------------------------------------------------------

FAILED = "failed"
Value = float | str | None
"""Final sampled success, FAILED, or None for a cell that has not ended."""


def summary_of(grid: Mapping[tuple[int, str], Sequence[Value]], **more: float) -> Summary:
    """``more``: further figures, the same in every cell."""
    results = []
    for (lag, name), values in grid.items():
        for seed, value in enumerate(values, 1):
            cell = Cell(lag=lag, correction=name, seed=seed)
            if value == FAILED:
                results.append(CellResult(cell=cell, status="failed", reason="learner: loss is nan"))
            elif value is not None:
                figures = {"sampled": float(value), "ess_turn": 0.5, "kl_k3": 0.01, "seconds": 9.0} | more
                curve = [(1, 0.1), (2, float(value))]
                results.append(CellResult(cell=cell, status="done", figures=figures, curve=curve))
    lags = sorted({lag for lag, _ in grid})
    names = list(dict.fromkeys(name for _, name in grid))
    seeds = range(1, 1 + max(len(values) for values in grid.values()))
    return Summary.of(results, lags=lags, corrections=names, seeds=tuple(seeds))


EXPECTED: dict[tuple[int, str], Sequence[Value]] = {
    (0, "none"): (0.95, 0.97), (0, "turn"): (0.96, 0.96),
    (2, "none"): (0.93, 0.97), (2, "turn"): (0.95, 0.97),
    (8, "none"): (0.02, 0.04), (8, "turn"): (0.93, 0.97),
    (16, "none"): (0.01, 0.02), (16, "turn"): (0.70, 0.76),
}  # fmt: skip


def test_what_staleness_does_and_what_undoes_it_is_stated_with_its_figures() -> None:
    assert conclusions(summary_of(EXPECTED), {"turn": "turn-level truncation"}) == [
        "At lag 16 training without a correction ends at 0.01 (0.01–0.02); higher: with turn-level truncation at "
        "0.73 (0.70–0.76).",
        "At lag 8 training without a correction ends at 0.03 (0.02–0.04); higher: with turn-level "
        "truncation at 0.95 (0.93–0.97).",
        "At lags 0 and 2 nothing is told apart from training without a correction beyond what seeds do: the means are "
        "0.95 to 0.96, the largest difference at one lag is 0.01, the largest spread over seeds 0.04.",
        "Without a correction, success is 0.96 (0.95–0.97) at lag 0 and below that at lag 8 (0.03) and lag 16 (0.01).",
        "With turn-level truncation, success is 0.96 (0.96–0.96) at lag 0 and below that at lag 16 (0.73).",
    ]


def test_a_grid_in_which_nothing_differs_is_described_as_such() -> None:
    grid = {(lag, name): (0.93, 0.96) for lag in (0, 2, 8) for name in ("none", "token", "turn")}
    found = conclusions(summary_of(grid))
    assert found[0].startswith("At lags 0, 2 and 8 nothing is told apart from training without a correction")
    assert found[1] == "Among the corrections themselves none is told apart from another, at lags 0, 2 and 8."
    assert found[2].startswith("Without a correction, with token or with turn, success up to lag 8 is not told apart")
    assert len(found) == 3


def test_a_difference_within_the_spread_over_seeds_is_not_stated() -> None:
    found = conclusions(summary_of({(8, "none"): (0.2, 0.6), (8, "turn"): (0.65, 0.95)}))
    assert found == [
        "At lag 8 nothing is told apart from training without a correction beyond what seeds do: the means are 0.40 to "
        "0.80, the largest difference at one lag is 0.40, the largest spread over seeds 0.40."
    ]


def test_seeds_that_disagree_elsewhere_in_the_grid_make_a_small_difference_doubtful() -> None:
    near = {(2, "none"): (0.80, 0.81), (2, "turn"): (0.90, 0.91)}
    quiet = {(8, "none"): (0.10, 0.11), (8, "turn"): (0.90, 0.91)}
    noisy = {(8, "none"): (0.10, 0.60), (8, "turn"): (0.30, 0.91)}
    assert any("At lag 2 training" in line for line in conclusions(summary_of(near | quiet)))
    assert not any("At lag 2 training" in line for line in conclusions(summary_of(near | noisy)))


def test_grids_that_contradict_themselves_are_described_lag_by_lag() -> None:
    grid: dict[tuple[int, str], Sequence[Value]] = {
        (0, "none"): (0.20, 0.22), (0, "turn"): (0.90, 0.92),
        (2, "none"): (0.90, 0.92), (2, "turn"): (0.50, 0.51),
        (8, "none"): (0.91, 0.93), (8, "turn"): (0.90, 0.92),
    }  # fmt: skip
    found = conclusions(summary_of(grid))
    assert found[0] == (
        "At lag 2 training without a correction ends at 0.91 (0.90–0.92); lower: with turn at 0.51 (0.50–0.51)."
    )
    assert found[1].startswith("At lag 0 training without a correction ends at 0.21")
    assert found[1].endswith("at lag 0 all corrections are one computation, engine mismatch apart.")
    assert found[2].startswith("At lag 8 nothing is told apart")
    assert "above that at lag 2 (0.91) and lag 8 (0.92)" in found[3]
    assert "below that at lag 2 (0.51)" in found[4]


def test_corrections_that_differ_from_one_another_are_set_beside_each_other() -> None:
    grid = {
        (8, "none"): (0.01, 0.02), (8, "token"): (0.40, 0.42), (8, "turn"): (0.90, 0.92), (8, "topr"): (0.89, 0.93),
    }  # fmt: skip
    assert conclusions(summary_of(grid))[1] == (
        "Among the corrections, at lag 8 token (0.41) ends below turn (0.91) and topr (0.91)."
    )


def test_the_area_and_greedy_success_are_told_apart_by_their_own_spread() -> None:
    whole = summary_of(EXPECTED)
    lower = {(8, "none"): 0.3, (16, "none"): 0.2, (2, "none"): 0.7}
    results = [
        replace(r, figures=dict(r.figures) | {"area": lower.get((r.cell.lag, r.cell.correction), 0.8), "greedy": 1.0})
        for r in whole.results
    ]
    found = conclusions(Summary.of(results, lags=whole.lags, corrections=whole.corrections, seeds=whole.seeds))
    assert (
        "By the area under the learning curve, at lag 16 none (0.20) is below turn (0.80); at lag 8 none (0.30) is "
        "below turn (0.80); at lag 2 none (0.70) is below turn (0.80); at lag 0 nothing is told apart from none."
    ) in found
    assert "By greedy success, at lags 0, 2, 8 and 16 nothing is told apart from none." in found


def test_a_group_with_a_failed_cell_is_described_and_never_compared() -> None:
    grid = dict(EXPECTED) | {(16, "none"): (FAILED, 0.01), (8, "none"): (FAILED, FAILED)}
    found = conclusions(summary_of(grid))
    assert "At lag 16, without a comparison: without a correction 0.01 [1 of 2 failed] and with turn 0.73" in found[1]
    assert "At lag 8, without a comparison: without a correction no result (2 of 2 failed) and with turn" in found[2]
    assert found[-1].startswith("Failed, and in no mean: 3 of 16 cells (lag 8, none, seed 1: learner: loss is nan;")
    assert not any("without a correction ends" in line for line in found)


def test_missing_cells_are_counted_and_their_groups_not_compared() -> None:
    found = conclusions(summary_of(dict(EXPECTED) | {(8, "turn"): (0.95, None)}))
    assert not any(line.startswith("At lag 8 training") for line in found)
    assert any("with turn 0.95 [1 of 2 not run]" in line for line in found)
    assert found[-1] == "Not run to the end yet: 1 of 16 cells."


def test_lags_of_which_nothing_is_known_are_named_together() -> None:
    grid = dict(EXPECTED) | {(lag, name): (None, FAILED) for lag in (2, 16) for name in ("none", "turn")}
    found = conclusions(summary_of(grid))
    assert "At lags 2 and 16 no cell has given a result." in found
    assert not any("no result" in line for line in found)


def test_one_seed_gives_figures_and_no_difference() -> None:
    found = conclusions(summary_of({key: values[:1] for key, values in EXPECTED.items()}))
    assert found[0].startswith("With one seed a cell no difference can be told from chance")
    assert "At lag 16, without a comparison: without a correction 0.01 and with turn 0.70." in found
    assert not any("above" in line or "below" in line for line in found)


def test_without_results_there_is_no_conclusion() -> None:
    assert conclusions(summary_of({(8, "none"): (FAILED, None), (8, "turn"): (None, None)})) == [
        "No conclusion: 1 of 4 cells have ended, none with a result."
    ]


def test_without_an_uncorrected_column_the_first_correction_is_the_measure() -> None:
    found = conclusions(summary_of({(8, "token"): (0.1, 0.12), (8, "turn"): (0.9, 0.92)}))
    assert found == ["At lag 8 training with token ends at 0.11 (0.10–0.12); higher: with turn at 0.91 (0.90–0.92)."]


def test_one_correction_alone_tells_what_lag_costs_it() -> None:
    assert conclusions(summary_of({(0, "turn"): (0.9, 0.92), (8, "turn"): (0.1, 0.12)})) == [
        "With turn, success is 0.91 (0.90–0.92) at lag 0 and below that at lag 8 (0.11)."
    ]


success_values = st.floats(0, 1)
groups = st.dictionaries(
    st.tuples(st.sampled_from([0, 2, 8]), st.sampled_from(["none", "token", "turn"])),
    st.lists(st.one_of(success_values, st.just(FAILED), st.none()), min_size=1, max_size=3),
    min_size=1,
)


@given(groups)
def test_no_difference_is_claimed_that_is_smaller_than_the_spread_over_seeds(
    grid: dict[tuple[int, str], list[Value]],
) -> None:
    whole = {(lag, name): grid.get((lag, name), [None]) for lag in (0, 2, 8) for name in ("none", "token", "turn")}
    summary = summary_of(whole)
    yardstick = Yardstick.of(summary)
    for first in summary.groups.values():
        for second in summary.groups.values():
            made = compare(first, second, yardstick)
            if made.sign in ("above", "below"):
                a, b = first.spread("sampled"), second.spread("sampled")
                assert a is not None
                assert b is not None
                assert first.is_whole
                assert second.is_whole
                assert abs(a.mean - b.mean) > max(a.range, b.range, RESOLUTION)
                assert a.low > b.high if made.sign == "above" else a.high < b.low
                assert compare(second, first, yardstick).sign == {"above": "below", "below": "above"}[made.sign]
    assert conclusions(summary)  # every grid has words


# --- tables, figure, page ----------------------------------------------------------------------------------------

ORIGIN = Origin(
    command="atpo study staleness --lags 0,8", settings=(("task", "hopqa <3>"),), machine="2 cores", made="2026-01-02",
    cell_seconds=3661.0,
)  # fmt: skip
MIXED = dict(EXPECTED) | {(16, "none"): (FAILED, 0.02), (2, "turn"): (0.95, None)}


def test_the_csv_has_a_line_for_every_cell_also_for_those_that_failed_or_are_missing() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(summary_of(MIXED)))))
    assert len(rows) == 16
    by_cell = {(row["lag"], row["correction"], row["seed"]): row for row in rows}
    assert by_cell["8", "turn", "2"]["sampled"] == "0.97"
    assert (by_cell["16", "none", "1"]["status"], by_cell["16", "none", "1"]["sampled"]) == ("failed", "")
    assert by_cell["16", "none", "1"]["reason"] == "learner: loss is nan"
    assert by_cell["2", "turn", "2"]["status"] == "missing"


def test_the_markdown_has_every_group_and_no_figure_for_one_that_has_none() -> None:
    text = outputs.markdown(summary_of(MIXED), ORIGIN, figure="p.png")
    assert "| 8 | 0.03 (0.02–0.04) | 0.95 (0.93–0.97) |" in text
    assert "| 16 | 0.02, 1 of 2 failed | 0.73 (0.70–0.76) |" in text
    assert "| 2 | 0.95 (0.93–0.97) | 0.95, 1 of 2 not run |" in text
    assert "- lag 16, none, seed 1: learner: loss is nan" in text
    assert "![Success, effective sample size and KL against lag](p.png)" in text
    assert text.startswith("**At lag 8 training without a correction ends at 0.03")
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 2  # the two matrices, and the table beside them


def test_a_section_is_filled_between_its_markers_again_and_again() -> None:
    text = f"# A\n\nabove\n\n{outputs.BEGIN}\nold\n{outputs.END}\n\nbelow\n"
    once = outputs.fill(text, "new\n", where="x.md")
    assert once == f"# A\n\nabove\n\n{outputs.BEGIN}\n\nnew\n\n{outputs.END}\n\nbelow\n"
    assert outputs.fill(once, "new\n", where="x.md") == once
    for broken in ("no markers", outputs.END + outputs.BEGIN, text + text):
        with pytest.raises(SetupError, match=r"x\.md needs one line <!-- study:staleness:begin -->"):
            outputs.fill(broken, "new", where="x.md")


def test_the_document_of_this_repository_has_the_markers() -> None:
    text = (ROOT / "docs" / "staleness.md").read_text(encoding="utf-8")
    assert outputs.fill(text, "new", where="docs/staleness.md") != text


class Checker(HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href", "srcset")]


def test_the_page_is_one_file_that_fetches_nothing_and_is_readable_in_light_and_in_dark() -> None:
    text = page(summary_of(MIXED, greedy=0.5), ORIGIN)
    checker = Checker()
    checker.feed(text)
    assert checker.fetched == []
    assert not {"script", "link", "img", "iframe"} & checker.tags
    assert "url(" not in text
    assert "@media (prefers-color-scheme:dark)" in text
    assert "hopqa &lt;3&gt;" in text
    assert "lag 16, none, seed 1" in text
    drawings = re.findall(r"<svg .*?</svg>", text, re.S)
    assert len(drawings) == 2 + len(PANELS) + 4  # the key, the panels, a lag's curves each
    for drawing in drawings:
        ET.fromstring(drawing)
        # Words and lines take the page's colours; only the corrections have colours of their own.
        assert set(re.findall(r'(?:fill|stroke)="(#\w+)"', drawing)) <= set(COLORS.values())


def test_every_correction_has_a_colour_and_a_mark_of_its_own() -> None:
    assert len(set(COLORS.values())) == len(set(MARKERS.values())) == len(CORRECTIONS)
    for name in CORRECTIONS:
        ET.fromstring(mark(1, 2, name))


@pytest.mark.parametrize("grid", [MIXED, {(8, "turn"): (0.5,)}])
def test_the_figure_is_drawn_of_whole_and_of_small_grids(
    tmp_path: Path, grid: Mapping[tuple[int, str], Sequence[Value]]
) -> None:
    (path,) = write_figure(summary_of(grid), tmp_path / "p.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def test_nothing_is_drawn_where_no_cell_gave_a_result(tmp_path: Path) -> None:
    empty = summary_of({(8, "turn"): (FAILED, None)})
    assert write_figure(empty, tmp_path / "p.png") == []
    assert "nothing recorded" in page(empty, ORIGIN)
    assert "failed" in outputs.markdown(empty, ORIGIN, figure="p.png")


def test_a_result_is_read_as_it_was_written() -> None:
    result = CellResult(
        cell=Cell(lag=8, correction="turn+ess", seed=3), status="done", figures={"sampled": 0.5}, curve=[(1, 0.5)]
    )
    assert from_json(json.loads(json.dumps(to_json(result)))) == result


# --- running and going on -----------------------------------------------------------------------------------------


@dataclass
class FakeRunner:
    """Ends each cell at once, or as ``ends`` says; notes what it ran."""

    ends: Callable[[Cell], CellResult | BaseException] = lambda cell: done(cell)
    ran: list[str] = field(default_factory=list)

    async def __call__(self, job: Job, on_step: OnStep) -> CellResult:
        self.ran.append(job.cell.name)
        on_step(1, 0.5)
        end = self.ends(job.cell)
        if isinstance(end, BaseException):
            raise end
        return end


def done(cell: Cell, sampled: float = 0.9) -> CellResult:
    figures = {"sampled": sampled + cell.seed / 1000, "greedy": 1.0, "ess_turn": 0.9, "kl_k3": 0.01, "seconds": 2.0}
    return CellResult(cell=cell, status="done", figures=figures, curve=[(1, 0.1), (2, sampled)])


def failed(cell: Cell) -> CellResult:
    return CellResult(cell=cell, status="failed", reason="learner: loss is nan", figures={"seconds": 1.0})


@dataclass
class Bench:
    """A study in a folder, its runner and policy made up."""

    out: Path
    screen: io.StringIO = field(default_factory=io.StringIO)
    made: list[int] = field(default_factory=list)

    def run(self, plan: Plan, runner: object, **more: object) -> bool | None:
        def ensure(config: Config, console: Console) -> Config:
            self.made.append(config.run.seed)
            return config.model_copy(update={"model": config.model.model_copy(update={"path": f"m{config.run.seed}"})})

        request = Request(plan=plan, out=self.out, command="repeat", again="go on", jobs=2)
        console = Console(file=self.screen, width=200)
        return study(replace(request, **more), ensure_policy=ensure, console=console, runner=lambda hurry: runner)  # type: ignore[arg-type, return-value]

    @property
    def said(self) -> str:
        return self.screen.getvalue()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Without its figures, which take longer than all the rest."""

    def no_figure(summary: Summary, path: Path) -> list[Path]:
        path.touch()
        return [path]

    monkeypatch.setattr(outputs, "write_figure", no_figure)
    return Bench(tmp_path / "study")


def test_a_study_runs_every_cell_and_hands_out_its_files(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "study")
    runner = FakeRunner()
    assert bench.run(plan_of(), runner) is True
    assert sorted(runner.ran) == sorted(cell.name for cell in plan_of().cells())
    assert bench.made == [1, 2]  # a policy for each seed, shared by its cells
    files = {p.name for p in bench.out.iterdir() if p.is_file()}
    assert {"staleness.csv", "staleness.md", "staleness.png", "staleness.html", "study.json"} <= files
    assert "[8/8]" in bench.said
    assert "repeat" in (bench.out / "staleness.md").read_text()


def test_a_cell_that_has_ended_is_not_run_again(bench: Bench) -> None:
    plan = plan_of()
    bench.run(plan, FakeRunner())
    again = FakeRunner()
    assert bench.run(plan, again) is True
    assert again.ran == []
    StudyFolder(bench.out).marker(plan.cells()[3]).unlink()
    assert bench.run(plan, again) is True
    assert again.ran == [plan.cells()[3].name]
    assert bench.made == [1, 2, 1]  # and no policy for a seed that needs none


def test_a_failed_cell_does_not_stop_the_study_and_the_table_shows_it(bench: Bench) -> None:
    plan = plan_of()
    runner = FakeRunner(lambda cell: failed(cell) if cell.lag == 4 and cell.correction == "none" else done(cell))
    assert bench.run(plan, runner) is True
    assert len(runner.ran) == 8
    assert "lag 4, none, seed 1: FAILED, learner: loss is nan  (1 s)" in bench.said
    assert "2 of 2 failed" in (bench.out / "staleness.md").read_text()
    again = FakeRunner()
    bench.run(plan, again)
    assert again.ran == []
    bench.run(plan, again, retry_failed=True)
    assert sorted(again.ran) == ["lag4-none-seed1", "lag4-none-seed2"]
    assert "failed" not in (bench.out / "staleness.csv").read_text()


def test_a_study_of_which_every_cell_failed_says_so(bench: Bench) -> None:
    assert bench.run(plan_of(), FakeRunner(failed)) is False
    assert "No conclusion: 8 of 8 cells have ended, none with a result." in bench.said


def test_what_would_end_every_cell_alike_stops_the_study_and_is_no_result(bench: Bench) -> None:
    plan = plan_of()
    first = plan.cells()[0]
    runner = FakeRunner(lambda cell: SetupError("no room") if cell == first else done(cell))
    with pytest.raises(SetupError, match="no room"):
        bench.run(plan, runner)
    assert first not in StudyFolder(bench.out).results(plan)
    assert bench.run(plan, FakeRunner()) is True


def test_other_settings_are_refused_with_what_differs_and_nothing_is_run(bench: Bench) -> None:
    bench.run(plan_of(), FakeRunner())
    before = {p: p.read_bytes() for p in bench.out.rglob("*") if p.is_file()}
    runner = FakeRunner()
    other = Plan.of(base(run__steps=6, learner__lr="0.25"), lags="0,4", corrections="none,turn", seeds=2)
    with pytest.raises(
        RunMismatch, match=r"learner\.lr was 0\.0006, is 0\.25\.  Use another --out, or the old settings"
    ):
        bench.run(other, runner)
    with pytest.raises(RunMismatch, match=r"--lags had 0,4, has 4; --seeds had 1,2, has 1"):
        bench.run(plan_of(lags="4", seeds=1), runner)
    assert runner.ran == []
    assert {p: p.read_bytes() for p in bench.out.rglob("*") if p.is_file()} == before


def test_a_grid_may_grow(bench: Bench) -> None:
    bench.run(plan_of(), FakeRunner())
    runner = FakeRunner()
    assert bench.run(plan_of(lags="0,2,4", seeds=3), runner) is True
    assert len(runner.ran) == 3 * 2 * 3 - 8
    assert len(StudyFolder(bench.out).results(plan_of(lags="0,2,4", seeds=3))) == 18


def test_a_result_of_other_settings_or_a_damaged_one_is_named(bench: Bench) -> None:
    plan = plan_of()
    bench.run(plan, FakeRunner())
    marker = StudyFolder(bench.out).marker(plan.cells()[0])
    data = json.loads(marker.read_text())
    data["settings"]["learner.lr"] = 1.0
    marker.write_text(json.dumps(data))
    with pytest.raises(
        RunMismatch, match=r"lag0-none-seed1\.json has the result of other settings: learner\.lr was 1\.0"
    ):
        bench.run(plan, FakeRunner())
    marker.write_text("{")
    with pytest.raises(SetupError, match=r"lag0-none-seed1\.json is damaged .*; delete it to have the cell run again"):
        bench.run(plan, FakeRunner())


def test_a_folder_that_is_no_study_is_left_alone(bench: Bench) -> None:
    bench.out.mkdir()
    (bench.out / "thesis.txt").write_text("dear")
    with pytest.raises(SetupError, match=r"exists and is no study .*; use another --out"):
        bench.run(plan_of(), FakeRunner())
    with pytest.raises(SetupError, match="is no study"):
        bench.run(plan_of(), FakeRunner(), report_only=True)
    assert [p.name for p in bench.out.iterdir()] == ["thesis.txt"]


def test_two_studies_in_one_folder_are_refused(bench: Bench) -> None:
    with (
        StudyFolder(bench.out).held(plan_of()),
        pytest.raises(SetupError, match=rf"is in use by process {os.getpid()}; stop that one, or use another --out"),
    ):
        bench.run(plan_of(), FakeRunner())


def test_the_configuration_of_a_folder_is_read_back_with_all_its_sections(bench: Bench) -> None:
    plan = plan_of()
    lora = plan.base.learner.lora.model_copy(update={"rank": 8})
    base = plan.base.model_copy(update={"learner": plan.base.learner.model_copy(update={"lora": lora})})
    with StudyFolder(bench.out).held(replace(plan, base=base)):
        assert StudyFolder(bench.out).plan().base.learner.lora == lora


def test_tables_of_what_has_ended_can_be_had_without_running_anything(bench: Bench) -> None:
    plan = plan_of()
    with StudyFolder(bench.out).held(plan):
        StudyFolder(bench.out).write_result(plan, done(plan.cells()[0]))
    runner = FakeRunner()
    assert bench.run(plan, runner, report_only=True) is True
    assert runner.ran == []
    assert "Not run to the end yet: 7 of 8 cells." in (bench.out / "staleness.md").read_text()


def test_a_report_takes_grid_and_configuration_from_the_folder(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan.of(
        base(run__steps=6, run__seed=7, learner__lr=0.25, correction__cap=3.0),
        lags="0,4",
        corrections="none,turn+ess",
        arguments=["mine.toml", "--learner.lr=0.25"],
    )
    bench.run(plan, FakeRunner())
    monkeypatch.chdir(bench.out.parent)
    assert StudyFolder(bench.out).plan().cells() == plan.cells()
    assert main.main(["study", "staleness", "--report", "--out", "study"]) == 0
    assert "Not run to the end yet" not in (bench.out / "staleness.md").read_text()
    reproduces = "atpo study staleness mine.toml --learner.lr=0.25 --lags 0,4 --corrections none,turn+ess --seeds 2"
    assert reproduces in (bench.out / "staleness.md").read_text()
    assert main.main(["study", "staleness", "--report", "--out", "study", *map(str, FILES), "--learner.lr", "0.5"]) == 2
    assert "learner.lr was 0.25, is 0.5" in capsys.readouterr().err


def test_a_report_is_of_the_part_of_the_grid_that_is_named(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.run(plan_of(lags="0,2,4"), FakeRunner())
    monkeypatch.chdir(bench.out.parent)
    report = ["study", "staleness", "--report", "--out", "study"]
    assert main.main([*report, "--lags", "0,4", "--seeds", "1"]) == 0
    out = capsys.readouterr().out
    assert "of the lags 0,2,4 only 0,4" in out
    assert "of the seeds 1,2 only 1" in out
    lines = (bench.out / "staleness.csv").read_text().splitlines()[1:]
    assert len(lines) == 4
    assert StudyFolder(bench.out).plan().lags == (0, 2, 4)  # nothing of the study itself has gone
    for words, line in (
        (["--lags", "0,3"], "--lags 0,3: study study has 0,2,4; name some of those"),
        (["--corrections", "token"], "--corrections token: study study has none,turn; name some of those"),
        (["--seeds", "3"], "--seeds 3: study study has 2 seeds (1,2); use 1 to 2"),
    ):
        assert main.main([*report, *words]) == 2
        assert capsys.readouterr().err == f"error: {line}\n"


def test_a_folder_that_records_no_arguments_is_reported_on(bench: Bench) -> None:
    bench.run(plan_of(), FakeRunner())
    file = bench.out / "study.json"
    data = json.loads(file.read_text())
    del data["words"]
    file.write_text(json.dumps(data))
    assert bench.run(StudyFolder(bench.out).plan(), FakeRunner(), report_only=True) is True


def test_a_document_is_filled_only_by_a_study_that_is_whole(bench: Bench, tmp_path: Path) -> None:
    plan = plan_of()
    document = tmp_path / "doc.md"
    document.write_text(f"# D\n{outputs.BEGIN}\n{outputs.END}\n")
    with StudyFolder(bench.out).held(plan):
        StudyFolder(bench.out).write_result(plan, done(plan.cells()[0]))
    with pytest.raises(SetupError, match=r"7 cells of study .* have not ended; run them first"):
        bench.run(plan, FakeRunner(), report_only=True, fill=document)
    bench.run(plan, FakeRunner(), fill=document)
    assert "nothing is told apart" in document.read_text()
    assert (tmp_path / "staleness.png").is_file()


def test_jobs_below_one_are_refused(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="--jobs must be >= 1, got 0"):
        bench.run(plan_of(), FakeRunner(), jobs=0)


@pytest.mark.parametrize(
    ("free_gb", "engine", "jobs"), [(24.0, "vllm", 4), (7.5, "vllm", 2), (7.5, "transformers", 4), (1.0, "vllm", 1)]
)
def test_as_many_cells_run_at_once_as_there_are_cores_and_memory_for(
    monkeypatch: pytest.MonkeyPatch, free_gb: float, engine: str, jobs: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    monkeypatch.setattr("atpo_async.api.machine.memory_gb", lambda: (64.0, free_gb))
    screen = io.StringIO()
    assert jobs_here(engine, Console(file=screen, width=200)) == jobs
    assert ("only 1.0 GB of memory are free" in screen.getvalue()) == (free_gb == 1.0)


# --- the command line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--corrections", "turns"],
            "error: --corrections turns: 'turns' is unknown; known: none, token, turn, turn+ess",
        ),
        (["--lags", "a"], "error: --lags a: 'a' is no lag"),
        (
            ["--correction.level", "token"],
            "error: --correction.level: the grid of the study sets it; use --corrections",
        ),
        (["--learner.schedule", "cosine"], "error: learner.schedule = 'cosine' ends with the run"),
        (["--jobs", "0"], "error: --jobs must be >= 1, got 0"),
        (["--report"], "error: runs/study-staleness is no study"),
    ],
)
def test_bad_words_are_one_line_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.main(["study", "staleness", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith(line)
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_studys_own_settings_that_a_users_file_replaces_are_named() -> None:
    own, users = ROOT / "configs" / "staleness.toml", str(ROOT / "configs" / "demo.toml")
    (line,) = left_out(load(users), [users], own)
    assert line.startswith(f"{users} stands in for {own}, and its settings are not used: learner.schedule = constant, ")
    assert line.endswith("; name it last to lay them over yours")
    assert "run.steps" not in line, "the demo has as many"
    assert left_out(load([users, own]), [users, str(own)], own) == []
    assert left_out(load([users, own]), ["mine.toml"], own) == [], "nothing differs"
    assert left_out(load(users), [users], own.with_name("nowhere.toml")) == []


def test_another_kind_of_study_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["study", "freshness"]) == 2
    assert "choose from" in capsys.readouterr().err


def test_the_default_grid_is_the_one_that_the_help_names() -> None:
    assert len(Plan.of(base()).cells()) == 32
    assert Plan.of(base()).corrections == tuple(DEFAULT_CORRECTIONS.split(","))


# --- processes ----------------------------------------------------------------------------------------------------

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

TAG = "ATPO_STUDY_TEST"


@pytest.fixture
def tag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A mark in the environment of all that a test starts; none of it may be left."""
    mark = str(tmp_path)
    monkeypatch.setenv(TAG, mark)
    yield mark
    assert living(mark) == []


def living(mark: str) -> list[int]:
    found = []
    for process in processes.processes():
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{process.pid}/environ").read_bytes()
            if process.pid != os.getpid() and f"{TAG}={mark}".encode() in environment.split(b"\0"):
                found.append(process.pid)
    return found


def script(code: str) -> Callable[[Job], list[str]]:
    return lambda job: [sys.executable, "-c", textwrap.dedent(code), str(job.folder.run(job.cell))]


DEAF_WITH_CHILD = """
    import pathlib, signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    pathlib.Path(sys.argv[1] + ".up").touch()
    time.sleep(1000)
"""
POLITE = """
    import pathlib, signal, sys, time
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    pathlib.Path(sys.argv[1] + ".up").touch()
    time.sleep(1000)
"""


def jobs_of(folder: StudyFolder, plan: Plan, count: int) -> list[Job]:
    return [Job(cell=cell, config=plan.config(cell, runs=folder.runs), folder=folder) for cell in plan.cells()[:count]]


class Quiet:
    def began(self, cell: Cell, *, steps: int) -> None: ...

    def moved(self, cell: Cell, step: int, success: float | None) -> None: ...

    def ended(self, result: CellResult) -> None: ...


async def until(condition: Callable[[], bool]) -> None:
    async def look() -> None:
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # another process makes it true

    await asyncio.wait_for(look(), DEADLINE_S)


@linux
@pytest.mark.parametrize(("code", "times"), [(POLITE, 1), (DEAF_WITH_CHILD, 2)])
async def test_ctrl_c_stops_every_cell_with_all_that_it_started(
    tmp_path: Path, tag: str, code: str, times: int
) -> None:
    plan, folder = plan_of(), StudyFolder(tmp_path / "s")
    kept: list[CellResult] = []
    said: list[str] = []
    hurry = asyncio.Event()
    with folder.held(plan):
        runner = TrainProcess(hurry=hurry, command=script(code), stop_s=DEADLINE_S)
        cells = run_cells(jobs_of(folder, plan, 3), runner=runner, at_once=2, watcher=Quiet(), keep=kept.append)
        ended = asyncio.create_task(until_interrupted(cells, hurry=hurry, say=said.append))
        await until(lambda: len(list(folder.runs.glob("*.up"))) == 2)
        assert len(living(tag)) >= 2
        os.kill(os.getpid(), signal.SIGINT)
        await until(lambda: bool(said))
        for _ in range(times - 1):
            os.kill(os.getpid(), signal.SIGINT)  # those that do not listen are killed
        assert await asyncio.wait_for(ended, DEADLINE_S) is False
    assert living(tag) == []
    assert kept == []
    assert not hurry.is_set() or times == 2


@linux
async def test_a_cell_that_does_not_stop_in_time_is_killed(tmp_path: Path, tag: str) -> None:
    plan, folder = plan_of(), StudyFolder(tmp_path / "s")
    with folder.held(plan):
        runner = TrainProcess(command=script(DEAF_WITH_CHILD), stop_s=0.0)
        (job,) = jobs_of(folder, plan, 1)
        running = asyncio.create_task(runner(job, lambda step, success: None))
        await until(lambda: folder.run(job.cell).with_name(f"{job.cell.name}.up").exists())
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(running, DEADLINE_S)
    assert living(tag) == []


CRASH = """
    import sys
    print("run somewhere")
    print("error: learner crashed 1 times within 300 s (supervisor.max_restarts = 0): loss is nan", file=sys.stderr)
    print("last lines of runs/x/logs/learner.0.log:\\n  | error: loss is nan", file=sys.stderr)
    sys.exit(1)
"""


@linux
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (CRASH, "learner: loss is nan"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL, out of memory?"),
        ("import sys; sys.exit(130)", "its command was stopped from outside"),
        ("import sys; sys.exit(1)", "its log is empty"),
        ("pass", "it ended after 0 of 6 steps"),
    ],
)
async def test_a_cell_that_fails_says_why(tmp_path: Path, tag: str, code: str, reason: str) -> None:
    plan, folder = plan_of(), StudyFolder(tmp_path / "s")
    with folder.held(plan):
        (job,) = jobs_of(folder, plan, 1)
        result = await TrainProcess(command=script(code))(job, lambda step, success: None)
    assert (result.status, result.reason) == ("failed", reason)
    assert result.figures["seconds"] >= 0


@linux
async def test_a_cell_that_only_the_user_can_mend_is_raised(tmp_path: Path, tag: str) -> None:
    plan, folder = plan_of(), StudyFolder(tmp_path / "s")
    with folder.held(plan):
        (job,) = jobs_of(folder, plan, 1)
        runner = TrainProcess(command=script("import sys; print('error: no vLLM here'); sys.exit(2)"))
        with pytest.raises(
            SetupError, match=r"cell lag 0, none, seed 1: no vLLM here  \(log: .*lag0-none-seed1\.log\)"
        ):
            await runner(job, lambda step, success: None)


@linux
async def test_a_cell_begins_anew_in_a_clean_folder_and_its_steps_are_reported(tmp_path: Path, tag: str) -> None:
    plan, folder = plan_of(), StudyFolder(tmp_path / "s")
    told: list[tuple[int, float | None]] = []
    with folder.held(plan):
        (job,) = jobs_of(folder, plan, 1)
        RunDir.create(job.config)
        left = folder.run(job.cell) / "metrics.jsonl"
        left.write_text("{}\n")
        prepared = tmp_path / "prepared"
        prepared.mkdir()
        with MetricsWriter(prepared / "metrics.jsonl", source="learner") as writer:
            for record in records_of([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], greedy=0.7):
                writer.write(step=record.step, version=record.version, metrics=record.metrics)
        code = f"import shutil, sys; shutil.copytree({str(prepared)!r}, sys.argv[1])"  # fails where a folder is left
        result = await TrainProcess(command=script(code))(job, lambda step, success: told.append((step, success)))
    assert result.status == "done", result.reason
    assert result.figures["sampled"] == pytest.approx(0.5)
    assert result.figures["greedy"] == 0.7
    assert told[-1] == (6, 0.6)
    assert [step for step, _ in result.curve] == list(range(1, 7))
    assert [success for _, success in result.curve] == pytest.approx([i / 10 for i in range(1, 7)])


async def test_what_an_interrupted_cell_left_in_shared_memory_goes_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleared: list[str] = []
    monkeypatch.setattr("atpo_async.run.scratch.clear", cleared.append)
    run = RunDir.create(build({"run": {"dir": str(tmp_path), "name": "r"}}))
    await clear_run(run.path)
    assert cleared == [run.run_id]
    assert not run.path.exists()
    await clear_run(run.path)  # nothing there, nothing to do


def test_a_study_of_an_earlier_program_goes_on_with_fields_that_came_later(tmp_path: Path) -> None:
    plan, folder = plan_of(), StudyFolder(tmp_path / "s")
    cell = plan.cells()[0]
    with folder.held(plan):
        folder.write_result(plan, done(cell))
    for file, table in ((folder.path / "study.json", "base"), (folder.marker(cell), "settings")):
        data = json.loads(file.read_text())
        assert data[table].pop("credit.trace_cap") == 1.0  # its default
        file.write_text(json.dumps(data))
    with folder.held(plan):
        assert list(folder.results(plan)) == [cell]
    with pytest.raises(RunMismatch, match=r"credit\.trace_cap was 1\.0, is 2\.0"):
        folder.check(plan_of(base(run__steps=6, credit__trace_cap=2.0, credit__value_mode="tree_trace")))


async def test_a_damaged_run_folder_is_cleared_too(tmp_path: Path) -> None:
    run = RunDir.create(build({"run": {"dir": str(tmp_path), "name": "r"}}))
    (run.path / "config.json").write_text('{"learner": {"no_such_field": 1}}')
    await clear_run(run.path)
    assert not run.path.exists()


async def test_a_run_folder_that_a_process_still_holds_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir.create(build({"run": {"dir": str(tmp_path), "name": "r"}}))
    with run.locked():
        clearing = asyncio.create_task(clear_run(run.path))
        await asyncio.sleep(0)
        await until(lambda: True)
        assert run.path.exists()
    await asyncio.wait_for(clearing, DEADLINE_S)
    assert not run.path.exists()
    run = RunDir.create(build({"run": {"dir": str(tmp_path), "name": "r"}}))
    monkeypatch.setattr("atpo_async.study.runner.RELEASE_S", -1.0)
    with run.locked(), pytest.raises(SetupError, match=r"an interrupted cell still runs: .* is in use by process"):
        await clear_run(run.path)


# --- what a person sees -------------------------------------------------------------------------------------------


def test_the_time_left_follows_from_the_cells_that_ended_and_those_that_run() -> None:
    now = [0.0]
    screen = io.StringIO()
    progress = StudyProgress(Console(file=screen, width=200), total=6, done=1, at_once=2, clock=lambda: now[0])
    first, second, third = plan_of().cells()[:3]
    progress.began(first, steps=10)
    progress.began(second, steps=10)
    assert progress.left_s() is None
    now[0] = 30.0
    progress.moved(first, 5, 0.25)  # a minute for a cell: two run on for half of it, three wait
    assert progress.left_s() == pytest.approx((30 + 30 + 3 * 60) / 2)
    assert screen.getvalue().splitlines() == [
        "1/6 cells; lag 0, none, seed 1: step 5/10, success 0.25; lag 0, turn, seed 1: starting; about 2:00 left"
    ]
    now[0] = 40.0
    progress.ended(done(first))
    assert screen.getvalue().splitlines()[-1].startswith("[2/6] lag 0, none, seed 1: sampled 0.90, greedy 1.00  (2 s)")
    progress.began(third, steps=10)
    assert progress.left_s() == pytest.approx((0 + 40 + 2 * 40) / 2)


def test_a_terminal_shows_bars_and_each_end() -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=100, force_terminal=True)
    cell = plan_of().cells()[0]
    with StudyProgress(console, total=2, done=0, at_once=1) as progress:
        progress.began(cell, steps=4)
        progress.moved(cell, 2, 0.5)
        progress.ended(failed(cell))
    assert "[1/2] lag 0, none, seed 1: FAILED, learner: loss is nan  (1 s)" in screen.getvalue()
    assert outcome(CellResult(cell=cell, status="done")) == "lag 0, none, seed 1: no figures"


def test_a_run_that_has_ended_is_read_with_its_configuration(tmp_path: Path) -> None:
    plan, folder = plan_of(), StudyFolder(tmp_path / "s")
    with folder.held(plan):
        job = next(job for job in jobs_of(folder, plan, 8) if job.cell.lag == 4)
        run = RunDir.create(job.config)
        with MetricsWriter(run.metrics_path, source="learner") as writer:
            for record in records_of([0.2] * 6 + [None] * 4, lag=4):
                writer.write(step=record.step, version=record.version, metrics=record.metrics)
        result = read_result(job, 12.34)
        assert (result.status, result.figures["lag_mean"], result.figures["seconds"]) == ("done", 4, 12.3)
        shutil.rmtree(run.path)
        assert read_result(job, 1.0).reason == "it ended after 0 of 10 steps"
