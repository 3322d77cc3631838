"""The model against real runs: calibrated by one run, it has to say what three others do.

All four are real runs of the slow tool's task under a policy that stays as it is (a learning rate of next to nothing),
so that trees, and how many of them have a signal, are of one kind.  The run that calibrates has another ``max_lag``
than the three, and notes each call of its engine and its task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from atpo_async.config import Config
from atpo_async.run.metrics import Record, read_metrics
from atpo_async.run.rundir import RunDir
from benchmarks.model_parts.calibration import ENGINE_LOG, TASK_LOG, fleet_of
from benchmarks.model_parts.parameters import Fleet
from benchmarks.model_parts.simulation import simulate
from benchmarks.real_runs import SETTLING, RealRun, seconds_per_step, train

CALIBRATION, CALIBRATION_LAG = "calibration", 3
LAGS = (0, 2, 4)
MEASURED = {
    "actor.engine": "benchmarks.model_parts.measured:MeasuredEngine",
    "environment.name": "benchmarks.model_parts.measured:MeasuredHopQA",
}
SIMULATED_STEPS = 200
LIMIT_S = 1800.0
LAG_FLOOR = 0.1
"""Versions: a lag below it is compared as if it were so large."""


@dataclass(frozen=True)
class Checked:
    """One run, real and simulated."""

    max_lag: int
    real_step_s: float
    model_step_s: float
    real_lag: float
    model_lag: float

    @property
    def throughput_error(self) -> float:
        """Of steps a second."""
        return self.real_step_s / self.model_step_s - 1

    @property
    def lag_error(self) -> float:
        return (self.model_lag - self.real_lag) / max(self.real_lag, LAG_FLOOR)

    def within(self, limit: float) -> bool:
        return abs(self.throughput_error) <= limit and abs(self.lag_error) <= limit


def name_of(max_lag: int) -> str:
    return f"lag-{max_lag}"


def make_runs(
    folder: Path, *, config: Path, policy: str, latency_s: float, sigma: float, steps: int, synchronous_steps: int
) -> None:
    """The four runs, one after another, in ``folder``.  Raises RunFailed."""
    notes = folder / CALIBRATION
    notes_of = {
        **MEASURED,
        "actor.engine_options.log": folder / ENGINE_LOG,
        "environment.options.log": folder / TASK_LOG,
    }
    if (notes / "metrics.jsonl").exists():
        raise FileExistsError(f"{notes} holds a run already; name another folder, or read it with --from")
    for name, max_lag, more in (
        (CALIBRATION, CALIBRATION_LAG, notes_of),
        *((name_of(lag), lag, {}) for lag in LAGS),
    ):
        wanted = SETTLING + (synchronous_steps if max_lag == 0 else steps)

        def done(made: Sequence[Record], wanted: int = wanted) -> bool:
            return len(made) >= wanted

        options = {
            "run.seed": 1 + max_lag,
            "run.steps": 10 * wanted,
            "learner.lr": 1e-9,
            "model.path": policy,
            "environment.options.hops": 3,
            "environment.options.seed": 1 + max_lag,
            "environment.options.latency_s": latency_s,
            "environment.options.latency_sigma": sigma,
            "staleness.max_lag": max_lag,
            "actor.trees_in_flight": _slots(config, max_lag),
            **more,
        }
        train(config, options, folder=folder, name=name, done=done, limit_s=LIMIT_S)


def calibrated(folder: Path) -> Fleet:
    """The model that the calibrating run gives."""
    config, run = kept(folder / CALIBRATION)
    options = config.environment.options
    return fleet_of(config, run, folder, latency_s=float(options["latency_s"]), sigma=float(options["latency_sigma"]))


def checked(folder: Path, fleet: Fleet, *, max_lag: int) -> Checked:
    """One of the three, and what the calibrated model says of it: only its settings are taken from it."""
    config, run = kept(folder / name_of(max_lag))
    like = replace(fleet, slots=config.actor.trees_in_flight, staleness=config.staleness)
    simulated = simulate(like, steps=SIMULATED_STEPS, settling=SETTLING + max_lag)
    return Checked(
        max_lag=max_lag,
        real_step_s=seconds_per_step(run.steps),
        model_step_s=simulated.step_s,
        real_lag=run.mean("lag/mean", slice(SETTLING, None)),
        model_lag=simulated.lag,
    )


def kept(folder: Path) -> tuple[Config, RealRun]:
    """A run as it lies in its folder."""
    rundir = RunDir.open(folder)
    return rundir.config, RealRun(list(read_metrics(rundir.metrics_path)))


def rows(found: Sequence[Checked]) -> list[list[str]]:
    return [
        [
            str(each.max_lag),
            f"{3600 / each.real_step_s:,.0f}",
            f"{3600 / each.model_step_s:,.0f}",
            f"{each.throughput_error:+.0%}",
            f"{each.real_lag:.2f}",
            f"{each.model_lag:.2f}",
            f"{each.lag_error:+.0%}",
        ]
        for each in found
    ]


HEADER = ("max_lag", "steps/h, real", "model", "error", "mean lag, real", "model", "error")


def _slots(config: Path, max_lag: int) -> int:
    from atpo_async.config import load

    return load(config).staleness.trees_per_batch * (max_lag + 1)
