"""A whole run of real processes in which every role is blocked: first the actor, then buffer and learner at once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from actors.engines.transformers import engine
from atpo_async.cli import main
from atpo_async.status import waits
from learner.checkpoints.saving import Saving
from learner.ranks import Ranks
from learner.torch_thread import WAITED_FOR, TorchThread
from tests.e2e_support import DEADLINE_S, STEPS, GatedHopQA, Job, Process, job
from tests.hang_support import status_of

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes through /proc"),
    pytest.mark.slow,
    pytest.mark.timeout(400),
]


def hang(self: engine.TransformersEngine, batch: list[Any]) -> None:
    time.sleep(1000)


class HangingHopQA(GatedHopQA):
    """In the first attempt of an actor no step of its engine returns."""

    def __init__(self, tokenizer: Path | str, *, gate: str, **options: Any) -> None:
        super().__init__(tokenizer, gate=gate, **options)
        begun = Path(gate).with_name("begun")
        if not begun.exists():
            begun.touch()
            engine.TransformersEngine._step = hang  # type: ignore[method-assign]


def ended(train: Process, role: str, why: str) -> list[str]:
    """What the supervisor said when it ended a role that was stuck."""
    return [line for line in train.said().splitlines() if line.startswith(f"{role} ended: stuck") and why in line]


def batches(run: Job) -> set[int]:
    """Steps that the learner has done, those in which nothing had a signal too."""
    return {record.step for record in run.with_metric("batch/trees") if record.source == "learner"}


def statuses(run: Job, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main.main(["status", str(run.path), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_whoever_a_call_in_the_torch_thread_waits_for_is_told_by_the_names_of_calls_that_are_made() -> None:
    saving = (Saving._save_checkpoint, Saving.export, Saving.try_export, Saving.resume)
    made = (Ranks.agree, Accelerator.wait_for_everyone, *saving)
    assert set(WAITED_FOR) == {call.__name__.strip("_") for call in made}


@pytest.mark.parametrize(("name", "on"), [("_learn", "torch"), ("agree", "learner"), ("save_checkpoint", "disk")])
async def test_a_call_in_the_torch_thread_is_a_wait_for_whom_it_depends_on(name: str, on: str) -> None:
    """Ranks wait for one another, and a checkpoint for the disk: starting the learner again would mend neither."""
    release = threading.Event()

    def call() -> bool:
        return release.wait(DEADLINE_S)

    call.__name__ = name
    thread = TorchThread(1)
    try:
        task = asyncio.create_task(thread(call))
        await asyncio.sleep(0)
        (found,) = (wait for wait in waits.open_waits() if wait["what"] == name.strip("_").replace("_", " "))
        assert found["on"] == on
        release.set()
        assert await task
    finally:
        release.set()
        thread.close()


def test_a_run_survives_every_role_being_blocked(
    hopqa_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {
        "environment.name": "tests.test_hang_runs:HangingHopQA",
        "links.deadline_s": 2.0,
        "supervisor.hang_s": 5.0,
        "supervisor.backoff_s": 0.1,
        "eval.at_start": False,
        "eval.at_end": False,
    }
    with job(tmp_path, hopqa_policy, **options) as run:
        train = run.train()
        run.until(
            lambda: ended(train, "actor-0", "(the engine's thread, its engine)"), "the end of the engine", of=train
        )

        def done(role: str) -> dict[str, int]:
            found = status_of(run.rundir, role)
            return {} if found is None else found.progress

        run.until(lambda: done("learner").get("batches"), "a batch of the second actor in the snapshot", of=train)
        run.until(lambda: done("actor-0").get("turns"), "its turns in the snapshot", of=train)
        found = statuses(run, capsys)
        assert found["running"]
        assert {name: role["state"] for name, role in found["roles"].items()} == {
            "buffer": "runs",
            "learner": "runs",
            "actor-0": "runs",
        }
        assert any(link["peer"] == "buffer" for link in found["roles"]["actor-0"]["links"].values())
        os.kill(train.popen.pid, signal.SIGUSR1)
        run.until(
            lambda: all(f"\n{role} (process {run.pid(role)}): " in train.said() for role in ("buffer", "learner")),
            "the snapshot of the whole run",
            of=train,
        )
        stopped = ("buffer", "learner")
        for role in stopped:
            os.kill(run.pid(role), signal.SIGSTOP)
        for role in stopped:
            run.until(partial(ended, train, role, "is stopped by a signal"), f"the end of {role}", of=train)
        run.open_gate()
        assert run.exit_code(train) == 0, run.story()
        assert run.living() == []
        assert batches(run) == set(range(1, STEPS + 1))
        assert not statuses(run, capsys)["running"]
