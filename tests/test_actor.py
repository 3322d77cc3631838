from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import TypeVar

import numpy as np
import pytest

from actors.actor import Actor
from actors.engines.base import SwapReport, WeightsFile
from actors.leases import LearnerMoved
from actors.weights.copies import NoSpace
from atpo_async.config import Config, build
from atpo_async.core.errors import (
    AtpoError,
    EngineDead,
    EnvironmentBroken,
    PeerLost,
    ProbeMismatch,
    WaitTimeout,
    WeightsRejected,
)
from atpo_async.core.tree import Turn
from atpo_async.ops.exits import EXIT_USER
from atpo_async.ops.role import exit_code
from atpo_async.wire.messages import (
    ActorReport,
    Lease,
    LeaseRequest,
    LeaseReturned,
    Leases,
    TreeClosed,
    TreeOpened,
    WeightsAnnounced,
    WeightsManifest,
)
from tests.actor_support import STOP, CountingEnvironment, ScriptedEngine, ints, lease

M = TypeVar("M")


def config_of(**actor: object) -> Config:
    return build(
        {
            "search": {"initial_rollouts": 2, "strategy": "none", "max_action_tokens": 8},
            "model": {"max_context_tokens": 64},
            "actor": {"trees_in_flight": 2, "report_every_s": 0.01} | actor,
            "links": {"deadline_s": 5.0},
        }
    )


class FakeBuffer:
    """Grants what is queued; finished when the queue is empty and ``ends`` is set."""

    def __init__(self, *leases: Lease, ends: bool = True) -> None:
        self.queue = deque(leases)
        self.ends = ends
        self.sent: list[object] = []
        self.asked: list[LeaseRequest] = []
        self.in_flight_now = 0
        self.most_at_once = 0
        self.stats = SimpleNamespace(waited_s=0.0)
        self.on_refused: Callable[[object, str], None] = lambda message, reason: None
        self.open: set[str] = set()
        self.arrived = asyncio.Event()
        self.endpoint = "tcp://127.0.0.1:1"
        self.weights_endpoint = ""

    async def until_asked(self, count: int) -> None:
        await self.until(lambda: len(self.asked) >= count)

    async def request(self, message: object, *, timeout_s: float) -> Leases:
        assert isinstance(message, LeaseRequest)
        self.asked.append(message)
        self.arrived.set()
        await asyncio.sleep(0)
        granted = tuple(self.queue.popleft() for _ in range(min(message.count, len(self.queue))))
        self.open |= {g.tree_id for g in granted}
        self.most_at_once = max(self.most_at_once, len(self.open))
        done = self.ends and not self.queue and not granted and not self.open
        return Leases(
            leases=granted,
            closed_because="nothing queued",
            retry_after_s=0.0,
            finished=done,
            weights_endpoint=self.weights_endpoint,
            announce_endpoint="tcp://0.0.0.0:8",
        )

    async def send(self, message: object) -> None:
        self.sent.append(message)
        self.arrived.set()
        if isinstance(message, TreeClosed):
            self.open.discard(message.tree_id)

    async def drain(self, *, timeout_s: float) -> None: ...

    async def until(self, holds: Callable[[], bool]) -> None:
        """Waits for: a message that makes ``holds`` true.  Unblocked by: the actor sending."""
        while not holds():
            self.arrived.clear()
            await asyncio.wait_for(self.arrived.wait(), 30)

    def of(self, kind: type[M]) -> list[M]:
        return [m for m in self.sent if isinstance(m, kind)]


class FakeWeights:
    """Announces versions in order, then nothing more; versions in ``rejected`` fail to arrive whole."""

    endpoint = ""
    silent = False
    limit_s = 60.0

    def __init__(self, *versions: int, rejected: tuple[int, ...] = ()) -> None:
        self.versions = deque(versions)
        self.rejected = rejected
        self.version = -1
        self.verify_s, self.hashed = 0.0, True
        self.released = 0
        self.go = asyncio.Event()
        self.go.set()

    async def next(self) -> WeightsAnnounced | None:
        await asyncio.sleep(0)
        await self.go.wait()
        if not self.versions:
            await asyncio.sleep(0.005)
            return None
        return WeightsAnnounced(
            run="r", version=self.versions.popleft(), total_bytes=0, digest="", host_id="", shm_path=None
        )  # fmt: skip

    def forget(self, version: int) -> None:
        """As the learner is asked again at the next poll."""
        self.versions.appendleft(version)

    async def fetch(self, announced: WeightsAnnounced) -> WeightsFile:
        if announced.version in self.rejected:
            raise WeightsRejected(f"version {announced.version}: altered")
        self.version = announced.version
        manifest = WeightsManifest(
            run="r",
            version=announced.version,
            total_bytes=0,
            chunk_bytes=4096,
            tensors=(),
            probe_token_ids=np.zeros(2, dtype=np.int32),
            probe_logprobs=np.zeros(1, dtype=np.float32),
            probe_tolerance=1.0,
        )
        return WeightsFile(path=None, manifest=manifest)  # type: ignore[arg-type]

    def release(self, weights: WeightsFile) -> None:
        self.released += 1

    def take_counts(self) -> dict[str, float]:
        return {}


