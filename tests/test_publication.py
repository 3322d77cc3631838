"""Publishing beside training: what the torch thread is held up for, and what becomes of what fails aside."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import pytest_asyncio
import torch

from atpo_async.core.errors import SetupError
from atpo_async.core.vocabulary import Precision
from atpo_async.links.server import Server
from atpo_async.run.metrics import read_metrics
from atpo_async.run.rundir import RunDir
from atpo_async.wire.messages import (
    LearnerToBuffer,
    NotYet,
    RunFinished,
    SampleRequest,
    Trained,
    VersionPublished,
    WeightsAnnounced,
)
from learner.batches import buffer_peer
from learner.role import learn
from learner.training.optimizer_steps import OptimizerSteps
from learner.weights import files, staging
from learner.weights.staging import Staged, Stager
from learner.weights.store import WeightsStore
from tests.learner_support import make_model
from tests.test_learner_loop import LINKS, WAIT_S, ScriptedBuffer, context, make_config

Served = tuple[ScriptedBuffer, str]
WITHOUT_EVALUATIONS: dict[str, object] = {"at_start": False, "at_end": False, "every_steps": 0}


@pytest_asyncio.fixture
async def served() -> AsyncIterator[Served]:
    buffer = ScriptedBuffer()
    async with Server(
        "tcp://127.0.0.1:0", name="buffer", receives=LearnerToBuffer, handler=buffer.handle, settings=LINKS
    ) as server:
        yield buffer, server.endpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


class Gate:
    """``WeightsStore.add`` of a version that waits until it is let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        plain = WeightsStore.add

        def add(store: WeightsStore, number: int, *args: Any, **kwargs: Any) -> WeightsAnnounced:
            if number == version:
                self.reached.set()
                assert self.open.wait(WAIT_S)
            return plain(store, number, *args, **kwargs)

        monkeypatch.setattr(WeightsStore, "add", add)


def published_in(buffer: ScriptedBuffer) -> list[int]:
    return [message.version for message in buffer.of(VersionPublished)]


