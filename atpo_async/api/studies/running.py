"""Runs a study to its end: what its folder lacks, first stage and second, and what follows from the results."""

from __future__ import annotations

import asyncio
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from atpo_async.api import machine, own_parts
from atpo_async.api.own_parts_process import named
from atpo_async.config import Config
from atpo_async.core.errors import ConfigError, RunMismatch, SetupError
from atpo_async.models.policy import warm_start_command
from atpo_async.report.progress import duration
from atpo_async.study.cells import KNOWN_SHARE, Cell, CellResult, least_known
from atpo_async.study.folder import StudyFolder
from atpo_async.study.grid.misleading import misleading_parts
from atpo_async.study.grid.overriding import overridden
from atpo_async.study.output import outputs
from atpo_async.study.output.page import HEADINGS
from atpo_async.study.output.tables import choice_lines, choice_table, matrices
from atpo_async.study.pace import Pace
from atpo_async.study.plan import Plan, fingerprint, leaving
from atpo_async.study.progress import StudyProgress
from atpo_async.study.results.conclusions import num_seeds, sentences
from atpo_async.study.results.planning import power_lines, spreading
from atpo_async.study.runner import Job, Runner, TrainProcess, held, run_cells, until_interrupted
from atpo_async.study.workers.in_process import InProcess
from atpo_async.study.workers.settings import WITHOUT_EFFECT, in_one_process

IN_PROCESS = "in one process"

MEMORY_GB = {"vllm": 3.5, "transformers": 1.5, IN_PROCESS: 1.0}
"""GiB that one cell of the demo's policy takes on a CPU with all its roles, by engine."""

MakeRunner = Callable[[asyncio.Event], Runner]
"""Makes the runner of cells; it is given the event that a second interruption sets."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One study as the user asked for it."""

    plan: Plan
    out: Path
    jobs: int | None = None
    """Cells at once; None: as many as there are cores and memory for."""
    in_process: bool = False
    """Each cell in one process (``study.workers.in_process``), not as an `atpo train`."""
    retry_failed: bool = False
    report_only: bool = False
    plan_only: bool = False
    """Say how many cells there are, what they can tell apart and how long they take, and run nothing."""
    fill: Path | None = None
    """A Markdown file that is to hold the results."""
    spread: float | None = None
    """Standard deviation of final success over seeds, to plan the power by."""
    difference: float = 0.1
    """Of success: the seeds that it takes are said."""
    command: str
    """The command that reproduces the study."""
    again: str
    """The command that goes on with it on this machine."""


