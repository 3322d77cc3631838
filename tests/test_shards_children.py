"""The shards as processes of the front: started again when they end or fall silent, ended with it, and whose error is
told."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from atpo_async.core.errors import RoleCrashed, SetupError
from atpo_async.ops.exits import ERROR_FILE, EXIT_USER, SUPERVISOR_PID
from atpo_async.run import launch
from atpo_async.run.rundir import RunDir
from buffer.front import children
from buffer.front.children import ShardProcesses
from buffer.front.shards import Shards
from tests.oracle_support import make_run
from tests.waiting_support import until, within


def program(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """What every shard runs in place of the buffer; ``starts`` counts the calls."""
    prelude = "import os, sys, json, time, signal\n"

    def command(module: str, *words: str, python: str = sys.executable) -> tuple[str, ...]:
        assert module == "buffer"
        return (python, "-c", prelude + code, *words)

    monkeypatch.setattr(launch, "command", command)


@pytest.fixture
async def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[RunDir, ShardProcesses, Shards]]:
    rundir = make_run(tmp_path / "run", buffer={"shards": 2}, supervisor={"max_restarts": 2})
    shards = Shards(2, settings=rundir.config.links, locate=lambda index: "")
    monkeypatch.setattr(children, "PAUSE_S", 0.01)
    monkeypatch.setattr(children, "LOOK_S", 0.05)
    processes = ShardProcesses(rundir.config, rundir, shards, hang_s=30.0)
    yield rundir, processes, shards
    await processes.end()


Kept = tuple[RunDir, ShardProcesses, Shards]


async def test_a_shard_that_ends_in_good_order_is_not_started_again(kept: Kept, monkeypatch: Any) -> None:
    rundir, processes, shards = kept
    note = rundir.path / "said.json"
    program(
        monkeypatch,
        f"open({str(note)!r}, 'w').write(json.dumps([sys.argv[1:], os.environ[{SUPERVISOR_PID!r}]]))",
    )
    await within(processes.keep(shards.links[1]))
    words, supervisor = json.loads(note.read_text())
    assert words == [str(rundir.path), "--name", "buffer-1"]
    assert int(supervisor) == os.getpid()
    assert [log.name for log in (rundir.path / "logs").iterdir()] == ["buffer-1.0.log"]


async def test_one_that_crashes_is_started_again_until_it_is_too_often(kept: Kept, monkeypatch: Any) -> None:
    rundir, processes, shards = kept
    program(monkeypatch, "sys.exit(3)")
    with pytest.raises(RoleCrashed, match=r"buffer-0 ended 3 times, with code 3"):
        await within(processes.keep(shards.links[0]))
    assert len(list((rundir.path / "logs").glob("buffer-0.*.log"))) == 3


async def test_what_only_the_user_can_mend_ends_the_front_with_the_shards_words(kept: Kept, monkeypatch: Any) -> None:
    _, processes, shards = kept
    program(
        monkeypatch,
        f"said = {{'code': {EXIT_USER}, 'error': 'the journal is damaged'}}\n"
        f"json.dump(said, open(os.environ[{ERROR_FILE!r}], 'w'))\n"
        f"sys.exit({EXIT_USER})",
    )
    with pytest.raises(SetupError, match=r"buffer-1: the journal is damaged"):
        await within(processes.keep(shards.links[1]))


async def test_one_that_does_not_answer_is_killed_and_started_again(kept: Kept, monkeypatch: Any) -> None:
    rundir, _, shards = kept
    silent = ShardProcesses(rundir.config, rundir, shards, hang_s=0.2)
    there = rundir.path / "second"
    program(monkeypatch, f"os.path.exists({str(there)!r}) and sys.exit(0)\nopen({str(there)!r}, 'w')\ntime.sleep(600)")
    await within(silent.keep(shards.links[0]))
    assert there.exists()


async def test_all_end_with_the_front_also_one_that_does_not_listen(kept: Kept, monkeypatch: Any) -> None:
    rundir, processes, shards = kept
    monkeypatch.setattr(children, "END_S", 0.2)
    program(
        monkeypatch,
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open({str(rundir.path)!r} + '/pid' + sys.argv[-1], 'w').write(str(os.getpid()))\ntime.sleep(600)",
    )
    keeping = [asyncio.create_task(processes.keep(link)) for link in shards.links]
    files = [rundir.path / f"pidbuffer-{k}" for k in (0, 1)]
    await until(lambda: all(file.exists() and file.read_text() for file in files))
    for task in keeping:
        task.cancel()
    await asyncio.gather(*keeping, return_exceptions=True)
    await within(processes.end())
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
