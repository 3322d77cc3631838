"""What a killed supervisor left running is ended by the next start of its run, and what is not its own is named."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from atpo_async.config import build
from atpo_async.core.errors import SetupError
from atpo_async.ops import orphans
from atpo_async.ops.exits import ERROR_FILE, SUPERVISOR_PID
from atpo_async.ops.orphans import end_orphans
from atpo_async.run import processes
from atpo_async.run.host import host_id
from atpo_async.run.rundir import RunDir
from atpo_async.status import snapshot, waits

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

DEADLINE_S = 60.0

ROLE = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
print("ready", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(build({"run": {"dir": str(tmp_path), "name": "r"}, "supervisor": {"stop_grace_s": 0.1}}))


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts processes as a supervisor would; they are gone afterwards."""
    made: list[subprocess.Popen[bytes]] = []

    def start(run: RunDir, *, supervisor: int, run_id: str = "", code: str = ROLE) -> subprocess.Popen[bytes]:
        env = {
            **os.environ,
            processes.ROLE_MARK: f"{run_id or run.run_id}/buffer/0",
            SUPERVISOR_PID: str(supervisor),
            ERROR_FILE: str(run.scratch / "buffer.0.error"),
        }
        process = subprocess.Popen([sys.executable, "-c", code], env=env, start_new_session=True, stdout=-1)
        made.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in made:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def gone() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def group(leader: int) -> set[int]:
    return {p.pid for p in processes.members(leader, processes.processes())}


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def never(seconds: float) -> None:
    raise AssertionError("waited")


def end_buffer(run: RunDir, *, pause_s: float, at_pause: Callable[[float], None] = lambda now: None) -> float:
    """End the orphaned buffer while each pause takes ``pause_s``; the seconds that this took, by that clock."""
    now = [0.0]

    def pause(seconds: float) -> None:
        at_pause(now[0])
        now[0] += pause_s

    assert end_orphans(run, clock=lambda: now[0], pause=pause) == ["buffer"]
    return now[0]


def test_a_stopped_role_whose_supervisor_was_killed_is_ended_with_all_that_it_started(
    run: RunDir, started: Callable[..., subprocess.Popen[bytes]]
) -> None:
    orphan = started(run, supervisor=gone())
    family = group(orphan.pid)
    assert len(family) == 2
    os.killpg(orphan.pid, signal.SIGSTOP)
    until(lambda: len(processes.stopped(family)) == 2)
    said: list[str] = []
    assert end_orphans(run, say=said.append) == ["buffer"]
    orphan.wait(timeout=DEADLINE_S)
    assert group(orphan.pid) == set()
    assert said == [
        f"buffer of an earlier start of this run is still there without its supervisor (process {orphan.pid}): a "
        "signal had stopped it, it is ended now"
    ]
    assert end_orphans(run, say=said.append, pause=never) == []


def test_an_orphan_that_hangs_has_its_time_to_end_and_is_then_ended(
    run: RunDir, started: Callable[..., subprocess.Popen[bytes]]
) -> None:
    orphan = started(run, supervisor=gone())
    times: list[float] = []

    def still_there(now: float) -> None:
        assert group(orphan.pid), "ended before its time"
        times.append(now)

    end_buffer(run, pause_s=1.0, at_pause=still_there)
    assert times == [0.0, 1.0, 2.0]  # stop_grace_s of 0.1 and two seconds more
    assert group(orphan.pid) == set()


