"""Launchers: the supervisor starts, sees and ends roles by way of one that the configuration names."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atpo_async.config import SupervisorConfig
from atpo_async.core.errors import ConfigError, RoleCrashed, SetupError
from atpo_async.ops.supervisor import Outcome, Supervisor
from atpo_async.run.rundir import RunDir
from tests.hang_support import DEADLINE_S, SERVES, make_run, spec_of, status_of, until_async

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

NICE = """
    from dataclasses import replace

    from atpo_async.ops.launchers.processes import ProcessLauncher

    class Nice(ProcessLauncher):
        \"\"\"Every role runs at a lower priority.\"\"\"

        def __init__(self, *, by: int = 10) -> None:
            self._by = by

        async def start(self, order):
            return await super().start(replace(order, argv=("nice", "-n", str(self._by), *order.argv)))
"""
ELSEWHERE = """
    import asyncio, os, signal, subprocess

    STARTED = []

    class Remote:
        \"\"\"A role on what could be another machine: it has no process id here.\"\"\"
        pid = None

        def __init__(self, process):
            self.process = process

        async def wait(self):
            return await asyncio.to_thread(self.process.wait)

        def ask_to_end(self, pids):
            self.process.terminate()

    class Elsewhere:
        \"\"\"Starts roles of which nothing can be told but that they ended.\"\"\"

        async def start(self, order):
            STARTED.append(order.role)
            output = order.log.open("xb")
            return Remote(subprocess.Popen(order.argv, env=order.env, stdout=output, stderr=output))

        async def kill(self, handles):
            for handle in handles:
                handle.process.kill()

        def usage(self, handles):
            return [None] * len(handles)

        memory_mb = usage
"""
FAILS = """
    from atpo_async.ops.launchers.processes import ProcessLauncher

    class Full(ProcessLauncher):
        async def start(self, order):
            raise RuntimeError("no place for it in the placement group")

    class Wordless(ProcessLauncher):
        async def start(self, order):
            return object()

    class Loses(ProcessLauncher):
        async def start(self, order):
            role = await super().start(order)
            async def wait():
                raise ConnectionError("node 7 is gone")
            role.wait = wait
            return role

    class Blind(ProcessLauncher):
        def usage(self, handles):
            raise RuntimeError("no route to node 7")

        memory_mb = usage

    class Half:
        async def start(self, order): ...
"""


@pytest.fixture(autouse=True)
def launchers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules of a user, outside the packages."""
    for name, code in (("nice", NICE), ("elsewhere", ELSEWHERE), ("fails", FAILS)):
        (tmp_path / f"launcher_{name}_of_this_test.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.endswith("_of_this_test")]:
        del sys.modules[name]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "runs")


def supervisor_of(
    run: RunDir, launcher: str, *roles: str, said: list[str] | None = None, **settings: Any
) -> Supervisor:
    """One that is told nothing but what ``said`` takes; its roles serve until they are stopped."""
    specs = [spec_of(run, role, SERVES) for role in roles]
    chosen = SupervisorConfig(launcher=launcher, backoff_s=0.0, max_restarts=1, sample_every_s=0.05, **settings)
    return Supervisor(run, specs, settings=chosen, say=(said if said is not None else []).append)


async def serving(run: RunDir, *roles: str) -> None:
    def all_serve() -> bool:
        found = [status_of(run, role) for role in roles]
        return all(status is not None and status.phase == "serving" for status in found)

    await until_async(all_serve)


async def test_a_users_launcher_starts_every_role_under_its_own_command(run: RunDir) -> None:
    launcher = "launcher_nice_of_this_test:Nice"
    supervisor = supervisor_of(run, launcher, "buffer", "learner", launcher_options={"by": 7})
    task = asyncio.create_task(supervisor.run())
    await serving(run, "buffer", "learner")
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in supervisor.pids.values()} == {min(own + 7, 19)}
    supervisor.interrupt()
    assert await asyncio.wait_for(task, DEADLINE_S) is Outcome.INTERRUPTED


async def test_roles_whose_processes_cannot_be_seen_from_here_run_restart_and_stop(run: RunDir) -> None:
    said: list[str] = []
    supervisor = supervisor_of(run, "launcher_elsewhere_of_this_test:Elsewhere", "buffer", "actor-0", said=said)
    task = asyncio.create_task(supervisor.run())
    await serving(run, "buffer", "actor-0")
    assert supervisor.pids == {}
    first = status_of(run, "actor-0")
    assert first is not None
    os.kill(first.pid, signal.SIGKILL)

    def second_serves() -> bool:
        now = status_of(run, "actor-0")
        return now is not None and now.phase == "serving" and now.pid != first.pid

    await until_async(second_serves)
    supervisor.interrupt()
    assert await asyncio.wait_for(task, DEADLINE_S) is Outcome.INTERRUPTED
    assert sys.modules["launcher_elsewhere_of_this_test"].STARTED == ["buffer", "actor-0", "actor-0"]
    assert [line for line in said if line.startswith("actor-0 ended: killed by SIGKILL")]


@pytest.mark.parametrize(
    ("launcher", "reason"),
    [
        ("Full", "RuntimeError: no place for it in the placement group"),
        (
            "Wordless",
            "its start() returned object, which lacks pid, wait, ask_to_end; see docs/extending.md",
        ),
    ],
)
async def test_a_launcher_that_fails_to_start_a_role_is_told_with_its_name(
    run: RunDir, launcher: str, reason: str
) -> None:
    name = f"launcher_fails_of_this_test:{launcher}"
    with pytest.raises(SetupError) as caught:
        await supervisor_of(run, name, "buffer").run()
    said = str(caught.value)
    assert said.startswith(f"buffer cannot be started by supervisor.launcher = '{name}'")
    assert reason in said


async def test_a_role_that_its_launcher_loses_is_started_again(run: RunDir) -> None:
    said: list[str] = []
    with pytest.raises(RoleCrashed, match=r"buffer crashed 2 times .* its launcher has lost it"):
        await supervisor_of(run, "launcher_fails_of_this_test:Loses", "buffer", said=said).run()
    assert [line for line in said if "lost it: ConnectionError: node 7 is gone; starting it again" in line]


async def test_a_launcher_that_cannot_tell_what_processes_do_ends_no_run(run: RunDir) -> None:
    said: list[str] = []
    supervisor = supervisor_of(run, "launcher_fails_of_this_test:Blind", "buffer", said=said, hang_s=1000.0)
    task = asyncio.create_task(supervisor.run())
    await until_async(lambda: said)
    await serving(run, "buffer")
    supervisor.interrupt()
    assert await asyncio.wait_for(task, DEADLINE_S) is Outcome.INTERRUPTED
    assert [line for line in said if "launcher" in line] == [
        "the launcher cannot tell what the roles' processes do: RuntimeError: no route to node 7"
    ]


def test_what_is_no_launcher_is_refused_before_anything_starts(run: RunDir) -> None:
    with pytest.raises(ConfigError, match="Half is not a launcher: it lacks kill, usage, memory_mb"):
        supervisor_of(run, "launcher_fails_of_this_test:Half")
