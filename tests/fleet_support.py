"""A fleet on a simulated clock: scripted actors of unlike speed, a learner, and the buffer's real decisions.

An actor makes its turns one after another, of all its trees in turn, so that it is as fast as it is however many trees
it holds.  Nothing waits and nothing is left to chance: every action is an event at a time.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from atpo_async.config import Config
from atpo_async.core.tree import Turn, VersionSpan
from atpo_async.wire.messages import (
    Batch,
    EvalRequest,
    Exhausted,
    Lease,
    SampleRequest,
    Trained,
    TreeClosed,
    TreeOpened,
    VersionPublished,
)
from buffer.state import BufferState

TOKENS = np.array([1], dtype=np.int32)
NONE = np.zeros(0, dtype=np.int32)
LOGPROBS = np.zeros(1, dtype=np.float32)
CHAIN = 5
"""Turns of a chain; every second chain earns a reward."""
REPORT_S, TICK_S = 2.0, 0.5
FETCH_S = 0.2
"""From a version's publication until an actor generates with it."""


@dataclass(kw_only=True)
class Virtual:
    """One actor."""

    name: str
    turns_per_s: float
    slots: int = 16
    joins: float = 0.0
    leaves: float | None = None
    """With notice."""
    killed: float | None = None
    trees: deque[list[Any]] = field(default_factory=deque)
    """(lease, turns made, turns in all)."""
    version: int = 0
    there: bool = False
    began: float = 0.0
    ended: float | None = None
    idle_s: float = 0.0
    idle_since: float | None = 0.0
    done: int = 0
    finished_at: list[float] = field(default_factory=list)

    def busy_share(self, until: float) -> float:
        """Of its time from its joining until it left, or ``until``."""
        end = min(until, self.ended if self.ended is not None else until)
        idle_s = self.idle_s + (max(end - self.idle_since, 0.0) if self.idle_since is not None else 0.0)
        return 1.0 - idle_s / (end - self.began)


