"""What of a grid will not show what its name says, told before it runs.

Axes whose values are the same run, recipes on a task that they are not for, lags that are there for a few steps only,
cells of other lengths.
"""

from __future__ import annotations

from pathlib import Path

from atpo_async.config import Config
from atpo_async.config.idle_settings import WORKS_WITH, without_effect
from atpo_async.config.recipes import TABLE
from atpo_async.study.cells import Cell
from atpo_async.study.grid.names import RECIPE
from atpo_async.study.plan import Plan


def misleading_parts(plan: Plan) -> list[str]:
    """A line for each."""
    cells = [(cell, plan.config(cell, runs=Path("runs"))) for cell in plan.cells()[: plan.num_groups]]
    lines = []
    for axis in plan.axes:
        if axis.name in WORKS_WITH and len(axis.values) > 1:
            lines += _without_effect(axis.name, cells)
        elif axis.name == RECIPE:
            lines += _on_another_task(plan, cells)
    return [*lines, *_mostly_younger(cells), *_of_other_lengths(cells)]


def _without_effect(name: str, cells: list[tuple[Cell, Config]]) -> list[str]:
    """The axis is a field that is not read, in all cells or in some."""
    found = [(cell, why) for cell, config in cells if (why := without_effect(config, name)) is not None]
    if not found:
        return []
    cell, why = found[0]
    if len(found) == len(cells):
        return [f"--axis {name} {why}: its values are the same run, and a difference between them is chance"]
    some = f"in {len(found)} of {len(cells)} cells of a seed, as in {cell.label}"
    return [f"{name} {why} {some}: there its values are the same run"]


def _on_another_task(plan: Plan, cells: list[tuple[Cell, Config]]) -> list[str]:
    axis = plan.axis(RECIPE)
    assert axis is not None
    lines = []
    for value, tables in axis.layers.items():
        task = tables[0].get(TABLE, {}).get("task", "")
        here = [config for cell, config in cells if dict(cell.at)[RECIPE] == value and not config.environments]
        others = {config.environment.name for config in here} - {task}
        if task and others:
            lines.append(
                f"recipe {value} is for environment.name = {task!r}, and runs on {', '.join(sorted(others))} here: it "
                "is not the method of its name there"
            )
    return lines


def _mostly_younger(cells: list[tuple[Cell, Config]]) -> list[str]:
    """Lags that are there for less than half of the steps over which success counts."""
    found = {cell.lag: config.run.steps - cell.lag for cell, config in cells if cell.lag is not None}
    return [
        f"lag {lag}: of the {steps} steps over which success counts the first {lag} train on batches of the first "
        f"policy, at smaller lags; --run.steps {2 * lag} or more makes it count for half of them"
        for lag, steps in sorted(found.items())
        if 2 * lag > steps
    ]


def _of_other_lengths(cells: list[tuple[Cell, Config]]) -> list[str]:
    """Recipes or other files may set the steps of their cells."""
    lengths: dict[tuple[str, int], Cell] = {}
    for cell, config in cells:
        lengths.setdefault((config.task_described, config.run.steps - (cell.lag or 0)), cell)
    lines = []
    for task in dict.fromkeys(task for task, _ in lengths):
        here = {steps: cell for (of, steps), cell in lengths.items() if of == task}
        if len(here) > 1:
            listed = ", ".join(f"{steps} ({cell.label})" for steps, cell in sorted(here.items()))
            lines.append(f"cells differ in run.steps: {listed}; success is compared after {min(here)}")
    return lines
