"""Makes the plan of a study from what the user asked for; whatever makes no grid is refused before anything starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from atpo_async.config import read_tables
from atpo_async.config.recipes import taken_from
from atpo_async.core.errors import ConfigError
from atpo_async.study.cells import LATE_STEPS, Cell
from atpo_async.study.grid.axes import DEMOS, RECIPES, Axis, parse_axis, recipes
from atpo_async.study.grid.choosing import parse_choosing
from atpo_async.study.grid.names import CORRECTION, LAG, RECIPE, TASK
from atpo_async.study.plan import CHOOSING_SEEDS, LEAST_STEPS, MAX_SEED, Plan, combinations, fingerprint

ALL = "all"
"""As the value of the axis ``recipe``: every recipe that leaves the task as it is and is not one with a task."""


FIRST_STAGE_SEEDS = 2
"""Of the first stage, where none are asked for."""

RIVALS = {LAG: "staleness.max_lag", CORRECTION: "correction."}
"""Axis -> the field, or the beginning of the fields, that no other axis may vary beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A study as it was asked for."""

    name: str
    axes: Sequence[str]
    """Each ``NAME=VALUE,VALUE``."""
    files: Sequence[Path | str] = ()
    """Configurations, laid over one another."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Dotted path -> text, over all files."""
    given: Sequence[str] = ()
    """Those of the options that the user gave himself."""
    seeds: int = 5
    against: Sequence[str] = ()
    """Each ``AXIS=VALUE``: what the others are compared with."""
    choose: str | None = None
    choose_by: str | None = None
    choose_at: Sequence[str] = ()
    choose_seeds: int | None = None
    """None: ``FIRST_STAGE_SEEDS``."""
    choose_for: str = "area"
    by_tokens: bool = False
    arguments: Sequence[str] = ()


def make_plan(wanted: Wanted, *, root: Path) -> Plan:
    """The plan.  Raises ConfigError for anything that does not make a grid, naming the axis, or option, and the value.

    Args:
        root: of the checkout, where configs/ is.
    """
    on_demo = _on_demo(wanted)
    axes = [parse_axis(_spelt_out(text, root), root=root, on_demo=on_demo) for text in wanted.axes]
    _check_names(axes)
    axes = with_references(axes, wanted.against)
    plan = Plan(
        name=wanted.name,
        axes=tuple(axes),
        seeds=(1,),
        own=read_tables(wanted.files),
        over=dict(wanted.options),
        by_tokens=wanted.by_tokens,
        arguments=tuple(wanted.arguments),
    )
    if wanted.choose is not None:
        choosing = parse_choosing(
            wanted.choose,
            axes,
            by=wanted.choose_by,
            at=wanted.choose_at,
            seeds=FIRST_STAGE_SEEDS if wanted.choose_seeds is None else wanted.choose_seeds,
            criterion=wanted.choose_for,
        )
        plan = replace(plan, choosing=choosing)
    elif wanted.choose_by is not None or wanted.choose_at or wanted.choose_seeds is not None:
        raise ConfigError(
            "--choose-by, --choose-at and --choose-seeds say how a value is chosen: name it with --choose "
            "FIELD=VALUE,VALUE"
        )
    _check_options(plan, wanted.given or wanted.options)
    plan = replace(plan, seeds=_seeds(plan, wanted.seeds))
    check_cells(plan)
    return plan


def _on_demo(wanted: Wanted) -> bool:
    tasks = next((text.partition("=")[2].split(",") for text in wanted.axes if text.startswith(f"{TASK}=")), [])
    if tasks:
        return all(task.strip() in DEMOS for task in tasks)
    return any(Path(file).stem in DEMOS for file in wanted.files)


def _spelt_out(text: str, root: Path) -> str:
    """``recipe=all`` with the names of all recipes for any task."""
    name, _, listed = (part.strip() for part in text.partition("="))
    words = [word.strip() for word in listed.split(",")]
    if name != RECIPE or ALL not in words:
        return text
    if len(words) > 1:
        raise ConfigError(f"--axis {text}: {ALL} stands for every recipe; leave the others out, or {ALL}")
    names = [each for each in recipes(root) if _for_any_task(root / RECIPES / f"{each}.toml")]
    return f"{RECIPE}={','.join(names)}"


def _for_any_task(file: Path) -> bool:
    """Whether it leaves the task as it is and is not one with a task (``[recipe]`` task)."""
    (table,) = read_tables(file)
    about = taken_from(table, str(file))
    has_task = about is not None and bool(about.task)
    return not has_task and not {"environment", "environments", "model", "team"} & set(table)


def _check_names(axes: Sequence[Axis]) -> None:
    """Raises ConfigError for no axis, and for two that decide the same field."""
    if not axes:
        raise ConfigError(
            "a study takes an axis at least, as in --axis correction=none,turn or --axis learner.lr=2e-4,4e-4"
        )
    names = [axis.name for axis in axes]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError(f"--axis {name} is given twice; name all its values in one: --axis {name}=VALUE,VALUE")
        for named, fields in RIVALS.items():
            if named in names and name.startswith(fields):
                raise ConfigError(f"--axis {name} with --axis {named}: both set {name}; take one of the two out")


def with_references(axes: Sequence[Axis], against: Sequence[str]) -> list[Axis]:
    found = {axis.name: axis for axis in axes}
    for text in against:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or name not in found:
            raise ConfigError(f"--against {text}: name an axis of the grid and its value: {', '.join(found)}")
        axis = found[name]
        if (reference := axis.value_named(value)) is None:
            raise ConfigError(f"--against {text}: {value!r} is none of the values of {name}: {', '.join(axis.values)}")
        found[name] = replace(axis, reference=reference)
    return list(found.values())


