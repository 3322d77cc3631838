"""The learner's loop against a scripted buffer: order of events, versions, metrics, resume, stops."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
import torch

from atpo_async.config import Config, LinksConfig, build
from atpo_async.core.errors import PeerLost, SetupError, WaitTimeout
from atpo_async.links.client import Client
from atpo_async.links.server import Server
from atpo_async.ops.role import RoleContext
from atpo_async.run.endpoints import Endpoints
from atpo_async.run.metrics import read_metrics
from atpo_async.run.rundir import RunDir
from atpo_async.status.facts import published_facts
from atpo_async.status.waits import BoundedWait
from atpo_async.status.wording import flat
from atpo_async.wire.messages import (
    Batch,
    Checkpointed,
    EvalQuery,
    EvalRequest,
    EvalResult,
    Exhausted,
    LearnerToBuffer,
    NotYet,
    Refused,
    RunFinished,
    SampleRequest,
    Trained,
    VersionPublished,
)
from learner.batches import buffer_peer, skipped
from learner.batches.lineage import LINEAGE_FILE
from learner.batches.skipped import load_batch, save_batch
from learner.checkpoints import checkpoint
from learner.loss import guards
from learner.role import learn
from learner.training.trainer import Trainer
from tests.learner_support import batch_of, make_batch, make_model

LINKS = LinksConfig()
WAIT_S = 60


class ScriptedBuffer:
    """Answers as a buffer would; ``events`` is what the learner said, in order."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.not_yet = 0
        """How often to say so before each batch."""
        self.on_sample: Callable[[SampleRequest], Any] | None = None
        self.evaluation_done = True
        self.success: float | None = 0.5
        self._asked: Counter[int] = Counter()
        self._evaluations: set[int] = set()

    async def handle(self, peer: str, message: Any) -> Any:
        self.events.append(message)
        if isinstance(message, EvalRequest):
            self._evaluations.add(message.step)
        elif isinstance(message, EvalQuery):
            if message.step not in self._evaluations:
                return Refused(reason=f"no evaluation of step {message.step}")
            if not self.evaluation_done:
                return EvalResult(step=message.step, done=False, success=None, num_done=1, num_tasks=4)
            return EvalResult(step=message.step, done=True, success=self.success, num_done=4, num_tasks=4)
        elif isinstance(message, SampleRequest):
            if self.on_sample is not None and (answer := self.on_sample(message)) is not None:
                return answer
            self._asked[message.step] += 1
            if self._asked[message.step] <= self.not_yet:
                return NotYet(waiting_for="2 more trees")
            return make_batch(seed=message.step, step=message.step, version=message.version)
        return None

    def kinds(self) -> list[type]:
        return [type(e) for e in self.events]

    def of(self, kind: type) -> list[Any]:
        return [e for e in self.events if isinstance(e, kind)]


@pytest_asyncio.fixture
async def served() -> AsyncIterator[tuple[ScriptedBuffer, str]]:
    buffer = ScriptedBuffer()
    async with Server(
        "tcp://127.0.0.1:0", name="buffer", receives=LearnerToBuffer, handler=buffer.handle, settings=LINKS
    ) as server:
        yield buffer, server.endpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def make_config(folder: Path, model: Path, **sections: dict[str, object]) -> Config:
    data: dict[str, dict[str, object]] = {
        "run": {"dir": str(folder), "name": "demo", "steps": 3},
        "model": {"path": str(model)},
        "learner": {"lr": 1e-3, "device": "cpu", "checkpoint_every": 2},
        "eval": {"every_steps": 2, "num_tasks": 4},
    }
    for name, section in sections.items():
        data[name] = {**data.get(name, {}), **section}
    return build(data)


def context(rundir: RunDir, buffer_endpoint: str) -> RoleContext:
    endpoints = Endpoints(learner=buffer_endpoint, weights="tcp://127.0.0.1:0", announce="tcp://127.0.0.1:0")
    return RoleContext(
        config=rundir.config, run_id=rundir.run_id, rundir=rundir, endpoints=endpoints, name="learner", index=0,
        stopping=asyncio.Event(), log=logging.getLogger("learner"),
    )  # fmt: skip


