"""What the model is asked about fleets of GPUs, and its answers as tables and points of a figure.

How many actors a learner feeds on, what lag for what speed-up, when one buffer ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context

from benchmarks.model_parts.gpus import KNOWN, TURNS_PER_S, Plan, fleet, splits
from benchmarks.model_parts.parameters import Buffer, table_of
from benchmarks.model_parts.simulation import Outcome, simulate

LAGS = (0, 1, 2, 4, 8)
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of the learner's GPUs at which engines and learner would be balanced."""
FEW_SHARES = (0.25, 0.5, 0.75)
"""For the largest fleet: what is simulated there takes long."""
MANY = 256
TOOLS_S = (0.3, 3.0)
ASYNCHRONOUS = 4
LOADS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.25, 1.5, 2.0, 3.0)
"""Turns that a fleet would make over turns that its buffer takes."""
USABLE = 0.7
"""Of what one buffer takes: above that, waits grow."""
STEPS = 6


@dataclass(frozen=True)
class Answer:
    """A plan, and what the model says of it."""

    plan: Plan
    outcome: Outcome


@dataclass
class Answers:
    """All that was simulated."""

    sweep: list[Answer] = field(default_factory=list)
    whole: list[Answer] = field(default_factory=list)
    """Versions that travel whole instead of as differences."""
    buffer: list[tuple[float, float]] = field(default_factory=list)
    """(turns made over turns taken, steps/s over those with a buffer that is never full)."""

    def best(self, gpus: int, max_lag: int, latency_s: float) -> Answer:
        """The split with the most steps; of those within 2 % the one with the fewest learner GPUs, as its trees are
        the freshest.  Raises ValueError where nothing of the kind was simulated."""
        found = [
            each for each in self.sweep
            if (each.plan.gpus, each.plan.max_lag, each.plan.latency_s) == (gpus, max_lag, latency_s)
        ]  # fmt: skip
        least = min(each.outcome.step_s for each in found)
        return min((e for e in found if e.outcome.step_s <= 1.02 * least), key=lambda e: e.plan.learner)


def ask(gpus: Sequence[int], *, jobs: int = 1, lags: Sequence[int] = LAGS) -> Answers:
    """Simulate what the tables need.  ``jobs`` processes at once."""
    answers = Answers()
    plans = [
        split
        for number in gpus
        for latency_s in (TOOLS_S if number < MANY else TOOLS_S[:1])
        for lag in lags
        for split in splits(
            Plan(gpus=number, learner=1, max_lag=lag, latency_s=latency_s), SHARES if number < MANY else FEW_SHARES
        )
    ]
    # The longest first: they would else run alone at the end.
    plans.sort(key=lambda plan: -plan.trees * (plan.max_lag + STEPS))
    answers.sweep = _simulated(plans, jobs=jobs)
    most = max(lag for lag in lags if lag <= ASYNCHRONOUS)
    best = [answers.best(number, most, TOOLS_S[0]).plan for number in gpus]
    answers.whole = _simulated([replace(plan, deltas=False) for plan in best], jobs=jobs)
    answers.buffer = _knee(best[0])
    return answers


def answered(plan: Plan) -> Answer:
    """One simulation, after the pipeline has filled."""
    return Answer(plan, simulate(fleet(plan), steps=STEPS, settling=3 + plan.max_lag))


def _simulated(plans: Iterable[Plan], *, jobs: int) -> list[Answer]:
    if jobs == 1:
        return [answered(plan) for plan in plans]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(answered, plans))


def _knee(plan: Plan) -> list[tuple[float, float]]:
    """Steps/s of a fleet whose buffer is made slower and slower."""
    free = answered(plan).outcome
    found = []
    for load in LOADS:
        slower = replace(fleet(plan), buffer=Buffer(turn_s=load / free.turns_per_s))
        found.append((load, free.step_s / simulate(slower, steps=STEPS, settling=3 + plan.max_lag).step_s))
    return found


# --- tables -----------------------------------------------------------------------------------------------------------

SPLIT_HEADER = (
    *("GPUs", "tool", "max_lag", "learner GPUs", "actors a learner GPU", "s a step", "speed-up over max_lag 0"),
    *("mean lag", "learner busy", "engines with a request", "requests in an engine"),
)
BUFFER_HEADER = (
    *("GPUs", "max_lag", "turns/s", "one buffer's share", "GPUs at one buffer's limit", "at 70 % of it"),
    *("the same where a turn has 32 tokens",),
)
WEIGHTS_HEADER = ("GPUs", "hosts with engines", "differences: s a step, mean lag", "whole versions: s a step, mean lag")
PARAMETERS_HEADER = ("parameter", "value", "what it is", "source")


def parameters() -> list[list[str]]:
    return table_of(KNOWN)


def split_rows(answers: Answers, gpus: Sequence[int], lags: Sequence[int] = LAGS) -> list[list[str]]:
    """The best split of each fleet at each lag."""
    rows = []
    for number in gpus:
        for latency_s in TOOLS_S if number < MANY else TOOLS_S[:1]:
            slow = answers.best(number, lags[0], latency_s).outcome.step_s
            for lag in lags:
                each = answers.best(number, lag, latency_s)
                plan, found = each.plan, each.outcome
                rows.append([
                    str(number), f"{latency_s:g} s", str(lag), str(plan.learner),
                    f"{plan.actors / plan.learner:.1f}", f"{found.step_s:.1f}", f"{slow / found.step_s:.1f} ×",
                    f"{found.lag:.1f}", f"{found.learner_busy:.0%}", f"{found.engine_busy:.0%}",
                    f"{found.requests:.0f}",
                ])  # fmt: skip
    return rows


def buffer_rows(answers: Answers, gpus: Sequence[int], lags: Sequence[int] = LAGS) -> list[list[str]]:
    """What one buffer is asked to take."""
    rows = []
    for number in gpus:
        for lag in (lag for lag in lags if lag >= min(ASYNCHRONOUS, lags[-1])):
            turns = answers.best(number, lag, TOOLS_S[0]).outcome.turns_per_s
            limit = TURNS_PER_S / (turns / number)
            rows.append([
                str(number), str(lag), f"{turns:,.0f}", f"{turns / TURNS_PER_S:.0%}", f"{limit:,.0f}",
                f"{USABLE * limit:,.0f}", f"{limit / 4:,.0f}, {USABLE * limit / 4:,.0f}",
            ])  # fmt: skip
    return rows


def weights_rows(answers: Answers) -> list[list[str]]:
    """Whole versions against differences, one copy a host."""
    rows = []
    for each in answers.whole:
        plan = each.plan
        delta = next(a for a in answers.sweep if a.plan == replace(plan, deltas=True))
        told = [f"{a.outcome.step_s:.1f}, {a.outcome.lag:.1f}" for a in (delta, each)]
        rows.append([str(plan.gpus), str(fleet(plan).links.copies), *told])
    return rows
