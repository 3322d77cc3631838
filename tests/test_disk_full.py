"""A disk that is full is waited for wherever the learner and its figures write; any other refusal is one line."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from atpo_async.core.errors import SetupError
from atpo_async.ops import disk
from atpo_async.ops.disk import error_number, until_written
from atpo_async.run import rundir
from atpo_async.run.metrics import MetricsWriter, read_metrics
from atpo_async.run.rundir import RunDir
from atpo_async.status import waits
from atpo_async.wire.messages import RunFinished
from learner.checkpoints import checkpoint
from learner.checkpoints.checkpoint import Progress
from learner.policy import export
from learner.role import learn
from learner.weights import files
from tests.learner_support import make_model
from tests.test_checkpoint import make_trainer
from tests.test_learner_loop import WAIT_S, ScriptedBuffer, context, make_config
from tests.test_learner_loop import served as served

LOG = logging.getLogger("test")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
IN_RUST = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


class Refusing:
    """Calls ``original`` after it has refused ``times`` times."""

    def __init__(self, original: Callable[..., Any], times: int, error: Exception = FULL) -> None:
        self.original, self.left, self.error = original, times, error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.left:
            self.left -= 1
            raise self.error
        return self.original(*args, **kwargs)


# --- waiting ----------------------------------------------------------------------------------------------------


def test_what_a_file_system_refused_is_known_whoever_says_it() -> None:
    assert error_number(FULL) == error_number(IN_RUST) == errno.ENOSPC
    assert error_number(RuntimeError("[Errno 122] Disk quota exceeded")) == errno.EDQUOT
    wrapped = SetupError("weights cannot be written")
    wrapped.__cause__ = FULL
    assert error_number(wrapped) == errno.ENOSPC
    assert error_number(ValueError("temperature 0.9")) is None


@pytest.mark.parametrize("error", [FULL, IN_RUST, OSError(errno.EDQUOT, "quota"), OSError(errno.EIO, "input/output")])
def test_a_full_disk_is_waited_for_with_a_name_and_the_write_goes_on(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[dict[str, Any]] = []
    with caplog.at_level(logging.INFO):
        done = until_written(
            "the checkpoint of step 6", Refusing(lambda: "done", 3, error), log=LOG,
            sleep=lambda seconds: seen.extend(waits.open_waits()),
        )  # fmt: skip
    assert done == "done"
    assert len(seen) == 3
    assert all(
        wait["on"] == waits.DISK and wait["what"].startswith("space for the checkpoint of step 6") for wait in seen
    )
    first, last = caplog.messages
    assert first.startswith("the checkpoint of step 6 cannot be written: ")
    assert last.startswith("the checkpoint of step 6 is written, after")


def test_a_refusal_that_room_does_not_mend_is_one_line_at_once() -> None:
    with pytest.raises(SetupError, match="the checkpoint cannot be written: Permission denied"):
        until_written("the checkpoint", Refusing(str, 1, PermissionError(errno.EACCES, "no")), log=LOG)


def test_an_error_of_the_program_is_no_full_disk() -> None:
    with pytest.raises(ZeroDivisionError):
        until_written("x", lambda: 1 // 0, log=LOG)


def test_where_others_wait_for_it_the_disk_is_given_up_in_one_line() -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    with pytest.raises(SetupError, match=r"x could not be written for \d+ s: No space left on device"):
        until_written("x", Refusing(str, 10**6), log=LOG, give_up_s=60.0, sleep=sleep, clock=lambda: now[0])
    assert 60 < now[0] < 70


# --- the learner ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["save_file", "publish"])
def test_a_checkpoint_that_found_no_room_leaves_nothing_behind_and_is_written_the_next_time(
    part: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(model)
    error = IN_RUST if part == "save_file" else FULL
    monkeypatch.setattr(checkpoint, part, Refusing(getattr(checkpoint, part), 1, error))
    with pytest.raises(OSError, match="No space left on device") as caught:
        checkpoint.save(tmp_path, trainer, Progress(step=1, version=1), keep=2)
    assert error_number(caught.value) == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
    made = checkpoint.save(tmp_path, trainer, Progress(step=1, version=1), keep=2)
    assert list(tmp_path.iterdir()) == [made]


@pytest.mark.parametrize(
    ("owner", "name", "said"),
    [
        (checkpoint, "save_file", "the checkpoint of step 2 in"),
        (checkpoint, "publish", "the checkpoint of step 2 in"),
        (export, "write_model", "the trained policy in"),
        (rundir.RunDir, "next_version", "the count of versions in"),
        (files.VersionFiles, "_write_payload", "version "),
        (os, "write", "lineage.jsonl cannot be written"),
    ],
)
async def test_a_learner_waits_for_room_on_the_disk_and_goes_on(
    owner: Any,
    name: str,
    said: str,
    served: tuple[ScriptedBuffer, str],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    buffer, endpoint = served
    monkeypatch.setattr(disk, "RETRY_S", 0.01)
    evaluation: dict[str, object] = {"every_steps": 0, "at_start": False, "at_end": False}
    config = make_config(tmp_path, model, eval=evaluation, learner={"lineage": owner is os})
    run = RunDir.create(config)
    original = getattr(owner, name)

    def fill_up(request: Any) -> None:
        # Once, after the start: what is written before the first step is tried there, and is another matter.
        if getattr(owner, name) is original:
            monkeypatch.setattr(owner, name, refusing)

    left = [3 if name == "_write_payload" else 2]

    def refusing(*args: Any, **kwargs: Any) -> Any:
        if left[0] and (owner is not os or b'"batch_id"' in args[1]):
            left[0] -= 1
            raise FULL
        return original(*args, **kwargs)

    buffer.on_sample = fill_up
    await asyncio.wait_for(learn(context(run, endpoint)), WAIT_S)
    assert any(said in message and "trying again until there is space" in message for message in caplog.messages)
    assert isinstance(buffer.events[-1], RunFinished)
    assert (run.path / "model" / "model.safetensors").is_file()
    assert [r.step for r in read_metrics(run.metrics_path) if "train/loss" in r.metrics] == [1, 2, 3]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FULL, "No space left on device"),
        (IN_RUST, "No space left on device"),
        (PermissionError(errno.EACCES, "no"), "Permission denied"),
        (ValueError("GenerationConfig is invalid:\n - temperature"), "GenerationConfig is invalid: - temperature"),
    ],
)
async def test_what_cannot_be_saved_at_the_end_stops_the_run_before_its_first_step(
    error: Exception,
    said: str,
    served: tuple[ScriptedBuffer, str],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    buffer, endpoint = served
    run = RunDir.create(make_config(tmp_path, model))
    monkeypatch.setattr("learner.checkpoints.saving.write_model", Refusing(str, 1, error))
    with pytest.raises(SetupError) as caught:
        await asyncio.wait_for(learn(context(run, endpoint)), WAIT_S)
    (line,) = str(caught.value).splitlines()
    assert said in line
    assert f"could not be saved to {run.path / 'model'} at the end" in line
    assert buffer.events == []


async def test_what_was_tried_before_the_first_step_is_removed_again(
    served: tuple[ScriptedBuffer, str], model: Path, tmp_path: Path
) -> None:
    buffer, endpoint = served
    run = RunDir.create(make_config(tmp_path, model, eval={"at_start": False, "at_end": False, "every_steps": 0}))
    seen: list[list[str]] = []
    buffer.on_sample = lambda request: seen.append([p.name for p in run.scratch.iterdir()])
    await asyncio.wait_for(learn(context(run, endpoint)), WAIT_S)
    assert not any("export" in name for names in seen for name in names)


# --- its figures ------------------------------------------------------------------------------------------------


def test_figures_wait_in_memory_for_room_and_are_written_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    real = os.write
    room = [10**6]

    def write(fd: int, data: bytes) -> int:
        if not room[0]:
            raise FULL
        taken = min(room[0], len(data))
        room[0] -= taken
        return real(fd, data[:taken])

    with MetricsWriter(path, source="learner") as writer:
        writer.write(step=0, version=0, metrics={"a": 0})
        monkeypatch.setattr("atpo_async.run.metrics.os.write", write)
        room[0] = 20  # the next line is cut short
        for step in (1, 2, 3):
            writer.write(step=step, version=0, metrics={"a": step})
        assert [r.step for r in read_metrics(path)] == [0]
        room[0] = 10**6
        writer.write(step=4, version=0, metrics={"a": 4})
    assert [r.step for r in read_metrics(path)] == [0, 1, 2, 3, 4]
    assert len([m for m in caplog.messages if "records wait in memory" in m]) == 1


def test_a_disk_that_stays_full_costs_figures_and_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl", source="learner") as writer:
        monkeypatch.setattr("atpo_async.run.metrics.os.write", Refusing(os.write, 10**6))
        for step in range(3):
            writer.write(step=step, version=0, metrics={})