def stopping_at(step: int, stopping: asyncio.Event) -> Callable[[SampleRequest], NotYet | None]:
    """An answer of the buffer: the role is asked to end once the batch after ``step`` is wanted."""

    def answer(request: SampleRequest) -> NotYet | None:
        if request.step < step:
            return None
        stopping.set()
        return NotYet(waiting_for="nothing will come")

    return answer


async def test_a_run_evaluates_before_the_first_update_and_publishes_every_version(
    served: tuple[ScriptedBuffer, str], model: Path, tmp_path: Path
) -> None:
    buffer, endpoint = served
    buffer.not_yet = 1
    rundir = RunDir.create(make_config(tmp_path, model))
    await asyncio.wait_for(learn(context(rundir, endpoint)), WAIT_S)

    kinds = buffer.kinds()
    assert kinds[:2] == [EvalRequest, VersionPublished]
    assert buffer.events[0].blocking
    assert buffer.events[0].num_tasks == 4
    assert kinds.index(EvalQuery) < kinds.index(SampleRequest)
    assert kinds[-1] == RunFinished
    assert [m.version for m in buffer.of(VersionPublished)] == [0, 1, 2, 3]
    assert [(m.batch_id, m.version) for m in buffer.of(Trained)] == [(0, 1), (1, 2), (2, 3)]
    assert buffer.of(Trained)[0].priorities.keys() == {f"tree-{i}" for i in range(4)}
    assert sorted({(m.step, m.version) for m in buffer.of(SampleRequest)}) == [(0, 0), (1, 1), (2, 2)]
    assert [(m.step, m.version, m.blocking) for m in buffer.of(EvalRequest)] == [
        (0, 0, True), (2, 2, False), (3, 3, True),
    ]  # fmt: skip

    records = list(read_metrics(rundir.metrics_path))
    evaluations = [r for r in records if "eval/success" in r.metrics]
    assert [(r.step, r.version) for r in evaluations] == [(0, 0), (2, 2), (3, 3)]
    assert records.index(evaluations[0]) < next(i for i, r in enumerate(records) if "train/loss" in r.metrics)
    steps = [r for r in records if "train/loss" in r.metrics]
    assert [(r.step, r.version, r.source) for r in steps] == [(i, i, "learner") for i in (1, 2, 3)]
    expected = {
        "train/reward", "train/success", "lag/mean", "lag/p95", "lag/max", "turns/multi_version_share",
        "tokens/trained_per_s", "time/learner_wait_s", "time/step_s", "is/ess_frac", "is/truncated_share", "clip_share",
        "grad_norm", "lr", "weights/publish_s", "turns/zero_advantage_share",
    }  # fmt: skip
    assert all(expected <= r.metrics.keys() for r in steps)

    assert (rundir.path / "model" / "model.safetensors").is_file()
    assert [p.name for p in checkpoint.list_checkpoints(rundir.checkpoints)] == [
        "step-000002-v000002", "step-000003-v000003",
    ]  # fmt: skip
    assert not (Path("/dev/shm") / f"atpo-{rundir.run_id}").exists()


async def test_a_stopped_run_goes_on_where_it_was(
    served: tuple[ScriptedBuffer, str], model: Path, tmp_path: Path
) -> None:
    buffer, endpoint = served
    config = make_config(tmp_path, model, learner={"checkpoint_every": 100}, eval={"every_steps": 0})
    rundir = RunDir.create(config)
    first = context(rundir, endpoint)

    buffer.on_sample = stopping_at(2, first.stopping)
    await asyncio.wait_for(learn(first), WAIT_S)
    assert buffer.of(RunFinished) == []
    assert [p.name for p in checkpoint.list_checkpoints(rundir.checkpoints)] == ["step-000002-v000002"]

    buffer.on_sample = None
    buffer.events.clear()
    await asyncio.wait_for(learn(context(RunDir.open(rundir.path), endpoint)), WAIT_S)
    # No number is used twice: the same weights are published again under a new one.
    assert [m.version for m in buffer.of(VersionPublished)] == [3, 4]
    assert [(m.step, m.version) for m in buffer.of(SampleRequest)] == [(2, 3)]
    assert [m.step for m in buffer.of(EvalRequest)] == [3]
    assert buffer.kinds()[-1] is RunFinished


