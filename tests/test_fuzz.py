"""Fuzzing in small: the corpus is what it says, and a buffer with rude peers serves the honest ones all the same."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import zmq

from atpo_async.config import LinksConfig, build
from atpo_async.core.errors import BadMessage
from atpo_async.run.endpoints import Endpoints
from atpo_async.run.rundir import RunDir
from atpo_async.wire import codec
from atpo_async.wire import messages as m
from buffer.service import BufferService
from scripts.fuzz_corpus import Corpus, Door, Shot
from scripts.fuzz_honest import Honest, hello_of
from scripts.fuzz_peers import HABITS, KNOCKS, Rude, knock

LIMIT_BYTES = 1 << 20
DEADLINE_S = 90.0
LOOPBACK = Endpoints(actors="tcp://127.0.0.1:0", learner="tcp://127.0.0.1:0")
RECEIVES: dict[Door, Any] = {"actors": m.ActorToBuffer, "learner": m.LearnerToBuffer}
DOORS: tuple[Door, ...] = ("actors", "learner")


def shots(door: Door, seed: int, count: int) -> list[Shot]:
    corpus = Corpus("run-1", door, seed=seed, limit_bytes=LIMIT_BYTES)
    return list(islice(iter(corpus.next, None), count))


@pytest.mark.parametrize("door", DOORS)
def test_equal_seeds_give_equal_messages(door: Door) -> None:
    assert shots(door, 3, 400) == shots(door, 3, 400)
    assert shots(door, 3, 400) != shots(door, 4, 400)


@pytest.mark.parametrize("door", DOORS)
def test_what_is_sent_is_no_message_or_one_that_changes_nothing(door: Door) -> None:
    outcomes: Counter[str] = Counter()
    for shot in shots(door, 1, 6000):
        try:
            message = codec.decode(shot.frames, RECEIVES[door], limits=codec.Limits(message_bytes=LIMIT_BYTES))
        except BadMessage:
            outcomes["refused by the wire"] += 1
            continue
        outcomes["refused by the buffer"] += 1
        if message.run != "run-1":
            continue
        match message:
            case m.EvalQuery():
                assert message.step == 2**31 - 1
            case m.SampleRequest():
                assert message.rank >= message.num_ranks
            case m.Trained():
                assert message.batch_id == 2**31 - 1
            case _:
                # None of a real run's trees is called anything like it.
                assert not message.tree_id.startswith(("train", "eval"))
    assert outcomes["refused by the wire"] > 3000
    assert outcomes["refused by the buffer"] > 300


async def test_honest_peers_notice_nothing_of_rude_ones_beside_them(tmp_path: Path) -> None:
    config = build(
        {
            "run": {"name": "fuzz", "dir": str(tmp_path), "seed": 1},
            "links": {"max_message_bytes": LIMIT_BYTES, "heartbeat_s": 0.2},
            "staleness": {"trees_per_batch": 2, "max_lag": 2},
            "search": {"initial_rollouts": 4, "rounds": 0},
        }
    )
    run = RunDir.create(config)
    context = zmq.Context()
    counts: Counter[str] = Counter()
    rude: list[Rude] = []
    service = BufferService(config, run=run.run_id, endpoints=LOOPBACK, rundir=run, stopping=asyncio.Event())
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(context.destroy, linger=0)
        await stack.enter_async_context(service)
        doors: dict[Door, str] = {"actors": service.actors.endpoint, "learner": service.learner.endpoint}
        hello = hello_of(config, run.run_id)
        settings = LinksConfig(heartbeat_s=0.2)
        honest = Honest(run.run_id, doors, hello=hello, trees_per_batch=2, settings=settings, pause_s=0.0)
        serving = asyncio.create_task(service.serve())
        working = asyncio.create_task(honest.work())
        for number, habits in enumerate(HABITS):
            door = DOORS[number % 2]
            corpus = Corpus(run.run_id, door, seed=number, limit_bytes=LIMIT_BYTES)
            rude.append(Rude(context, doors[door], f"rude-{number}", corpus, habits, counts))
        for number in range(len(KNOCKS)):
            knock(doors[DOORS[number % 2]], number)
        deadline = time.monotonic() + DEADLINE_S

        def bad() -> int:
            return service.actors.bad_messages + service.learner.bad_messages

        while bad() < 2000 or honest.report.batches < 3:
            assert not working.done(), honest.report.faults
            assert not serving.done()
            assert time.monotonic() < deadline, (bad(), honest.report)
            for peer in rude:
                for _ in range(16):
                    if not peer.fire():
                        break
                peer.listen()
            # Lets the buffer and the honest peers, on this loop too, get at what has come.
            await asyncio.sleep(0.001)
        honest.stop()
        report = await working
        assert report.faults == []
        assert (report.trees_trained, report.batches >= 3) == (2 * report.batches, True)
        assert len(counts) > 15
        for peer in rude:
            peer.close()
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


def test_no_link_has_libzmqs_heartbeats() -> None:
    # With them libzmq 4.3.5 aborts the process when a peer goes away while the receive queue is full of what it sent.
    modules = list((Path(__file__).resolve().parent.parent / "atpo_async" / "links").rglob("*.py"))
    assert modules
    for path in modules:
        assert "HEARTBEAT_IVL" not in path.read_text(encoding="utf-8"), path