@pytest.fixture
def saving(run: RunDir, started: Callable[..., subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """An orphan whose status says that it saves."""
    orphan = started(run, supervisor=gone())
    seen(run, phase=waits.SAVING)
    return orphan


def test_an_orphan_that_saves_what_was_trained_has_the_time_for_it(
    run: RunDir, saving: subprocess.Popen[bytes]
) -> None:
    def save_for_100_s(now: float) -> None:
        assert group(saving.pid), "ended while it saved"
        if now >= 90.0:
            seen(run, phase="ending")

    assert end_buffer(run, pause_s=10.0, at_pause=save_for_100_s) == 100.0
    assert group(saving.pid) == set()


def test_an_orphan_that_never_ends_its_saving_is_ended_at_last(run: RunDir, saving: subprocess.Popen[bytes]) -> None:
    give_up_s = run.config.links.give_up_s
    assert end_buffer(run, pause_s=give_up_s / 2) > give_up_s
    assert group(saving.pid) == set()


def test_the_roles_of_a_living_supervisor_are_never_touched_and_it_is_named(
    run: RunDir, started: Callable[..., subprocess.Popen[bytes]]
) -> None:
    role = started(run, supervisor=os.getpid())
    with pytest.raises(SetupError, match=rf"its buffer \(process {role.pid}\) belongs to supervisor process") as found:
        end_orphans(run, pause=never)
    assert str(os.getpid()) in str(found.value)
    assert role.poll() is None


def test_processes_of_other_runs_and_of_a_copy_of_the_folder_are_left_alone(
    run: RunDir, tmp_path: Path, started: Callable[..., subprocess.Popen[bytes]]
) -> None:
    others = started(run, supervisor=gone(), run_id=f"{run.run_id}x")
    copy = tmp_path / "copy"
    (copy / "scratch").mkdir(parents=True)
    copied = started(RunDir(copy, run_id=run.run_id, config=run.config), supervisor=os.getpid())
    assert end_orphans(run, pause=never) == []
    assert others.poll() is None
    assert copied.poll() is None


def seen(run: RunDir, **changes: object) -> snapshot.StatusSnapshot:
    """A status file in the run's folder."""
    status = snapshot.StatusSnapshot(
        role="buffer",
        mark=f"{run.run_id}/buffer/0",
        pid=os.getpid(),
        started=processes.started(os.getpid()) or 0,
        host=host_id(),
        hostname="here",
        at=time.time(),
        monotonic_s=time.monotonic(),
        sequence=1,
        phase="serving",
        phase_s=1.0,
        starting=False,
        still_s=0.0,
        loop_age_s=0.1,
    )
    status = msgspec.structs.replace(status, **changes)
    (run.path / snapshot.FOLDER).mkdir(exist_ok=True)
    (run.path / snapshot.FOLDER / "buffer.json").write_bytes(msgspec.json.encode(status))
    return status


def test_a_role_of_another_user_is_named_with_its_process(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    status = seen(run)
    monkeypatch.setattr(processes, "is_ours", lambda pid: False)
    with pytest.raises(SetupError, match=rf"runs as process {status.pid} of another user, .*kill -9 {status.pid}"):
        end_orphans(run, pause=never)


def test_a_role_that_lives_on_another_machine_is_named_and_one_that_gives_no_sign_is_not(run: RunDir) -> None:
    def renewed(_: float) -> None:
        seen(run, host="another", hostname="there", sequence=2)

    seen(run, host="another", hostname="there")
    with pytest.raises(SetupError, match=r"buffer of run .* runs on there \(process"):
        end_orphans(run, pause=renewed)
    assert end_orphans(run, pause=lambda seconds: None) == []
    seen(run, host="another", hostname="there", at=time.time() - 2 * orphans.OTHER_HOST_S)
    assert end_orphans(run, pause=never) == []


COMMAND = """
import sys
from atpo_async.cli import main
from atpo_async.ops import specs as role_commands

real = role_commands.role_specs

def specs(config, rundir, **more):
    buffer = next(spec for spec in real(config, rundir, **more) if spec.name == "buffer")
    argv = (sys.executable, "-c", "import time; time.sleep({seconds})")
    return [buffer, role_commands.RoleSpec(name="learner", argv=argv, ends_run=True)]

role_commands.role_specs = specs
sys.exit(main.main(["train", "c.toml"]))
"""


@pytest.mark.slow
def test_the_same_command_goes_on_after_its_supervisor_was_killed_and_its_buffer_stopped(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "c.toml").write_text(
        '[model]\npath = "model"\n[actor]\nengine = "transformers"\n[supervisor]\nstop_grace_s = 0.5\n'
    )

    def command(seconds: float) -> list[str]:
        return [sys.executable, "-c", textwrap.dedent(COMMAND.format(seconds=seconds))]

    first = subprocess.Popen(command(1000), cwd=tmp_path, stdout=subprocess.DEVNULL)
    state = tmp_path / "runs" / "run" / snapshot.FOLDER
    until(lambda: getattr(snapshot.read(state)[0].get("buffer"), "phase", "") == "serving" or first.poll() is not None)
    assert first.poll() is None
    stopped = snapshot.read(state)[0]["buffer"].pid
    os.kill(stopped, signal.SIGSTOP)
    first.kill()
    first.wait()
    second = subprocess.run(command(0), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stdout + second.stderr
    assert (
        f"note: buffer of an earlier start of this run is still there without its supervisor (process {stopped})"
        in (second.stdout)
    )
    assert processes.started(stopped) is None