async def test_the_status_says_how_far_the_learner_is(
    served: tuple[ScriptedBuffer, str], model: Path, tmp_path: Path
) -> None:
    buffer, endpoint = served
    said: list[str] = []

    def look(request: SampleRequest) -> NotYet | None:
        facts = published_facts()["learner"]
        if request.step == 2 and facts["published"] == 0:
            return NotYet(waiting_for="the publication, which goes on meanwhile")
        said.append(flat(facts))
        return None

    buffer.on_sample = look
    config = make_config(tmp_path, model, staleness={"publish_every": 2}, eval={"at_start": False, "at_end": False})
    await asyncio.wait_for(learn(context(RunDir.create(config), endpoint)), WAIT_S)
    assert said == [
        "step 0 of 3, version 0, published 0",
        "step 1 of 3, version 1, published 0",
        "step 2 of 3, version 2, published 2",
    ]


async def test_publishing_every_other_version_still_counts_each(
    served: tuple[ScriptedBuffer, str], model: Path, tmp_path: Path
) -> None:
    buffer, endpoint = served
    config = make_config(tmp_path, model, staleness={"publish_every": 2}, eval={"at_start": False, "at_end": False})
    await asyncio.wait_for(learn(context(RunDir.create(config), endpoint)), WAIT_S)
    assert [m.version for m in buffer.of(VersionPublished)] == [0, 2, 3]  # the last one always
    assert [m.version for m in buffer.of(Trained)] == [1, 2, 3]


async def test_a_batch_without_trees_is_a_step_and_a_version(
    served: tuple[ScriptedBuffer, str], model: Path, tmp_path: Path
) -> None:
    buffer, endpoint = served
    rundir = RunDir.create(make_config(tmp_path, model, eval={"at_start": False, "at_end": False, "every_steps": 0}))
    buffer.on_sample = lambda request: batch_of((), (), step=request.step) if request.step else None
    await asyncio.wait_for(learn(context(rundir, endpoint)), WAIT_S)
    assert [m.version for m in buffer.of(Trained)] == [1, 2, 3]
    assert all(m.priorities == {} for m in buffer.of(Trained)[1:])


async def test_a_buffer_that_forgot_an_evaluation_is_asked_again(
    served: tuple[ScriptedBuffer, str], model: Path, tmp_path: Path
) -> None:
    buffer, endpoint = served
    config = make_config(tmp_path, model, run={"steps": 1}, eval={"at_end": False})
    buffer._evaluations = Forgetful()
    await asyncio.wait_for(learn(context(RunDir.create(config), endpoint)), WAIT_S)
    assert [m.step for m in buffer.of(EvalRequest)] == [0, 0]


class Forgetful(set[int]):
    """Loses the first evaluation it is told of."""

    lost = False

    def add(self, element: int) -> None:
        if self.lost:
            super().add(element)
        self.lost = True


async def test_a_refusing_buffer_ends_the_learner_with_its_reason(
    served: tuple[ScriptedBuffer, str], model: Path, tmp_path: Path
) -> None:
    buffer, endpoint = served
    buffer.on_sample = lambda request: Refused(reason="another run lives here")
    config = make_config(tmp_path, model, eval={"at_start": False})
    with pytest.raises(SetupError, match="another run lives here"):
        await asyncio.wait_for(learn(context(RunDir.create(config), endpoint)), WAIT_S)


