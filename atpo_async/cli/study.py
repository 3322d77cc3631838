"""``atpo study``: plan, run what has not been run, and write what follows from it."""

from __future__ import annotations

import asyncio
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from atpo_async.cli import doctor
from atpo_async.config import Config, as_options, get, load
from atpo_async.core.errors import ConfigError
from atpo_async.report.progress import duration
from atpo_async.study import outputs
from atpo_async.study.cells import FINAL, CellResult
from atpo_async.study.conclusions import sentences
from atpo_async.study.folder import StudyFolder
from atpo_async.study.plan import Plan
from atpo_async.study.progress import StudyProgress
from atpo_async.study.runner import Job, Runner, TrainProcess, run_cells, until_interrupted
from atpo_async.study.tables import matrix

DEFAULT_OUT = Path("runs") / "study-staleness"

MEMORY_GB = {"vllm": 3.5, "transformers": 1.5}
"""That a cell of the demo's policy takes on a CPU, by its actor's engine: all its roles and their supervisor."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asks for."""

    plan: Plan
    out: Path = DEFAULT_OUT
    jobs: int | None = None
    """Cells at once; None: as many as there are cores and memory for."""
    retry_failed: bool = False
    report_only: bool = False
    fill: Path | None = None
    """A Markdown file that is to hold the results."""
    command: str
    """Reproduces the study."""
    again: str
    """Goes on with it here."""


def study(
    request: Request,
    *,
    ensure_policy: Callable[[Config, Console], Config],
    console: Console | None = None,
    runner: Callable[[asyncio.Event], Runner] = lambda hurry: TrainProcess(hurry=hurry),
) -> bool | None:
    """Run the study to its end or an interruption: whether any cell gave a result; None where it was interrupted.

    Args:
        ensure_policy: makes the policy of a seed where there is none, and returns the configuration that names it.
        runner: of cells, given the event that says that nobody wants to wait any more.

    Raises ConfigError, SetupError and RunMismatch as the plan, the folder and the machine do.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    plan, folder = request.plan, StudyFolder(request.out)
    if request.jobs is not None and request.jobs < 1:
        raise ConfigError(f"--jobs must be >= 1, got {request.jobs}")
    if request.report_only:
        whole = folder.plan()
        folder.check(plan, part=True)
        for name in ("lags", "corrections", "seeds"):
            some, every = getattr(plan, name), getattr(whole, name)
            if len(some) < len(every):
                console.print(f"of the {name} {_joined(every)} only {_joined(some)}", markup=False)
        return _report(request, folder, console)
    if request.fill is not None:
        outputs.check_fillable(request.fill)  # now, not when every cell has run
    cells = plan.cells()
    folder.check(plan)
    doctor.check_machine(plan.config(cells[0], runs=folder.runs))
    doctor.check_model(plan.base)
    with folder.held(plan):
        known = folder.results(plan)
        if request.retry_failed:
            known = {cell: result for cell, result in known.items() if result.status == "done"}
        open_cells = [cell for cell in cells if cell not in known]
        if open_cells:
            at_once = min(len(open_cells), request.jobs or jobs_here(doctor.engine_of(plan.base)[0], console))
            console.print(
                f"study {folder.path}: {len(plan.lags)} lags × {len(plan.corrections)} corrections × {len(plan.seeds)} "
                f"seeds = {len(cells)} cells, {len(known)} done; {at_once} at once"
            )
            models = {
                seed: ensure_policy(_of_seed(plan.base, seed), console).model.path
                for seed in sorted({cell.seed for cell in open_cells})
            }
            jobs = [
                Job(cell=cell, config=plan.config(cell, runs=folder.runs, model=models[cell.seed]), folder=folder)
                for cell in open_cells
            ]
            done, took = _run(request, folder, jobs, at_once, console, runner, total=len(cells))
            if not done:
                count = len(folder.results(plan))
                console.print(
                    f"stopped after {took}; no process is left.  {count} of {len(cells)} cells have ended.  The study "
                    f"goes on with:  {request.again}"
                )
                return None
            console.print(f"done in {took}.")
        return _report(request, folder, console)


def _run(
    request: Request,
    folder: StudyFolder,
    jobs: Sequence[Job],
    at_once: int,
    console: Console,
    runner: Callable[[asyncio.Event], Runner],
    *,
    total: int,
) -> tuple[bool, str]:
    """Whether all jobs came to their ends, and how long that took."""
    plan = request.plan

    def keep(result: CellResult) -> None:
        folder.write_result(plan, result)
        outputs.write_csv(folder, plan)

    async def work() -> bool:
        hurry = asyncio.Event()
        cells = run_cells(jobs, runner=runner(hurry), at_once=at_once, watcher=progress, keep=keep)
        return await until_interrupted(cells, hurry=hurry, say=progress.say)

    with StudyProgress(console, total=total, done=total - len(jobs), at_once=at_once) as progress:
        done = asyncio.run(work())
    return done, duration(progress.elapsed_s)


def _report(request: Request, folder: StudyFolder, console: Console) -> bool:
    """Files, table and sentences of the cells that have ended; whether any gave a result."""
    plan = request.plan
    written = outputs.write_all(folder, plan, command=request.command)
    if request.fill is not None:
        written += outputs.fill_file(folder, plan, request.fill, command=request.command)
    summary = outputs.summary_of(folder, plan)
    head, *rows = matrix(summary, FINAL)
    table = Table(title="sampled success at the end: mean (lowest–highest) over seeds", title_justify="left")
    for i, column in enumerate(head):
        table.add_column(column, no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in sentences(summary):
        console.print(line, markup=False)
    for path in written:
        console.print(f"wrote {path}", markup=False)
    return any(result.status == "done" for result in summary.results)


def _of_seed(base: Config, seed: int) -> Config:
    return base.model_copy(update={"run": base.run.model_copy(update={"seed": seed})})


def jobs_here(engine: str, console: Console) -> int:
    """Cells that this machine takes at once: a core and ``MEMORY_GB`` each, one at least."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = doctor.memory_gb()
    if memory is None:
        return cores
    each = MEMORY_GB[engine]
    if memory[1] < each:
        console.print(f"only {memory[1]:.1f} GB of memory are free; a cell with {engine} takes about {each:g}")
    return max(1, min(cores, int(memory[1] / each)))


def words_of(files: Sequence[str], options: Mapping[str, str]) -> list[str]:
    """A plan's ``words``: without this machine's folders."""
    return [*(outputs.relative(Path(file)) for file in files), *(f"--{k}={text}" for k, text in options.items())]


def left_out(base: Config, files: Sequence[str], own: Path) -> list[str]:
    """What to say of the study's own settings, which a user's files stand in for: a line, or none where none differs.

    Args:
        base: of ``files`` and options.
        own: the file of those settings; it need not exist.
    """
    if not own.is_file() or any(Path(file).name == own.name for file in files):
        return []
    texts = as_options(own)
    studys = load(own)
    differing = [f"{name} = {text}" for name, text in texts.items() if get(base, name) != get(studys, name)]
    if not differing:
        return []
    return [
        f"{', '.join(files)} stands in for {own}, and its settings are not used: {', '.join(differing)}; name it last "
        "to lay them over yours"
    ]


def reproducing(plan: Plan) -> str:
    """The command that makes the same study anywhere, its grid spelt out."""
    grid = ["--lags", _joined(plan.lags), "--corrections", _joined(plan.corrections), "--seeds", str(len(plan.seeds))]
    return shlex.join(["atpo", "study", "staleness", *plan.words, *grid])


def _joined(values: Sequence[object]) -> str:
    return ",".join(map(str, values))
