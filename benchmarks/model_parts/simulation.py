"""A simulated run: actors grow trees on their engines, the buffer takes the turns, the learner steps and publishes."""

from __future__ import annotations

import statistics
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy

from benchmarks.model_parts.buffer import Counts, SimulatedBuffer, Tree
from benchmarks.model_parts.engine import Engine
from benchmarks.model_parts.parameters import Fleet

Process = Generator[simpy.Event, Any, None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a simulated run did, its first steps left out."""

    steps: int
    seconds: float
    lag: float
    """Mean over the turns of the batches that were within ``max_lag``."""
    lag_max: int
    trees: Counts
    left: int
    """Trees that were under lease or ready at the end, less those at the beginning of the counting."""
    engine_busy: float
    """Share of the time with a request in an engine."""
    requests: float
    """Mean number in an engine."""
    tokens_per_s: float
    """Sampled, by all engines."""
    learner_busy: float
    buffer_busy: float

    @property
    def step_s(self) -> float:
        return self.seconds / self.steps

    @property
    def turns_per_s(self) -> float:
        return self.trees.turns / self.seconds


class Actor:
    """Grows trees in its slots.

    Args:
        env: simulated time.
        fleet: the run.
        buffer: where leases come from and turns go.
        rng: of this actor.
    """

    def __init__(self, env: simpy.Environment, fleet: Fleet, buffer: SimulatedBuffer, rng: np.random.Generator) -> None:
        self._env, self._fleet, self._buffer, self._rng = env, fleet, buffer, rng
        self.engine = Engine(env, fleet.engine)
        self.version = 0
        self._newer = 0
        self._fetching = False
        self._swapped = env.event()
        for _ in range(fleet.slots):
            env.process(self._slot())

    def announced(self, version: int) -> None:
        """The learner can be asked for a version; the newest is fetched when the one before is there."""
        self._newer = max(self._newer, version)
        if not self._fetching:
            self._fetching = True
            self._env.process(self._fetch())

    def _fetch(self) -> Process:
        links = self._fleet.links
        while self._newer > self.version:
            version = self._newer
            yield self._env.timeout(links.delivery_s)
            self.engine.pause()
            yield self._env.timeout(links.pause_s)
            self.engine.resume()
            self.version = version
            swapped, self._swapped = self._swapped, self._env.event()
            swapped.succeed()
        self._fetching = False

    def _slot(self) -> Process:
        """One tree after another."""
        while True:
            tree = yield self._buffer.lease()
            while self.version < tree.min_version:
                yield self._swapped
            yield from self._grow(tree)

    def _grow(self, tree: Tree) -> Process:
        shape = self._fleet.trees
        committed = [0.0]
        rounds = [(shape.chains, shape.chain_turns), *[(shape.branches, shape.branch_turns)] * shape.rounds]
        for count, lengths in rounds:
            turns = self._rng.choice(lengths, size=count)
            yield simpy.AllOf(self._env, [self._env.process(self._chain(tree, int(n), committed)) for n in turns])
        # The slot is free now; the tree ends once its last turn is committed.
        self._env.process(self._close(tree, committed[0]))

    def _close(self, tree: Tree, committed: float) -> Process:
        yield self._env.timeout(max(committed - self._env.now, 0.0))
        self._buffer.end(tree)

    def _chain(self, tree: Tree, turns: int, committed: list[float]) -> Process:
        fleet = self._fleet
        for turn in range(turns):
            version = self.version
            if fleet.engine.request_s:
                yield self._env.timeout(fleet.engine.request_s)
            yield self.engine.generate(fleet.trees.tokens(self._rng))
            yield self._env.timeout(fleet.tools.wait_s(self._rng, last=turn == turns - 1))
            committed[0] = max(committed[0], self._buffer.take(tree, version))


@dataclass
class Learner:
    """Steps, and tells the actors of versions."""

    env: simpy.Environment
    fleet: Fleet
    buffer: SimulatedBuffer
    actors: Sequence[Actor]
    ended: list[float] = field(default_factory=list)
    """When each step ended."""
    batches: list[list[Tree]] = field(default_factory=list)
    trained_s: float = 0.0

    def run(self) -> Process:
        settings, version = self.fleet.learner, 0
        self._announce(0)
        written = self.env.event().succeed()
        while True:
            batch = yield from self.buffer.batch(version)
            yield self.env.timeout(settings.ask_s + settings.step_s)
            self.trained_s += settings.step_s
            version += 1
            self.batches.append(batch)
            self.ended.append(self.env.now)
            self.buffer.trained(version)
            if version % self.fleet.staleness.publish_every == 0:
                # The bytes of the version before must have been written.
                yield written
                written = self.env.process(self._write(version))
                yield self.env.timeout(settings.held_s)

    def _write(self, version: int) -> Process:
        yield self.env.timeout(self.fleet.learner.write_s)
        self._announce(version)

    def _announce(self, version: int) -> None:
        self.buffer.publish(version)
        for actor in self.actors:
            actor.announced(version)


@dataclass(frozen=True)
class _Mark:
    """The counters at one moment."""

    counts: dict[str, Any]
    engines: list[tuple[float, float, float]]
    trained_s: float
    left: int


def simulate(fleet: Fleet, *, steps: int, settling: int = 2, seed: int = 0) -> Outcome:
    """Run until the learner has made ``settling + steps`` steps; the first ``settling`` are not counted.

    Raises ValueError where the fleet stands still: nothing is under way, and the learner waits.
    """
    env = simpy.Environment()
    seeds = np.random.SeedSequence(seed).spawn(fleet.actors + 1)
    buffer = SimulatedBuffer(env, fleet, np.random.default_rng(seeds[0]))
    actors = [Actor(env, fleet, buffer, np.random.default_rng(each)) for each in seeds[1:]]
    learner = Learner(env, fleet, buffer, actors)
    env.process(learner.run())
    before = _until(env, learner, buffer, settling)
    after = _until(env, learner, buffer, settling + steps)
    start = learner.ended[settling - 1] if settling else 0.0
    seconds = learner.ended[settling + steps - 1] - start
    lags = list(_lags(learner, fleet, settling))
    counts = Counts(**{name: after.counts[name] - before.counts[name] for name in after.counts})
    busy, requests, tokens = (
        sum(b[i] - a[i] for a, b in zip(before.engines, after.engines, strict=True)) for i in range(3)
    )
    return Outcome(
        steps=steps, seconds=seconds, lag=statistics.fmean(lags) if lags else 0.0, lag_max=max(lags, default=0),
        trees=counts, left=after.left - before.left,
        engine_busy=busy / seconds / fleet.actors, requests=requests / seconds / fleet.actors,
        tokens_per_s=tokens / seconds, learner_busy=(after.trained_s - before.trained_s) / seconds,
        buffer_busy=counts.served_s / seconds / fleet.buffer.shards,
    )  # fmt: skip


def _until(env: simpy.Environment, learner: Learner, buffer: SimulatedBuffer, steps: int) -> _Mark:
    while len(learner.ended) < steps:
        try:
            env.step()
        except simpy.core.EmptySchedule:
            raise ValueError(f"the fleet stands still after step {len(learner.ended)}") from None
    engines = []
    for actor in learner.actors:
        actor.engine._settle()
        engines.append((actor.engine.busy_s, actor.engine.requests_s, actor.engine.tokens))
    left = buffer.under_lease + len(buffer.ready)
    return _Mark(dict(vars(buffer.counts)), engines, learner.trained_s, left)


def _lags(learner: Learner, fleet: Fleet, settling: int) -> Iterator[int]:
    """Of each turn that was trained on: batch k is consumed at version k."""
    for version, batch in enumerate(learner.batches):
        if version >= settling:
            for tree in batch:
                yield from (version - each for each in tree.versions if version - each <= fleet.staleness.max_lag)