async def test_skipped_updates_are_kept_and_too_many_stop_the_run(
    served: tuple[ScriptedBuffer, str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, endpoint = served
    config = make_config(
        tmp_path, model, run={"steps": 9}, learner={"max_skipped_updates": 3}, eval={"at_start": False}
    )
    rundir = RunDir.create(config)
    monkeypatch.setattr(skipped, "KEPT_BATCHES", 2)
    monkeypatch.setattr("learner.training.optimizer_steps.guards.fault", lambda **numbers: "loss is nan")
    with pytest.raises(guards.UpdatesRefused, match="3 updates in a row"):
        await asyncio.wait_for(learn(context(rundir, endpoint)), WAIT_S)
    kept = sorted((rundir.path / "skipped").iterdir())
    assert [p.name for p in kept] == ["step-000002-rank-0.batch", "step-000003-rank-0.batch"]
    assert load_batch(kept[0]).step == 1


async def test_heartbeats_and_weights_flow_during_a_step(
    served: tuple[ScriptedBuffer, str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The torch thread waits here for the loop: if the loop waited for the step, neither would go on."""
    _, endpoint = served
    running = asyncio.get_running_loop()
    train = Trainer.train

    def slow(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), running).result(timeout=WAIT_S)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", slow)
    config = make_config(tmp_path, model, eval={"at_start": False, "at_end": False})
    await asyncio.wait_for(learn(context(RunDir.create(config), endpoint)), WAIT_S)


async def test_a_stop_in_mid_step_gives_the_batch_up(
    served: tuple[ScriptedBuffer, str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer, endpoint = served
    rundir = RunDir.create(make_config(tmp_path, model, eval={"at_start": False, "at_end": False}))
    ctx = context(rundir, endpoint)
    running = asyncio.get_running_loop()
    train = Trainer.train

    def stopped(self: Trainer, batch: Batch, *, should_stop: Callable[[], bool], **kwargs: Any) -> Any:
        if batch.step == 1:
            running.call_soon_threadsafe(ctx.stopping.set)
            while not should_stop():
                torch.zeros(1)
        return train(self, batch, should_stop=should_stop, **kwargs)

    monkeypatch.setattr(Trainer, "train", stopped)
    await asyncio.wait_for(learn(ctx), WAIT_S)
    assert [m.batch_id for m in buffer.of(Trained)] == [0]
    assert [p.name for p in checkpoint.list_checkpoints(rundir.checkpoints)] == ["step-000001-v000001"]


def test_a_long_wait_is_logged_with_its_reason_and_then_ends_loudly(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    settings = LinksConfig(deadline_s=60, give_up_s=600)
    wait = BoundedWait("the learner", "batch 7 of 16 trees", settings, lambda: now, log=logging.getLogger("learner"))
    wait.again("3 trees of 16 are ready")
    assert caplog.records == []
    now = 61.0
    wait.again("3 trees of 16 are ready")
    wait.again("3 trees of 16 are ready")
    assert caplog.messages == ["the learner has waited 61 s for batch 7 of 16 trees: 3 trees of 16 are ready"]
    wait.moved()
    now = 660.0
    wait.again("x")
    now = 662.0
    with pytest.raises(WaitTimeout, match=r"waited 601 s for batch 7 of 16 trees .*: 3 trees of 16"):
        wait.again("3 trees of 16 are ready")


def test_a_wait_in_which_something_comes_is_not_given_up_but_still_logged(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    settings = LinksConfig(deadline_s=60, give_up_s=600)
    wait = BoundedWait("the learner", "batch 7 of 16 trees", settings, lambda: now, log=logging.getLogger("learner"))
    for minutes in (9, 18, 27):
        now = 60.0 * minutes
        wait.moved()
        wait.again("few with signal")
    assert caplog.messages[-1] == "the learner has waited 1620 s for batch 7 of 16 trees: few with signal"


class Impatient(BoundedWait):
    """Gives up at the second turn in a row in which nothing came."""

    fruitless = 0

    def again(self, reason: str) -> None:
        self.fruitless += 1
        if self.fruitless > 1:
            raise WaitTimeout(f"nothing came for {self.what}: {reason}")

    def moved(self) -> None:
        self.fruitless = 0


async def test_progress_in_the_buffer_keeps_the_wait_alive_and_giving_up_leaves_a_checkpoint(
    served: tuple[ScriptedBuffer, str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer, endpoint = served
    monkeypatch.setattr(buffer_peer, "BoundedWait", Impatient)
    asked: Counter[int] = Counter()

    def slow(request: SampleRequest) -> NotYet | None:
        """Always something new before the second batch, and nothing any more before the third."""
        asked[request.step] += 1
        if request.step == 0 or (request.step == 1 and asked[1] > 5):
            return None
        return NotYet(waiting_for="2 more trees", progress=asked[1])

    buffer.on_sample = slow
    config = make_config(tmp_path, model, learner={"checkpoint_every": 100}, eval={"at_start": False, "every_steps": 0})
    rundir = RunDir.create(config)
    with pytest.raises(WaitTimeout, match=r"nothing came for batch 2 \(16 trees\): 2 more trees"):
        await asyncio.wait_for(learn(context(rundir, endpoint)), WAIT_S)
    assert asked == {0: 1, 1: 6, 2: 2}
    assert [p.name for p in checkpoint.list_checkpoints(rundir.checkpoints)] == ["step-000002-v000002"]


async def test_a_buffer_that_takes_nothing_any_more_costs_no_batch(
    served: tuple[ScriptedBuffer, str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, endpoint = served
    config = make_config(tmp_path, model, learner={"checkpoint_every": 100}, eval={"at_start": False, "every_steps": 0})
    rundir = RunDir.create(config)
    send = Client.send

    async def lose(self: Any, message: Any) -> None:
        if isinstance(message, Trained) and message.version == 2:
            raise PeerLost("the buffer is gone")
        await send(self, message)

    monkeypatch.setattr(Client, "send", lose)
    with pytest.raises(PeerLost, match="the buffer is gone"):
        await asyncio.wait_for(learn(context(rundir, endpoint)), WAIT_S)
    assert [p.name for p in checkpoint.list_checkpoints(rundir.checkpoints)] == ["step-000002-v000002"]


async def test_an_evaluation_lost_at_a_stop_is_asked_for_again(
    served: tuple[ScriptedBuffer, str], model: Path, tmp_path: Path
) -> None:
    buffer, endpoint = served
    rundir = RunDir.create(make_config(tmp_path, model, run={"steps": 4}, eval={"at_start": False}))
    first = context(rundir, endpoint)
    buffer.evaluation_done = False

    buffer.on_sample = stopping_at(3, first.stopping)
    await asyncio.wait_for(learn(first), WAIT_S)
    assert [m.step for m in buffer.of(EvalRequest)] == [2]

    buffer.on_sample, buffer.evaluation_done = None, True
    buffer.events.clear()
    await asyncio.wait_for(learn(context(RunDir.open(rundir.path), endpoint)), WAIT_S)
    # Due at step 2, whose weights are gone: made up for at step 3, with the weights published at the start.
    assert [(m.step, m.version, m.blocking) for m in buffer.of(EvalRequest)] == [(3, 4, False), (4, 5, True)]
    evaluated = [r.step for r in read_metrics(rundir.metrics_path) if "eval/success" in r.metrics]
    assert evaluated == [3, 4]


async def test_an_evaluation_with_a_result_is_not_asked_for_again(
    served: tuple[ScriptedBuffer, str], model: Path, tmp_path: Path
) -> None:
    buffer, endpoint = served
    rundir = RunDir.create(make_config(tmp_path, model, run={"steps": 4}, eval={"at_start": False}))
    first = context(rundir, endpoint)

    def stop(request: SampleRequest) -> NotYet | None:
        if request.step < 3:
            return None
        if any("eval/success" in r.metrics for r in read_metrics(rundir.metrics_path)):
            first.stopping.set()
        return NotYet(waiting_for="nothing will come")

    buffer.on_sample = stop
    await asyncio.wait_for(learn(first), WAIT_S)
    buffer.on_sample = None
    buffer.events.clear()
    await asyncio.wait_for(learn(context(RunDir.open(rundir.path), endpoint)), WAIT_S)
    assert [m.step for m in buffer.of(EvalRequest)] == [4]


async def test_an_evaluation_without_a_result_is_said_loudly_and_written_nowhere(
    served: tuple[ScriptedBuffer, str], model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    buffer, endpoint = served
    buffer.success = None
    rundir = RunDir.create(make_config(tmp_path, model, run={"steps": 1}, eval={"at_end": False}))
    await asyncio.wait_for(learn(context(rundir, endpoint)), WAIT_S)
    assert "evaluation of step 0 has no result: none of its tasks could be done" in caplog.messages
    assert not any("eval/success" in r.metrics for r in read_metrics(rundir.metrics_path))


def test_a_kept_batch_reads_back(tmp_path: Path) -> None:
    batch = make_batch()
    save_batch(tmp_path / "b", batch)
    again = load_batch(tmp_path / "b")
    assert again.num_leaves == batch.num_leaves
    assert again.trees[1].turns[0].action.tolist() == batch.trees[1].turns[0].action.tolist()


async def test_the_buffer_is_told_what_a_checkpoint_holds_also_after_a_new_start(
    served: tuple[ScriptedBuffer, str], model: Path, tmp_path: Path
) -> None:
    buffer, endpoint = served
    rundir = RunDir.create(make_config(tmp_path, model, eval={"every_steps": 0, "at_start": False, "at_end": False}))
    await asyncio.wait_for(learn(context(rundir, endpoint)), WAIT_S)
    assert [(m.step, m.version) for m in buffer.of(Checkpointed)] == [(2, 2), (3, 3)]
    # On disk before it is said, and said before the next batch is asked for.
    assert buffer.kinds().index(Checkpointed) < [
        isinstance(e, SampleRequest) and e.step == 2 for e in buffer.events
    ].index(True)
    buffer.events.clear()
    await asyncio.wait_for(learn(context(RunDir.open(rundir.path), endpoint)), WAIT_S)
    assert [m.step for m in buffer.of(Checkpointed)] == [3]


async def test_a_buffer_that_needs_room_gets_a_checkpoint_and_is_asked_again(
    served: tuple[ScriptedBuffer, str], model: Path, tmp_path: Path
) -> None:
    buffer, endpoint = served
    config = make_config(
        tmp_path, model, learner={"checkpoint_every": 100}, eval={"every_steps": 0, "at_start": False, "at_end": False}
    )
    rundir = RunDir.create(config)

    def crowded(request: SampleRequest) -> NotYet | Batch | None:
        saved = [m.step for m in buffer.of(Checkpointed)]
        if request.step == 1 and 1 not in saved:
            return NotYet(waiting_for="space in its journal", checkpoint_wanted=True)
        if request.step == 1:
            batch = make_batch(seed=1, step=1, version=request.version)
            return msgspec.structs.replace(batch, checkpoint_wanted=True)
        return None

    buffer.on_sample = crowded
    await asyncio.wait_for(learn(context(rundir, endpoint)), WAIT_S)
    assert [m.step for m in buffer.of(Checkpointed)] == [1, 2, 3]
    assert [m.batch_id for m in buffer.of(Trained)] == [0, 1, 2]


async def test_when_no_task_is_left_the_run_is_over_before_its_last_step(
    served: tuple[ScriptedBuffer, str], model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    buffer, endpoint = served
    rundir = RunDir.create(make_config(tmp_path, model, eval={"every_steps": 0, "at_start": False}))
    buffer.on_sample = lambda request: Exhausted(reason="all tasks are done") if request.step == 2 else None
    with caplog.at_level(logging.INFO):
        await asyncio.wait_for(learn(context(rundir, endpoint)), WAIT_S)
    assert "no further batch: all tasks are done" in caplog.text
    assert [m.step for m in buffer.of(EvalRequest)] == [2]
    assert buffer.kinds()[-1] is RunFinished
    assert (rundir.path / "model" / "model.safetensors").is_file()
    assert [m.step for m in buffer.of(Checkpointed)][-1] == 2


async def test_the_lineage_says_what_each_batch_was_trained_on_and_only_if_asked_for(
    served: tuple[ScriptedBuffer, str], model: Path, tmp_path: Path
) -> None:
    _, endpoint = served
    evaluation: dict[str, object] = {"every_steps": 0, "at_start": False, "at_end": False}
    quiet = RunDir.create(make_config(tmp_path / "quiet", model, eval=evaluation))
    await asyncio.wait_for(learn(context(quiet, endpoint)), WAIT_S)
    assert not (quiet.path / LINEAGE_FILE).exists()
    rundir = RunDir.create(make_config(tmp_path, model, eval=evaluation, learner={"lineage": True}))
    await asyncio.wait_for(learn(context(rundir, endpoint)), WAIT_S)
    start, *lines = [json.loads(line) for line in (rundir.path / LINEAGE_FILE).read_text().splitlines()]
    assert start == {"starts_at": 0, "rank": 0, "version": 0}
    assert [(line["step"], line["rank"], line["version"], line["batch_id"]) for line in lines] == [
        (i, 0, i, i) for i in range(3)
    ]
    assert [tree["tree_id"] for tree in lines[0]["trees"]] == [f"tree-{i}" for i in range(4)]
    hashes = {tree["hash"] for line in lines for tree in line["trees"]}
    assert len(hashes) == 12
    assert all(len(each) == 16 for each in hashes)
