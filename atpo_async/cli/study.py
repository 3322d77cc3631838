"""``atpo study``: plan, run what has not been run, and write what follows from it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from atpo_async.api import machine
from atpo_async.api.policy import ensure_policy
from atpo_async.cli.common import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, LAYERS, Asked, demo_config, note
from atpo_async.config import Config, as_options, get, load
from atpo_async.core.errors import ConfigError
from atpo_async.report.progress import duration
from atpo_async.study import outputs
from atpo_async.study.cells import FINAL, CellResult
from atpo_async.study.conclusions import sentences
from atpo_async.study.folder import StudyFolder
from atpo_async.study.plan import Plan
from atpo_async.study.progress import StudyProgress
from atpo_async.study.runner import Job, Runner, TrainProcess, held, run_cells, until_interrupted
from atpo_async.study.tables import matrix
from atpo_async.study.workers.in_process import InProcess

DEFAULT_OUT = Path("runs") / "study-staleness"

IN_PROCESS = "in one process"

MEMORY_GB = {"vllm": 3.5, "transformers": 1.5, IN_PROCESS: 1.0}
"""GiB that one cell of the demo's policy takes on a CPU with all its roles, by engine."""


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Of the command line."""
    parser.add_argument(
        "kind", metavar="staleness", choices=["staleness"], help="every batch exactly so many versions old"
    )
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="*",
        default=[],
        help=f"other configurations than configs/demo.toml and configs/staleness.toml; {LAYERS}",
    )
    parser.add_argument("--out", metavar="DIR", help="the study's folder; runs/study-staleness where left out")
    parser.add_argument("--lags", metavar="LIST", help="learner versions; 0,2,8,16 where left out")
    parser.add_argument(
        "--corrections", metavar="LIST", help="by name; none,token,turn,turn+ess where left out; a wrong one lists all"
    )
    parser.add_argument("--seeds", metavar="N", type=int, help="from run.seed on; 2 where left out")
    parser.add_argument("--jobs", metavar="N", type=int, help="cells at once; as cores and memory allow where left out")
    parser.add_argument(
        "--in-process",
        action="store_true",
        help="each cell in one process, without sockets, where generation and training take turns: many times as fast",
    )
    parser.add_argument("--retry-failed", action="store_true", help="run cells that failed again")
    parser.add_argument(
        "--report",
        action="store_true",
        help="run nothing: tables and figures of what has ended; the grid's options name a part of it",
    )
    parser.add_argument("--fill", metavar="FILE", help="write the results into a Markdown file, between its markers")


def run(asked: Asked) -> int:
    """Run the study, or only write what follows from it."""
    args = asked.args
    out = Path(args.out) if args.out else DEFAULT_OUT
    plan = _asked_plan(asked, out)
    if args.config and not args.report:
        with contextlib.suppress(ConfigError):  # outside a checkout there are no settings of ours
            for line in left_out(plan.base, args.config, demo_config().with_name("staleness.toml")):
                note(line)
    request = Request(
        plan=plan,
        out=out,
        jobs=args.jobs,
        in_process=args.in_process,
        retry_failed=args.retry_failed,
        report_only=args.report,
        fill=Path(args.fill) if args.fill else None,
        command=reproducing(plan, in_process=args.in_process),
        again=asked.again,
    )
    found = study(request, ensure_policy=ensure_policy)
    return EXIT_INTERRUPTED if found is None else EXIT_DONE if found else EXIT_FAILED


def _asked_plan(asked: Asked, out: Path) -> Plan:
    """The plan that was asked for.  For a report the study's folder has it, and the options select a part of it."""
    args, texts = asked.args, asked.options
    grid = {"lags": args.lags, "corrections": args.corrections, "seeds": args.seeds}
    if args.report:
        found = StudyFolder(out).plan(**grid)
        if not args.config and not texts:
            return found
        grid = {
            "lags": ",".join(map(str, found.lags)),
            "corrections": ",".join(found.corrections),
            "seeds": len(found.seeds),
        }
    return Plan.of(
        load(args.config or [demo_config(), demo_config().with_name("staleness.toml")], texts),
        options=list(texts),
        arguments=arguments_of(args.config, texts),
        **{name: value for name, value in grid.items() if value is not None},
    )


