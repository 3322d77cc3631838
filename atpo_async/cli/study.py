"""``atpo study``: the plan that was asked for, and the study that it makes."""

from __future__ import annotations

import argparse
import contextlib
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from atpo_async.api.policy import ensure_policy
from atpo_async.api.studies.running import Request, study
from atpo_async.cli.common import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, LAYERS, Asked, demo_config, note
from atpo_async.config import as_options, get, load
from atpo_async.core.errors import ConfigError
from atpo_async.study.cells import LATE_STEPS
from atpo_async.study.folder import StudyFolder
from atpo_async.study.grid.choosing import CRITERIA
from atpo_async.study.grid.making import FIRST_STAGE_SEEDS, Wanted, make_plan, with_references
from atpo_async.study.grid.names import CORRECTION, LAG, TASK
from atpo_async.study.grid.presets import DEFAULT_SEEDS, OWN_NAME, PRESETS, Preset
from atpo_async.study.output import outputs
from atpo_async.study.plan import LEAST_STEPS, Plan, joined

DEFAULT_DIFFERENCE = 0.1
"""Of success: the seeds that it would take are said."""


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Of the command line."""
    parser.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        help=f"{', '.join(PRESETS)}: a study that comes with its axes; any other name is that of a study of yours, of "
        f"its folder runs/study-NAME and its files; {OWN_NAME} where left out",
    )
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="*",
        default=[],
        help=f"other configurations than those of the study, or configs/demo.toml; {LAYERS}.  A cell makes "
        f"{LEAST_STEPS + LATE_STEPS} steps at least ({LEAST_STEPS}, and {LATE_STEPS} for batches of trees that came in "
        f"before), with lags {LEAST_STEPS}",
    )
    _add_grid(parser)
    _add_choosing(parser)
    parser.add_argument("--out", metavar="DIR", help="the study's folder; runs/study-NAME where left out")
    parser.add_argument("--jobs", metavar="N", type=int, help="cells at once; as cores and memory allow where left out")
    parser.add_argument(
        "--in-process",
        action="store_true",
        help="each cell in one process, without sockets, with an engine of its own and an exact lag: three times as "
        "many cells an hour",
    )
    parser.add_argument("--retry-failed", action="store_true", help="run cells that failed again")
    parser.add_argument(
        "--report",
        action="store_true",
        help="run nothing: tables and figures of what has ended; the grid's options name a part of it",
    )
    parser.add_argument("--plan", action="store_true", help="run nothing: say how many cells, what power, what time")
    parser.add_argument(
        "--fill",
        metavar="FILE",
        help="write the results into a Markdown file, between its lines "
        "<!-- study:NAME:begin --> and <!-- study:NAME:end -->",
    )
    parser.add_argument(
        "--spread", metavar="S", type=float, help="standard deviation of final success over seeds, to plan the power by"
    )
    parser.add_argument(
        "--difference",
        metavar="D",
        type=float,
        default=DEFAULT_DIFFERENCE,
        help=f"of success: the seeds that it takes are said; {DEFAULT_DIFFERENCE:g} where left out",
    )


def _add_grid(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--axis",
        metavar="NAME=VALUES",
        action="append",
        default=[],
        help="an axis and its values, with commas between them: a field (learner.lr=2e-4,4e-4; a value with commas in "
        "brackets or quotes), lag, correction, recipe (names of configs/recipes, paths, or all), config (paths) or "
        "task (names of configs/, paths); given once for each axis",
    )
    parser.add_argument("--lags", metavar="LIST", help="learner versions: --axis lag=LIST")
    parser.add_argument("--corrections", metavar="LIST", help="by name: --axis correction=LIST; a wrong one lists all")
    parser.add_argument(
        "--seeds",
        metavar="N",
        type=int,
        help="how many, from run.seed on; where left out "
        + ", ".join(f"{preset.seeds} of {name}" for name, preset in PRESETS.items() if preset.seeds != DEFAULT_SEEDS)
        + f" and {DEFAULT_SEEDS} of others",
    )
    parser.add_argument(
        "--against",
        metavar="AXIS=VALUE",
        action="append",
        default=[],
        help="the value with which the others of its axis are compared; none of corrections, at2po of recipes, else "
        "the first one",
    )
    parser.add_argument(
        "--by",
        choices=("steps", "tokens"),
        help="success is compared after equal steps, or at equal tokens generated; steps where left out, of "
        f"{', '.join(name for name, preset in PRESETS.items() if preset.by_tokens)} tokens",
    )


def _add_choosing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--choose",
        metavar="FIELD=VALUES",
        action="append",
        default=[],
        help="a field whose value is chosen in a first stage, with seeds of its own",
    )
    parser.add_argument(
        "--choose-by",
        metavar="AXIS",
        help="the axis for each of whose values one is chosen; all: one for the whole grid; may be left out where the "
        "grid has one axis",
    )
    parser.add_argument(
        "--choose-at",
        metavar="AXIS=VALUES",
        action="append",
        default=[],
        help="another axis' values in that stage; all of them where left out",
    )
    parser.add_argument(
        "--choose-seeds", metavar="N", type=int, help=f"of that stage; {FIRST_STAGE_SEEDS} where left out"
    )
    parser.add_argument(
        "--choose-for",
        metavar="FIGURE",
        choices=tuple(CRITERIA),
        default="area",
        help=f"what the choice is by: {', '.join(CRITERIA)}; area where left out",
    )


def _one_choice(chosen: Sequence[str]) -> str | None:
    if len(chosen) > 1:
        raise ConfigError(f"--choose {' --choose '.join(chosen)}: a study chooses one field; make the other an --axis")
    return chosen[0] if chosen else None


def run(asked: Asked) -> int:
    """Run the study, or only write what follows from it."""
    args = asked.args
    name, files = _name_and_files(args)
    out = Path(args.out) if args.out else _folder_of(name)
    plan = _asked_plan(asked, name, files, out)
    request = Request(
        plan=plan,
        out=out,
        jobs=args.jobs,
        in_process=args.in_process,
        retry_failed=args.retry_failed,
        report_only=args.report,
        plan_only=args.plan,
        fill=Path(args.fill) if args.fill else None,
        spread=_positive(args.spread, "--spread"),
        difference=_positive(args.difference, "--difference") or DEFAULT_DIFFERENCE,
        command=reproducing(plan, in_process=args.in_process),
        again=asked.again,
    )
    found = study(request, ensure_policy=ensure_policy)
    return EXIT_INTERRUPTED if found is None else EXIT_DONE if found else EXIT_FAILED


def _positive(value: float | None, option: str) -> float | None:
    if value is not None and not (math.isfinite(value) and 0 < value <= 1):
        raise ConfigError(f"{option} must be above 0 and at most 1, as success is, got {value:g}")
    return value


def _name_and_files(args: argparse.Namespace) -> tuple[str, list[str]]:
    """The first word is the study's name, unless it is a file."""
    words = [word for word in [args.name, *args.config] if word is not None]
    if words and not words[0].endswith((".toml", ".json")) and not Path(words[0]).is_file():
        name, files = words[0], words[1:]
    else:
        name, files = OWN_NAME, words
    axes = args.axis or args.lags or args.corrections
    if name not in PRESETS and not axes and not args.report:
        _check_new(Path(args.out) if args.out else _folder_of(name))
        lead = f"{name}: no study comes with that name; there are" if words and name == words[0] else "there are"
        raise ConfigError(
            f"a study takes an axis at least, as in --axis correction=none,turn or --axis learner.lr=2e-4,4e-4; {lead} "
            f"{', '.join(PRESETS)}, which have theirs"
        )
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"{name!r} is no name of a study: letters, digits, - and _ make one")
    return name, files


