"""How many trees an actor grows at once, decided from scripted statistics."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from actors.engines.base import EngineStats
from actors.slots import LEAST_S, MOST_S, Change, Meter, Seen, SlotControl, control_of
from atpo_async.config import build
from buffer.journal.slowness import BATCHES, SLOW_S, SlowCommits
from tests.actor_support import ScriptedEngine
from tests.test_actor import FakeBuffer, actor_of, config_of, leases

Engine = Callable[[int], tuple[float, float]]
"""Slots -> requests in it, tokens/s."""


def saturating(*, requests_a_tree: float, full_at: float) -> Engine:
    """Tokens a second grow with the requests in it up to ``full_at`` of them, and no further."""
    return lambda slots: (slots * requests_a_tree, 100 * min(slots * requests_a_tree, full_at))


def run(control: SlotControl, engine: Engine, intervals: int, *, refused: float = 0.0) -> list[Change]:
    changes = []
    for _ in range(intervals):
        running, rate = engine(control.slots)
        change = control.after(Seen(running=running, refused=refused, tokens_per_s=rate))
        changes += [] if change is None else [change]
    return changes


def test_slots_grow_until_the_batch_is_full_and_then_stay() -> None:
    control = SlotControl(seats=128, most=1000)
    engine = saturating(requests_a_tree=2.5, full_at=1e9)
    changes = run(control, engine, 20)
    assert [change.after for change in changes] == [16, 32, 52]
    assert str(changes[0]) == "8 -> 16 trees in flight: the engine ran 20 of 128 requests"
    assert run(control, engine, 200) == []


def test_what_gives_no_more_tokens_is_taken_back_and_not_tried_again_at_once() -> None:
    control = SlotControl(seats=256, most=1000)
    engine = saturating(requests_a_tree=2.0, full_at=30.0)
    changes = run(control, engine, 10)
    assert [(change.before, change.after) for change in changes] == [(8, 16), (16, 32), (32, 16)]
    assert str(changes[-1]) == "32 -> 16 trees in flight: with 32 the engine made +0% tokens/s"
    later = run(control, engine, 200)
    assert control.slots == 16
    assert len(later) < 20  # tried again now and then: the policy's actions change


def test_shorter_requests_are_answered_before_the_next_try_is_due() -> None:
    control = SlotControl(seats=256, most=1000)
    run(control, saturating(requests_a_tree=2.0, full_at=30.0), 10)
    changes = run(control, saturating(requests_a_tree=1.0, full_at=1e9), 4)
    assert changes[0].before == 16
    assert control.slots > 16


def test_slots_shrink_once_requests_have_queued_for_two_intervals() -> None:
    control = SlotControl(seats=64, most=1000, start=40)
    queueing = saturating(requests_a_tree=4.0, full_at=64.0)
    assert run(control, queueing, 2) == []  # the first one is not judged
    (change,) = run(control, queueing, 1)
    assert str(change) == "40 -> 16 trees in flight: 160 requests were in the engine, which runs 64 at once"
    assert run(control, queueing, 100) == []


def test_a_queue_of_one_interval_changes_nothing() -> None:
    control = SlotControl(seats=64, most=1000, start=20)
    for running in (64.0, 100.0, 64.0, 100.0, 64.0, 100.0):
        assert control.after(Seen(running=running, refused=0.0, tokens_per_s=1.0)) is None


def test_slots_are_not_what_lacks_while_no_lease_is_to_be_had() -> None:
    control = SlotControl(seats=128, most=1000)
    assert run(control, saturating(requests_a_tree=2.0, full_at=1e9), 50, refused=0.6) == []
    assert run(control, saturating(requests_a_tree=2.0, full_at=1e9), 2) != []


def test_slots_grow_though_every_batch_ends_with_a_time_without_leases() -> None:
    control = SlotControl(seats=128, most=1000)
    changes = run(control, saturating(requests_a_tree=2.0, full_at=1e9), 20, refused=0.4)
    assert [change.after for change in changes] == [16, 32, 64]


def test_slots_never_pass_their_bounds() -> None:
    control = SlotControl(seats=128, most=20)
    run(control, saturating(requests_a_tree=0.1, full_at=1e9), 100)
    assert control.slots == 20
    assert SlotControl(seats=4, most=2).slots == 2
    alone = SlotControl(seats=1, most=100, start=1)
    assert run(alone, saturating(requests_a_tree=6.0, full_at=1.0), 100) == []
    assert alone.slots == 1


@pytest.mark.parametrize(
    ("actor", "staleness", "most"),
    [
        ({"trees_in_flight": 5}, {}, None),
        ({"max_num_seqs": 64}, {"trees_per_batch": 16, "max_lag": 8}, 64),
        ({"max_num_seqs": 512}, {"trees_per_batch": 16, "max_lag": 1}, 32),
    ],
)
def test_slots_are_bounded_by_the_engine_and_by_admission(
    actor: dict[str, object], staleness: dict[str, object], most: int | None
) -> None:
    control = control_of(build({"actor": actor, "staleness": staleness}))
    if most is None:
        assert control is None
        return
    assert control is not None
    run(control, saturating(requests_a_tree=0.01, full_at=1e9), 100)
    assert control.slots == most


STATS = EngineStats(
    version=0, in_flight=0, prompt_tokens=0, cached_prompt_tokens=0, generated_tokens=0, finished_requests=0,
    failed_requests=0,
)  # fmt: skip


def samples(meter: Meter, *given: tuple[float, int, int, int], counts: bool = True) -> Sequence[Seen | None]:
    """Each: seconds, in flight, tokens and requests so far."""
    return [
        meter.add(
            replace(STATS, in_flight=in_flight, generated_tokens=tokens, finished_requests=finished), seconds,
            refused=False, counts=counts,
        )
        for seconds, in_flight, tokens, finished in given
    ]  # fmt: skip


def test_an_interval_ends_when_as_many_requests_finished_as_are_in_flight() -> None:
    meter = Meter(STATS)
    none, seen = samples(meter, (LEAST_S, 10, 50, 5), (LEAST_S, 20, 160, 16))
    assert none is None
    assert seen == Seen(running=15.0, refused=0.0, tokens_per_s=160 / (2 * LEAST_S))
    assert samples(meter, (LEAST_S / 2, 4, 500, 100)) == [None]  # too short


def test_an_interval_ends_even_where_no_request_does() -> None:
    meter = Meter(STATS)
    assert samples(meter, (MOST_S / 2, 3, 0, 0)) == [None]
    assert samples(meter, (MOST_S / 2, 3, 0, 0)) == [Seen(running=3.0, refused=0.0, tokens_per_s=0.0)]


def test_time_in_a_swap_or_an_evaluation_counts_for_nothing_and_neither_do_its_tokens() -> None:
    meter = Meter(STATS)
    assert samples(meter, (100.0, 7, 1000, 1000), counts=False) == [None]
    assert samples(meter, (LEAST_S, 2, 1010, 1002)) == [Seen(running=2.0, refused=0.0, tokens_per_s=10 / LEAST_S)]


class EmptyEngine(ScriptedEngine):
    """Says that it runs one request, whatever it does; each look finds a second's work done."""

    looks = 0

    def stats(self) -> EngineStats:
        self.looks += 1
        return replace(STATS, in_flight=1, generated_tokens=100 * self.looks**2, finished_requests=self.looks)


