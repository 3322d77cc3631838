"""The display of a run in progress: a live panel on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from atpo_async.report.collapse import Collapse, CollapseWatch
from atpo_async.report.screen import Screen
from atpo_async.run.metrics import Record, eval_versions, versions_said
from atpo_async.status.loading import RoleStart
from atpo_async.status.loading import line as starting_line

PLAIN_EVERY_S = 5.0
STARTING_EVERY_S = 10.0
"""Between two lines about roles that are starting."""
WINDOW = 8
"""Records of one source over which waits are averaged."""
MANY_STEPS = 5
"""Batches in a row without a tree to train on before the user is warned; again whenever their number has doubled."""


@dataclass
class RunState:
    """The newest figures of a run, from its records.  Pure: reads no clock."""

    total_steps: int
    since: float = 0.0
    """Unix seconds of this start: waits and speed are measured from here, figures also from before."""
    step: int = 0
    version: int = 0
    latest: dict[str, float] = field(default_factory=dict)
    by_source: dict[str, dict[str, float]] = field(default_factory=dict)
    evals: list[tuple[int, float]] = field(default_factory=list)
    """(step, greedy success)."""
    eval_mixed: str = ""
    """Which versions sampled the latest of them, where that was more than one."""
    failed_branches: int = 0
    steps_without_trees: int = 0
    """Batches in a row, up to the latest, without a tree to train on."""
    collapse: Collapse | None = None
    """Of success, where it came about in this start."""
    _watch: CollapseWatch = field(default_factory=CollapseWatch)
    _waits: dict[str, deque[tuple[float, float]]] = field(default_factory=dict)
    _pace: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=40))

    def feed(self, records: Sequence[Record]) -> None:
        for record in records:
            self.version = max(self.version, record.version)
            self.latest.update(record.metrics)
            self.failed_branches += int(record.metrics.get("actor/failed_branches", 0))
            self.by_source.setdefault(record.source, {}).update(record.metrics)
            if "eval/success" in record.metrics:
                self.evals.append((record.step, record.metrics["eval/success"]))
                oldest, newest = eval_versions(record) or (0, 0)
                self.eval_mixed = versions_said(oldest, newest) if oldest != newest else ""
            if "train/loss" in record.metrics or "train/success" in record.metrics:
                self.step = max(self.step, record.step)
            if "train/success" in record.metrics:
                collapse = self._watch.feed(record.step, record.metrics["train/success"])
                if record.time >= self.since:  # one from before has been said
                    self.collapse = self.collapse or collapse
            if record.time < self.since:
                continue
            if "batch/trees" in record.metrics:
                self.steps_without_trees = 0 if record.metrics["batch/trees"] else self.steps_without_trees + 1
            if "train/loss" in record.metrics:
                self._pace.append((record.time, record.step))
            for name in ("time/learner_wait_s", "time/actor_wait_s"):
                if name in record.metrics:
                    window = self._waits.setdefault(f"{name} {record.source}", deque(maxlen=WINDOW))
                    window.append((record.time, record.metrics[name]))

    def wait_share(self, name: str) -> float | None:
        """Share of the recent past that was spent in a wait, mean over the sources; None while unknown."""
        shares = []
        for key, window in self._waits.items():
            if key.startswith(f"{name} ") and len(window) > 1:
                took = window[-1][0] - window[0][0]
                if took > 0:
                    shares.append(min(1.0, sum(wait for _, wait in list(window)[1:]) / took))
        return sum(shares) / len(shares) if shares else None

    def summed(self, name: str) -> float | None:
        """Sum over the sources of each one's latest figure."""
        found = [metrics[name] for metrics in self.by_source.values() if name in metrics]
        return sum(found) if found else None

    def left_s(self) -> float | None:
        """Seconds to the last step at the recent pace; None while unknown."""
        if len(self._pace) < 2:
            return None
        (began, first), (ended, last) = self._pace[0], self._pace[-1]
        return (self.total_steps - last) * (ended - began) / (last - first) if last > first else None

    def memory(self) -> dict[str, float]:
        """Role -> MiB."""
        figures = self.by_source.get("supervisor", {})
        return {
            name.removeprefix("memory/").removesuffix("_mb"): value
            for name, value in figures.items()
            if name.startswith("memory/")
        }