def _folder_of(name: str) -> Path:
    return Path("runs") / f"study-{name}"


def _check_new(out: Path) -> None:
    """Raises ConfigError for a study that is there, with the command that goes on with it."""
    if not (out / "study.json").is_file():
        return
    was = StudyFolder(out).plan()
    raise ConfigError(
        f"study {out} is there, and goes on when its grid is named again:  {reproducing(was)} --out {out}  (with "
        "--in-process if it ran so); --report writes its tables and figures, --plan besides says what is left"
    )


def _axes_given(args: argparse.Namespace) -> dict[str, str]:
    """Axis -> its values, in the order given.  Raises ConfigError for one that is there twice."""
    texts = list(args.axis)
    texts += [f"{LAG}={args.lags}"] if args.lags is not None else []
    texts += [f"{CORRECTION}={args.corrections}"] if args.corrections is not None else []
    found: dict[str, str] = {}
    for text in texts:
        axis, equals, listed = (part.strip() for part in text.partition("="))
        if not equals or not axis:
            raise ConfigError(f"--axis {text}: an axis is NAME=VALUE,VALUE, as in --axis learner.lr=2e-4,4e-4")
        if axis in found:
            raise ConfigError(f"--axis {axis} is given twice; name all its values in one: --axis {axis}=VALUE,VALUE")
        found[axis] = listed
    return found