async def test_an_actor_asks_for_more_leases_as_its_slots_grow_and_tells_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="atpo.actor")
    engine = EmptyEngine()
    engine.hold = asyncio.Event()
    now = [0.0]

    def clock() -> float:
        now[0] += 0.5  # every look at the clock
        return now[0]

    buffer = FakeBuffer(*leases(20))
    stopping = asyncio.Event()
    actor = actor_of(
        buffer, engine=engine, stopping=stopping, clock=clock, config=config_of(trees_in_flight=0, max_num_seqs=64)
    )
    work = asyncio.create_task(actor.work())
    await buffer.until(lambda: len(buffer.open) > 8)
    stopping.set()
    engine.hold.set()
    await work
    assert buffer.asked[0].count == 8
    assert buffer.asked[1].count == 8  # 16 less the 8 that grow
    assert re.search(r"8 -> 16 trees in flight: the engine ran 1 of 64 requests", caplog.text)


def test_slow_commits_are_told_once_with_the_ways_out_and_fast_ones_never() -> None:
    told: list[str] = []
    watch = SlowCommits(Path("/disk/journal"), synced=True, post=lambda line, key: told.append(line))
    fast, slow = {"buffer/commit_s/mean": SLOW_S / 10}, {"buffer/commit_s/mean": 2 * SLOW_S}
    for gauges in ([slow] * (BATCHES - 1) + [fast]) * 3 + [{}]:
        watch.note(gauges)
    assert told == []
    for _ in range(5 * BATCHES):
        watch.note(slow)
    (line,) = told
    assert "/disk/journal takes 40 ms" in line
    assert "--buffer.journal_dir" in line
    assert "--buffer.journal_sync false" in line