@dataclass(frozen=True, kw_only=True)
class Request:
    """One study as the user asked for it."""

    plan: Plan
    out: Path = DEFAULT_OUT
    jobs: int | None = None
    """Cells at once; None: as many as there are cores and memory for."""
    in_process: bool = False
    """Each cell in one process (``study.workers``), not as an `atpo train`."""
    retry_failed: bool = False
    report_only: bool = False
    fill: Path | None = None
    """A Markdown file that is to hold the results."""
    command: str
    """The command that reproduces the study."""
    again: str
    """The command that goes on with it on this machine."""


def study(
    request: Request,
    *,
    ensure_policy: Callable[[Config, Console], Config],
    console: Console | None = None,
    runner: Callable[[asyncio.Event], Runner] | None = None,
) -> bool | None:
    """Run the study to its end; returns whether any cell gave a result, None where it was interrupted.

    Args:
        ensure_policy: makes the policy of a seed where there is none, and returns the configuration that names it.
        runner: runs cells; it is given the event that a second interruption sets.  None: as the request says.

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
    machine.check_machine(plan.config(cells[0], runs=folder.runs))
    machine.check_model(plan.base)
    with folder.held(plan):
        known = folder.results(plan)
        if request.retry_failed:
            known = {cell: result for cell, result in known.items() if result.status == "done"}
        open_cells = [cell for cell in cells if cell not in known]
        if open_cells:
            engine = IN_PROCESS if request.in_process else machine.engine_of(plan.base)[0]
            at_once = min(len(open_cells), request.jobs or jobs_here(engine, console))
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
            runner = runner or (_in_process if request.in_process else _as_runs)
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


def _as_runs(hurry: asyncio.Event) -> Runner:
    return TrainProcess(hurry=hurry)


def _in_process(hurry: asyncio.Event) -> Runner:
    return InProcess()


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
    """Whether all jobs ended, and how long that took."""
    plan = request.plan

    def keep(result: CellResult) -> None:
        folder.write_result(plan, result)
        outputs.write_csv(folder, plan)

    async def work() -> bool:
        hurry = asyncio.Event()
        async with held(runner(hurry)) as ready:
            cells = run_cells(jobs, runner=ready, at_once=at_once, watcher=progress, keep=keep)
            return await until_interrupted(cells, hurry=hurry, say=progress.say)

    with StudyProgress(console, total=total, done=total - len(jobs), at_once=at_once) as progress:
        done = asyncio.run(work())
    return done, duration(progress.elapsed_s)


def _report(request: Request, folder: StudyFolder, console: Console) -> bool:
    """Write files, table and sentences of the cells that have ended; returns whether any gave a result."""
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
    _, free = machine.memory_gb()
    each = MEMORY_GB.get(engine, max(MEMORY_GB.values()))
    if free < each:
        console.print(f"only {free:.1f} GB of memory are free; a cell with {engine} takes about {each:g}")
    return max(1, min(cores, int(free / each)))


def arguments_of(files: Sequence[str], options: Mapping[str, str]) -> list[str]:
    """A plan's ``arguments``: with paths relative to the working folder."""
    return [*(outputs.relative(Path(file)) for file in files), *(f"--{k}={text}" for k, text in options.items())]


def left_out(base: Config, files: Sequence[str], own: Path) -> list[str]:
    """A line about the study's own settings that the user's files replace; none where no value differs.

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


def reproducing(plan: Plan, *, in_process: bool = False) -> str:
    """The command that makes the same study anywhere, its grid spelt out."""
    grid = ["--lags", _joined(plan.lags), "--corrections", _joined(plan.corrections), "--seeds", str(len(plan.seeds))]
    how = ["--in-process"] if in_process else []
    return shlex.join(["atpo", "study", "staleness", *plan.arguments, *grid, *how])


def _joined(values: Sequence[object]) -> str:
    return ",".join(map(str, values))
