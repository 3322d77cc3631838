"""The facts of a run: success, goal, lag, waits and memory as numbers, computed from its metrics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from atpo_async.core.errors import SetupError
from atpo_async.report.by_environment import EnvironmentFacts, environment_facts
from atpo_async.report.collapse import advice, collapse_of
from atpo_async.run.metrics import Record, eval_versions, read_metrics, versions_said
from atpo_async.run.rundir import RunDir


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
    """The run in numbers."""

    name: str
    run_id: str
    steps: int
    total_steps: int
    origin: float
    """Unix seconds of the first lease, or of the first record where that is not known: zero of the time axes."""
    origin_is_lease: bool
    duration_s: float
    """Seconds from ``origin`` to the last record: without what came before it, the start of the engine above all."""
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
    rewards: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Name of a part of the reward -> its mean over the first and over the last three steps that have it."""
    environments: list[EnvironmentFacts] = field(default_factory=list)
    """Of a run that has several."""
    notes: list[str] = field(default_factory=list)

    @property
    def since(self) -> str:
        """The event at ``origin``, in words."""
        return "first lease" if self.origin_is_lease else "first record"

    def lines(self) -> list[str]:
        """For the end of a run on the terminal."""
        found = []
        if self.smooth:
            first, last = self.smooth[0].value, self.smooth[-1].value
            found.append(f"sampled success in training, mean of the first → last three steps: {first:.2f} → {last:.2f}")
        if self.evals:
            listed = ", ".join(f"{e.value:.3f} (step {e.step}{self._mixed(e.step)})" for e in self.evals)
            found.append(f"greedy success on held-out tasks: {listed}")
        if self.rewards:
            parts = ", ".join(f"{name} {first:.2f} → {last:.2f}" for name, (first, last) in self.rewards.items())
            found.append(f"parts of the reward, the same: {parts}")
        found += [each.line() for each in self.environments]
        if self.goal is not None:
            found.append(
                f"{GOAL:g} sampled success (mean of three steps) {self.goal.time - self.origin:.0f} s after the "
                f"{self.since}, at step {self.goal.step}"
            )
        lag = shown(self.lag_mean, "{:.1f}"), shown(self.lag_max, "{:.0f}")
        waits = shown(self.learner_wait_share, "{:.0%}"), shown(self.actor_wait_share, "{:.0%}")
        found.append(f"lag {lag[0]} versions (max {lag[1]}); learner waited {waits[0]} of the time, actors {waits[1]}")
        return found + self.notes

    def _mixed(self, step: int) -> str:
        oldest, newest = self.eval_versions.get(step, (0, 0))
        return f", {versions_said(oldest, newest)}" if oldest != newest else ""


GOAL = 0.9
"""Sampled success that the report dates: when the mean of three steps first reaches it."""


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
    unjudged = mean(s.value for s in series(records, "train/success_unknown"))
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
        duration_s=max(0.0, ended - origin),
        success=success,
        smooth=smooth,
        evals=by_step(series(records, "eval/success")),
        eval_versions={r.step: found for r in records if (found := eval_versions(r)) is not None},
        goal=next((s for s in smooth if s.value >= GOAL), None),
        lag_mean=mean(s.value for s in series(records, "lag/mean")),
        lag_max=max(lag_max, default=None),
        multi_version_share=mean(s.value for s in series(records, "turns/multi_version_share")),
        learner_wait_share=wait_share(records, "time/learner_wait_s", "time/between_steps_s"),
        actor_wait_share=wait_share(records, "time/actor_wait_s", "time/actor_interval_s"),
        probe_error=max(probe, default=None),
        memory_mb=memory,
        rewards=reward_parts(records),
        environments=environment_facts([each.label for each in rundir.config.environments], records),
        notes=[
            *_collapses(rundir, success),
            *failures(failed, untested),
            *unknowns(unknown, unjudged or 0.0),
        ],
    )


def _collapses(rundir: RunDir, success: Sequence[Sample]) -> list[str]:
    found = collapse_of((sample.step, sample.value) for sample in success)
    return [found.line(advice(rundir.config))] if found is not None else []


REWARD = "reward/"
"""Begins the metrics of a reward's parts in training."""


def reward_names(records: Sequence[Record]) -> list[str]:
    """Of the parts of the reward that training has metrics of."""
    return sorted({name.removeprefix(REWARD) for r in records for name in r.metrics if name.startswith(REWARD)})


def reward_parts(records: Sequence[Record]) -> dict[str, tuple[float, float]]:
    """Of each part its mean over the first and over the last three steps that have it."""
    found = {}
    for name in reward_names(records):
        values = [sample.value for sample in by_step(series(records, REWARD + name))]
        found[name] = (sum(values[:3]) / len(values[:3]), sum(values[-3:]) / len(values[-3:]))
    return found


def failures(branches: float, eval_tasks: float) -> list[str]:
    """A note on what failed, so that it is not mistaken for the policy's failure; empty if nothing did."""
    found = []
    if branches:
        found.append(f"{branches:.0f} branches failed and were left out; the actors' logs say why")
    if eval_tasks:
        found.append(f"{eval_tasks:.0f} held-out tasks failed in the evaluations and count as wrong")
    return found


def unknowns(eval_tasks: float, train_share: float) -> list[str]:
    """A note on chains without a success value, so that they are not mistaken for failures; empty if there are none."""
    found = []
    if eval_tasks:
        found.append(
            f"{eval_tasks:.0f} held-out tasks ended without a success value (StepResult.success is None): greedy "
            "success is that of the others"
        )
    if train_share:
        found.append(
            f"{max(train_share, 0.001):.1%} of what was sampled in training ended without a success value: sampled "
            "success is that of the rest"
        )
    return found


def wait_share(records: Sequence[Record], name: str, interval: str = "") -> float | None:
    """Seconds waited over seconds covered, all sources together; None without two records.

    A record covers its ``interval`` where it has one, else the time since its source's last record.
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


def mean(values: Iterable[float]) -> float | None:
    """None of no values."""
    found = list(values)
    return sum(found) / len(found) if found else None


def shown(value: float | None, form: str) -> str:
    """A value in the form given; a dash where it is not known."""
    return "–" if value is None else form.format(value)