def study(
    request: Request,
    *,
    ensure_policy: Callable[[Config, Console], Config],
    console: Console | None = None,
    runner: MakeRunner | None = None,
) -> bool | None:
    """Run the study to its end; returns whether any cell gave a result, None where it was interrupted.

    Args:
        ensure_policy: makes the policy of a cell where there is none, and returns the configuration that names it.
        runner: runs cells.  None: as the request says.

    Raises ConfigError, SetupError and RunMismatch as the plan, the folder and the machine do.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    plan, folder = request.plan, StudyFolder(request.out)
    runner = runner or (_in_process if request.in_process else _as_runs)
    if request.jobs is not None and request.jobs < 1:
        raise ConfigError(f"--jobs must be >= 1, got {request.jobs}")
    if request.report_only:
        _check_part(plan, folder, console)
        return _report(request, plan, folder, console)
    if request.in_process:
        check_in_process(plan)
    check_own_parts(plan, lambda line: console.print(line, markup=False))
    if request.fill is not None:
        outputs.check_fillable(request.fill, plan.name)  # now, not when every cell has run
    folder.check(plan)
    check_way(plan, folder, in_process=request.in_process)
    if request.plan_only:
        _Study(request, folder, console, ensure_policy, runner).announce()
        return True
    check_machine(plan, folder)
    with folder.held(plan):
        whole = _Study(request, folder, console, ensure_policy, runner)
        whole.announce()
        if not whole.run():
            return None
        return _report(request, folder.resolved(plan), folder, console)


def _as_runs(hurry: asyncio.Event) -> Runner:
    return TrainProcess(hurry=hurry)


def _in_process(hurry: asyncio.Event) -> Runner:
    return InProcess()


def _check_part(plan: Plan, folder: StudyFolder, console: Console) -> None:
    """Raises for a grid that the folder does not have; says of which part of it the report is."""
    folder.check(plan, part=True)
    for line in plan.left_out():
        console.print(line, markup=False)


def check_way(plan: Plan, folder: StudyFolder, *, in_process: bool) -> None:
    """Raises RunMismatch where cells have ended that ran the other way: in one process a lag is exact, in a run of
    several it is at most ``staleness.max_lag``, so that their figures are not of one kind."""
    ended = [*folder.results(folder.resolved(plan)).values(), *folder.first_stage(plan).values()]
    others = sum(r.status == "done" and r.in_process is not None and r.in_process != in_process for r in ended)
    if not others:
        return
    ran = "each in one process" if not in_process else "each as a run of several processes"
    go_on = "add --in-process" if not in_process else "leave --in-process out"
    raise RunMismatch(
        f"study {folder.path}: {others} of its cells ran {ran}, and the two ways do not make one study: {go_on} to go "
        "on with it, or use another --out"
    )


def check_in_process(plan: Plan) -> None:
    """Raises ConfigError for a cell that asks for what one process does not have, and for two that would be the same
    there, naming them; before the first runs."""
    made: dict[tuple[str, str], Cell] = {}
    for cell in plan.of_one_seed():
        try:
            config = in_one_process(plan.config(cell, runs=Path("runs")))
        except ConfigError as exc:
            raise ConfigError(f"cell {cell.label}: {exc}") from None
        lag, steps = config.staleness.max_lag, config.run.steps
        if cell.lag is None and steps - lag < least_known(steps):
            raise ConfigError(
                f"cell {cell.label}: staleness.max_lag = {lag} is exact in one process, so that the last {lag} of "
                f"run.steps = {steps} batches are of trees that had come in before, and success is not known as they "
                f"are trained on: use --axis lag={lag}, whose runs are so much longer, at least --run.steps "
                f"{math.ceil(round(lag / (1 - KNOWN_SHARE), 6))}, or leave --in-process out"
            )
        settings = plan.settings(cell)
        same = made.setdefault((cell.stage, fingerprint(leaving(settings, WITHOUT_EFFECT))), cell)
        if same is not cell:
            was = plan.settings(same)
            idle = ", ".join(name for name in settings if settings[name] != was.get(name))
            raise ConfigError(
                f"cell {cell.label} would be the same run as cell {same.label} in one process, where {idle} has no "
                "effect: take one of the values out, or leave --in-process out"
            )


def check_own_parts(plan: Plan, say: Callable[[str], None]) -> None:
    """Raises ConfigError or SetupError for a cell whose own parts (``package.module:name``) cannot be had, naming it;
    before the first runs.  Cells of equal parts are looked at once."""
    seen = set()
    for cell in plan.of_one_seed():
        config = plan.config(cell, runs=Path("runs"))
        parts = repr(named(config))
        if parts in seen:
            continue
        seen.add(parts)
        try:
            own_parts.check(config, say=say)
        except (ConfigError, SetupError) as exc:
            raise type(exc)(f"cell {cell.label}: {exc}") from None


def check_machine(plan: Plan, folder: StudyFolder) -> None:
    """Raises SetupError where this machine lacks what a cell needs; one cell for each engine, task and model."""
    seen = set()
    for cell in plan.cells()[: plan.num_groups]:
        config = plan.config(cell, runs=folder.runs)
        needs = (config.actor.engine, config.task_described, config.model.path)
        if needs not in seen:
            seen.add(needs)
            machine.check_machine(config)
            machine.check_model(config)


class _Study:
    """The cells of a study that are still to be run, stage by stage."""

    def __init__(
        self,
        request: Request,
        folder: StudyFolder,
        console: Console,
        ensure_policy: Callable[[Config, Console], Config],
        runner: MakeRunner,
    ) -> None:
        self._request, self._folder, self._console = request, folder, console
        self._ensure_policy, self._runner = ensure_policy, runner
        self._plan = folder.resolved(request.plan)
        self._paths: dict[tuple[str, ...], str] = {}
        self._at_once: int | None = None

    def announce(self) -> None:
        """Say what the study has, what it can tell apart, and how long it takes as far as that is known."""
        plan, request = self._plan, self._request
        first, cells = plan.first_stage(), plan.cells()
        known = self._known(cells)
        grid = " × ".join(f"{len(axis.values)} of {axis.name}" for axis in plan.axes)
        self._say(f"study {self._folder.path}: {grid} × {num_seeds_of(plan)} = {len(cells)} cells, {len(known)} done")
        if plan.choosing is not None:
            done, last = self._folder.first_stage(plan), first[-1].seed
            seeds = f"seeds {first[0].seed}–{last}" if last != first[0].seed else f"seed {last}"
            self._say(
                f"first stage, which chooses {plan.choosing.field}: {len(first)} cells with {seeds}, {len(done)} done"
            )
        for line in [*overridden(plan), *misleading_parts(plan)]:
            self._say(line)
        results = [*self._folder.first_stage(plan).values(), *known.values()]
        spread = spreading(results, request.spread, axes=plan.axes, by_tokens=plan.by_tokens)
        for line in power_lines(plan.axes, len(plan.seeds), spread, wanted=request.difference):
            self._say(line)
        self._say(self._time_needed(first, cells))

    def _time_needed(self, first: Sequence[Cell], cells: Sequence[Cell]) -> str:
        waiting = [*self._open(first, self._folder.first_stage(self._plan)), *self._open(cells, self._known(cells))]
        if not waiting:
            return "every cell has ended"
        left = self._pace().left_s([], self._with_steps(waiting), lanes=self._lanes(len(waiting)))
        to_run = f"{_counted(len(waiting))} to run, {self._lanes(len(waiting))} at once"
        if left is None:
            return f"{to_run}; the time is told once a cell has made a quarter of its steps"
        return f"{to_run}: about {duration(left)}, by those that have ended here"

    def run(self) -> bool:
        """Whether all cells have ended; False where an interruption stopped them.

        Raises SetupError where the first stage tells nothing to choose by.
        """
        plan = self._plan
        first, cells = plan.first_stage(), plan.cells()
        known = self._known(cells)
        if first:
            # A choice that results rest on is not made again.
            ended = self._retried(self._folder.first_stage(plan), retry=not known)
            if not self._stage(first, ended, later=self._open(cells, known)):
                return False
            self._plan = plan = self._folder.resolved(plan)
            self._tell_choices(plan)
            self._check_choices(plan)
            if len(ended) < len(first):
                results = self._folder.first_stage(plan).values()
                spread = spreading(results, self._request.spread, axes=plan.axes, by_tokens=plan.by_tokens)
                for line in power_lines(plan.axes, len(plan.seeds), spread, wanted=self._request.difference):
                    self._say(line)
        return self._stage(cells, self._retried(self._known(cells), retry=True))

    def _known(self, cells: Sequence[Cell]) -> dict[Cell, CellResult]:
        return self._folder.results(self._plan)

    def _retried(self, ended: Mapping[Cell, CellResult], *, retry: bool) -> dict[Cell, CellResult]:
        """Without those that failed, where these are to run again."""
        again = self._request.retry_failed and retry
        return {cell: result for cell, result in ended.items() if not again or result.status == "done"}

    def _open(self, cells: Sequence[Cell], ended: Mapping[Cell, CellResult]) -> list[Cell]:
        return [cell for cell in cells if cell not in ended]

    def _stage(self, cells: Sequence[Cell], ended: Mapping[Cell, CellResult], later: Sequence[Cell] = ()) -> bool:
        """Run the cells that have not ended; whether they all did now."""
        open_cells = self._open(cells, ended)
        if not open_cells:
            return True
        plan, folder = self._plan, self._folder
        try:
            jobs = [
                Job(cell=cell, config=plan.config(cell, runs=folder.runs, model=self._policy(cell)), folder=folder)
                for cell in open_cells
            ]
        except KeyboardInterrupt:  # while a policy was made
            done, took = False, "a policy was begun"
        else:
            done, took = self._run(jobs, total=len(cells) + len(later), later=later)
        if done:
            ended = folder.first_stage(plan) if cells[0].stage else folder.results(plan)
            failed = sum(result.status == "failed" for result in ended.values())
            again = f", {failed} of them failed (--retry-failed runs these again)" if failed else ""
            self._say(f"{_counted(len(cells))} done{again}; {took}.")
            return True
        count = len(folder.results(plan)) + len(folder.first_stage(plan))
        everything = len(plan.cells()) + len(plan.first_stage())
        self._say(
            f"stopped after {took}; no process is left.  {count} of {everything} cells have ended.  The study goes on "
            f"with:  {self._request.again}"
        )
        return False

    def _policy(self, cell: Cell) -> str | None:
        """The folder of a cell's policy, made where it is one that is made and is not there; once for all alike."""
        config = self._plan.config(cell, runs=self._folder.runs)
        if not config.model.warm_start:
            return None
        key = tuple(warm_start_command(config))
        if key not in self._paths:
            self._paths[key] = self._ensure_policy(config, self._console).model.path
        return self._paths[key]

    def _run(self, jobs: Sequence[Job], *, total: int, later: Sequence[Cell]) -> tuple[bool, str]:
        """Whether all jobs ended, and how long that took."""
        plan, folder = self._plan, self._folder

        def keep(result: CellResult) -> None:
            folder.write_result(plan, result)
            if not result.cell.stage:
                outputs.write_csv(folder, plan)

        async def work() -> bool:
            hurry = asyncio.Event()
            async with held(self._runner(hurry)) as runner:
                cells = run_cells(jobs, runner=runner, at_once=at_once, watcher=progress, keep=keep)
                return await until_interrupted(cells, hurry=hurry, say=progress.say)

        at_once = self._lanes(len(jobs))
        with StudyProgress(
            self._console,
            waiting=[(job.cell, job.config.run.steps) for job in jobs],
            total=total,
            done=total - len(jobs) - len(later),
            later=self._with_steps(later),
            at_once=at_once,
            pace=self._pace(),
        ) as progress:
            done = asyncio.run(work())
        return done, duration(progress.elapsed_s)

    def _lanes(self, most: int) -> int:
        if self._at_once is None:
            engine = IN_PROCESS if self._request.in_process else machine.engine_of(self._plan.base)[0]
            self._at_once = self._request.jobs or jobs_here(engine, self._console)
        return min(most, self._at_once)

    def _pace(self) -> Pace:
        ended = self._folder.first_stage(self._plan) | self._folder.results(self._plan)
        return Pace.of(ended, dict(self._with_steps(list(ended))))

    def _with_steps(self, cells: Sequence[Cell]) -> list[tuple[Cell, int]]:
        steps = functools.cache(lambda at: self._plan.settings(Cell(at=at[0], seed=at[1], stage=at[2]))["run.steps"])
        return [(cell, steps((cell.at, cell.seed, cell.stage))) for cell in cells]

    def _tell_choices(self, plan: Plan) -> None:
        assert plan.choosing is not None
        chosen = self._folder.choices(plan)
        self._console.print(_drawn(choice_table(plan.choosing, chosen), title=f"choice of {plan.choosing.field}"))
        for line in choice_lines(plan.choosing, chosen):
            self._say(line)

    def _check_choices(self, plan: Plan) -> None:
        """Raises SetupError where every cell of a choice failed: the first candidate would be no choice at all."""
        assert plan.choosing is not None
        by, ended = plan.choosing.by, self._folder.first_stage(plan).values()
        for of, choice in self._folder.choices(plan).items():
            if not choice.settled:
                here = [result for result in ended if dict(result.cell.at).get(by, "") == of]
                raise SetupError(
                    f"no value of {plan.choosing.field} can be chosen{f' for {by} {of}' if of else ''}: "
                    f"all {len(here)} cells of the first stage failed, as {here[0].cell.label}: {here[0].reason}.  "
                    "Mend that and add --retry-failed, or name other candidates with another --out"
                )

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False)


