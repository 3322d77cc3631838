"""The page of a study: one HTML file that opens without a network, readable in light and in dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from atpo_async.study.cells import COLUMNS, FINAL, WINDOW
from atpo_async.study.conclusions import WORDS, sentences
from atpo_async.study.figure import COLORS, PANELS
from atpo_async.study.folder import KIND
from atpo_async.study.origin import Origin
from atpo_async.study.plots import draw_curves, draw_panel, mark
from atpo_async.study.summary import NUM_ERRORS, RESOLUTION, Summary
from atpo_async.study.tables import details, has, matrix, num_seeds

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
    panels = "".join(_figure_of(draw_panel(summary, panel), panel.title) for panel in PANELS)
    small = "".join(_figure_of(draw_curves(summary, lag), f"Lag {lag}.") for lag in summary.lags)
    tables = [
        (f"Sampled success at the end, mean of the last {WINDOW} steps", matrix(summary, FINAL)),
        ("Greedy success on held-out tasks", matrix(summary, "greedy") if has(summary, "greedy") else []),
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
    seeds = num_seeds(summary)
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
        f"<footer>Made from cells/*.json by atpo-async; {KIND}.csv has every cell.  Bands are the lowest and the "
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
            f'stroke-width="2.2"/>{mark(17, 7, name)}</svg>'
        )
        entries.append(f"<span>{sign}{escape(name)}: {escape(WORDS[name])}</span>")
    return f"<div class='key'>{''.join(entries)}</div>"
