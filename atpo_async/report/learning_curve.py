"""The learning curve in a file of its own, as SVG or PNG."""

from __future__ import annotations

from pathlib import Path

from atpo_async.core.errors import SetupError
from atpo_async.report import charts
from atpo_async.report.charts import GREEN
from atpo_async.report.facts import GOAL, facts
from atpo_async.report.figures import learning_by_time, learning_lines
from atpo_async.run.files import write_atomic
from atpo_async.run.rundir import RunDir


def write_figure(rundir: RunDir, path: Path) -> Path:
    """The learning curve by time, as ``.svg`` or ``.png``.  Raises SetupError for another ending or without metrics."""
    found = facts(rundir)
    if path.suffix == ".svg":
        drawing = learning_by_time(found).drawing
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
        # To the left of the line: the legend is below the curves' end.
        label = f"{GOAL:g} after {seconds:.0f} s"
        axes.annotate(label, (seconds, 0.05), xytext=(-5, 0), textcoords="offset points", ha="right")
    axes.set(xlabel=f"seconds from the {found.since}", ylabel="success", ylim=(0, 1.02))
    axes.grid(color=charts.GRID)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.writing.png")
    figure.savefig(aside)
    aside.replace(path)
    return path