def _counted(cells: int) -> str:
    return "1 cell" if cells == 1 else f"{cells} cells"


def num_seeds_of(plan: Plan) -> str:
    """``5 seeds``."""
    return "one seed" if len(plan.seeds) == 1 else f"{len(plan.seeds)} seeds"


def _report(request: Request, plan: Plan, folder: StudyFolder, console: Console) -> bool:
    """Write files, table and sentences of the cells that have ended; returns whether any gave a result."""
    written = outputs.write_all(folder, plan, command=request.command)
    if request.fill is not None:
        written += outputs.fill_file(folder, plan, request.fill, command=request.command)
    summary = outputs.summary_of(folder, plan)
    for place, rows in matrices(summary, summary.final):
        about = f"{HEADINGS[summary.final]}: over {num_seeds(summary)} [95 % interval]"
        console.print(_drawn(rows, title=f"{about}: {place}" if place else about))
    for line in sentences(summary):
        console.print(line, markup=False)
    for path in written:
        console.print(f"wrote {path}", markup=False)
    return any(result.status == "done" for result in summary.results)


def _drawn(rows: Sequence[Sequence[str]], *, title: str) -> Table:
    head, *body = rows
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(head):
        table.add_column(column, no_wrap=i == 0)
    for row in body:
        table.add_row(*row)
    return table


def jobs_here(engine: str, console: Console) -> int:
    """Cells that this machine takes at once: a core and ``MEMORY_GB`` each, one at least."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    _, free = machine.memory_gb()
    each = MEMORY_GB.get(engine, max(MEMORY_GB.values()))
    if free < each:
        console.print(f"only {free:.1f} GB of memory are free; a cell with {engine} takes about {each:g}")
    return max(1, min(cores, int(free / each)))
