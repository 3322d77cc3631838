"""The figures of the report: which metrics each of them draws, and its caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atpo_async.report import charts
from atpo_async.report.charts import BLUE, GREEN, GREY, ORANGE, PALETTE, PURPLE, RED, TEAL, Axes, Line, Marker
from atpo_async.report.facts import GOAL, REWARD, Facts, Sample, by_step, mean, reward_names, series
from atpo_async.run.metrics import Record

LAG_PREFIXES = ("lag/turns_", "lag/hist_")
MAX_POINTS = 600


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing, as SVG, and the sentence below it."""

    drawing: str
    caption: str


def learning_lines(found: Facts, *, by_time: bool) -> list[Line]:
    """Sampled success, its mean of three, and greedy success, by step or by seconds."""

    def at(sample: Sample) -> tuple[float, float]:
        return (sample.time - found.origin if by_time else float(sample.step), sample.value)

    return [
        Line(name="sampled, each step", points=[at(s) for s in found.success], color=BLUE, width=1.2, opacity=0.35),
        Line(name="sampled, mean of three", points=[at(s) for s in found.smooth], color=BLUE, width=2.4),
        Line(name="greedy, held-out tasks", points=[at(s) for s in found.evals], color=ORANGE, dots=True),
    ]


def learning_by_step(found: Facts) -> Figure:
    axes = Axes(x_label="step", y_label="success", y_range=(0.0, 1.0), percent=True, guides=(GOAL,))
    return Figure(charts.line_chart(learning_lines(found, by_time=False), axes), "Success by step.")


def learning_by_time(found: Facts) -> Figure:
    markers: tuple[Marker, ...] = ()
    if found.goal is not None:
        seconds = found.goal.time - found.origin
        markers = (Marker(x=seconds, text=f"{GOAL:g} after {seconds:.0f} s"),)
    axes = Axes(
        x_label=_seconds(found),
        y_label="success",
        y_range=(0.0, 1.0),
        percent=True,
        guides=(GOAL,),
        markers=markers,
    )
    return Figure(
        charts.line_chart(learning_lines(found, by_time=True), axes), f"The same by time since the {found.since}."
    )


def rewards(records: Sequence[Record]) -> Figure | None:
    """The parts of the reward by step; None where a run has none."""
    names = reward_names(records)
    if not names:
        return None
    lines = [
        Line(
            name=name,
            points=[(float(s.step), s.value) for s in by_step(series(records, REWARD + name))],
            color=PALETTE[number % len(PALETTE)],
            width=1.8,
        )
        for number, name in enumerate(names[: len(PALETTE)])
    ]
    more = f"  {len(names) - len(PALETTE)} more are in metrics.jsonl." if len(names) > len(PALETTE) else ""
    drawing = charts.line_chart(lines, Axes(x_label="step", y_label="reward"))
    return Figure(drawing, f"Parts of the reward by name, without their weights, sampled in training.{more}")


def lag(records: Sequence[Record]) -> Figure:
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
    caption = "Lag of the turns in each batch: the learner's version when consumed minus the turn's oldest."
    return Figure(drawing, caption)


def lag_lines(records: Sequence[Record]) -> Figure:
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
        caption += f"  {mean(s.value for s in multi) or 0:.1%} of turns were sampled by more than one version."
    return Figure(charts.line_chart(lines, Axes(x_label="step", y_label="lag, versions")), caption)


def shares(records: Sequence[Record]) -> Figure:
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
        return Figure(charts.nothing(Axes(x_label="", y_label="")), "Where the time went: nothing recorded.")
    return Figure(
        charts.bars(rows),
        "Shares of each role's time.  The learner waits for data when generation is the bottleneck, the actors for "
        "admission when training is; weights are published by the one and swapped in by the others.",
    )


def _covered(records: Sequence[Record], interval: str, name: str) -> float:
    covered, last = 0.0, None
    for record in records:
        if name in record.metrics:
            covered += record.metrics.get(interval) or (record.time - (record.time if last is None else last))
            last = record.time
    return covered


def throughput(found: Facts, records: Sequence[Record]) -> Figure:
    lines = []
    for color, (label, name) in zip(
        PALETTE, (("generated", "tokens/generated_per_s"), ("trained", "tokens/trained_per_s")), strict=False
    ):
        samples = series(records, name)
        lines += _by_source(found, samples, label, color)
    drawing = charts.line_chart(lines, Axes(x_label=_seconds(found), y_label="tokens a second"))
    return Figure(drawing, "Tokens generated by the actors and trained on by the learner.")


def _by_source(found: Facts, samples: Sequence[Sample], label: str, color: str) -> list[Line]:
    sources = sorted({s.source for s in samples})
    lines = []
    for index, source in enumerate(sources):
        name = label if len(sources) == 1 else f"{label}, {source}"
        points = _timed(found, [s for s in samples if s.source == source])
        lines.append(Line(name=name, points=points, color=color if index == 0 else PALETTE[(index + 2) % len(PALETTE)]))
    return lines


def correction(records: Sequence[Record]) -> Figure:
    lines = [
        Line(name="effective sample size", points=_points(by_step(series(records, "is/ess_frac"))), color=PURPLE),
        Line(name="weights truncated", points=_points(by_step(series(records, "is/truncated_share"))), color=RED),
    ]
    axes = Axes(x_label="step", y_label="share", y_range=(0.0, 1.0), percent=True)
    caption = "Importance weights: effective sample size, and the share cut at the cap."
    return Figure(charts.line_chart(lines, axes), caption)


def clipping(records: Sequence[Record]) -> Figure:
    lines = [Line(name="ratios clipped", points=_points(by_step(series(records, "clip_share"))), color=ORANGE)]
    axes = Axes(x_label="step", y_label="share", percent=True)
    return Figure(charts.line_chart(lines, axes), "Share of ratios at the clip.")


def weights(found: Facts, records: Sequence[Record]) -> Figure:
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
    return Figure(charts.line_chart(lines, Axes(x_label=_seconds(found), y_label="milliseconds")), caption)


def memory(found: Facts, records: Sequence[Record]) -> Figure:
    lines = []
    for color, role in zip(PALETTE * 4, sorted(found.memory_mb), strict=False):
        samples = series(records, f"memory/{role}_mb")
        lines.append(Line(name=role, points=_timed(found, samples), color=color))
    peaks = ", ".join(f"{role} {size:.0f} MB" for role, size in sorted(found.memory_mb.items()))
    return Figure(
        charts.line_chart(lines, Axes(x_label=_seconds(found), y_label="MB")),
        f"Memory of each role, summed over its processes.  Peaks: {peaks or 'not recorded'}.",
    )


def _seconds(found: Facts) -> str:
    """Label of a time axis."""
    return f"seconds from the {found.since}"


def _points(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    return _thin([(float(s.step), s.value) for s in samples])


def _timed(found: Facts, samples: Sequence[Sample]) -> list[tuple[float, float]]:
    return _thin([(s.time - found.origin, s.value) for s in samples])


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about ``MAX_POINTS``, evenly: a run of weeks must still make a small page."""
    stride = -(-len(points) // MAX_POINTS) or 1
    return points[::stride]
