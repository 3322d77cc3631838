"""What an evaluation says of itself: whose turns it counts, what it does not know, and that it failed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from atpo_async.config import build
from atpo_async.core.errors import AtpoError
from atpo_async.report.facts import facts
from atpo_async.report.progress import RunState, plain
from atpo_async.run.metrics import Record
from atpo_async.run.rundir import RunDir
from atpo_async.status import waits
from atpo_async.wire.messages import EvalQuery, EvalRequest, EvalResult, Lease
from buffer.journal import entries
from buffer.state import BufferState
from learner.batches.buffer_peer import BufferPeer
from learner.evaluation import Evaluations
from tests.buffer_peers_support import configured, grown, published, running, state, take
from tests.buffer_support import Disk

__all__ = ["state"]

WAIT_S = 60.0


def asked(step: int = 0, version: int = 0, *, num_tasks: int = 2, blocking: bool = False) -> EvalRequest:
    return EvalRequest(run="r", step=step, version=version, num_tasks=num_tasks, blocking=blocking)


def eval_leases(state: BufferState, count: int) -> tuple[Lease, ...]:
    leases = state.lease("a", count, 0.0).leases
    assert {lease.kind for lease in leases} == {"eval"}
    return leases


# --- versions --------------------------------------------------------------------------------------------------------


def test_an_evaluation_says_from_which_to_which_version_its_turns_are(state: BufferState) -> None:
    state.evaluate(asked(num_tasks=3))
    assert (state.eval_result(0).version_min, state.eval_result(0).version_max) == (-1, -1)
    for lease, version in zip(eval_leases(state, 3), (4, 2, 7), strict=True):
        take(state, grown(lease, (1.0,), version=version))
    result = state.eval_result(0)
    assert (result.done, result.version_min, result.version_max) == (True, 2, 7)


def test_turns_of_the_evaluation_that_a_newer_one_replaced_do_not_count_as_its_versions(state: BufferState) -> None:
    state.evaluate(asked())
    first, _ = eval_leases(state, 2)
    take(state, grown(first, (1.0,), version=0))
    state.publish(published(3))
    state.evaluate(asked(version=3))
    for lease in eval_leases(state, 2):
        take(state, grown(lease, (1.0,), version=3))
    result = state.eval_result(0)
    assert (result.success, result.version_min, result.version_max) == (1.0, 3, 3)


def test_versions_and_what_is_unknown_outlive_the_buffer() -> None:
    disk, config = Disk(), configured()
    state = disk.open(config)
    state.publish(published())
    state.evaluate(asked(num_tasks=3))
    first, second, third = eval_leases(state, 3)
    take(state, grown(first, (1.0,), version=2))
    take(state, grown(second, (1.0,), version=5, success=None))
    disk.commit()
    state = disk.open(config)
    take(state, grown(third, (0.0,), version=3))
    result = state.eval_result(0)
    assert (result.done, result.success, result.num_unknown) == (True, 0.5, 1)
    assert (result.version_min, result.version_max) == (2, 5)


# --- unknown ---------------------------------------------------------------------------------------------------------


def test_a_task_whose_success_is_unknown_is_no_success_and_no_failure(state: BufferState) -> None:
    state.evaluate(asked(num_tasks=4))
    right, wrong, unknown, _ = leases = eval_leases(state, 4)
    take(state, grown(right, (1.0,)))
    take(state, grown(wrong, (0.0,)))
    for lease in leases[2:]:
        take(state, grown(lease, (1.0,), success=None))
    result = state.eval_result(0)
    assert (result.done, result.success, result.num_done, result.num_unknown) == (True, 0.5, 4, 2)
    assert state.drain_records() == [(0, 0, {"eval/failed": 0.0, "eval/unknown": 2.0, "eval/turns_mean": 1.0})]
    assert unknown.tree_id not in state.pool


def test_an_evaluation_in_which_all_is_unknown_has_no_result(state: BufferState) -> None:
    state.evaluate(asked())
    for lease in eval_leases(state, 2):
        take(state, grown(lease, (1.0,), success=None))
    result = state.eval_result(0)
    assert (result.done, result.success, result.num_unknown) == (True, None, 2)


def test_in_training_too_a_reward_is_no_success_and_what_is_unknown_is_counted_apart(state: BufferState) -> None:
    first, second = state.lease("a", 2, 0.0).leases
    take(state, grown(first, (1.0, 0.0), success=None))
    known, *rest = grown(second, (1.0, 0.0))[1:-1]
    take(state, [grown(second, (1.0, 0.0))[0], known])
    take(state, [msgspec.structs.replace(cast(Any, each), success=None) for each in rest])
    take(state, [grown(second, (1.0, 0.0))[-1]])
    since = state.counters.since
    assert since.means["train/reward"] == (1.0, 2.0)
    assert since.means["train/success"] == (1.0, 1.0)
    assert since.means["train/success_unknown"] == (1.5, 2.0)


# --- in the journal ------------------------------------------------------------------------------------------------


def test_only_evaluations_that_got_on_are_written_again() -> None:
    disk = Disk()
    state = disk.open(configured())
    state.publish(published())
    for step in (1, 2):
        state.evaluate(asked(step))
    leases = eval_leases(state, 4)
    disk.commit()
    written: list[bytes] = []
    put = disk.put

    def watched(key: bytes, value: bytes | None) -> None:
        written.append(key)
        put(key, value)

    disk.put = watched  # type: ignore[method-assign]
    take(state, grown(leases[-1], (1.0,)))
    disk.commit()
    assert [key for key in written if key.startswith(entries.EVALUATION)] == [entries.EVALUATION + b"%020d" % 2]
    written.clear()
    disk.commit()
    assert written == []


def test_evaluations_that_an_earlier_program_wrote_in_one_value_go_on() -> None:
    disk = Disk()
    state = disk.open(configured())
    state.publish(published())
    disk.commit()
    old = {"step": 4, "version": 0, "num_tasks": 2, "blocking": True, "next_task": 1, "results": {0: 1.0}, "turns": 3}
    disk.put(entries.ALL_EVALUATIONS, msgspec.msgpack.encode([old]))
    state = disk.open(configured())
    assert entries.ALL_EVALUATIONS not in disk.state
    assert entries.EVALUATION + b"%020d" % 4 in disk.state
    (lease,) = eval_leases(state, 1)
    assert lease.task_index == 1
    take(state, grown(lease, (0.0,)))
    assert state.eval_result(4).success == 0.5
    assert state.drain_records() == [(4, 0, {"eval/failed": 0.0, "eval/unknown": 0.0, "eval/turns_mean": 2.0})]


async def test_messages_of_actors_count_as_progress_of_the_buffer() -> None:
    async with running() as peers:
        await peers.tell(published())
        (lease,) = await peers.leases(1)
        before = waits.progress_made().get("messages", 0)
        await peers.send(*grown(lease))
        assert waits.progress_made()["messages"] == before + 4


# --- the learner's side ----------------------------------------------------------------------------------------------


class FakeBuffer:
    """Answers queries with what it is given."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.run_id = "r"
        self.stopping = asyncio.Event()
        self.settings = SimpleNamespace(give_up_s=0.0)
        self.no_answer = "no answer"
        self.link = SimpleNamespace(drain=self._drain)

    async def _drain(self, *, timeout_s: float) -> None:
        """Nothing is under way."""

    async def send(self, message: Any) -> None:
        assert isinstance(message, EvalRequest)

    async def ask(self, query: Any) -> Any:
        assert isinstance(query, EvalQuery)
        if not self.answers:
            await asyncio.Event().wait()
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def bounded_wait(self, what: str) -> Any:
        return SimpleNamespace(again=lambda reason: None, moved=lambda: None)

    async def unless_stopping(self, awaitable: Any) -> Any:
        return await awaitable


