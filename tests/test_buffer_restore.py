"""Whatever happens to a buffer, the next one finds all that was acknowledged: any order of events, any crash."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from atpo_async.config import Config, build
from atpo_async.core.errors import BadMessage
from atpo_async.core.tree import Turn, VersionSpan
from atpo_async.wire import messages as m
from buffer.journal import entries
from buffer.state import BufferState
from tests.buffer_support import Disk

PROMPT = np.array([1, 2, 3], dtype=np.int32)


class Life:
    """A buffer with actors and a learner, all of whom may start again at any moment; what happens is drawn.

    The learner's lineage is its weights: which tree it has used how often by the step it is at.
    """

    def __init__(self, config: Config, seed: int) -> None:
        self.config = config
        self.chance = random.Random(seed)
        self.now = 0.0
        self.disk = Disk()
        self.state = self.disk.open(config)
        self.leases: dict[str, list[m.Lease]] = {f"a{i}": [] for i in range(3)}
        self.sent: dict[str, list[Any]] = {}
        self.counter = 1
        self.version = 1
        self.lineage: list[tuple[tuple[int, str, bytes], ...]] = []
        self.saved = 0
        self.in_hand: m.Batch | None = None
        self.exhausted = False
        self.restarts = 0
        self.publish()
        self.disk.commit()  # the learner waits for the acknowledgement before it asks for anything

    def publish(self) -> None:
        self.state.publish(
            m.VersionPublished(run="r", version=self.version, weights_endpoint="w", announce_endpoint="n")
        )  # fmt: skip

    def live(self, events: int) -> Life:
        possible: list[tuple[Callable[[], None], int]] = [
            (self.lease, 6), (self.grow, 40), (self.learn, 10), (self.save, 2), (self.crash, 2), (self.fall_back, 1),
            (self.actor_starts_again, 1), (self.silence, 1), (self.evaluate, 1),
        ]  # fmt: skip
        for _ in range(events):
            if self.exhausted:
                break
            self.now += 0.05
            event = self.chance.choices([e for e, _ in possible], [w for _, w in possible])[0]
            event()
            self.disk.commit()
        return self

    def finish(self) -> Life:
        """Without further harm, until the buffer says that there is nothing left."""
        for _ in range(4000):
            if self.exhausted:
                return self
            for event in (self.lease, *[self.grow] * 12, self.learn):
                self.now += 0.01
                event()
                self.disk.commit()
        raise AssertionError(f"the run does not end: {self.state.waiting_for(self.request(), self.now)}")

    # --- actors

    def lease(self) -> None:
        actor = self.chance.choice(list(self.leases))
        if len(self.leases[actor]) < 4:
            for lease in self.state.lease(actor, 2, self.now).leases:
                list(lease.committed)
                self.leases[actor].append(lease)
        self.state.report(actor, [lease.tree_id for lease in self.leases[actor]], self.now)

    def grow(self) -> None:
        actor = self.chance.choice(list(self.leases))
        if not self.leases[actor]:
            return
        lease = self.chance.choice(self.leases[actor])
        done = {turn.turn_id: turn for turn in lease.committed}
        mine = self.sent.setdefault(f"{lease.tree_id} {lease.epoch}", [])
        number = max(done, default=0) + len(mine)
        message: Any
        if not mine:
            message = m.TreeOpened(run="r", tree_id=lease.tree_id, lease_epoch=lease.epoch, prompt=PROMPT)
        elif number <= 4:
            inner = number == 1 and lease.task_index % 2 == 0
            parent = 1 if number > 1 and lease.task_index % 2 == 0 else 0
            message = self.turn(lease, number, parent, inner)
        else:
            message = m.TreeClosed(
                run="r", tree_id=lease.tree_id, lease_epoch=lease.epoch, num_turns=number - 1,
                failed_branches=lease.task_index % 3, failures={},
            )  # fmt: skip
            self.leases[actor].remove(lease)
        mine.append(message)
        try:
            self.state.take(message, self.now)
            if self.chance.random() < 0.2:
                self.state.take(self.chance.choice(mine), self.now)  # its acknowledgement was lost
        except BadMessage:
            if lease in self.leases[actor]:
                self.leases[actor].remove(lease)

    def turn(self, lease: m.Lease, number: int, parent: int, inner: bool) -> Turn:
        tokens = 1 + (lease.seed + number) % 5
        return Turn(
            run="r", tree_id=lease.tree_id, turn_id=number, parent_id=parent, lease_epoch=lease.epoch,
            expansion_round=0, observation=np.zeros(0, dtype=np.int32),
            action=np.full(tokens, lease.task_index, dtype=np.int32), logprobs=np.full(tokens, -0.5, dtype=np.float32),
            spans=(VersionSpan(max(self.version, lease.min_version), 0, tokens),),
            end="continue" if inner else "done", reward=None if inner else float(number % 2),
            success=None, generate_s=0.0, environment_s=0.0,
        )  # fmt: skip

    def actor_starts_again(self) -> None:
        actor = self.chance.choice(list(self.leases))
        self.leases[actor].clear()
        self.state.hello(actor, self.now)

    def silence(self) -> None:
        actor = self.chance.choice(list(self.leases))
        self.leases[actor].clear()
        self.now += 1000.0
        for other in self.leases:
            if other != actor:
                self.state.report(other, [lease.tree_id for lease in self.leases[other]], self.now)
        self.state.tick(self.now)

    # --- the learner

    def request(self) -> m.SampleRequest:
        return m.SampleRequest(
            run="r", rank=0, num_ranks=1, step=len(self.lineage), version=self.version,
            num_trees=self.config.staleness.trees_per_batch, wait_s=0.0,
        )  # fmt: skip

    def learn(self) -> None:
        if self.in_hand is None:
            answer = self.state.sample(self.request(), self.now)
            if isinstance(answer, m.Exhausted):
                self.exhausted = True
            elif answer is not None:
                self.in_hand = answer
            return
        batch, self.in_hand = self.in_hand, None
        assert len({t.tree_id for t in batch.trees}) == len(batch.trees)
        self.lineage.append(tuple((t.task_index, t.tree_id, t.turns[0].action.tobytes()) for t in batch.trees))
        for tree in batch.trees:
            assert {int(token) for turn in tree.turns for token in turn.action} == {tree.task_index}
        self.counter += 1
        self.version = self.counter
        self.publish()
        self.state.trained(
            m.Trained(
                run="r", batch_id=batch.batch_id, version=self.version,
                priorities={t.tree_id: self.chance.random() for t in batch.trees},
            )
        )  # fmt: skip

    def save(self) -> None:
        self.saved = len(self.lineage)
        self.state.checkpointed(m.Checkpointed(run="r", step=self.saved, version=self.version))

    def fall_back(self) -> None:
        """Killed: what was learned since the checkpoint is lost."""
        self.in_hand = None
        del self.lineage[self.saved :]
        self.counter += 1
        self.version = self.counter
        self.publish()

    def evaluate(self) -> None:
        step = len(self.lineage)
        self.state.evaluate(m.EvalRequest(run="r", step=step, version=self.version, num_tasks=2, blocking=False))

    # --- the buffer

    def crash(self) -> None:
        before = snapshot(self.state, self.disk, partial=self.config.buffer.ready == "partial")
        self.state = self.disk.open(self.config, now=self.now, seed=self.restarts)
        self.restarts += 1
        assert snapshot(self.state, self.disk, partial=self.config.buffer.ready == "partial") == before


def snapshot(state: BufferState, disk: Disk, *, partial: bool) -> dict[str, Any]:
    """Everything that is to be the same after a restart."""
    rest = msgspec.msgpack.decode(disk.state[entries.RUN])
    return {
        "state": {key: msgspec.msgpack.decode(value) for key, value in disk.state.items() if key != entries.RUN},
        "rest": {name: value for name, value in rest.items() if name != "incarnation"},
        "ready": sorted(state.pool.ready_ids()),
        "out": state.pool.num_out,
        # A tree that still grows comes back into the pool with all its leaves, those after it was offered too.
        "bytes": (state.assembly.nbytes, disk.nbytes, *(() if partial else (state.pool.nbytes, state.nbytes))),
        "parked": state.assembly.num_parked(),
        "pending": state.ledger.num_training,
        "evaluations": sorted(map(str, state.ledger.evaluations)),
    }


def config_of(max_uses: int, *, partial: bool, **buffer: Any) -> Config:
    return build(
        {
            "run": {"max_tasks": 12},
            "staleness": {"trees_per_batch": 3, "max_lag": 200, "max_uses": max_uses},
            "search": {"initial_rollouts": 5, "rounds": 0},
            "buffer": {"ready": "partial" if partial else "complete", "max_reissues": 50, **buffer},
        }
    )


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_every_task_is_trained_on_as_often_as_intended_whoever_starts_again(seed: int, max_uses: int) -> None:
    life = Life(config_of(max_uses, partial=False), seed).live(700).finish()
    uses = Counter(task for batch in life.lineage for task, _, _ in batch)
    assert uses == dict.fromkeys(range(12), max_uses)
    for task in range(12):
        assert len({tree_id for batch in life.lineage for t, tree_id, _ in batch if t == task}) == 1


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_trees_served_while_they_grow_survive_too(seed: int, max_uses: int) -> None:
    life = Life(config_of(max_uses, partial=True), seed).live(700).finish()
    uses = Counter(task for batch in life.lineage for task, _, _ in batch)
    assert uses.keys() == set(range(12))
    assert min(uses.values()) >= 1


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_at_the_end_no_record_is_left_that_is_not_needed(seed: int) -> None:
    life = Life(config_of(2, partial=False), seed).live(400).finish()
    for step in life.state.ledger.evaluations:
        step.results |= dict.fromkeys(range(step.num_tasks), 1.0)
    life.save()
    held = {held.tree_id for actor in life.leases for held in life.state.ledger.held_by(actor)}
    assert all("-e" in tree_id for tree_id in held)
    assert life.state.pool.nbytes == 0
    assert life.state.nbytes == life.disk.nbytes == life.state.assembly.nbytes
