"""A whole run on a buffer of two shards, as a user starts it: real actor, real learner, a shard and then the front
killed on the way."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from atpo_async.run import processes
from atpo_async.status.run_view import look
from tests.e2e_support import STEPS, Job, job

pytestmark = [
    pytest.mark.fleet,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes through /proc"),
    pytest.mark.slow,
    pytest.mark.timeout(300),
]


def pids(run: Job) -> dict[str, int]:
    """Role -> process, of the buffer's front and its shards."""
    found = {}
    for process in processes.marked(*(f"{run.rundir.run_id}/buffer/{attempt}" for attempt in range(9))):
        try:
            words = Path(f"/proc/{process.pid}/cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue  # it has ended meanwhile
        found[words[words.index("--name") + 1] if "--name" in words else "buffer"] = process.pid
    return found


def said(run: Job, role: str) -> str:
    return "".join(log.read_text(errors="replace") for log in sorted((run.path / "logs").glob(f"{role}.*.log")))


def test_a_run_on_two_shards_goes_on_after_a_shard_and_the_front_were_killed(
    hopqa_policy: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"buffer.shards": 2}
    with job(tmp_path, hopqa_policy, **options) as run:
        train = run.train()
        run.until(lambda: run.steps() and "buffer-1 is sent turns directly" in said(run, "actor-0"), "a step", of=train)
        before = pids(run)
        assert before.keys() == {"buffer", "buffer-0", "buffer-1"}
        assert {"buffer", "buffer-0", "buffer-1"} <= set(look(run.path).running_roles)
        os.kill(before["buffer-1"], signal.SIGKILL)
        run.until(lambda: pids(run).get("buffer-1", before["buffer-1"]) != before["buffer-1"], "a new shard", of=train)
        assert pids(run)["buffer"] == before["buffer"]
        os.kill(before["buffer"], signal.SIGKILL)
        run.until(lambda: pids(run).get("buffer", before["buffer"]) != before["buffer"], "a new front", of=train)
        run.open_gate()
        assert run.exit_code(train) == 0, run.story()
        assert run.living() == []
        assert sorted({record.step for record in run.steps()}) == list(range(1, STEPS + 1))
        assert [record.step for record in run.with_metric("eval/success")] == [0, STEPS]
        assert {p.name for p in (run.path / "journal").iterdir()} == {"shard-0-of-2", "shard-1-of-2"}
