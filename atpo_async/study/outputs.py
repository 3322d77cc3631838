"""The outputs of a study, all from its cells' results: a CSV, Markdown, a figure, a page, a section of a document."""

from __future__ import annotations

import re
from pathlib import Path

from atpo_async.core.errors import SetupError
from atpo_async.report.facts import GOAL
from atpo_async.report.progress import duration
from atpo_async.run.files import write_atomic
from atpo_async.study.cells import FINAL, WINDOW
from atpo_async.study.conclusions import sentences
from atpo_async.study.figure import write_figure
from atpo_async.study.folder import KIND, StudyFolder
from atpo_async.study.origin import Origin
from atpo_async.study.page import page
from atpo_async.study.plan import Plan
from atpo_async.study.summary import Summary
from atpo_async.study.tables import details, has, markdown_table, matrix, num_seeds, to_csv

BEGIN, END = f"<!-- study:{KIND}:begin -->", f"<!-- study:{KIND}:end -->"
"""Between them ``fill`` writes the results."""


def write_all(folder: StudyFolder, plan: Plan, *, command: str) -> list[Path]:
    """Write the four files into the study's folder and return their paths.

    Args:
        command: what reproduces the study, for the reader.
    """
    summary = summary_of(folder, plan)
    origin = Origin.of(folder, plan, command)
    paths = [folder.path / f"{KIND}.{ending}" for ending in ("csv", "md", "png", "html")]
    write_csv(folder, plan)
    write_atomic(paths[1], f"# Staleness\n\n{markdown(summary, origin, figure=f'{KIND}.png')}")
    figure = write_figure(summary, paths[2])
    write_atomic(paths[3], page(summary, origin))
    return [paths[0], paths[1], *figure, paths[3]]


def write_csv(folder: StudyFolder, plan: Plan) -> None:
    write_atomic(folder.path / f"{KIND}.csv", to_csv(summary_of(folder, plan)))


def summary_of(folder: StudyFolder, plan: Plan) -> Summary:
    return Summary.of(folder.results(plan).values(), lags=plan.lags, corrections=plan.corrections, seeds=plan.seeds)


def markdown(summary: Summary, origin: Origin, *, figure: str) -> str:
    """The results as a section without a heading.  ``figure`` is the figure's path for the reader."""
    first, *rest = sentences(summary)
    parts = [
        f"**{first}**",
        "\n".join(f"- {line}" for line in rest),
        f"![Success, effective sample size and KL against lag]({figure})",
        f"Sampled success at the end (mean of the last {WINDOW} steps), mean over {num_seeds(summary)} and, in "
        "brackets, lowest and highest:",
        markdown_table(matrix(summary, FINAL)),
        "Greedy success on held-out tasks after the last step:" if has(summary, "greedy") else "",
        markdown_table(matrix(summary, "greedy")) if has(summary, "greedy") else "",
        f"Beside it, means over seeds (*steps to {GOAL:g}*: each seed's):",
        markdown_table(details(summary)),
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
    return "Failed cells:\n\n" + "\n".join(f"- {r.cell.label}: {r.reason}" for r in failed)


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
    """Write the results into a Markdown file between its markers, and the figure beside it.

    Returns what was written.  Raises SetupError for a file without markers, and while cells are missing.
    """
    summary = summary_of(folder, plan)
    if summary.num_missing:
        raise SetupError(f"{path}: {summary.num_missing} cells of study {folder.path} have not ended; run them first")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise SetupError(f"{path} cannot be read: {exc.strerror}") from None
    figure = path.with_name(f"{KIND}.png")
    whole = fill(text, markdown(summary, Origin.of(folder, plan, command), figure=figure.name), where=str(path))
    written = write_figure(summary, figure)
    write_atomic(path, whole)
    return [path, *written]


def relative(path: Path) -> str:
    """A path for a command that others will type: relative where it lies below the working folder."""
    text = str(path)
    here = str(Path.cwd())
    return re.sub(rf"^{re.escape(here)}/", "", text)