async def test_the_next_step_trains_while_a_version_is_written(
    served: Served,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    buffer, endpoint = served
    gate = Gate(monkeypatch, 1)

    def answer(request: SampleRequest) -> NotYet | None:
        if request.step == 2:
            # Trained on a second batch, while the version of the first one is still being written.
            assert published_in(buffer) == [0]
            gate.open.set()
        return None

    buffer.on_sample = answer
    config = make_config(tmp_path, model, eval=WITHOUT_EVALUATIONS, staleness={"publish_every": 1, "max_lag": 2})
    # The version of the second batch is due before the first one's bytes are written: only then training waits.
    monkeypatch.setattr("learner.weights.publication.Publication.is_due", lambda self, step: step != 2)
    rundir = RunDir.create(config)
    await asyncio.wait_for(learn(context(rundir, endpoint)), WAIT_S)
    assert published_in(buffer) == [0, 1, 3]
    assert buffer.kinds()[-1] is RunFinished
    written = [r.version for r in read_metrics(rundir.metrics_path) if "weights/write_s" in r.metrics]
    assert written == [1, 3]


async def test_trees_that_need_the_version_being_written_cannot_block_the_learner(
    served: Served,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with ``max_lag`` 0: no batch until its version is published, which is written only once it is waited for."""
    buffer, endpoint = served
    asked = threading.Event()
    plain = WeightsStore.add

    def add(store: WeightsStore, number: int, *args: Any, **kwargs: Any) -> WeightsAnnounced:
        assert number == 0 or asked.wait(WAIT_S)
        return plain(store, number, *args, **kwargs)

    def answer(request: SampleRequest) -> NotYet | None:
        if request.version in published_in(buffer):
            asked.clear()
            return None
        asked.set()
        return NotYet(waiting_for=f"trees of version {request.version}")

    monkeypatch.setattr(WeightsStore, "add", add)
    buffer.on_sample = answer
    config = make_config(tmp_path, model, eval=WITHOUT_EVALUATIONS, staleness={"max_lag": 0})
    learning = asyncio.create_task(learn(context(RunDir.create(config), endpoint)))
    await asyncio.to_thread(_until, lambda: len(buffer.of(Trained)) == 3 or learning.done())
    asked.set()  # for the last version nothing asks
    await asyncio.wait_for(learning, WAIT_S)
    assert published_in(buffer) == [0, 1, 2, 3]


def _until(holds: Callable[[], bool]) -> None:
    ticks = threading.Event()
    for _ in range(WAIT_S * 100):
        if holds():
            return
        ticks.wait(0.01)
    raise AssertionError("it did not come about")


async def test_the_run_ends_only_when_its_last_version_is_announced(
    served: Served,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    buffer, endpoint = served
    gate = Gate(monkeypatch, 3)
    config = make_config(tmp_path, model, eval={"at_start": False, "at_end": True, "every_steps": 0})
    learning = asyncio.create_task(learn(context(RunDir.create(config), endpoint)))
    await asyncio.to_thread(gate.reached.wait, WAIT_S)
    await asyncio.to_thread(_until, lambda: len(buffer.of(Trained)) == 3)
    assert not learning.done()
    gate.open.set()
    await asyncio.wait_for(learning, WAIT_S)
    names = [kind.__name__ for kind in buffer.kinds()]
    last = max(i for i, name in enumerate(names) if name == "VersionPublished")
    assert published_in(buffer)[-1] == 3
    assert last < names.index("EvalRequest") < names.index("RunFinished")


async def test_what_keeps_a_version_from_being_written_ends_a_learner_that_waits_for_its_trees(
    served: Served,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    buffer, endpoint = served
    monkeypatch.setattr(buffer_peer, "REPEAT_S", 0.0)
    plain = WeightsStore.add

    def add(store: WeightsStore, number: int, *args: Any, **kwargs: Any) -> WeightsAnnounced:
        if number == 1:
            raise SetupError("weights of version 1 cannot be written to the moon")
        return plain(store, number, *args, **kwargs)

    monkeypatch.setattr(WeightsStore, "add", add)
    buffer.on_sample = lambda request: NotYet(waiting_for="trees of version 1") if request.step else None
    config = make_config(tmp_path, model, eval=WITHOUT_EVALUATIONS)
    with pytest.raises(SetupError, match="version 1 cannot be written to the moon"):
        await asyncio.wait_for(learn(context(RunDir.create(config), endpoint)), WAIT_S)


async def test_a_learner_that_is_stopped_gives_up_a_version_that_waits_for_space(
    served: Served,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    buffer, endpoint = served
    rundir = RunDir.create(make_config(tmp_path, model, eval=WITHOUT_EVALUATIONS))
    ctx = context(rundir, endpoint)
    plain = files.write_part

    def full(file: BinaryIO, gap: int, data: memoryview) -> None:
        if "v1." in str(file.name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(file, gap, data)

    def answer(request: SampleRequest) -> NotYet | None:
        if request.step == 0:
            return None
        ctx.stopping.set()
        return NotYet(waiting_for="nothing will come")

    monkeypatch.setattr(files, "write_part", full)
    buffer.on_sample = answer
    await asyncio.wait_for(learn(ctx), WAIT_S)
    assert published_in(buffer) == [0]
    assert [m.version for m in buffer.of(Trained)] == [1]
    assert not (Path("/dev/shm") / f"atpo-{rundir.run_id}").exists()


# --- staging


def bytes_of(staged: Staged) -> bytes:
    return b"".join(bytes(data) for _, data in staged.parts())


def test_weights_that_change_after_they_were_staged_are_published_as_they_were() -> None:
    weight = torch.arange(8.0)
    staged = Stager("bfloat16").stage({"w": weight}, copied=False)
    assert staged is not None
    before = weight.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    weight.add_(1.0)
    assert bytes_of(staged) == before


def test_the_next_version_waits_for_the_bytes_of_the_one_before_or_for_the_end() -> None:
    stager = Stager("float32")
    first = stager.stage({"w": torch.zeros(4)}, copied=False)
    assert first is not None
    asked = 0

    def released_at_the_third() -> bool:
        nonlocal asked
        asked += 1
        if asked == 3:
            first.release()
        return False

    second = stager.stage({"w": torch.ones(4)}, copied=False, should_stop=released_at_the_third)
    assert second is not None
    assert asked == 3
    assert bytes_of(second) == torch.ones(4).numpy().tobytes()
    assert stager.stage({"w": torch.ones(4)}, copied=False, should_stop=lambda: True) is None


class Event:
    """Of a device: the copies are over once it was waited for."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def synchronize(self) -> None:
        self.log.append("weights are read")


def test_bytes_are_handed_out_only_after_the_devices_copies() -> None:
    log: list[str] = []
    staged = Staged({"w": torch.zeros(2)}, "float32", buffer=torch.zeros(8, dtype=torch.uint8), event=Event(log))
    parts = staged.parts()
    assert log == []
    next(parts)
    assert log == ["weights are read"]


class Stream:
    """Of a device: what is queued is done at once."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.after: list[object] = []

    def wait_stream(self, other: object) -> None:
        self.after.append(other)

    def record(self, stream: object) -> None: ...

    def synchronize(self) -> None: ...


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_device_casts_in_parts_what_then_are_the_bytes_of_whole_tensors(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "CAST_ELEMENTS", 100)
    for name, fake in (("Stream", Stream), ("Event", Stream), ("current_stream", Stream)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    source = torch.Generator().manual_seed(0)
    tensors = {f"w{i}": torch.randn(17, 19, generator=source) for i in range(3)} | {"odd": torch.ones(7, 5).t()}
    tensors["tied"] = tensors["w1"]
    specs, total = staging.layout(tensors, precision)
    stager = Stager(precision)
    for _ in range(2):
        stager._buffer = torch.empty(total, dtype=torch.uint8)
        event = stager._start_copies(specs, tensors, torch.device("cpu"))
        staged = Staged(tensors, precision, buffer=stager._buffer, event=event)
        assert bytes_of(staged) == bytes_of(Staged(tensors, precision))
    assert len(stager._stream.after) == 2  # after the weights were made


def test_without_pinned_memory_weights_are_published_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = torch.empty

    def none_left(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", none_left)
    assert len(staging._host_memory(12, pinned=True)) == 12
    assert "no 12 bytes of pinned memory" in caplog.text


async def test_no_optimizer_step_changes_weights_that_are_still_read(
    served: Served,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, endpoint = served
    log: list[str] = []
    monkeypatch.setattr(Staged, "until_read", lambda self: log.append("read"))
    plain = OptimizerSteps._apply

    def applied(self: OptimizerSteps) -> float:
        step = self.optimizer.step

        def counted(*args: Any, **kwargs: Any) -> Any:
            log.append("step")
            return step(*args, **kwargs)

        self.optimizer.step = counted
        try:
            return plain(self)
        finally:
            self.optimizer.step = step

    monkeypatch.setattr(OptimizerSteps, "_apply", applied)
    config = make_config(tmp_path, model, eval=WITHOUT_EVALUATIONS, run={"steps": 2})
    await asyncio.wait_for(learn(context(RunDir.create(config), endpoint)), WAIT_S)
    steps = [i for i, said in enumerate(log) if said == "step"]
    assert len(steps) >= 2
    assert all(log[i - 1] == "read" for i in steps)


async def test_the_buffer_is_told_an_address_of_the_learner_that_actors_reach(
    served: Served, model: Path, tmp_path: Path
) -> None:
    buffer, endpoint = served
    config = make_config(tmp_path, model, run={"steps": 1}, eval=WITHOUT_EVALUATIONS, links={"advertise": "a.example"})
    rundir = RunDir.create(config)
    await asyncio.wait_for(learn(context(rundir, endpoint)), WAIT_S)
    bound = rundir.listening.now()
    # On the buffer's machine, behind the same name: where the buffer was reached.
    told = {(message.weights_endpoint, message.announce_endpoint) for message in buffer.of(VersionPublished)}
    assert told == {tuple(each.replace("127.0.0.1", "0.0.0.0") for each in (bound.weights, bound.announce))}
