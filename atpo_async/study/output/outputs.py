"""The outputs of a study, all from its cells' results: a CSV, Markdown, a figure, a page, a section of a document."""

from __future__ import annotations

import re
from pathlib import Path

from atpo_async.core.errors import SetupError
from atpo_async.report.facts import GOAL
from atpo_async.report.progress import duration
from atpo_async.run.files import write_atomic
from atpo_async.study.cells import WINDOW
from atpo_async.study.folder import StudyFolder
from atpo_async.study.output.figure import panels, write_figure
from atpo_async.study.output.origin import Origin
from atpo_async.study.output.page import figure_tables, page
from atpo_async.study.output.tables import Rows, details, goals, markdown_table, to_csv
from atpo_async.study.plan import Plan
from atpo_async.study.results.comparisons import num_laid_down
from atpo_async.study.results.conclusions import method, sentences
from atpo_async.study.results.summary import Summary, place


def marks(name: str) -> tuple[str, str]:
    """Between them ``fill`` writes the results of the study of that name."""
    return f"<!-- study:{name}:begin -->", f"<!-- study:{name}:end -->"


def write_all(folder: StudyFolder, plan: Plan, *, command: str) -> list[Path]:
    """Write the four files into the study's folder, of a part of it under names of their own, and return their paths.

    Args:
        command: what reproduces the study, for the reader.
    """
    summary = summary_of(folder, plan)
    origin = Origin.of(folder, plan, command)
    stem = _stem(plan)
    paths = [folder.path / f"{stem}.{ending}" for ending in ("csv", "md", "png", "html")]
    write_csv(folder, plan)
    write_atomic(paths[1], f"# {origin.title}\n\n{markdown(summary, origin, figure=f'{stem}.png')}")
    figure = write_figure(summary, paths[2])
    write_atomic(paths[3], page(summary, origin))
    return [paths[0], paths[1], *figure, paths[3]]


def _stem(plan: Plan) -> str:
    """Of the names of its files."""
    return plan.name if plan.part_of is None else f"{plan.name}-part"


def write_csv(folder: StudyFolder, plan: Plan) -> None:
    """A line a cell."""
    text = to_csv(summary_of(folder, plan), choosing=plan.choosing, chosen=plan.chosen)
    write_atomic(folder.path / f"{_stem(plan)}.csv", text)


def summary_of(folder: StudyFolder, plan: Plan) -> Summary:
    """Of the cells that have ended."""
    return Summary.of(
        folder.results(plan).values(),
        axes=plan.axes,
        seeds=plan.seeds,
        by_tokens=plan.by_tokens,
        laid_down=num_laid_down(plan.axes, plan.part_of.axes) if plan.part_of is not None else 0,
    )


def markdown(summary: Summary, origin: Origin, *, figure: str) -> str:
    """The results as a section without a heading.  ``figure`` is the figure's path for the reader."""
    first, *rest = sentences(summary)
    tables = [part for heading, rows in figure_tables(summary) for part in (f"{heading}:", markdown_table(rows))]
    took, shown = goals(summary), panels(summary)
    parts = [
        f"**{first}**",
        "\n".join(f"- {line}" for line in rest),
        f"![{'; '.join(panel.title for panel in shown)}; learning curves]({figure})" if shown else "",
        *tables,
        method(summary),
        *(_took(summary, took) if took else []),
        "Beside it, means over seeds:",
        markdown_table(details(summary)),
        *([*origin.choices_said, markdown_table(origin.choices)] if origin.choices else []),
        failures(summary),
        f"{origin.made}; {origin.machine}; {duration(origin.cell_seconds)} of cells in all.  "
        + "  ".join(f"{name[:1].upper()}{name[1:]}: {value}." for name, value in origin.settings),
        f"```sh\n{origin.command}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _took(summary: Summary, rows: Rows) -> list[str]:
    budgets = [
        f"{place(task)}: {tokens:,.0f}" if task else f"{tokens:,.0f}" for task, tokens in summary.token_budgets.items()
    ]
    equal = (
        f"  Equal tokens are what every cell of a task sampled in all ({'; '.join(budgets)})."
        if summary.by_tokens and budgets
        else ""
    )
    return [
        f"What it took until the mean of {WINDOW} steps' sampled success was {GOAL:g}: the mean and its interval where "
        "every run got there; else how many did, and the mean with each run counted no further than those of the task "
        "that never got there were watched (restricted mean).  Tokens are the actions sampled for training, each once."
        f"{equal}",
        markdown_table(rows),
    ]


def failures(summary: Summary) -> str:
    failed = [result for result in summary.results if result.status == "failed"]
    if not failed:
        return ""
    return "Failed cells:\n\n" + "\n".join(f"- {r.cell.label}: {r.reason}" for r in failed)


def fill(text: str, section: str, *, name: str, where: str) -> str:
    """``text`` with ``section`` between its marks.  Raises SetupError where they are not there once, in order."""
    begin, end = marks(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SetupError(f"{where} needs one line {begin} and, below it, one line {end}: the results go between them")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{section.strip()}\n\n{end}{after}"


def check_fillable(path: Path, name: str) -> None:
    """Raises SetupError for a file that cannot be read or has no marks."""
    try:
        fill(path.read_text(encoding="utf-8"), "", name=name, where=str(path))
    except OSError as exc:
        raise SetupError(f"{path} cannot be read: {exc.strerror}") from None


def fill_file(folder: StudyFolder, plan: Plan, path: Path, *, command: str) -> list[Path]:
    """Write the results into a Markdown file between its marks, and the figure beside it.

    Returns what was written.  Raises SetupError for a file without marks, and while cells are missing.
    """
    summary = summary_of(folder, plan)
    if summary.num_missing:
        raise SetupError(f"{path}: {summary.num_missing} cells of study {folder.path} have not ended; run them first")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise SetupError(f"{path} cannot be read: {exc.strerror}") from None
    figure = path.with_name(f"{plan.name}.png")
    section = markdown(summary, Origin.of(folder, plan, command), figure=figure.name)
    whole = fill(text, section, name=plan.name, where=str(path))
    written = write_figure(summary, figure)
    write_atomic(path, whole)
    return [path, *written]


def relative(path: Path) -> str:
    """A path for a command that others will type: relative where it lies below the working folder."""
    text = str(path)
    here = str(Path.cwd())
    return re.sub(rf"^{re.escape(here)}/", "", text)
