"""A run folder of an earlier program: its journal is read as that program read it, and the run goes on to its end.

``old_run.tar.xz`` is a real run (transformers engine, a policy of two layers; program of commit 87957ff) that was
killed with kill -9, every process of it, after half of its tasks: with trees half grown under leases, a tree ready for
a batch, a batch that the learner had and the buffer did not know to be trained on, another behind the last checkpoint,
and a checkpoint not yet in its place.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atpo_async.run.metrics import parse_record
from atpo_async.run.rundir import RunDir
from atpo_async.wire.records import TurnRecords
from buffer.journal.journal import Journal
from buffer.journal.persistence import StatePersistence
from buffer.state import BufferState
from buffer.trees.index import TreeEntry, places_of
from tests.e2e_support import DEADLINE_S, Process

ARCHIVE = Path(__file__).with_name("old_run.tar.xz")
MAX_TASKS = 48
CHECKPOINT = 4
"""Batches in the last whole one."""

# What the program that made the run reads from it.
COUNTS = {
    "turns": 159,
    "growing trees": 4,
    "ready trees": 1,
    "trees with the learner": 4,
    "trees kept for a checkpoint": 4,
    "leases": 4,
    "batches": 2,
    "tasks to lease again": 0,
}
CURSOR = {
    "incarnation": 2,
    "next task": 29,
    "next tree": 46,
    "next batch": 7,
    "given up": 0,
    "published": 5,
    "step": 5,
    "saved step": 4,
    "version": 5,
    "bytes of records": 43520,
    "batches not confirmed": 1,
}
TASKS = {"trained": 20}
LEASES = {
    "b1-00000025": (25, "actor-0", 0, 11),
    "b1-00000026": (26, "actor-0", 0, 9),
    "b1-00000027": (27, "actor-0", 0, 4),
    "b1-00000028": (28, "actor-0", 0, 0),
}
"""Tree -> (task, holder, epoch, turns that are there)."""
READY = ["b1-00000023"]
EVALUATED = {0: 8, 3: 8}
"""Step -> held-out tasks with a result."""


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run as it was left.  The paths in its configuration are relative to the working folder."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path / "old_run")
    return tmp_path / "old_run" / "runs" / "run"


@contextmanager
def buffer_of(run: Path) -> Iterator[tuple[BufferState, Journal, dict[str, int]]]:
    """The state that a buffer of this run would begin with, its journal, and what it would say to have found there."""
    opened = RunDir.open(run)
    journal = Journal(opened.journal, run=opened.run_id, max_bytes=opened.config.buffer.max_bytes)
    try:
        recovered = journal.recover()
        state = BufferState(opened.config, run=opened.run_id, rng=np.random.default_rng(0), now=0.0, store=journal)
        yield state, journal, StatePersistence(state).restore(recovered.rows, recovered.state, 0.0)
    finally:
        asyncio.run(journal.close())


@contextmanager
def alone_on_this_machine() -> Iterator[None]:
    """Two copies of one run have one id, by which their processes and their shared memory are known."""
    with (Path(tempfile.gettempdir()) / f"atpo-old-run-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def batches(run: Path) -> list[dict[str, Any]]:
    """What the weights were trained on: without what a learner that fell back has lost."""
    kept: list[dict[str, Any]] = []
    for line in lines(run / "lineage.jsonl"):
        if "starts_at" in line:
            kept = [batch for batch in kept if batch["step"] < line["starts_at"]]
        else:
            kept.append(line)
    return kept


def turns_of(tree: TreeEntry, journal: Journal) -> TurnRecords:
    return TurnRecords.raw([journal.read(place) for place in places_of(tree.rows)], len(tree))


def test_the_journal_of_an_earlier_program_holds_what_that_program_found_in_it(old: Path) -> None:
    with buffer_of(old) as (state, journal, counts):
        assert counts == COUNTS
        assert {
            "incarnation": state.incarnation,
            "next task": state.ledger.tasks.next_task,
            "next tree": state.ledger.next_number,
            "next batch": state.batches.next_id,
            "given up": state.ledger.tasks.given_up,
            "published": state.ledger.progress.published,
            "step": state.step,
            "saved step": state.batch_server.saved_step,
            "version": state.version,
            "bytes of records": journal.nbytes,
            "batches not confirmed": sum(not batch.confirmed for batch in state.batches.by_step.values()),
        } == CURSOR
        assert dict(state.counters.tasks) == TASKS
        leases = {}
        for tree_id in state.ledger.training_trees():
            held, growing = state.ledger.held(tree_id), state.assembly.growing(tree_id)
            assert held is not None
            assert growing is not None
            leases[tree_id] = (held.task_index, held.holder, held.epoch, len(growing.turns))
            turns = turns_of(state.assembly.tree(tree_id), journal)
            assert [turn.tree_id for turn in turns] == [tree_id] * len(turns)
        assert leases == LEASES
        assert state.pool.ready_ids() == READY
        assert {each.step: len(each.results) for each in state.ledger.evaluations} == EVALUATED


def test_the_turns_in_the_journal_of_an_earlier_program_are_those_that_its_learner_was_trained_on(old: Path) -> None:
    with buffer_of(old) as (state, journal, _):
        hashes = {}
        for batch in state.batches.by_step.values():
            for drawn in batch.drawn:
                turns = turns_of(state.trees.registry.as_served(drawn), journal)
                assert all(turn.run == state.run and len(turn.action) == len(turn.logprobs) for turn in turns)
                hashes[drawn.tree_id] = hashlib.blake2b(b"".join(turns.parts), digest_size=8).hexdigest()
        trained = {tree["tree_id"]: tree["hash"] for batch in batches(old) for tree in batch["trees"]}
        assert hashes
        assert hashes == {tree_id: trained[tree_id] for tree_id in hashes}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes through /proc")
def test_a_run_of_an_earlier_program_goes_on_and_trains_on_every_task_once(old: Path) -> None:
    metrics, lineage = (old / "metrics.jsonl").read_bytes(), (old / "lineage.jsonl").read_bytes()
    next_version = int((old / "version").read_text())
    given = {tree["tree_id"]: tree["hash"] for batch in batches(old)[CHECKPOINT:] for tree in batch["trees"]}

    with alone_on_this_machine():
        train = Process(["train", "run.toml"], Path("output.txt"))
        try:
            code = train.popen.wait(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            train.end()
    assert code == 0, story(train, old)
    assert "(goes on; " in train.said()

    # What was there stays; what came is behind it.
    assert (old / "metrics.jsonl").read_bytes().startswith(metrics)
    assert (old / "lineage.jsonl").read_bytes().startswith(lineage)

    # From the last whole checkpoint on, with its optimizer, under versions that were never given.
    start, *come = lines(old / "lineage.jsonl")[len(lineage.splitlines()) :]
    last = CHECKPOINT + len(come)
    assert start["starts_at"] == CHECKPOINT
    assert start["version"] >= next_version
    assert [batch["step"] for batch in come] == list(range(CHECKPOINT, last))
    records = [r for r in map(parse_record, (old / "metrics.jsonl").read_bytes()[len(metrics) :].splitlines()) if r]
    steps = [record for record in records if record.source == "learner" and "batch/trees" in record.metrics]
    assert [record.step for record in steps] == list(range(CHECKPOINT + 1, last + 1))
    first = steps[0].metrics
    assert first["train/updates"] + first["guard/skipped_updates"] == CHECKPOINT + 1

    # The trees that were there, those of the batches that the learner had lost among them, as they were.
    hashes = {tree["tree_id"]: tree["hash"] for batch in come for tree in batch["trees"]}
    assert given
    assert given == {tree_id: hashes.get(tree_id) for tree_id in given}
    assert set(READY) <= hashes.keys()

    # No task twice, and none lost: those in no batch are accounted for.
    used = Counter(tree["task_index"] for batch in batches(old) for tree in batch["trees"])
    assert {task: times for task, times in used.items() if times > 1} == {}
    assert used.keys() <= set(range(MAX_TASKS))
    with buffer_of(old) as (state, _, found):
        assert {name: count for name, count in found.items() if count} == {}
        assert state.ledger.tasks.next_task == MAX_TASKS
        tasks = state.counters.tasks
        assert tasks["trained"] == len(used)
        assert tasks["trained"] + tasks["no_signal"] + tasks["failed"] + state.ledger.tasks.given_up == MAX_TASKS

    assert (old / "model" / "config.json").is_file()
    assert not list((old / "checkpoints").glob(".writing-*"))


def story(train: Process, run: Path) -> str:
    """What a failure should show."""
    logs = sorted((run / "logs").glob("*.log"))
    return "\n".join([train.said(), *(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)])
