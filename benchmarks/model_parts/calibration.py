"""Parameters of the model out of one real run: its metrics, and the notes of its engine and its task."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atpo_async.config import Config
from atpo_async.run.metrics import Record
from benchmarks.model_parts.parameters import Buffer, EngineRate, Fleet, Known, Learner, Links, Tools, Trees
from benchmarks.real_runs import SETTLING, RealRun

ENGINE_LOG, TASK_LOG = "engine.jsonl", "task.jsonl"


@dataclass(frozen=True)
class Request:
    """One action's request to the engine."""

    began: float
    ended: float
    tokens: int


@dataclass(frozen=True)
class Episode:
    """One chain's own steps: (called, returned, waited for the tool)."""

    replayed: int
    steps: list[tuple[float, float, float]]


def notes_in(folder: Path) -> tuple[list[Request], list[Episode]]:
    """What a measured run has noted."""
    requests = [Request(*line) for line in _lines(folder / ENGINE_LOG)]
    episodes = [Episode(int(line[0]), [tuple(step) for step in line[1]]) for line in _lines(folder / TASK_LOG)]
    return requests, [each for each in episodes if each.steps]


def fitted_rate(requests: Sequence[Request], *, seats: int) -> EngineRate:
    """Seconds a token and request by how many there were, by least squares over the requests of a run.

    A request of T tokens took ``request_s + T * (first_s + more_s * n)``, with n the mean number in the engine during
    its time, itself included.  Raises ValueError for fewer than ten requests.
    """
    if len(requests) < 10:
        raise ValueError(f"{len(requests)} requests are too few to measure an engine")
    company = np.array(mean_in_flight(requests))
    tokens = np.array([each.tokens for each in requests], dtype=float)
    took = np.array([each.ended - each.began for each in requests])
    left = np.stack([tokens, tokens * company, np.ones_like(tokens)], axis=1)
    first, more, each = _not_negative(left, took)
    return EngineRate(first_s=first, more_s=more, seats=seats, request_s=each)


def mean_in_flight(requests: Sequence[Request]) -> list[float]:
    """Of each request, the mean number in the engine during it."""
    times = np.array(sorted([(r.began, 1) for r in requests] + [(r.ended, -1) for r in requests]))
    at, count = times[:, 0], np.cumsum(times[:, 1])
    # Integral of the number in flight up to each event.
    area = np.concatenate([[0.0], np.cumsum(count[:-1] * np.diff(at))])

    def integral(moment: np.ndarray) -> np.ndarray:
        place = np.searchsorted(at, moment, side="right") - 1
        inside: np.ndarray = area[place] + count[place] * (moment - at[place])
        return inside

    began, ended = np.array([r.began for r in requests]), np.array([r.ended for r in requests])
    found: list[float] = ((integral(ended) - integral(began)) / np.maximum(ended - began, 1e-9)).tolist()
    return found


def hosting_s(requests: Sequence[Request], episodes: Sequence[Episode]) -> float:
    """What a turn takes besides its request and its tool: hosting, search, sending."""
    between = [
        later[0] - earlier[1] for each in episodes for earlier, later in zip(each.steps, each.steps[1:], strict=False)
    ]
    inside = [returned - called - waited for each in episodes for called, returned, waited in each.steps]
    generating = statistics.fmean(each.ended - each.began for each in requests)
    return max(statistics.fmean(between) - generating, 0.0) + max(statistics.fmean(inside), 0.0)


