"""A run that trains on nothing stops and says why; trees without a signal alone are no fault."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from atpo_async.api.notes import trained
from atpo_async.core.errors import SetupError
from atpo_async.ops.exits import EXIT_USER
from atpo_async.ops.role import exit_code
from atpo_async.run.metrics import Record
from atpo_async.run.rundir import RunDir
from atpo_async.wire.messages import Batch, Exhausted, RunFinished, Trained
from buffer.state import BufferState
from learner.batches.fruitless import Fruitless, NothingToTrainOn, num_trained
from learner.checkpoints import checkpoint
from learner.role import learn
from learner.training.report import StepReport
from tests.buffer_peers_support import ask, closed, configured, grown, opened, published
from tests.learner_support import batch_of, make_batch, make_model
from tests.test_learner_loop import WAIT_S, ScriptedBuffer, context, make_config
from tests.test_learner_loop import served as served

QUIET: dict[str, object] = {"every_steps": 0, "at_start": False, "at_end": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def empty(step: int = 0, **counts: float) -> Batch:
    """A batch without a tree; ``counts``: what the buffer counted."""
    metrics = {f"buffer/{name}": float(count) for name, count in counts.items()}
    return msgspec.structs.replace(batch_of((), (), step=step), metrics=metrics)


def report(**dropped: int) -> StepReport:
    metrics = {f"dropped/{reason}": float(count) for reason, count in dropped.items()}
    return StepReport(metrics=metrics, priorities={}, trained=frozenset(), fault=None)


# --- when a run stops -------------------------------------------------------------------------------------------


def test_so_many_batches_in_a_row_of_failed_trees_stop_the_run_with_the_reasons_by_count() -> None:
    watch = Fruitless(3)
    assert watch.after(empty(dropped_no_leaf=9, no_signal_trees=2), report()) is None
    assert watch.after(empty(dropped_no_leaf=4, dropped_stale=3), report()) is None
    stop = watch.after(empty(dropped_one_leaf=8), report())
    assert isinstance(stop, NothingToTrainOn)
    assert exit_code(stop) == EXIT_USER  # no restart would mend it
    said = str(stop)
    assert said.startswith("3 batches in a row held no tree to train on")
    assert "trees: 13 failed, no chain of them came to its end, 8 failed but for one chain, 3 older than" in said


def test_trees_that_the_learner_refuses_count_as_well() -> None:
    watch = Fruitless(2)
    whole = make_batch(num_trees=4)
    assert num_trained(whole, report(bad_token=3)) == 1
    assert watch.after(whole, report(bad_token=4)) is None
    stop = watch.after(whole, report(bad_token=4))
    assert stop is not None
    assert "8 refused by the learner (bad_token)" in str(stop)


def test_a_batch_with_one_tree_to_train_on_begins_the_count_anew() -> None:
    watch = Fruitless(2)
    assert watch.after(empty(dropped_no_leaf=9), report()) is None
    assert watch.after(make_batch(num_trees=4), report(bad_token=3)) is None
    assert watch.after(empty(dropped_no_leaf=9), report()) is None


@pytest.mark.parametrize("failed", [0, 3])
def test_trees_without_a_signal_stop_no_run_nor_does_a_task_that_fails_among_them(failed: int) -> None:
    watch = Fruitless(2)
    for _ in range(20):
        assert watch.after(empty(no_signal_trees=12, dropped_no_leaf=failed), report()) is None


async def test_a_learner_saves_what_it_has_learned_before_it_stops_for_batches_without_trees(
    served: tuple[ScriptedBuffer, str], model: Path, tmp_path: Path
) -> None:
    buffer, endpoint = served
    learner: dict[str, object] = {"max_skipped_updates": 2, "checkpoint_every": 100}
    run = RunDir.create(make_config(tmp_path, model, run={"steps": 50}, eval=QUIET, learner=learner))
    buffer.on_sample = lambda request: empty(request.step, dropped_no_leaf=9) if request.step else None
    with pytest.raises(NothingToTrainOn, match="2 batches in a row"):
        await asyncio.wait_for(learn(context(run, endpoint)), WAIT_S)
    assert [m.batch_id for m in buffer.of(Trained)] == [0, 1, 2]
    assert [p.name for p in checkpoint.list_checkpoints(run.checkpoints)] == ["step-000003-v000003"]
    assert not buffer.of(RunFinished)


@pytest.mark.parametrize("counts", [{"no_signal_trees": 12}, {"dropped_no_leaf": 3}])
async def test_a_run_of_which_no_step_trained_on_a_tree_is_not_done(
    counts: dict[str, float], served: tuple[ScriptedBuffer, str], model: Path, tmp_path: Path
) -> None:
    buffer, endpoint = served
    run = RunDir.create(make_config(tmp_path, model, eval=QUIET, learner={"checkpoint_every": 1}))
    buffer.on_sample = lambda request: empty(request.step, **counts)
    with pytest.raises(SetupError, match=r"nothing was trained in 3 batches: trees: \d+ (failed|without a signal)"):
        await asyncio.wait_for(learn(context(run, endpoint)), WAIT_S)
    assert not buffer.of(RunFinished)
    assert not (run.path / "model").exists()
    # The next start begins at step 1 once more, and may have another configuration.
    assert checkpoint.list_checkpoints(run.checkpoints) == []
    assert not run.is_trained


async def test_a_run_that_runs_out_of_tasks_without_a_step_is_not_done(
    served: tuple[ScriptedBuffer, str], model: Path, tmp_path: Path
) -> None:
    buffer, endpoint = served
    run = RunDir.create(make_config(tmp_path, model, eval=QUIET))
    buffer.on_sample = lambda request: Exhausted(reason="all run.max_tasks = 8 tasks are done: 0 trained on, 8 failed")
    with pytest.raises(SetupError, match=r"nothing was trained in 0 batches: no tree came at all; .* 8 failed"):
        await asyncio.wait_for(learn(context(run, endpoint)), WAIT_S)
    assert not buffer.of(RunFinished)


# --- the buffer's part ------------------------------------------------------------------------------------------


def failed_tree(state: BufferState) -> None:
    (lease,) = state.lease("a", 1, 0.0).leases
    for message in (opened(lease), closed(lease, 0, failed=4)):
        state.take(message, 0.0)


def test_when_tree_after_tree_fails_the_learner_gets_an_empty_batch_that_counts_them() -> None:
    """It would wait for as long as any tree comes."""
    config = configured(staleness={"trees_per_batch": 2, "max_lag": 8, "max_oversampling": 2.0})
    state = BufferState(config, run="r", rng=np.random.default_rng(0), now=0.0)
    state.publish(published())
    for _ in range(3):
        failed_tree(state)
        assert state.sample(ask(), 0.0) is None
    failed_tree(state)
    batch = state.sample(ask(), 0.0)
    assert isinstance(batch, Batch)
    assert (batch.num_trees, batch.metrics["buffer/dropped_no_leaf"]) == (0, 4)


def test_failed_trees_beside_one_that_is_ready_serve_no_short_batch() -> None:
    config = configured(staleness={"trees_per_batch": 2, "max_lag": 8, "max_oversampling": 2.0})
    state = BufferState(config, run="r", rng=np.random.default_rng(0), now=0.0)
    state.publish(published())
    for message in grown(state.lease("a", 1, 0.0).leases[0]):
        state.take(message, 0.0)
    for _ in range(6):
        failed_tree(state)
    assert state.sample(ask(), 0.0) is None


# --- the last line ----------------------------------------------------------------------------------------------


def step(number: int, **metrics: Any) -> Record:
    return Record(time=0.0, source="learner", step=number, version=number, metrics=metrics)


def test_the_last_line_says_how_much_was_trained_on() -> None:
    records = [
        step(1, **{"batch/trees": 12, "batch/trained": 12}),
        step(2, **{"batch/trees": 12, "batch/trained": 1}),  # lost with a killed learner, and done again
        step(2, **{"batch/trees": 12, "batch/trained": 11, "dropped/bad_token": 1, "buffer/no_signal_trees": 3}),
        step(3, **{"batch/trees": 0, "batch/trained": 0, "buffer/dropped_no_leaf": 5, "buffer/no_signal_trees": 4}),
        step(3, **{"eval/success": 0.5}),
    ]
    assert trained(records) == (
        "trained on 23 trees in 2 of 3 steps; 1 step had none to learn from.  Other trees: 7 without a signal, 5 "
        "failed, 1 refused or too old"
    )
    assert trained([]) == ""
