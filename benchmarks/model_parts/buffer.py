"""A simulated buffer: turns are served one after another, trees admitted and batches drawn as by the real one.

The rule of admission (``buffer.leases.admission``) and what has to be served before it expires
(``buffer.pool.expiry``) are the buffer's own code; its service time, and the choice among trees that may wait, are
modelled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy

from benchmarks.model_parts.parameters import Fleet
from buffer.leases.admission import LagRule, LearnerProgress
from buffer.pool.expiry import Expiry


@dataclass(eq=False)
class Tree:
    """A tree under lease, ready, or trained on."""

    number: int
    min_version: int
    versions: list[int] = field(default_factory=list)
    """Of each turn, the one under which its action began."""


@dataclass
class Counts:
    """What became of trees and turns since the counting began."""

    leased: int = 0
    no_signal: int = 0
    stale: int = 0
    trained: int = 0
    turns: int = 0
    served_s: float = 0.0
    """Time that all shards together spent on turns."""


class SimulatedBuffer:
    """Leases, turns, batches.

    Args:
        env: simulated time.
        fleet: the run.
        rng: draws which trees have no signal, and batches.
    """

    def __init__(self, env: simpy.Environment, fleet: Fleet, rng: np.random.Generator) -> None:
        self._env, self._fleet, self._rng = env, fleet, rng
        self.progress = LearnerProgress()
        self._rule = LagRule(fleet.staleness, self.progress)
        self._expiry = Expiry(fleet.staleness.max_lag)
        self.ready: dict[int, Tree] = {}
        self.under_lease = 0
        self.counts = Counts()
        self._produced = 0
        """Trees that ended since the last batch, those without signal too."""
        self._number = 0
        self._free_at = [float(env.now)] * fleet.buffer.shards
        self._askers: deque[simpy.Event] = deque()
        self._changed = env.event()

    # --- actors

    def lease(self) -> simpy.Event:
        """An event that happens with a tree, in the order of asking, once the rule admits one."""
        asked = self._env.event()
        self._askers.append(asked)
        self._admit()
        return asked

    def take(self, tree: Tree, version: int) -> float:
        """A turn that began under ``version`` has come; returns when it is committed."""
        tree.versions.append(version)
        settings = self._fleet.buffer
        shard = tree.number % settings.shards
        self._free_at[shard] = max(self._free_at[shard], self._env.now) + settings.turn_s
        self.counts.served_s += settings.turn_s
        self.counts.turns += 1
        return self._free_at[shard] + settings.commit_s

    def end(self, tree: Tree) -> None:
        """All turns of a tree are committed."""
        self.under_lease -= 1
        self._produced += 1
        if self._rng.random() < self._fleet.trees.no_signal:
            self.counts.no_signal += 1
        else:
            self.ready[tree.number] = tree
            self._expiry.put(tree.number, max(tree.versions))
            self._expiry.put_unserved(tree.number, min(tree.versions))
        self._notify()

    # --- the learner

    def publish(self, version: int) -> None:
        self.progress.publish(version)
        self._notify()

    def batch(self, version: int) -> Generator[simpy.Event, Any, list[Tree]]:
        """The trees of the next batch: ``trees = yield from buffer.batch(version)``.  Waits for: enough of them."""
        self.progress.waits_at(version)
        staleness = self._fleet.staleness
        wanted, enough = staleness.trees_per_batch, staleness.max_oversampling * staleness.trees_per_batch
        while True:
            for number in self._expiry.stale(version):
                self._remove(number)
                self.counts.stale += 1
            if len(self.ready) >= wanted or (self._produced >= enough and self.ready):
                break
            self._admit()
            yield self._changed
        chosen = [self._remove(number) for number in self._choose(min(wanted, len(self.ready)), version)]
        self._produced = 0
        self.counts.trained += len(chosen)
        self.progress.consumed(version)
        self._notify()
        return chosen

    def trained(self, version: int) -> None:
        self.progress.trained(version)
        self._notify()

    # --- inside

    def _choose(self, count: int, version: int) -> list[int]:
        """First what would expire unserved, then any: priorities are not modelled."""
        chosen: list[int] = []
        for need, rows in self._expiry.due(count, version):
            left = [int(row) for row in rows if int(row) not in chosen]
            chosen += [left[i] for i in self._rng.choice(len(left), size=min(need, len(left)), replace=False)]
        others = [number for number in self.ready if number not in chosen]
        rest = self._rng.permutation(len(others))[: count - len(chosen)]
        return chosen + [others[i] for i in rest]

    def _remove(self, number: int) -> Tree:
        tree = self.ready.pop(number)
        self._expiry.remove(number, max(tree.versions))
        self._expiry.remove_unserved(number, min(tree.versions))
        return tree

    def _admit(self) -> None:
        while self._askers:
            pending = self.under_lease + len(self.ready)
            closed = self._rule.why_closed(
                under_lease=self.under_lease, ready=len(self.ready), produced=self._produced, memory_full=False
            )
            if closed is not None:
                return
            self._number += 1
            self.under_lease += 1
            self.counts.leased += 1
            self._askers.popleft().succeed(Tree(self._number, self._rule.least_version(pending)))

    def _notify(self) -> None:
        self._admit()
        changed, self._changed = self._changed, self._env.event()
        changed.succeed()
