"""Workers of a study: one cell after another in one process, whose end costs its cell alone and leaves nothing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import textwrap
from pathlib import Path

import pytest

from atpo_async.api.studies.running import Request, check_in_process, study
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.run import processes
from atpo_async.study.cells import CellResult
from atpo_async.study.folder import StudyFolder
from atpo_async.study.runner import Job, run_cells
from atpo_async.study.workers.in_process import InProcess
from tests.study_support import FakeRunner, plan_of
from tests.test_study import DEADLINE_S, Quiet, jobs_of, records_of, until

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

WORKER = """
    import json, os, pathlib, shutil, sys, time
    print(json.dumps({"ready": True}), flush=True)
    for number, line in enumerate(sys.stdin):
        asked = json.loads(line)
        run = asked["config"]["run"]
        folder = pathlib.Path(run["dir"]) / run["name"]
        (pathlib.Path(run["dir"]) / f"{run['name']}.pid").write_text(str(os.getpid()))
        if HOW == "crash" and number == 1:
            pathlib.Path(asked["log"]).write_text("a word before the end\\n")
            os.kill(os.getpid(), 9)
        if HOW == "hang":
            time.sleep(1000)
        if HOW == "noise":
            print("what is that", flush=True)
        if HOW == "user":
            print(json.dumps({"failed": "no such model", "user": True}), flush=True)
            continue
        shutil.copytree(PREPARED, folder)
        print(json.dumps({"step": 1, "success": 0.25}), flush=True)
        print(json.dumps({"ended": True}), flush=True)