class VirtualFleet:
    """Actors, a learner and a buffer on one clock.

    Args:
        config: of the run; it ends with ``run.max_tasks`` or ``run.steps``.
        actors: of the fleet.
        step_s: that the learner takes for a batch.
        turns: of a training tree, by its task.
    """

    def __init__(
        self, config: Config, *actors: Virtual, step_s: float = 0.1, turns: Callable[[int], int] = lambda task: 10
    ) -> None:
        self.config = config
        self.now = 0.0
        self.state = BufferState(config, run="r", rng=np.random.default_rng(0), now=0.0)
        self.actors = {actor.name: actor for actor in actors}
        self.turns = turns
        self.step_s = step_s
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._asking: dict[str, bool] = {}
        """Actors with free slots, in the order in which they came to have them -> whether the reason for which they
        were refused holds for them only."""
        self._changed = False
        """Something other than a tree's end has happened since they were last asked for."""
        self.step = self.version = 0
        self._learning = False
        self.over = False
        self._alive: set[str] = set()
        self.trained: Counter[int] = Counter()
        self.lags: list[int] = []
        """Of every turn that was served."""
        self.lags_of: dict[str, list[int]] = {}
        self.holders: dict[str, list[str]] = {}
        """Tree -> the actors that had its lease, in order."""
        self.batch_times: list[float] = []
        self.dropped: Counter[str] = Counter()
        self.refused: list[str] = []
        for actor in actors:
            self.at(actor.joins, lambda actor=actor: self._join(actor))  # type: ignore[misc]
            if actor.leaves is not None:
                self.at(actor.leaves, lambda actor=actor: self._leave(actor))  # type: ignore[misc]
            if actor.killed is not None:
                self.at(actor.killed, lambda actor=actor: self._kill(actor))  # type: ignore[misc]
        self.at(TICK_S, self._tick)

    def at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), action))

    # --- the run -----------------------------------------------------------------------------------------------

    def run(self, *, most_s: float = 1000.0, until: Callable[[], bool] = lambda: False) -> VirtualFleet:
        """Until the run is over, or ``until``; a run that stands still fails."""
        if not self.step:
            self._publish()
        while not self.over and not until():
            self._learn()
            self._ask()
            self.now, _, action = heapq.heappop(self._events)
            assert self.now < most_s, f"not over after {most_s} s: {self.state.sizes()}, trained {self.step} batches"
            action()
        return self

    def evaluate(self, num_tasks: int) -> None:
        """A blocking evaluation of the published version."""
        self.state.evaluate(
            EvalRequest(run="r", step=self.step, version=self.version, num_tasks=num_tasks, blocking=True)
        )

    def keep_alive(self, name: str) -> None:
        """The link of this actor lives on whatever else it does."""
        self._alive.add(name)

    def _tick(self) -> None:
        for name in self._alive:
            self.state.ledger.actors.heard(name, self.now)
        self.state.tick(self.now)
        self._changed = True
        self.at(self.now + TICK_S, self._tick)

    # --- the learner -------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        version = self.version
        self.state.publish(VersionPublished(run="r", version=version, weights_endpoint="w", announce_endpoint="n"))

        def fetched() -> None:
            for actor in self.actors.values():
                actor.version = max(actor.version, version)

        self.at(self.now + (FETCH_S if version else 0.0), fetched)
        self._changed = True

    def _learn(self) -> None:
        if self._learning:
            return
        request = SampleRequest(
            run="r", rank=0, num_ranks=1, step=self.step, version=self.version,
            num_trees=self.config.staleness.trees_per_batch, wait_s=0.0,
        )  # fmt: skip
        batch = self.state.sample(request, self.now)
        if isinstance(batch, Exhausted):
            self.over = True
        elif batch is not None:
            self._learning = self._changed = True
            self.batch_times.append(self.now)
            for tree in batch.trees:
                self.trained[tree.task_index] += 1
                lags = [self.version - turn.oldest_version for turn in tree.turns]
                self.lags += lags
                self.lags_of[tree.tree_id] = lags
            self.dropped.update({n: int(v) for n, v in batch.metrics.items() if n.startswith("buffer/dropped") and v})
            self.at(self.now + self.step_s, lambda: self._finish_step(batch))

    def _finish_step(self, batch: Batch) -> None:
        self._learning = False
        self.step += 1
        self.version += 1
        self._publish()
        priorities = {tree.tree_id: 0.5 for tree in batch.trees}
        self.state.trained(Trained(run="r", batch_id=batch.batch_id, version=self.version, priorities=priorities))
        self.over = self.over or self.step >= self.config.run.steps

    # --- actors ------------------------------------------------------------------------------------------------

    def _join(self, actor: Virtual) -> None:
        actor.there, actor.began, actor.idle_since = True, self.now, self.now
        self.state.hello(actor.name, self.now)
        self._asking[actor.name] = False
        self.at(self.now + REPORT_S, lambda: self._report(actor))

    def _report(self, actor: Virtual) -> None:
        if actor.there:
            self.state.report(actor.name, [lease.tree_id for lease, _, _ in actor.trees], self.now)
            self.at(self.now + REPORT_S, lambda: self._report(actor))

    def _ask(self) -> None:
        """Leases for those with free slots; whom it concerns is as in ``handlers.lease_queue``."""
        changed, self._changed = self._changed, False
        for name in list(self._asking):
            if self._asking[name] and not changed:
                continue
            actor = self.actors[name]
            answer, only_here = self.state.admit(
                name, actor.slots - len(actor.trees), self.now, engine_version=actor.version
            )
            found, self._asking[name] = answer.leases, only_here
            if found and not actor.trees:
                if actor.idle_since is not None:
                    actor.idle_s += self.now - actor.idle_since
                actor.idle_since = None
                self.at(self.now + 1.0 / actor.turns_per_s, lambda actor=actor: self._turn(actor))  # type: ignore[misc]
            for lease in found:
                turns = self.turns(lease.task_index) if lease.kind == "train" else CHAIN
                self.holders.setdefault(lease.tree_id, []).append(name)
                actor.trees.append([lease, len(tuple(lease.committed)), turns])
                self.state.take(
                    TreeOpened(run="r", tree_id=lease.tree_id, lease_epoch=lease.epoch, prompt=TOKENS), self.now
                )  # fmt: skip
            if len(actor.trees) >= actor.slots:
                del self._asking[name]
            elif not only_here:
                return

    def _turn(self, actor: Virtual) -> None:
        if not actor.there:
            return
        self.state.ledger.actors.heard(actor.name, self.now)
        entry = actor.trees[0]
        actor.trees.rotate(-1)
        lease, made, turns = entry
        self.state.take(_turn_of(lease, made + 1, turns, actor.version), self.now)
        entry[1] = made + 1
        if made + 1 == turns:
            closed = TreeClosed(
                run="r", tree_id=lease.tree_id, lease_epoch=lease.epoch, num_turns=turns, failed_branches=0, failures={}
            )  # fmt: skip
            self.state.take(closed, self.now)
            actor.trees.remove(entry)
            actor.done += 1
            actor.finished_at.append(self.now)
            self._asking[actor.name] = False
        if actor.leaves is not None and self.now >= actor.leaves:
            self._gone(actor)
        elif actor.trees:
            self.at(self.now + 1.0 / actor.turns_per_s, lambda: self._turn(actor))
        else:
            actor.idle_since = self.now

    def _leave(self, actor: Virtual) -> None:
        """It finishes the turn under way first, where there is one."""
        self._asking.pop(actor.name, None)
        if not actor.trees:
            self._gone(actor)

    def _gone(self, actor: Virtual) -> None:
        self._kill(actor)
        self.state.returned(actor.name, [lease.tree_id for lease, _, _ in actor.trees])
        self.state.ledger.actors.leaves(actor.name)
        self._changed = True

    def _kill(self, actor: Virtual) -> None:
        actor.there, actor.ended = False, self.now
        self._asking.pop(actor.name, None)


def _turn_of(lease: Lease, turn_id: int, turns: int, version: int) -> Turn:
    chain, place = divmod(turn_id - 1, CHAIN)
    leaf = place == CHAIN - 1 or turn_id == turns
    return Turn(
        run="r", tree_id=lease.tree_id, turn_id=turn_id, parent_id=turn_id - 1 if place else 0, lease_epoch=lease.epoch,
        expansion_round=0, observation=NONE, action=TOKENS, logprobs=LOGPROBS, spans=(VersionSpan(version, 0, 1),),
        end="done" if leaf else "continue", reward=float(chain % 2) if leaf else None,
        success=bool(chain % 2) if leaf else None, generate_s=0.0, environment_s=0.0,
    )  # fmt: skip