def actor_of(
    buffer: FakeBuffer,
    *,
    engine: ScriptedEngine | None = None,
    environment: CountingEnvironment | None = None,
    weights: FakeWeights | None = None,
    stopping: asyncio.Event | None = None,
    config: Config | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Actor:
    return Actor(
        run="r",
        name="actor-0",
        config=config or config_of(),
        engine=engine or ScriptedEngine(),
        environment=environment or CountingEnvironment(),
        buffer=buffer,  # type: ignore[arg-type]
        weights=weights or FakeWeights(0),  # type: ignore[arg-type]
        stopping=stopping or asyncio.Event(),
        clock=clock,
    )


def leases(count: int, **changes: object) -> list[Lease]:
    return [lease(tree_id=f"t{i}", task_index=i, **changes) for i in range(count)]


async def test_every_leased_tree_is_grown_and_closed_and_never_more_than_the_slots_at_once() -> None:
    buffer = FakeBuffer(*leases(5))
    await actor_of(buffer).work()
    assert {m.tree_id for m in buffer.of(TreeClosed)} == {f"t{i}" for i in range(5)}
    assert buffer.most_at_once == 2
    assert len(buffer.of(Turn)) == 5 * 2 * 2


async def test_turns_leave_before_their_tree_is_done() -> None:
    buffer = FakeBuffer(*leases(1))
    await actor_of(buffer).work()
    kinds = [type(m).__name__ for m in buffer.sent if not isinstance(m, ActorReport)]
    assert kinds[0] == "TreeOpened"
    assert kinds[-1] == "TreeClosed"
    assert kinds[1:-1] == ["Turn"] * 4


async def test_nothing_is_generated_before_the_runs_own_weights_are_in() -> None:
    weights = FakeWeights(0)
    weights.go.clear()
    engine = ScriptedEngine()
    buffer = FakeBuffer(*leases(1))
    work = asyncio.create_task(actor_of(buffer, engine=engine, weights=weights).work())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not buffer.asked
    assert not engine.contexts
    weights.go.set()
    await work
    assert engine.swapped == [0]


async def test_a_lease_waits_for_its_least_version() -> None:
    weights = FakeWeights(0, 3)
    buffer = FakeBuffer(*leases(1, min_version=3))
    await actor_of(buffer, weights=weights).work()
    assert {s.version for t in buffer.of(Turn) for s in t.spans} == {3}


async def test_weights_that_arrive_altered_are_skipped_and_the_next_are_taken() -> None:
    engine = ScriptedEngine()
    buffer = FakeBuffer(*leases(1, min_version=2))
    await actor_of(buffer, engine=engine, weights=FakeWeights(0, 1, 2, rejected=(1,))).work()
    assert engine.swapped == [0, 2]


class RefusingEngine(ScriptedEngine):
    """Its swaps raise what is listed first, each once."""

    def __init__(self, *errors: AtpoError) -> None:
        super().__init__()
        self.errors = list(errors)

    async def swap(self, weights: WeightsFile) -> SwapReport:
        if self.errors and weights.manifest.version:
            raise self.errors.pop(0)
        return await super().swap(weights)


MISSING = WeightsRejected("weights version 1: tensor model.norm.weight is missing (1 of 11 are)")
OFF = ProbeMismatch("weights version 1: the engine (float32 on cpu) is 0.3 nats off the learner's probe, tolerance 0.1")


@pytest.mark.parametrize("errors", [(MISSING, MISSING), (OFF, OFF), (OFF, MISSING, OFF, MISSING, OFF)])
async def test_a_refused_swap_ends_no_actor_and_the_same_version_is_fetched_again(
    errors: tuple[AtpoError, ...], caplog: pytest.LogCaptureFixture
) -> None:
    engine = RefusingEngine(*errors)
    buffer = FakeBuffer(*leases(1, min_version=1))
    await actor_of(buffer, engine=engine, weights=FakeWeights(0, 1)).work()
    assert engine.swapped == [0, 1]
    assert len(buffer.of(TreeClosed)) == 1
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert str(errors[0]) in said[0]
    assert len(said) <= len(errors)


@pytest.mark.parametrize("error", [MISSING, OFF])
async def test_the_same_refusal_three_times_in_a_row_ends_the_run_in_one_line(error: AtpoError) -> None:
    engine = RefusingEngine(error, error, error)
    buffer = FakeBuffer(*leases(1, min_version=1))
    with pytest.raises(type(error)) as raised:
        await actor_of(buffer, engine=engine, weights=FakeWeights(0, 1)).work()
    assert str(raised.value).startswith(f"{error} (3 times in a row; ")
    assert len(str(raised.value).splitlines()) == 1
    assert exit_code(raised.value) == EXIT_USER
    assert engine.swapped == [0]


async def test_weights_for_which_there_is_no_space_are_waited_for_and_that_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Full(FakeWeights):
        tries = 0

        async def fetch(self, announced: WeightsAnnounced) -> WeightsFile:
            self.tries += 1
            if self.tries in range(2, 9):
                self.forget(announced.version)
                raise NoSpace("version 1: its 10000 bytes cannot be written")
            return await super().fetch(announced)

    engine = ScriptedEngine()
    await actor_of(FakeBuffer(*leases(1, min_version=1)), engine=engine, weights=Full(0, 1)).work()
    assert engine.swapped == [0, 1]
    assert len([record for record in caplog.records if "cannot be written" in record.getMessage()]) == 1


@contextlib.asynccontextmanager
async def refused(count: int, reason: str) -> AsyncIterator[FakeBuffer]:
    """An actor with ``count`` leases of which the first tree's opening is refused; at the end it works to its end."""
    engine = ScriptedEngine()
    engine.hold = asyncio.Event()
    buffer = FakeBuffer(*leases(count))
    work = asyncio.create_task(actor_of(buffer, engine=engine).work())
    await buffer.until(lambda: {getattr(m, "tree_id", "") for m in buffer.sent} >= {"t0", "t1"})
    buffer.on_refused(next(m for m in buffer.sent if getattr(m, "tree_id", "") == "t0"), reason)
    yield buffer
    buffer.open.discard("t0")
    engine.hold.set()
    await work


async def test_a_refused_tree_is_given_up_and_its_slot_goes_on() -> None:
    async with refused(3, "unknown lease") as buffer:
        pass
    assert {m.tree_id for m in buffer.of(TreeClosed)} == {"t1", "t2"}


async def test_stopping_gives_the_leases_back() -> None:
    engine = ScriptedEngine()
    engine.hold = asyncio.Event()
    stopping = asyncio.Event()
    buffer = FakeBuffer(*leases(2), ends=False)
    work = asyncio.create_task(actor_of(buffer, engine=engine, stopping=stopping).work())
    await buffer.until(lambda: len(buffer.of(TreeOpened)) == 2)
    stopping.set()
    await work
    (returned,) = buffer.of(LeaseReturned)
    assert set(returned.tree_ids) == {"t0", "t1"}


async def test_an_environment_that_always_raises_ends_the_actor_with_its_name_and_error() -> None:
    environment = CountingEnvironment(fault=lambda number, action: RuntimeError("no such table"))
    buffer = FakeBuffer(*leases(20))
    with pytest.raises(EnvironmentBroken, match=r"environment 'hopqa': 4 trees in a row .* no such table"):
        await actor_of(buffer, environment=environment).work()


async def test_an_engine_that_answers_no_request_is_not_taken_for_a_broken_environment() -> None:
    engine = ScriptedEngine()
    engine.hold = asyncio.Event()
    buffer = FakeBuffer(*leases(20))
    config = config_of().model_copy(
        update={"search": config_of().search.model_copy(update={"generate_timeout_s": 0.001})}
    )
    with pytest.raises(EngineDead, match=r"4 trees in a row .* as the engine does not answer"):
        await actor_of(buffer, engine=engine, config=config).work()


async def test_a_dead_engine_ends_the_actor() -> None:
    engine = ScriptedEngine(lambda c, n: EngineDead("engine core is gone"))
    with pytest.raises(EngineDead, match="engine core is gone"):
        await actor_of(FakeBuffer(*leases(2)), engine=engine).work()


async def test_the_report_renews_the_leases_and_carries_the_metrics() -> None:
    engine = ScriptedEngine(lambda c, n: ints(5, 6, STOP))
    engine.hold = asyncio.Event()
    buffer = FakeBuffer(*leases(2))
    work = asyncio.create_task(actor_of(buffer, engine=engine).work())
    await buffer.until(lambda: any(set(m.tree_ids) == {"t0", "t1"} for m in buffer.of(ActorReport)))
    engine.hold.set()
    await work
    named = set().union(*(m.metrics for m in buffer.of(ActorReport)))
    assert {"tokens/generated_per_s", "time/actor_wait_s", "weights/swap_s", "engine/probe_error"} <= named


async def test_a_buffer_that_is_away_for_a_while_is_asked_again() -> None:
    class Flaky(FakeBuffer):
        async def request(self, message: object, *, timeout_s: float) -> Leases:
            if len(self.asked) < 2:
                self.asked.append(message)  # type: ignore[arg-type]
                raise PeerLost("buffer restarting")
            return await super().request(message, timeout_s=timeout_s)

    buffer = Flaky(*leases(1))
    await actor_of(buffer).work()
    assert len(buffer.of(TreeClosed)) == 1


async def test_stopping_ends_an_actor_that_still_waits_for_its_first_weights() -> None:
    weights = FakeWeights(0)
    weights.go.clear()
    stopping = asyncio.Event()
    buffer = FakeBuffer(*leases(1), ends=False)
    work = asyncio.create_task(actor_of(buffer, weights=weights, stopping=stopping).work())
    stopping.set()
    await asyncio.wait_for(work, 30)
    assert not buffer.asked


async def test_an_actor_whose_run_ends_before_it_has_weights_ends_with_it() -> None:
    weights = FakeWeights()
    weights.silent = True
    buffer = FakeBuffer(ends=False)
    work = asyncio.create_task(actor_of(buffer, weights=weights).work())
    await buffer.until_asked(2)
    assert not work.done()
    buffer.ends = True
    await asyncio.wait_for(work, 30)
    assert {asked.count for asked in buffer.asked} == {0}


async def test_an_actor_without_weights_looks_for_the_learner_where_the_buffer_says_it_is() -> None:
    weights = FakeWeights()
    weights.silent, weights.endpoint = True, "tcp://127.0.0.1:7"
    buffer = FakeBuffer(ends=False)
    buffer.weights_endpoint = "tcp://127.0.0.1:9"
    with pytest.raises(LearnerMoved, match=r"is at tcp://127\.0\.0\.1:9 now"):
        await asyncio.wait_for(actor_of(buffer, weights=weights).work(), 30)


async def test_every_second_of_a_slot_without_a_tree_counts_as_waiting() -> None:
    now = 0.0

    class Slow(FakeBuffer):
        async def request(self, message: object, *, timeout_s: float) -> Leases:
            nonlocal now
            now += 3.0  # the buffer holds the request, then fills it whole
            return await super().request(message, timeout_s=timeout_s)

    buffer = Slow(*leases(2))
    actor = actor_of(buffer, clock=lambda: now)
    await actor.work()
    waited = actor._metrics.flush()["time/actor_wait_s"]
    reported = sum(m.metrics.get("time/actor_wait_s", 0.0) for m in buffer.of(ActorReport))
    assert waited + reported == pytest.approx(now)


async def test_a_wait_for_a_lease_ends_loudly_past_its_limit_and_says_what_for() -> None:
    now = 0.0

    class Closed(FakeBuffer):
        async def request(self, message: object, *, timeout_s: float) -> Leases:
            nonlocal now
            now += 400.0
            return Leases(leases=(), closed_because="80 trees are pending", retry_after_s=0.0, finished=False)

    with pytest.raises(WaitTimeout, match=r"actor actor-0 waited .* for a lease .*80 trees are pending"):
        await actor_of(Closed(), clock=lambda: now).work()


async def test_a_refused_tree_goes_back_to_the_buffer() -> None:
    async with refused(2, "other bytes") as buffer:
        await buffer.until(lambda: any(m.tree_ids == ("t0",) for m in buffer.of(LeaseReturned)))
        assert [m.reason for m in buffer.of(LeaseReturned)] == ["other bytes"]


@pytest.mark.parametrize("slots_taken", [False, True])
async def test_an_actor_that_hears_of_a_learner_elsewhere_stops_to_look_there(slots_taken: bool) -> None:
    """Also where every slot waits for weights and nobody asks for leases: then because the learner is silent."""
    buffer = FakeBuffer(*(leases(2, min_version=99) if slots_taken else ()), ends=False)
    buffer.endpoint = "tcp://10.1.2.3:5"
    weights = FakeWeights(1)
    weights.endpoint, weights.silent = "tcp://10.1.2.3:7", slots_taken
    work = asyncio.create_task(actor_of(buffer, weights=weights).work())
    await buffer.until_asked(2)
    assert not work.done()
    buffer.weights_endpoint = "tcp://*:9"
    with pytest.raises(LearnerMoved, match=r"is at tcp://10\.1\.2\.3:9 now, no longer at tcp://10\.1\.2\.3:7") as moved:
        await asyncio.wait_for(work, 30)
    assert moved.value.announce_endpoint == "tcp://10.1.2.3:8"