"""


def prepared(tmp_path: Path) -> Path:
    """A run folder as far as results are read from it."""
    from atpo_async.run.metrics import MetricsWriter

    folder = tmp_path / "prepared"
    if not folder.exists():
        folder.mkdir()
        with MetricsWriter(folder / "metrics.jsonl", source="learner") as writer:
            for record in records_of([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], greedy=0.7):
                writer.write(step=record.step, version=record.version, metrics=record.metrics)
    return folder


def runner_of(tmp_path: Path, how: str) -> InProcess:
    code = f"HOW, PREPARED = {how!r}, {str(prepared(tmp_path))!r}\n" + textwrap.dedent(WORKER)
    return InProcess(command=lambda: [sys.executable, "-c", code])


def pid_of(job: Job) -> int:
    return int((job.folder.runs / f"{job.cell.name}.pid").read_text())


def is_alive(pid: int) -> bool:
    return processes.started(pid) is not None


async def run_all(tmp_path: Path, how: str, count: int, at_once: int = 1) -> tuple[list[Job], list[CellResult]]:
    plan, folder = plan_of(lags="0", corrections="none,token,turn"), StudyFolder(tmp_path / "s")
    kept: list[CellResult] = []
    with folder.held(plan):
        jobs = jobs_of(folder, plan, count)
        async with runner_of(tmp_path, how) as runner:
            cells = run_cells(jobs, runner=runner, at_once=at_once, watcher=Quiet(), keep=kept.append)
            await asyncio.wait_for(cells, DEADLINE_S)
    return jobs, kept


@linux
async def test_cells_follow_one_another_in_one_process_that_ends_with_them(tmp_path: Path) -> None:
    jobs, kept = await run_all(tmp_path, "well", 3)
    assert [result.status for result in kept] == ["done"] * 3
    assert kept[0].figures["sampled"] == pytest.approx(0.5)
    assert all(result.in_process for result in kept)
    assert len({pid_of(job) for job in jobs}) == 1
    assert not is_alive(pid_of(jobs[0]))
    assert json.loads(jobs[0].folder.config(jobs[0].cell).read_text())["run"]["name"] == jobs[0].cell.name


@linux
async def test_a_worker_that_is_killed_costs_its_cell_and_another_takes_the_next(tmp_path: Path) -> None:
    jobs, kept = await run_all(tmp_path, "crash", 3)
    assert [result.status for result in kept] == ["done", "failed", "done"]
    assert kept[1].reason == (
        "its process was killed by SIGKILL, out of memory?; the last line of its log: a word before the end"
    )
    assert pid_of(jobs[0]) == pid_of(jobs[1]) != pid_of(jobs[2])


@linux
async def test_a_worker_that_says_what_is_no_fact_costs_its_cell(tmp_path: Path) -> None:
    _, kept = await run_all(tmp_path, "noise", 1)
    assert kept[0].status == "failed"
    assert kept[0].reason.startswith("its process reports what is not understood")


@linux
async def test_what_only_the_user_can_mend_costs_its_cell_and_ends_the_study_where_three_end_so(tmp_path: Path) -> None:
    _, kept = await run_all(tmp_path, "user", 2)
    assert [(result.status, result.reason) for result in kept] == [("failed", "no such model")] * 2
    with pytest.raises(SetupError, match=r"3 cells in a row ended alike, .* seed 1: no such model  \(log: "):
        await run_all(tmp_path / "more", "user", 3)


@linux
async def test_a_study_that_is_cancelled_leaves_no_worker(tmp_path: Path) -> None:
    running = asyncio.create_task(run_all(tmp_path, "hang", 2, at_once=2))
    files = tmp_path / "s" / "runs"
    await until(lambda: len([file for file in files.glob("*.pid") if file.read_text()]) == 2)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, DEADLINE_S)
    assert not any(is_alive(int(file.read_text())) for file in files.glob("*.pid"))


@pytest.mark.slow
@linux
def test_a_worker_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """The real worker, whose input ends while nothing runs."""
    import subprocess

    from atpo_async.study.workers.in_process import worker_command

    worker = subprocess.Popen(worker_command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        assert json.loads(worker.stdout.readline()) == {"ready": True}
        worker.stdin.write(b'{"config": {"nonsense": 1}, "log": "%s"}\n' % str(tmp_path / "log").encode())
        worker.stdin.flush()
        said = json.loads(worker.stdout.readline())
        assert said["user"]
        assert "nonsense" in said["failed"]
        worker.stdin.close()
        assert worker.wait(DEADLINE_S) == 0
    finally:
        if worker.poll() is None:
            os.kill(worker.pid, signal.SIGKILL)
            worker.wait()
        worker.stdout.close()


@pytest.mark.parametrize(
    ("axes", "choose"),
    [(["lag=0,4", "learner.num_processes=1,2"], None), (["lag=0,4"], "learner.num_processes=1,2")],
    ids=["of the grid", "of the choosing"],
)
def test_a_cell_that_one_process_cannot_have_is_named_before_any_runs(
    axes: list[str], choose: str | None, tmp_path: Path
) -> None:
    plan, runner = plan_of(axes=axes, choose=choose), FakeRunner()
    request = Request(plan=plan, out=tmp_path / "s", in_process=True, command="repeat", again="go on")
    with pytest.raises(ConfigError, match=r"cell (choose: )?lag 0, .*: learner.num_processes = 2: one process has one"):
        study(request, ensure_policy=lambda config, console: config, runner=lambda hurry: runner)
    assert not runner.ran
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("axes", "choose", "idle"),
    [
        (["correction=none,turn", "actor.count=1,2"], None, "actor.count"),
        (["correction=none,turn"], "weights.chunk_bytes=1000000,2000000", "weights.chunk_bytes"),
    ],
    ids=["of the grid", "of the choosing"],
)
def test_cells_that_are_one_in_one_process_are_named_before_any_runs(
    axes: list[str], choose: str | None, idle: str
) -> None:
    plan = plan_of(axes=axes, choose=choose)
    message = rf"would be the same run as cell .* in one process, where {idle} has no effect: .* leave --in-process out"
    with pytest.raises(ConfigError, match=message):
        check_in_process(plan)
    check_in_process(plan_of(axes=["correction=none,turn", "actor.trees_in_flight=4,8"]))


def test_a_lag_that_leaves_success_unknown_at_the_end_is_refused_before_any_runs() -> None:
    options = {"run.steps": "40"}
    check_in_process(plan_of(axes=["staleness.max_lag=0,8"], options=options))
    with pytest.raises(ConfigError, match=r"staleness.max_lag = 9 is exact in one process, .* use --axis lag=9"):
        check_in_process(plan_of(axes=["staleness.max_lag=0,9"], options=options))
    check_in_process(plan_of(axes=["lag=0,16"], options=options))