def _check_options(plan: Plan, given: Iterable[str]) -> None:
    decided = plan.decided()
    for name in given:
        if name in decided:
            raise ConfigError(f"--{name}: the grid of the study sets it; use {decided[name]}")


def _seeds(plan: Plan, count: int) -> tuple[int, ...]:
    first = plan.base.run.seed
    if count < 1:
        raise ConfigError(f"--seeds must be >= 1, got {count}")
    if count > CHOOSING_SEEDS:
        raise ConfigError(f"--seeds {count}: a study has at most {CHOOSING_SEEDS}")
    more = CHOOSING_SEEDS + (plan.choosing.seeds if plan.choosing else 0)
    if first + max(count, more) > MAX_SEED:
        raise ConfigError(
            f"--seeds {count} from run.seed = {first} on: seeds are below {MAX_SEED}; use a lower run.seed"
        )
    return tuple(range(first, first + count))


def check_cells(plan: Plan) -> None:
    """Raises ConfigError for a cell that no run could have, and for two that would be the same run."""
    _check_each_value(plan)
    made: dict[str, Cell] = {}
    names: dict[str, Cell] = {}
    for at in combinations(plan.axes):
        cell = Cell(at=at, seed=plan.seeds[0])
        _check_run(plan, cell)
        settings = plan.settings(cell)
        same = made.setdefault(fingerprint(settings), cell)
        if same is not cell:
            warm = "model.path" in dict(at) and plan.base.model.warm_start
            way_out = (
                "model.warm_start = true makes every cell's policy itself: add --model.warm_start false"
                if warm
                else "take one of the values out (an option, or an axis that goes over another, may set the field)"
            )
            raise ConfigError(f"cell {cell.label} would be the same run as cell {same.label}: {way_out}")
        if names.setdefault(cell.name, cell) is not cell:
            raise ConfigError(f"cells {cell.label} and {names[cell.name].label} would have one folder; rename a file")
    for cell in plan.of_one_seed():
        plan.config(cell, runs=Path("runs"))


def _check_each_value(plan: Plan) -> None:
    """Each value with all other axes at their first: the error then names the axis, or choice, that is to blame."""
    first = {axis.name: axis.values[0] for axis in plan.axes}
    seed = plan.seeds[0]
    for axis in plan.axes:
        for value in axis.values:
            cell = Cell(at=tuple((first | {axis.name: value}).items()), seed=seed)
            # A candidate of the first stage that is no value of its field is not the axis' fault.
            if (fault := _fault(replace(plan, choosing=None), cell)) is not None and _fault(plan, cell) is not None:
                name = axis.name if value != first[axis.name] else _to_blame(plan, first, axis.name)
                raise ConfigError(f"--axis {name}={value if name == axis.name else first[name]}: {fault}")
    if plan.choosing is None:
        return
    for value in plan.choosing.values:
        at = tuple((first | {plan.choosing.field: value}).items())
        if (fault := _fault(plan, Cell(at=at, seed=seed, stage="choose"))) is not None:
            raise ConfigError(f"--choose {plan.choosing.field}={value}: {fault}")


def _to_blame(plan: Plan, first: Mapping[str, str], otherwise: str) -> str:
    """Of axes at their first values, which have no configuration together, one that has one at another value."""
    for axis in plan.axes:
        for value in axis.values[1:]:
            cell = Cell(at=tuple((dict(first) | {axis.name: value}).items()), seed=plan.seeds[0])
            if _fault(replace(plan, choosing=None), cell) is None:
                return axis.name
    return otherwise


def _fault(plan: Plan, cell: Cell) -> ConfigError | None:
    """Why a cell has no configuration; None where it has one."""
    try:
        plan.config(cell, runs=Path("runs"))
    except ConfigError as exc:
        return exc
    return None


def _check_run(plan: Plan, cell: Cell) -> None:
    """Raises ConfigError where success at the end of the cell could not be measured, or not be compared."""
    config = plan.config(cell, runs=Path("runs"))
    lag = cell.lag or 0
    steps = config.run.steps - lag
    if cell.lag is None:
        late = min(LATE_STEPS, config.staleness.max_lag)
        if steps < LEAST_STEPS + late:
            raise ConfigError(
                f"cell {cell.label}: run.steps = {steps} with staleness.max_lag = {config.staleness.max_lag}: a cell's "
                f"success is the mean of {LEAST_STEPS} steps, and the last {late} batches may be of trees that came in "
                f"before; use at least --run.steps {LEAST_STEPS + late}"
            )
        if config.staleness.exact_lag is not None:
            raise ConfigError(
                f"cell {cell.label}: staleness.exact_lag = {config.staleness.exact_lag} grows no trees in the last "
                f"steps, in which success is measured; use --axis lag={config.staleness.exact_lag}, which makes up "
                "for them"
            )
        return
    if steps < LEAST_STEPS:
        raise ConfigError(
            f"cell {cell.label}: run.steps = {steps}: a cell's success is the mean of its last {LEAST_STEPS} steps; "
            f"use at least --run.steps {LEAST_STEPS}"
        )
    if lag >= steps:
        raise ConfigError(
            f"cell {cell.label}: lag {lag} with run.steps = {steps} would never be reached while success is measured: "
            f"the lag grows from 0 by one a step; use smaller lags or --run.steps {2 * lag}"
        )
    if config.learner.schedule != "constant":
        raise ConfigError(
            f"cell {cell.label}: learner.schedule = {config.learner.schedule!r} ends with the run, and a cell's run is "
            "longer by its lag: cells would differ by more than their lag; use --learner.schedule constant"
        )
