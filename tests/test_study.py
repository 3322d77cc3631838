"""Studies: what a cell's run says, running and going on, and stopping without a trace."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import math
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from rich.console import Console

from atpo_async.api.studies.running import Request, jobs_here, study
from atpo_async.cli import main
from atpo_async.cli.study import left_out
from atpo_async.config import Config, as_options, build
from atpo_async.core.errors import ConfigError, RunMismatch, SetupError
from atpo_async.run import processes
from atpo_async.run.metrics import MetricsWriter, Record
from atpo_async.run.rundir import RunDir
from atpo_async.study.cells import COLUMNS, Cell, CellResult, figures_of, from_json, to_json, tokens_of, unfinished
from atpo_async.study.folder import StudyFolder
from atpo_async.study.output import outputs
from atpo_async.study.pace import Pace, Running
from atpo_async.study.plan import Plan
from atpo_async.study.progress import StudyProgress, outcome
from atpo_async.study.results.summary import Summary
from atpo_async.study.runner import (
    CellRefused,
    Job,
    TrainProcess,
    clear_run,
    read_result,
    run_cells,
    until_interrupted,
)
from tests.study_support import FILES, ROOT, FakeRunner, cell, done, failed, plan_of

DEADLINE_S = 60.0

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
            "guard/skipped_updates": 2.0, "train/tokens": 100.0,
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
    assert (found["steps"], found["collapsed"]) == (6, 0)
    assert (found["tokens"], found["tokens_to_goal"]) == (600, 500)
    assert (found["trained_s"], found["seconds_to_goal"]) == (5, 4)  # from the first record on
    assert set(found) | {"seconds", "at_tokens"} == {column.key for column in COLUMNS}


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


@pytest.mark.parametrize(
    ("success", "reason"),
    [
        ([0.1] * 8 + [None, None], None),  # the last batches were of trees that had come in before
        ([0.1] * 3 + [None, None], None),  # also of a run of a few steps
        ([0.1] * 7 + [None] * 3, "sampled success is not known after step 7 of 10: all later batches were of trees"),
        ([None] * 9 + [0.1], "sampled success is known of 1 of 10 steps, and is a mean of 3"),
        ([0.1] * 2 + [None], "sampled success is known of 2 of 3 steps, and is a mean of 3: use more --run.steps"),
    ],
)
def test_a_run_whose_lag_is_not_exact_may_lack_the_success_of_its_last_steps(
    success: list[float | None], reason: str | None
) -> None:
    found = unfinished(records_of(success), steps=len(success), lag=None, evaluates=True)
    assert (found is None) == (reason is None)
    assert (found or "").startswith(reason or "")


def test_tokens_count_up_to_each_step_also_of_steps_without_success() -> None:
    assert tokens_of(records_of([0.1, None, 0.3]), [(1, 0.1), (3, 0.3)]) == [100, 300]
    assert tokens_of([], [(1, 0.1)]) == []


def test_an_evaluation_that_was_not_asked_for_is_not_missing() -> None:
    records = records_of([0.1] * 5, greedy=None)
    assert unfinished(records, steps=5, lag=0, evaluates=False) is None
    assert "greedy" not in figures_of(records, steps=5, lag=0)


# --- running and going on -----------------------------------------------------------------------------------------


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
        console = Console(file=self.screen, width=400)
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


CHOOSE: dict[str, object] = {"choose": "learner.lr=1e-4,3e-4", "choose_by": "correction", "choose_seeds": 1}


def test_what_the_first_stage_chooses_is_what_the_second_runs_with(bench: Bench) -> None:
    plan = plan_of(**CHOOSE)  # type: ignore[arg-type]

    def better(of: Cell) -> CellResult:
        at = dict(of.at)
        best = {"none": "0.0001", "turn": "0.0003"}[at["correction"]]
        return done(of, area=0.9 if at.get("learner.lr", best) == best else 0.5)

    stopped = FakeRunner(lambda of: SetupError("full") if of == plan.first_stage()[5] else better(of))
    with pytest.raises(SetupError, match="full"):
        bench.run(plan, stopped)
    runner = FakeRunner(better)
    assert bench.run(plan, runner) is True
    assert sum(name.startswith("choose-") for name in [*stopped.ran[:-1], *runner.ran]) >= len(plan.first_stage()) - 1
    configs = {file.stem: json.loads(file.read_text()) for file in (bench.out / "cells").glob("lag*.json")}
    assert {name.split("-")[1]: data["settings"]["learner.lr"] for name, data in configs.items()} == {
        "none": 1e-4,
        "turn": 3e-4,
    }
    assert "For none the lowest candidate was chosen" in bench.said
    assert "| turn | 0.500 | 0.900 | 0.0003 (the highest candidate) |" in (bench.out / "staleness.md").read_text()
    again = FakeRunner()
    assert bench.run(plan, again, retry_failed=True) is True
    assert again.ran == []


def test_a_choice_that_results_rest_on_is_not_made_again(bench: Bench) -> None:
    plan = plan_of(**CHOOSE)  # type: ignore[arg-type]
    one = plan.first_stage()[0]
    bench.run(plan, FakeRunner(lambda of: failed(of) if of == one else done(of, area=0.5)))
    again = FakeRunner(lambda of: done(of, area=1.0))
    bench.run(plan, again, retry_failed=True)
    assert again.ran == []


def test_nothing_is_chosen_where_every_cell_of_a_choice_failed(bench: Bench) -> None:
    plan = plan_of(**CHOOSE)  # type: ignore[arg-type]
    runner = FakeRunner(lambda of: failed(of) if dict(of.at)["correction"] == "turn" else done(of, area=0.5))
    with pytest.raises(SetupError, match=r"no value of learner\.lr .* for correction turn: all 4 cells .* failed"):
        bench.run(plan, runner)
    assert "none: all failed" in bench.said
    assert all(name.startswith("choose-") for name in runner.ran)
    again = FakeRunner(lambda of: done(of, area=0.5))
    assert bench.run(plan, again, retry_failed=True) is True
    assert sum(name.startswith("choose-") for name in again.ran) == 4


def test_a_policy_whose_making_is_interrupted_stops_the_study_as_a_cell_does(bench: Bench) -> None:
    class Interrupted(list[int]):
        def append(self, seed: int) -> None:
            raise KeyboardInterrupt

    bench.made = Interrupted()
    assert bench.run(plan_of(), FakeRunner()) is None
    assert "0 of 8 cells have ended.  The study goes on with:" in bench.said


def test_a_plan_says_what_it_has_and_can_tell_apart_and_runs_nothing(bench: Bench) -> None:
    runner = FakeRunner()
    assert bench.run(plan_of(), runner, plan_only=True, spread=0.1) is True
    assert runner.ran == []
    assert not bench.out.exists()
    assert "2 of lag × 2 of correction × 2 seeds = 8 cells, 0 done" in bench.said
    assert "power: 4 comparisons of 2 seeds with 2" in bench.said
    assert "8 cells to run, 2 at once; the time is told once a cell has made a quarter of its steps" in bench.said
    bench.run(plan_of(), runner)
    bench.run(plan_of(seeds=3), runner, plan_only=True)
    assert "4 cells to run, 2 at once: about 0:04, by those that have ended here" in bench.said


def test_a_failed_cell_does_not_stop_the_study_and_the_table_shows_it(bench: Bench) -> None:
    plan = plan_of()
    runner = FakeRunner(
        lambda cell: failed(cell) if dict(cell.at) == {"lag": "4", "correction": "none"} else done(cell)
    )
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


def refused(of: Cell, reason: str = "objective.surrogate = 'mine:broken' failed") -> CellRefused:
    return CellRefused(CellResult(cell=of, status="failed", reason=reason, in_process=True), Path("cell.log"))


def test_a_value_that_only_the_user_can_mend_costs_its_own_cells(bench: Bench) -> None:
    plan = plan_of(seeds=4)
    runner = FakeRunner(lambda of: refused(of) if dict(of.at) == {"lag": "0", "correction": "none"} else done(of))
    assert bench.run(plan, runner, jobs=1) is True
    assert len(runner.ran) == 16
    assert "16 cells done, 4 of them failed (--retry-failed runs these again)" in bench.said
    assert "lag 0, none, seed 1: FAILED, objective.surrogate = 'mine:broken' failed" in bench.said


def test_three_cells_in_a_row_that_end_alike_end_the_study(bench: Bench) -> None:
    plan = plan_of(seeds=4)
    runner = FakeRunner(lambda of: refused(of, f"no space for runs/{of.name}/x") if of.seed > 1 else done(of))
    with pytest.raises(
        SetupError,
        match=r"3 cells in a row ended alike, the last of them cell lag 4, none, seed 2: no space for "
        r"runs/lag4-none-seed2/x  \(log: cell\.log\); mend that, and add --retry-failed",
    ):
        bench.run(plan, runner, jobs=1)
    assert len(runner.ran) == 4 + 3
    again = FakeRunner()
    assert bench.run(plan, again, retry_failed=True) is True
    assert len(again.ran) == 16 - 4


def test_a_study_does_not_go_on_the_other_way(bench: Bench) -> None:
    plan = plan_of(options={"actor.engine": "transformers"})
    with StudyFolder(bench.out).held(plan):
        StudyFolder(bench.out).write_result(plan, replace(done(plan.cells()[0]), in_process=True))
    runner = FakeRunner()
    for request in ({}, {"plan_only": True}):
        with pytest.raises(
            RunMismatch, match=r"1 of its cells ran each in one process, .*: add --in-process to go on with it"
        ):
            bench.run(plan, runner, **request)
    assert runner.ran == []
    assert bench.run(plan, runner, in_process=True) is True
    assert bench.run(plan, runner, report_only=True) is True


def test_other_settings_are_refused_with_what_differs_and_nothing_is_run(bench: Bench) -> None:
    bench.run(plan_of(), FakeRunner())
    before = {p: p.read_bytes() for p in bench.out.rglob("*") if p.is_file()}
    runner = FakeRunner()
    other = plan_of(options={"learner.lr": "0.25"})
    with pytest.raises(
        RunMismatch, match=r"learner\.lr was 0\.0006, is 0\.25\.  Use another --out, or the old settings"
    ):
        bench.run(other, runner)
    with pytest.raises(RunMismatch, match=r"--axis lag had 0,4, has 4; --seeds had 1,2, has 1"):
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
    data["settings"]["learner.lr"] = 6e-4
    figures = data["figures"]
    for part, fault in (
        ({"figures": figures | {"greedy": 7}}, "greedy = 7"),
        ({"figures": figures | {"steps_to_goal": -1}}, "steps_to_goal = -1"),
        ({"figures": figures | {"kl_k1": math.inf}}, "kl_k1 = inf"),
        ({"curve": []}, "no curve"),
        ({"curve": [[1, 0.5], [2, 1.5]]}, "a success outside 0 to 1 in the curve"),
        ({"curve": [[2, 0.5], [1, 0.5]]}, "steps of the curve out of order"),
        ({"tokens": [1.0]}, "1 counts of tokens beside a curve of 2 steps"),
    ):
        marker.write_text(json.dumps(data | part))
        with pytest.raises(SetupError, match=rf"lag0-none-seed1\.json is damaged \(ValueError: {fault}\); delete it"):
            bench.run(plan, FakeRunner(), report_only=True)
    rounded = {"figures": figures | {"kl_k1": -1e-9, "ess_turn": 1.0 + 1e-9}, "curve": [[1, -1e-17], [2, 1.0 + 1e-9]]}
    marker.write_text(json.dumps(data | rounded))
    assert bench.run(plan, FakeRunner(), report_only=True) is True


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
    plan = replace(plan, over={**plan.over, "learner.lora.rank": "8"})
    with StudyFolder(bench.out).held(plan):
        assert StudyFolder(bench.out).plan().base.learner.lora.rank == 8


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
    options = {"run.seed": "7", "learner.lr": "0.25"}
    plan = plan_of(corrections="none,turn+ess", options=options, arguments=["mine.toml", "--learner.lr=0.25"])
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
    assert "of lag 0,2,4 only 0,4" in out
    assert "of the seeds 1,2 only 1" in out
    assert len((bench.out / "staleness-part.csv").read_text().splitlines()) == 1 + 4
    assert len((bench.out / "staleness.csv").read_text().splitlines()) == 1 + 12
    page = (bench.out / "staleness-part.md").read_text()
    assert "A part of the study: of lag 0,2,4 only 0,4; of the seeds 1,2 only 1." in page
    assert "staleness-part.png" in page
    assert "\natpo study staleness --report --axis lag=0,4 --seeds 1\n```" in page
    assert "--lags 0,2,4" in page
    (bench.out / "staleness.csv").unlink()
    assert main.main([*report, "--axis", "correction=all"]) == 0
    assert len((bench.out / "staleness.csv").read_text().splitlines()) == 1 + 12
    capsys.readouterr()
    assert StudyFolder(bench.out).plan().axes[0].values == ("0", "2", "4")  # nothing of the study itself has gone
    for words, line in (
        (["--lags", "0,3"], "--axis lag=0,3: study study has 0,2,4, not 3; name some of those"),
        (
            ["--corrections", "token"],
            "--axis correction=token: study study has none,turn, not token; name some of those",
        ),
        (["--axis", "learner.lr=1"], "--axis learner.lr: study study has no such axis; it has lag, correction"),
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
    document.write_text("# D\n" + "\n".join(outputs.marks("staleness")))
    with StudyFolder(bench.out).held(plan):
        StudyFolder(bench.out).write_result(plan, done(plan.cells()[0]))
    with pytest.raises(SetupError, match=r"7 cells of study .* have not ended; run them first"):
        bench.run(plan, FakeRunner(), report_only=True, fill=document)
    bench.run(plan, FakeRunner(), fill=document)
    assert "is not told apart" in document.read_text()
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
            "error: --axis correction=turns: 'turns' is unknown; known: none, token, turn, turn+ess",
        ),
        (["--lags", "a"], "error: --axis lag=a: 'a' is no lag"),
        (
            ["--correction.level", "token"],
            "error: --correction.level: the grid of the study sets it; use --axis correction=",
        ),
        (
            ["--learner.schedule", "cosine"],
            "error: cell lag 0, none, seed 1: learner.schedule = 'cosine' ends with the run",
        ),
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
    (line,) = left_out([users], {}, own)
    assert line.startswith(f"{users} stands in for {own}, and its settings are not used: learner.schedule = constant, ")
    assert line.endswith("; name it last to lay them over yours")
    assert "run.steps" not in line, "the demo has as many"
    assert left_out([users, str(own)], {}, own) == []
    own_texts = as_options(own)
    assert left_out([users], own_texts, own) == [], "nothing differs"
    assert left_out([users], {}, own.with_name("nowhere.toml")) == []


def test_a_name_that_comes_with_no_study_needs_axes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["study", "freshness"]) == 2
    assert "freshness: no study comes with that name; there are staleness, methods" in capsys.readouterr().err


def test_a_study_that_is_there_says_what_goes_on_with_it(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.run(plan_of(axes=["learner.lr=1e-4,2e-4"], name="mine", arguments=["mine.toml"]), FakeRunner())
    assert main.main(["study", "mine", "--plan", "--out", str(bench.out)]) == 2
    err = capsys.readouterr().err
    assert f"study {bench.out} is there, and goes on when its grid is named again:  atpo study mine mine.toml" in err
    assert "--axis learner.lr=0.0001,0.0002" in err


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
        folder.check(plan_of(options={"credit.trace_cap": "2.0", "credit.value_mode": "tree_trace"}))


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
    cells = plan_of().cells()[:5]
    waiting = [(each, 10) for each in cells]
    console = Console(file=screen, width=200)
    progress = StudyProgress(console, waiting=waiting, total=6, done=1, at_once=2, clock=lambda: now[0])
    first, second, third, *_ = cells
    progress.began(first, steps=10)
    progress.began(second, steps=10)
    assert progress.left_s() is None
    now[0] = 30.0
    progress.moved(first, 5, 0.25)  # a minute for a cell: two run on for half of it, then two, then one
    assert progress.left_s() == pytest.approx(30 + 60 + 60)
    assert screen.getvalue().splitlines() == [
        "1/6 cells; lag 0, none, seed 1: step 5/10, success 0.25; lag 0, turn, seed 1: starting; about 2:30 left"
    ]
    now[0] = 40.0
    progress.ended(done(first))
    assert screen.getvalue().splitlines()[-1].startswith("[2/6] lag 0, none, seed 1: sampled 0.90, greedy 1.00  (2 s)")
    progress.began(third, steps=10)
    assert progress.left_s() == pytest.approx(0 + 40 + 40)


def test_the_time_of_a_cell_is_that_of_the_cells_most_like_it() -> None:
    pace = Pace()
    assert pace.left_s([], [(cell(recipe="a", task="short"), 10)], lanes=1) is None
    pace.note(cell(recipe="a", task="short"), steps=10, seconds=10.0)
    pace.note(cell(recipe="b", task="long"), steps=10, seconds=100.0)
    assert pace.expected_s(cell(seed=2, recipe="a", task="short"), steps=20) == 20
    assert pace.expected_s(cell(recipe="c", task="long"), steps=10) == 100
    assert pace.expected_s(cell(recipe="c", task="other"), steps=10) == 55
    # Three long ones and a short one on two lanes; the running one is slower than those before.
    running = [Running(cell=cell(recipe="b", task="long"), steps=10, step=5, for_s=150.0)]
    waiting = [(cell(seed=3, recipe="a", task="short"), 10), (cell(seed=2, recipe="b", task="long"), 10)]
    assert pace.left_s(running, waiting, lanes=2) == pytest.approx(max(150, 10 + (100 / 10 + 150 / 5) / 2 * 10))


def test_a_terminal_shows_bars_and_each_end() -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=100, force_terminal=True)
    one = plan_of().cells()[0]
    with StudyProgress(console, waiting=[(one, 4)], total=2, done=0, at_once=1) as progress:
        progress.began(one, steps=4)
        progress.moved(one, 2, 0.5)
        progress.ended(failed(one))
    assert "[1/2] lag 0, none, seed 1: FAILED, learner: loss is nan  (1 s)" in screen.getvalue()
    assert outcome(CellResult(cell=one, status="done")) == "lag 0, none, seed 1: no figures"


def test_a_run_that_has_ended_is_read_with_its_configuration(tmp_path: Path) -> None:
    plan, folder = plan_of(), StudyFolder(tmp_path / "s")
    with folder.held(plan):
        job = next(job for job in jobs_of(folder, plan, 8) if job.cell.lag == 4)
        run = RunDir.create(job.config)
        with MetricsWriter(run.metrics_path, source="learner") as writer:
            for record in records_of([0.2] * 6 + [None] * 4, lag=4):
                writer.write(step=record.step, version=record.version, metrics=record.metrics)
        result = read_result(job, 12.34, in_process=True)
        assert from_json(to_json(result)) == result
        assert (result.status, result.figures["lag_mean"], result.figures["seconds"]) == ("done", 4, 12.3)
        shutil.rmtree(run.path)
        assert read_result(job, 1.0, in_process=False).reason == "it ended after 0 of 10 steps"


@pytest.mark.parametrize("more", [{}, {"plan_only": True}])
def test_a_cell_whose_own_part_cannot_be_had_is_named_before_any_runs(
    bench: Bench, tmp_path: Path, more: dict[str, bool]
) -> None:
    layer = tmp_path / "mine.toml"
    layer.write_text('[objective]\ntoken_weights = ["tests.study_support:misspelt"]\n')
    plan = plan_of(axes=[f"config={FILES[0]},{layer}"], files=[FILES[0]])
    runner = FakeRunner()
    with pytest.raises(ConfigError, match=r"cell mine, seed 1: .*misspelt"):
        bench.run(plan, runner, **more)
    assert not runner.ran


def test_a_study_chooses_one_field(capsys: pytest.CaptureFixture[str]) -> None:
    twice = ["--choose", "learner.lr=1e-3,2e-3", "--choose", "learner.max_grad_norm=1,2", "--choose-by", "all"]
    assert main.main(["study", "t", str(FILES[0]), "--axis", "credit.discount=0.9,1", *twice, "--plan"]) == 2
    assert (
        "--choose learner.lr=1e-3,2e-3 --choose learner.max_grad_norm=1,2: a study chooses one"
        in capsys.readouterr().err
    )