def evaluations(
    folder: Path, *answers: Any, written: list[tuple[int, int, Mapping[str, float]]] | None = None
) -> Evaluations:
    config = build({"run": {"dir": str(folder), "name": "r"}, "eval": {"num_tasks": 2}})

    def write(step: int, version: int, metrics: Mapping[str, float]) -> None:
        if written is not None:
            written.append((step, version, metrics))

    return Evaluations(
        config,
        RunDir.create(config),
        buffer=cast(BufferPeer, FakeBuffer(*answers)),
        write=write,
        log=logging.getLogger("learner"),
    )


def done(**fields: Any) -> EvalResult:
    return EvalResult(**({"step": 3, "done": True, "success": 0.5, "num_done": 2, "num_tasks": 2} | fields))


async def test_the_learner_writes_the_versions_beside_the_success(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    written: list[tuple[int, int, Mapping[str, float]]] = []
    made = evaluations(tmp_path, done(version_min=3, version_max=5), written=written)
    await made.begin(3, 3)
    await asyncio.wait_for(asyncio.gather(*made.under_way), WAIT_S)
    numbers = {"eval/success": 0.5, "eval/tasks": 2.0, "eval/version_min": 3.0, "eval/version_max": 5.0}
    assert written == [(3, 3, numbers)]
    assert "step 3: greedy success 0.500, sampled by versions 3 to 5" in caplog.messages


@pytest.mark.parametrize("error", [RuntimeError("no such thing"), AtpoError("odd"), KeyError("x")])
async def test_whatever_ends_an_evaluation_beside_training_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    made = evaluations(tmp_path, error)
    await made.begin(3, 3)
    # As the role does at its end.
    await asyncio.wait_for(asyncio.gather(*made.under_way, return_exceptions=True), WAIT_S)
    (said,) = caplog.messages
    assert said == f"evaluation of step 3 is given up: {type(error).__name__}: {error}"


async def test_an_evaluation_without_a_result_at_the_runs_end_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = evaluations(tmp_path)
    await made.begin(3, 3)
    await asyncio.wait_for(made.wait_for_those_under_way(), WAIT_S)
    assert caplog.messages == ["evaluation 3 has no result 0 s after the last step (links.give_up_s)"]
    for task in made.under_way:
        task.cancel()


async def test_an_evaluation_in_which_all_is_unknown_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = evaluations(tmp_path, done(success=None, num_unknown=2))
    await made.begin(3, 3)
    await asyncio.wait_for(asyncio.gather(*made.under_way), WAIT_S)
    (said,) = caplog.messages
    assert said == (
        "evaluation of step 3 has no result: the environment reported no success or failure of 2 of its 2 tasks "
        "(StepResult.success is None), the others failed"
    )


# --- what is shown ---------------------------------------------------------------------------------------------------


def evaluated(step: int, success: float, oldest: int, newest: int) -> Record:
    metrics = {"eval/success": success, "eval/version_min": float(oldest), "eval/version_max": float(newest)}
    return Record(time=1.0 + step, source="learner", step=step, version=oldest, metrics=metrics)


def test_the_terminal_says_which_versions_were_mixed_and_nothing_where_none_were() -> None:
    shown = RunState(total_steps=9)
    shown.feed([evaluated(2, 0.5, 2, 2)])
    assert "eval 0.500 (step 2)" in plain(shown)
    shown.feed([evaluated(4, 0.75, 4, 6)])
    assert "eval 0.750 (step 4, versions 4 to 6)" in plain(shown)


def test_the_report_says_which_versions_were_mixed_and_what_was_unknown(tmp_path: Path) -> None:
    rundir = RunDir.create(build({"run": {"dir": str(tmp_path), "name": "r"}}))
    counted = Record(time=9.0, source="buffer", step=4, version=4, metrics={"eval/unknown": 3.0})
    sampled = Record(time=9.0, source="learner", step=4, version=4, metrics={"train/success_unknown": 0.25})
    lines = facts(rundir, [evaluated(2, 0.5, 2, 2), evaluated(4, 0.75, 4, 6), counted, sampled]).lines()
    assert "greedy success on held-out tasks: 0.500 (step 2), 0.750 (step 4, versions 4 to 6)" in lines
    assert any(line.startswith("3 held-out tasks ended without a success value") for line in lines)
    assert any(line.startswith("25.0% of what was sampled in training ended without a success value") for line in lines)