def _asked_plan(asked: Asked, name: str, files: Sequence[str], out: Path) -> Plan:
    """The plan that was asked for.  For a report the study's folder has it, and the options select a part of it."""
    args, texts = asked.args, asked.options
    given = _axes_given(args)
    part_of: Plan | None = None
    if args.report:
        found = StudyFolder(out).plan(axes=given, seeds=args.seeds)
        if args.against:
            found = _against(found, args.against)
        if not files and not texts:
            return found
        part_of = found.part_of
        given = {axis.name: axis.text.partition("=")[2] for axis in found.axes}
    preset = PRESETS.get(name)
    axes = dict(preset.axes) | given if preset is not None else given
    paths = _base_files(preset, files, axes)
    plan = make_plan(
        Wanted(
            name=name,
            axes=[f"{axis}={listed}" for axis, listed in axes.items()],
            files=paths,
            options=(dict(preset.options) if preset is not None else {}) | dict(texts),
            given=list(texts),
            seeds=args.seeds if args.seeds is not None else preset.seeds if preset is not None else DEFAULT_SEEDS,
            against=args.against,
            choose=_one_choice(args.choose),
            choose_by=args.choose_by,
            choose_at=args.choose_at,
            choose_seeds=args.choose_seeds,
            choose_for=args.choose_for,
            by_tokens=args.by == "tokens" if args.by is not None else preset is not None and preset.by_tokens,
            arguments=arguments_of(files, texts),
        ),
        root=_root(),
    )
    if files and preset is not None and preset.files and not args.report:
        with contextlib.suppress(ConfigError):  # outside a checkout there are no settings of ours
            for line in left_out(files, texts, demo_config(preset.files[-1])):
                note(line)
    return StudyFolder(out).resolved(replace(plan, part_of=part_of)) if args.report else plan


def _against(plan: Plan, against: Sequence[str]) -> Plan:
    """A folder's plan with other references."""
    return plan.of_grid(axes=with_references(plan.axes, against), seeds=plan.seeds)


def _base_files(preset: Preset | None, files: Sequence[str], axes: Mapping[str, str]) -> list[Path]:
    """What all cells begin with: the user's files, else the study's own, else the demo where no axis is the task."""
    if files:
        return [Path(file) for file in files]
    if preset is not None:
        return [demo_config(stem) for stem in preset.files] if preset.files or TASK in axes else [demo_config()]
    return [] if TASK in axes else [demo_config()]


def _root() -> Path:
    """The checkout, or the working folder, where configs/ is."""
    try:
        return demo_config().parent.parent
    except ConfigError:
        return Path()


def arguments_of(files: Sequence[str], options: Mapping[str, str]) -> list[str]:
    """A plan's ``arguments``: with paths relative to the working folder."""
    return [*(outputs.relative(Path(file)) for file in files), *(f"--{k}={text}" for k, text in options.items())]


def left_out(files: Sequence[str], options: Mapping[str, str], own: Path) -> list[str]:
    """A line about the study's own settings that the user's files replace; none where no value differs.

    Args:
        own: the file of those settings; it need not exist.
    """
    if not own.is_file() or any(Path(file).name == own.name for file in files):
        return []
    base = load(list(files), options)
    texts = as_options(own)
    studys = load(own)
    differing = [f"{name} = {text}" for name, text in texts.items() if get(base, name) != get(studys, name)]
    if not differing:
        return []
    return [
        f"{', '.join(files)} stands in for {own}, and its settings are not used: {', '.join(differing)}; name it last "
        "to lay them over yours"
    ]


def _reporting(plan: Plan, whole: Plan) -> str:
    """The command that reports a part of a study, or compares its values with other references."""
    words = ["atpo", "study", *([plan.name] if plan.name != OWN_NAME else []), "--report"]
    for axis, every in zip(plan.axes, whole.axes, strict=True):
        words += ["--axis", f"{axis.name}={joined(axis.values)}"] if axis.values != every.values else []
        words += ["--against", f"{axis.name}={axis.against}"] if axis.reference != every.reference else []
    return shlex.join([*words, *(["--seeds", str(len(plan.seeds))] if plan.seeds != whole.seeds else [])])


def reproducing(plan: Plan, *, in_process: bool = False) -> str:
    """The command that makes the same study anywhere, its grid spelt out; of a part of it, in a second line, the one
    that reports it."""
    if plan.part_of is not None:
        return f"{reproducing(plan.part_of, in_process=in_process)}\n{_reporting(plan, plan.part_of)}"
    words = ["atpo", "study", *([plan.name] if plan.name != OWN_NAME else []), *plan.arguments]
    for axis in plan.axes:
        option = {LAG: "--lags", CORRECTION: "--corrections"}.get(axis.name) if plan.name == "staleness" else None
        listed = axis.text.partition("=")[2]
        words += [option, listed] if option else ["--axis", axis.text]
    words += ["--seeds", str(len(plan.seeds))]
    words += [word for axis in plan.axes if axis.reference for word in ("--against", f"{axis.name}={axis.reference}")]
    preset = PRESETS.get(plan.name)
    if plan.by_tokens != (preset is not None and preset.by_tokens):
        words += ["--by", "tokens" if plan.by_tokens else "steps"]
    words += ["--in-process"] if in_process else []
    return shlex.join([*words, *(plan.choosing.words if plan.choosing is not None else [])])