def shapes(episodes: Sequence[Episode], *, chains: int, branches: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers of turns of initial chains and of branches.  A branch at the root replays nothing: where there are such,
    as many of the chains stand for them."""
    whole = [len(each.steps) for each in episodes if not each.replayed]
    forked = [len(each.steps) for each in episodes if each.replayed]
    expected = len(episodes) * branches / (chains + branches)
    at_root = max(round(expected - len(forked)), 0)
    return tuple(whole), (*forked, *whole[:at_root])


def fleet_of(config: Config, run: RealRun, folder: Path, *, latency_s: float, sigma: float) -> Fleet:
    """The model of a run like the measured one; slots and ``max_lag`` are those of its configuration."""
    requests, episodes = notes_in(folder)
    steps = slice(SETTLING, None)
    chains, branches = shapes(
        episodes, chains=config.search.initial_rollouts, branches=config.search.branches * config.search.rounds
    )
    grown, empty = (
        sum(r.metrics[name] for r in run.steps[steps]) for name in ("train/trees", "buffer/no_signal_trees")
    )
    own = run.mean("time/step_s", steps)
    held = run.mean("weights/publish_s", steps)
    asked = run.mean("time/between_steps_s", steps) - own - held - run.mean("time/learner_wait_s", steps)
    written = _mean(run.records, "weights/write_s")
    return Fleet(
        trees=Trees(
            chains=config.search.initial_rollouts,
            branches=config.search.branches,
            rounds=config.search.rounds,
            chain_turns=chains,
            branch_turns=branches,
            action_tokens=statistics.fmean(each.tokens for each in requests),
            no_signal=empty / grown,
        ),
        engine=fitted_rate(requests, seats=config.actor.max_num_seqs),
        tools=Tools(latency_s=latency_s, sigma=sigma, overhead_s=hosting_s(requests, episodes)),
        learner=Learner(step_s=own, held_s=held, write_s=written, ask_s=max(asked, 0.0)),
        buffer=Buffer(commit_s=config.buffer.commit_ms / 1000 + run.mean("buffer/commit_s/mean", steps)),
        links=Links(verify_s=_mean(run.records, "weights/fetch_s"), pause_s=_mean(run.records, "weights/swap_s")),
        slots=config.actor.trees_in_flight,
        staleness=config.staleness,
    )  # fmt: skip


def told(fleet: Fleet, source: str) -> list[Known]:
    """The parameters that were measured, for a table."""
    engine, learner = fleet.engine, fleet.learner
    chain, branch = np.mean(fleet.trees.chain_turns), np.mean(fleet.trees.branch_turns)
    found = {
        "turns of an initial chain, of a branch": f"{chain:.2f}, {branch:.2f}",
        "sampled tokens of a turn": f"{fleet.trees.action_tokens:.2f}",
        "share of trees without a signal": f"{fleet.trees.no_signal:.3f}",
        "engine, n requests: ms a token of each": f"{1e3 * engine.first_s:.2f} + {1e3 * engine.more_s:.3f} n",
        "engine: ms of a request besides": f"{1e3 * engine.request_s:.1f}",
        "hosting, search, sending: ms a turn": f"{1e3 * fleet.tools.overhead_s:.1f}",
        "learner: s a step, held up by publishing, until announced": (
            f"{learner.step_s:.3f}, {learner.held_s:.3f}, {learner.write_s:.3f}"
        ),
        "learner: ms from a ready batch to its step": f"{1e3 * learner.ask_s:.0f}",
        "buffer: ms until a turn is committed": f"{1e3 * fleet.buffer.commit_s:.1f}",
        "a version: s to fetch and verify, engine's pause": f"{fleet.links.verify_s:.3f}, {fleet.links.pause_s:.3f}",
    }
    return [Known(what=what, value=value, kind="measured", source=source) for what, value in found.items()]


def _not_negative(left: np.ndarray, right: np.ndarray) -> list[float]:
    """Least squares without negative coefficients: those that would be are left out, the most negative first."""
    columns = list(range(left.shape[1]))
    while True:
        found = np.linalg.lstsq(left[:, columns], right, rcond=None)[0]
        if (found >= 0).all():
            whole = np.zeros(left.shape[1])
            whole[columns] = found
            result: list[float] = whole.tolist()
            return result
        del columns[int(np.argmin(found))]


def _mean(records: Sequence[Record], metric: str) -> float:
    """Of whichever role's ``metric``, its mean where it was aggregated; 0 where none has it."""
    names = (metric, f"{metric}/mean")
    values = [r.metrics[name] for r in records for name in names if name in r.metrics]
    return statistics.fmean(values[2:] or values) if values else 0.0


def _lines(path: Path) -> list[Any]:
    """JSON lines; the last one may be cut short by the end of the run."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines):
        try:
            found.append(json.loads(line))
        except ValueError:
            if number != len(lines) - 1:
                raise
    return found