class Progress(Screen):
    """Shows a run.  Use as a context; ``feed`` takes records, ``say`` shows other events.

    Args:
        advice: what to try where success collapses (``report.collapse.advice``).
    """

    def __init__(
        self,
        console: Console,
        *,
        title: str,
        total_steps: int,
        advice: str = "a lower learner.lr",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        super().__init__(console, self._live, clock=clock)
        self._title = title
        self.state = RunState(total_steps, since=self._began)
        self._said_at = clock()
        self._said = (0, 0)
        self._warned_at_steps = 0
        self._advice = advice
        self._told_collapse = False
        self._starting = ""
        self._starting_said_at = clock()

    def __exit__(self, *exc_info: object) -> None:
        super().__exit__(*exc_info)
        if self.state.step > self._said[0]:
            self.say(plain(self.state))

    def feed(self, records: Sequence[Record]) -> None:
        """Take in records and show what changed: the panel at every call, a plain line every few seconds and evals."""
        self.state.feed(records)
        self._warn_if_nothing_is_trained()
        self._tell_a_collapse()
        now = self._clock()
        if self._live is not None:
            self._refresh()
            return
        at = (self.state.step, len(self.state.evals))
        new_eval = at[1] > self._said[1]
        if new_eval or (at[0] > self._said[0] and now - self._said_at >= PLAIN_EVERY_S):
            self._said_at = now
            self._said = at
            self.say(plain(self.state))

    def starting(self, found: Sequence[RoleStart]) -> None:
        """Show which roles are starting: in the panel, or as a line every ``STARTING_EVERY_S``, later less often."""
        self._starting = starting_line(found)
        if self._live is not None:
            self._refresh()
            return
        now = self._clock()
        longest_s = max((start.for_s for start in found), default=0.0)
        if self._starting and now - self._starting_said_at >= max(STARTING_EVERY_S, longest_s / 6):
            self._starting_said_at = now
            self.say(self._starting)

    def _refresh(self) -> None:
        assert self._live is not None
        view = panel(self.state, title=self._title, elapsed_s=self.elapsed_s, starting=self._starting)
        self._live.update(view, refresh=True)

    def _warn_if_nothing_is_trained(self) -> None:
        steps = self.state.steps_without_trees
        if not steps:
            self._warned_at_steps = 0
        elif steps >= max(MANY_STEPS, 2 * self._warned_at_steps):
            self._warned_at_steps = steps
            success = _number(self.state.latest.get("train/success"), "{:.2f}")
            self.say(
                f"{steps} batches in a row had no tree to learn from: all leaves of each tree earned the same (success "
                f"{success}), so the weights do not change; near 0 the policy may have collapsed: a lower learner.lr "
                "or staleness.max_lag makes that less likely"
            )

    def _tell_a_collapse(self) -> None:
        if self.state.collapse is not None and not self._told_collapse:
            self._told_collapse = True
            self.say(self.state.collapse.line(self._advice))


def plain(state: RunState) -> str:
    """One line."""
    parts = [f"step {state.step}/{state.total_steps}", f"version {state.version}"]
    for label, name, form in (
        ("success", "train/success", "{:.2f}"),
        ("reward", "train/reward", "{:.2f}"),
        ("loss", "train/loss", "{:.3g}"),
    ):
        if name in state.latest:
            parts.append(f"{label} {form.format(state.latest[name])}")
    if state.evals:
        step, success = state.evals[-1]
        mixed = f", {state.eval_mixed}" if state.eval_mixed else ""
        parts.append(f"eval {success:.3f} (step {step}{mixed})")
    if "lag/mean" in state.latest:
        parts.append(f"lag {state.latest['lag/mean']:.1f}")
    if "is/ess_frac" in state.latest:
        parts.append(f"ess {state.latest['is/ess_frac']:.2f}")
    tokens = state.summed("tokens/generated_per_s")
    if tokens is not None:
        parts.append(f"{tokens:.0f} tokens/s")
    for label, name in (("learner waits", "time/learner_wait_s"), ("actors wait", "time/actor_wait_s")):
        share = state.wait_share(name)
        if share is not None:
            parts.append(f"{label} {share:.0%}")
    if state.failed_branches:
        parts.append(f"{state.failed_branches} branches failed")
    left = state.left_s()
    if left is not None and left > 0:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def panel(state: RunState, *, title: str, elapsed_s: float, starting: str = "") -> RenderableType:
    """A few rows that fit in 80 columns.

    Args:
        starting: which roles are still starting, in words.
    """
    head = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=state.total_steps, completed=state.step, width=28)
    left = state.left_s()
    times = f"{duration(elapsed_s)}" + (f", {duration(left)} left" if left is not None and left > 0 else "")
    head.add_row(Text(f"step {state.step}/{state.total_steps}", style="bold"), bar, Text(times, style="dim"))

    body = Table.grid(padding=(0, 3))
    for _ in range(4):
        body.add_column(no_wrap=True)
    latest = state.latest
    evaluation = f"{state.evals[-1][1]:.3f} at {state.evals[-1][0]}" if state.evals else "–"
    lag = _number(latest.get("lag/mean"), "{:.1f}")
    if "lag/max" in latest:
        lag += f" (max {latest['lag/max']:.0f})"
    rows = (
        ("success", _number(latest.get("train/success"), "{:.2f}"), "tokens/s made", _count(state, "generated")),
        ("reward", _number(latest.get("train/reward"), "{:.2f}"), "tokens/s trained", _count(state, "trained")),
        ("eval, greedy", evaluation, "learner waits", _percent(state.wait_share("time/learner_wait_s"))),
        ("lag, versions", lag, "actors wait", _percent(state.wait_share("time/actor_wait_s"))),
        ("ess", _number(latest.get("is/ess_frac"), "{:.2f}"), "version", str(state.version)),
    )
    for name, value, other, figure in rows:
        body.add_row(Text(name, style="dim"), Text(value, style="bold"), Text(other, style="dim"), Text(figure))
    parts: list[RenderableType] = [head, body]
    if starting:
        parts.append(Text(starting, style="dim italic"))
    elif not state.step:
        parts.append(Text("starting: the engine loads and the first trees grow", style="dim italic"))
    memory = state.memory()
    if memory:
        line = "  ".join(f"{role} {size:.0f} MB" for role, size in sorted(memory.items()))
        parts.append(Text(line, style="dim", overflow="ellipsis", no_wrap=True))
    if state.failed_branches:
        parts.append(Text(f"{state.failed_branches} branches failed: the actors' logs say why", style="yellow"))
    return Panel(Group(*parts), title=title, title_align="left", border_style="cyan", width=78)


def duration(seconds: float) -> str:
    """``1:05`` or ``2:03:04``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _percent(value: float | None) -> str:
    return _number(value, "{:.0%}")


def _count(state: RunState, kind: str) -> str:
    return _number(state.summed(f"tokens/{kind}_per_s"), "{:.0f}")
