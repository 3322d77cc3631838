"""The figure of docs/scaling.md: speed-up by lag, steps by how GPUs are divided, and where one buffer ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.model_parts.questions import ASYNCHRONOUS, LAGS, MANY, TOOLS_S, Answers

COLORS = {8: "#2a6fbb", 64: "#2e8b57", 512: "#d2691e"}
MARKERS = {8: "o", 64: "s", 512: "^"}
"""Colour is not to be the only sign."""
OTHER = "#707070", "D"


def draw(answers: Answers, gpus: Sequence[int], path: Path, lags: Sequence[int] = LAGS) -> None:
    """Write the figure; its format is that of the file's name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, split, knee) = pyplot.subplots(1, 3, figsize=(13.5, 4.2), layout="constrained")
    _speed_ups(speed, answers, gpus, lags)
    _splits(split, answers, gpus, lags)
    _knee(knee, answers)
    for panel in (speed, split, knee):
        panel.grid(color="#e0e0e0", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _style(gpus: int, latency_s: float) -> dict[str, Any]:
    color, marker = COLORS.get(gpus, OTHER[0]), MARKERS.get(gpus, OTHER[1])
    return {"color": color, "marker": marker, "markersize": 5, "linestyle": "-" if latency_s == TOOLS_S[0] else "--"}


def _speed_ups(panel: Any, answers: Answers, gpus: Sequence[int], lags: Sequence[int]) -> None:
    for number in gpus:
        for latency_s in TOOLS_S if number < MANY else TOOLS_S[:1]:
            slow = answers.best(number, lags[0], latency_s).outcome.step_s
            ups = [slow / answers.best(number, lag, latency_s).outcome.step_s for lag in lags]
            panel.plot(lags, ups, label=f"{number} GPUs, tool {latency_s:g} s", **_style(number, latency_s))
    panel.set(title="What lag for what speed-up", xlabel="staleness.max_lag", ylabel="steps/s over those of max_lag 0")
    panel.set_xticks(list(lags))
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False, fontsize=8)


def _splits(panel: Any, answers: Answers, gpus: Sequence[int], lags: Sequence[int]) -> None:
    lag = max(each for each in lags if each <= ASYNCHRONOUS)
    for number in gpus:
        found = sorted(
            (each.plan.learner / number, each.outcome.step_s)
            for each in answers.sweep
            if (each.plan.gpus, each.plan.max_lag, each.plan.latency_s) == (number, lag, TOOLS_S[0])
        )
        least = min(step for _, step in found)
        panel.plot(
            [share for share, _ in found], [least / step for _, step in found], label=f"{number} GPUs",
            **_style(number, TOOLS_S[0]),
        )  # fmt: skip
    panel.set(
        title=f"How many actors a learner (max_lag {lag}, tool {TOOLS_S[0]:g} s)", xlabel="learner's share of the GPUs",
        ylabel="steps/s over the best division",
    )  # fmt: skip
    panel.set_xlim(0, 0.7)
    panel.set_ylim(0, 1.08)
    panel.legend(frameon=False, fontsize=8, loc="lower right")


def _knee(panel: Any, answers: Answers) -> None:
    panel.plot(*zip(*answers.buffer, strict=True), color=OTHER[0], marker=OTHER[1], markersize=5)
    panel.axvline(1.0, color="#b03030", linewidth=1, linestyle=":")
    panel.annotate("one buffer's limit", (1.0, 0.12), xytext=(5, 0), textcoords="offset points", fontsize=8)
    panel.set(
        title="When one buffer ends", xlabel="turns/s of the fleet over those that one buffer takes",
        ylabel="steps/s over those with a faster buffer",
    )  # fmt: skip
    panel.set_ylim(0, 1.08)
    panel.set_xlim(left=0)
