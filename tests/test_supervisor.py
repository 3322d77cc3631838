"""The supervisor on tiny scripted roles: restarts, giving up, stopping with all that a role started."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from atpo_async.config import Config, SupervisorConfig, build
from atpo_async.core.errors import RoleCrashed, SetupError
from atpo_async.ops import supervisor as supervisor_module
from atpo_async.ops.attempts import backoff_s
from atpo_async.ops.specs import RoleSpec, role_specs
from atpo_async.ops.supervisor import Outcome, Supervisor
from atpo_async.run import launch, processes
from atpo_async.run.files import last_lines
from atpo_async.run.metrics import MetricsWriter, Record, read_metrics
from atpo_async.run.rundir import RunDir
from atpo_async.run.scratch import weights_folder

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

DEADLINE_S = 60.0
QUICK = SupervisorConfig(max_restarts=2, backoff_s=0.0, stop_grace_s=5.0, sample_every_s=0.05)
LONG_GRACE = QUICK.model_copy(update={"stop_grace_s": DEADLINE_S})
"""For roles that end by themselves, however busy the machine is."""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    rundir = RunDir.create(build({"run": {"dir": str(tmp_path), "name": "r"}}))
    yield rundir
    left = [p for p in processes.processes() if f"{rundir.run_id}/" in _environment(p.pid)]
    assert left == [], "a test left processes behind"


def _environment(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return ""


def script(name: str, code: str, **more: bool) -> RoleSpec:
    return RoleSpec(name=name, argv=(sys.executable, "-c", textwrap.dedent(code)), **more)  # type: ignore[arg-type]


FOREVER = "import time; time.sleep(1000)"
DEAF_WITH_CHILD = """
    import signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    print("child", child.pid, flush=True)
    time.sleep(1000)
"""


async def finished(supervisor: Supervisor) -> Outcome:
    return await asyncio.wait_for(supervisor.run(), DEADLINE_S)


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition of other processes; a deadline, not a duration."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - another process cannot set an event
            await asyncio.sleep(0.01)


def log(run: RunDir, role: str, attempt: int = 0) -> str:
    path = run.log_path(role, attempt)
    return path.read_text() if path.exists() else ""


async def test_the_run_is_done_when_the_learner_is_and_the_others_end_by_themselves(run: RunDir) -> None:
    told = run.path / "told"
    other = f"import os, time\nwhile not os.path.exists({str(told)!r}): time.sleep(0.01)\nprint('ended by itself')"
    learner = f"open({str(told)!r}, 'w').close()"
    specs = [script("buffer", other, stops_last=True), script("learner", learner, ends_run=True)]
    assert await finished(Supervisor(run, specs, settings=LONG_GRACE)) is Outcome.DONE
    assert "ended by itself" in log(run, "buffer")


async def test_roles_that_do_not_end_by_themselves_are_stopped(run: RunDir) -> None:
    settings = QUICK.model_copy(update={"stop_grace_s": 0.05})
    specs = [script("actor-0", FOREVER), script("learner", "pass", ends_run=True)]
    assert await finished(Supervisor(run, specs, settings=settings)) is Outcome.DONE


async def test_a_crashed_role_is_started_again_with_a_log_of_its_own(run: RunDir) -> None:
    flag = run.path / "flag"
    code = f"""
        import os, sys
        if not os.path.exists({str(flag)!r}):
            open({str(flag)!r}, "w").close()
            sys.exit("first attempt fails")
        print("second attempt")
    """
    said: list[str] = []
    supervisor = Supervisor(run, [script("learner", code, ends_run=True)], settings=QUICK, say=said.append)
    assert await finished(supervisor) is Outcome.DONE
    assert "first attempt fails" in log(run, "learner", 0)
    assert "second attempt" in log(run, "learner", 1)
    assert len(said) == 1
    assert said[0].startswith("learner ended: exit code 1; starting it again in 0 s")


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("os._exit(0)", r"it ended without an error message, as by os\._exit\(\)"),
        ("os._exit(2)", r"it ended without an error message, as by os\._exit\(\)"),
        ("os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
    ],
)
async def test_a_role_whose_environment_ends_the_process_is_started_again_and_the_step_is_told(
    run: RunDir, end: str, reason: str
) -> None:
    flag = run.path / "flag"
    code = f"""
        import os, pathlib, time
        doing = pathlib.Path(os.environ["ATPO_ERROR_FILE"]).with_suffix(".doing")
        if not os.path.exists({str(flag)!r}):
            open({str(flag)!r}, "w").close()
            doing.write_text("step 2 of task 7 (train)   ")
            {end}
        doing.write_text("")
    """
    waits = f"import os, time\nwhile not os.path.exists({str(run.path / 'go')!r}): time.sleep(0.01)"
    said: list[str] = []
    specs = [script("actor-0", code), script("learner", waits, ends_run=True)]
    supervisor = Supervisor(run, specs, settings=QUICK, say=said.append)
    task = asyncio.create_task(finished(supervisor))
    await until(lambda: said)
    (run.path / "go").touch()
    assert await task is Outcome.DONE
    assert re.match(rf"actor-0 ended: {reason}; its environment was at step 2 of task 7 \(train\); starting", said[0])


async def test_a_role_killed_from_outside_loses_its_children_before_it_is_started_again(run: RunDir) -> None:
    supervisor = Supervisor(run, [script("actor-0", DEAF_WITH_CHILD), script("learner", FOREVER)], settings=QUICK)
    task = asyncio.create_task(finished(supervisor))
    await until(lambda: "child" in log(run, "actor-0"))
    child = int(log(run, "actor-0").split()[1])
    os.kill(supervisor.pids["actor-0"], signal.SIGKILL)
    await until(lambda: "child" in log(run, "actor-0", 1))
    assert not _runs(child)
    supervisor.interrupt()
    supervisor.interrupt()
    assert await task is Outcome.INTERRUPTED


async def test_repeated_crashes_stop_the_run_with_the_reason_and_the_last_lines(run: RunDir) -> None:
    code = "import sys\nfor i in range(30): print('line', i)\nprint('error: the disk is full', flush=True)\nsys.exit(1)"
    supervisor = Supervisor(run, [script("buffer", code), script("learner", FOREVER, ends_run=True)], settings=QUICK)
    with pytest.raises(RoleCrashed) as caught:
        await finished(supervisor)
    message = str(caught.value)
    assert "buffer crashed 3 times within 300 s (supervisor.max_restarts = 2): the disk is full" in message
    assert "  | line 29" in message
    assert "  | line 10" not in message  # twenty lines, no more
    assert not run.log_path("buffer", 3).exists()


async def test_where_to_join_is_told_once_the_buffer_says_it_and_again_when_it_has_moved(run: RunDir) -> None:
    moves = run.path / "moves"
    code = f"""
        import os, time
        from pathlib import Path
        from atpo_async.run.rundir import RunDir
        listening = RunDir.open({str(run.path)!r}).listening
        listening.note(actors="tcp://[fd00::5]:7000")
        while not os.path.exists({str(moves)!r}): time.sleep(0.01)
        listening.note(actors="tcp://[fd00::5]:7001")
        time.sleep(1000)
    """
    said: list[str] = []
    supervisor = Supervisor(run, [script("buffer", code), script("learner", FOREVER)], settings=QUICK, say=said.append)
    task = asyncio.create_task(finished(supervisor))
    await until(lambda: said)
    moves.touch()
    await until(lambda: len(said) == 2)
    supervisor.interrupt()
    supervisor.interrupt()
    assert await task is Outcome.INTERRUPTED
    assert said == [
        "actors join with --join [fd00::5]:7000",
        "actors join with --join [fd00::5]:7001: the buffer is no longer where it was",
    ]


async def test_where_the_learner_is_to_join_is_told_where_none_is_started_here(run: RunDir) -> None:
    code = f"""
        import time
        from atpo_async.run.rundir import RunDir
        RunDir.open({str(run.path)!r}).listening.note(actors="tcp://127.0.0.1:7000", learner="tcp://127.0.0.1:7001")
        time.sleep(1000)
    """
    said: list[str] = []
    supervisor = Supervisor(run, [script("buffer", code, ends_run=True)], settings=QUICK, say=said.append)
    task = asyncio.create_task(finished(supervisor))
    await until(lambda: len(said) == 2)
    supervisor.interrupt()
    supervisor.interrupt()
    assert await task is Outcome.INTERRUPTED
    assert said == ["the learner joins with --join 127.0.0.1:7001", "actors join with --join 127.0.0.1:7000"]


@pytest.mark.slow
@pytest.mark.parametrize("learner_first", [False, True])
async def test_who_ended_with_the_run_comes_back_for_a_learner_that_did_not_live_to_end(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, learner_first: bool
) -> None:
    """Killed after it had said that the run is over: the others end, before or after it has come back."""
    monkeypatch.setattr(supervisor_module, "COMEBACK_S", 0.1)
    ended, back = run.path / "ended", run.path / "back"
    buffer = f"""
        import os, time
        if os.path.exists({str(ended)!r}):
            open({str(run.path / "answered")!r}, "w").close()
            time.sleep(1000)
        while {learner_first} and not os.path.exists({str(back)!r}):
            time.sleep(0.01)
        open({str(ended)!r}, "w").close()
    """
    learner = f"""
        import os, sys, time
        if not os.path.exists({str(run.path / "told")!r}):
            open({str(run.path / "told")!r}, "w").close()
            while not {learner_first} and not os.path.exists({str(ended)!r}):
                time.sleep(0.01)
            os.kill(os.getpid(), 9)
        open({str(back)!r}, "w").close()
        while not os.path.exists({str(run.path / "answered")!r}):
            time.sleep(0.01)
    """
    said: list[str] = []
    specs = [script("buffer", buffer, stops_last=True), script("learner", learner, ends_run=True)]
    assert await finished(Supervisor(run, specs, settings=QUICK, say=said.append)) is Outcome.DONE
    assert "buffer had ended with the run, whose learner died before it did; starting it again" in said


async def test_settings_for_accelerate_in_the_shell_reach_no_role_and_are_told(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    said: list[str] = []
    code = "import os; print({k: v for k, v in os.environ.items() if k.startswith('ACCELERATE_')})"
    plain = script("learner", code, ends_run=True)
    spec = RoleSpec(name="learner", argv=plain.argv, env={"ACCELERATE_USE_CPU": "true"}, ends_run=True)
    assert await finished(Supervisor(run, [spec], settings=QUICK, say=said.append)) is Outcome.DONE
    assert log(run, "learner").strip() == "{'ACCELERATE_USE_CPU': 'true'}"
    assert any("not heeded" in line and "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4" in line for line in said), said


async def test_crashes_outside_the_window_are_forgotten(run: RunDir) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 200.0
        return now

    count = run.path / "count"
    code = f"""
        import sys
        with open({str(count)!r}, "a+") as f:
            f.write("x"); f.seek(0)
            sys.exit(1 if len(f.read()) < 6 else 0)
    """
    settings = QUICK.model_copy(update={"max_restarts": 1, "restart_window_s": 100.0})
    supervisor = Supervisor(run, [script("learner", code, ends_run=True)], settings=settings, clock=clock)
    assert await finished(supervisor) is Outcome.DONE
    assert count.read_text() == "x" * 6


async def test_what_only_the_user_can_mend_is_not_tried_again(run: RunDir) -> None:
    code = "import sys; print('error: vLLM is not installed', file=sys.stderr); sys.exit(2)"
    supervisor = Supervisor(run, [script("actor-0", code), script("learner", FOREVER, ends_run=True)], settings=QUICK)
    with pytest.raises(SetupError, match=r"^actor-0: vLLM is not installed"):
        await finished(supervisor)
    assert not run.log_path("actor-0", 1).exists()


async def test_a_launcher_cannot_hide_what_a_role_said(run: RunDir) -> None:
    code = """
        import json, os, sys
        open(os.environ["ATPO_ERROR_FILE"], "w").write(json.dumps({"code": 2, "error": "no such model"}))
        print("noise of the launcher"); sys.exit(1)
    """
    supervisor = Supervisor(run, [script("learner", code, ends_run=True)], settings=QUICK)
    with pytest.raises(SetupError, match=r"^learner: no such model"):
        await finished(supervisor)


async def test_an_interrupt_asks_the_roles_and_the_buffer_last(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "LAST_GRACE_S", DEADLINE_S)
    order = run.path / "order"
    code = """
        import signal, sys, time
        def end(*_):
            open({order!r}, "a").write({name!r} + " ")
            sys.exit(0)
        signal.signal(signal.SIGTERM, end)
        print("ready", flush=True)
        time.sleep(1000)
    """
    names = ("buffer", "actor-0")
    specs = [
        script(name, textwrap.dedent(code).format(order=str(order), name=name), stops_last=name == "buffer")
        for name in names
    ]
    supervisor = Supervisor(run, specs, settings=LONG_GRACE)
    task = asyncio.create_task(finished(supervisor))
    await until(lambda: all("ready" in log(run, name) for name in names))
    supervisor.interrupt()
    assert await task is Outcome.INTERRUPTED
    assert order.read_text().split() == ["actor-0", "buffer"]


async def test_a_second_interrupt_kills_what_does_not_listen_with_its_children(run: RunDir) -> None:
    settings = QUICK.model_copy(update={"stop_grace_s": 1000.0})
    supervisor = Supervisor(run, [script("actor-0", DEAF_WITH_CHILD)], settings=settings)
    task = asyncio.create_task(finished(supervisor))
    await until(lambda: "child" in log(run, "actor-0"))
    child = int(log(run, "actor-0").split()[1])
    supervisor.interrupt()
    supervisor.interrupt()
    assert await task is Outcome.INTERRUPTED
    assert not _runs(child)


async def test_roles_that_will_not_go_are_killed_together_and_not_one_after_the_other(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[int] = []
    kill_roles = processes.kill_roles

    def counted(marks: Mapping[int, str], **more: float) -> int:
        together.append(len(marks))
        return kill_roles(marks, **more)

    monkeypatch.setattr(processes, "kill_roles", counted)
    names = ("actor-0", "actor-1", "actor-2")
    supervisor = Supervisor(run, [script(name, DEAF_WITH_CHILD) for name in names], settings=QUICK)
    task = asyncio.create_task(finished(supervisor))
    await until(lambda: all("child" in log(run, name) for name in names))
    children = [int(log(run, name).split()[1]) for name in names]
    supervisor.interrupt()
    supervisor.interrupt()
    assert await task is Outcome.INTERRUPTED
    assert max(together) == len(names)
    assert not any(_runs(child) for child in children)


async def test_weights_of_a_killed_learner_do_not_stay_in_shared_memory(run: RunDir) -> None:
    folder = weights_folder(run.run_id)
    code = f"import os, time\nos.mkdir({str(folder)!r})\ntime.sleep(1000)"
    settings = QUICK.model_copy(update={"max_restarts": 0})
    supervisor = Supervisor(run, [script("learner", code, ends_run=True)], settings=settings)
    task = asyncio.create_task(finished(supervisor))
    await until(folder.is_dir)
    os.kill(supervisor.pids["learner"], signal.SIGKILL)
    with pytest.raises(RoleCrashed):
        await task
    assert not folder.exists()


async def test_an_interrupt_ends_the_back_off_too(run: RunDir) -> None:
    said: list[str] = []
    settings = QUICK.model_copy(update={"backoff_s": 1000.0, "max_backoff_s": 1000.0})
    supervisor = Supervisor(run, [script("learner", "raise SystemExit(1)")], settings=settings, say=said.append)
    task = asyncio.create_task(finished(supervisor))
    await until(lambda: said)
    supervisor.interrupt()
    assert await task is Outcome.INTERRUPTED


async def test_roles_end_when_their_supervisor_is_killed(run: RunDir, tmp_path: Path) -> None:
    role = tmp_path / "role.py"
    role.write_text(
        textwrap.dedent("""
            import sys
            from atpo_async.ops import role

            async def main(context):
                print("ready", flush=True)
                await context.stopping.wait()
                print("told to stop", flush=True)

            role.run("buffer", main, sys.argv[1:])
        """)
    )
    boss = f"""
import asyncio, sys
from pathlib import Path
from atpo_async.config import SupervisorConfig
from atpo_async.run.endpoints import Endpoints
from atpo_async.run.rundir import RunDir
from atpo_async.ops.specs import RoleSpec
from atpo_async.ops.supervisor import Supervisor
run = RunDir.open({str(run.path)!r})
run.write_endpoints(Endpoints("a", "b", "c", "d"))
spec = RoleSpec(name="buffer", argv=(sys.executable, {str(role)!r}, str(run.path)))
asyncio.run(Supervisor(run, [spec], settings=SupervisorConfig()).run())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", boss)
    await until(lambda: "ready" in log(run, "buffer"))
    process.kill()
    await process.wait()
    await until(lambda: "told to stop" in log(run, "buffer"))
    await until(lambda: not processes.marked(f"{run.run_id}/buffer/0"))


async def test_memory_of_a_role_is_summed_over_its_processes_and_written(run: RunDir) -> None:
    seen: list[Record] = []
    supervisor = Supervisor(run, [script("actor-0", DEAF_WITH_CHILD)], settings=QUICK, on_records=seen.extend)
    task = asyncio.create_task(finished(supervisor))
    await until(lambda: any("memory/actor-0_mb" in record.metrics for record in seen))
    supervisor.interrupt()
    supervisor.interrupt()
    await task
    records = [r for r in read_metrics(run.metrics_path) if "memory/actor-0_mb" in r.metrics]
    assert {r.source for r in records} == {"supervisor"}
    assert all(r.metrics["memory/actor-0_mb"] > 0 for r in records)


async def test_records_of_all_roles_reach_whoever_shows_them(run: RunDir) -> None:
    seen: list[Record] = []
    with MetricsWriter(run.metrics_path, source="learner") as writer:
        writer.write(step=1, version=1, metrics={"train/loss": 1.0})
        supervisor = Supervisor(run, [script("learner", "pass", ends_run=True)], settings=QUICK, on_records=seen.extend)
        await finished(supervisor)
    assert [r.source for r in seen].count("learner") == 1


def test_the_back_off_doubles_up_to_its_limit() -> None:
    settings = SupervisorConfig(backoff_s=0.5, max_backoff_s=3.0)
    assert [backoff_s(n, settings) for n in (1, 2, 3, 4, 5)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def specs_of(**sections: dict[str, object]) -> dict[str, RoleSpec]:
    config: Config = build(sections)
    return {s.name: s for s in role_specs(config, Path("runs/r"), has_cuda=lambda: False, python="python", environ={})}


def test_one_process_each_is_started_plainly() -> None:
    specs = specs_of(actor={"count": 2, "num_threads": 1}, learner={"num_threads": 3})
    assert list(specs) == ["buffer", "learner", "actor-0", "actor-1"]
    assert specs["learner"].argv == ("python", "-P", launch.HERE, "learner", "runs/r")
    assert specs["actor-1"].argv == ("python", "-P", launch.HERE, "actors", "runs/r", "--index", "1")
    assert specs["learner"].env["OMP_NUM_THREADS"] == "3"
    assert specs["actor-0"].env == {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    assert specs["learner"].ends_run
    assert specs["buffer"].stops_last


def test_several_ranks_are_started_through_accelerate() -> None:
    learner = specs_of(learner={"num_processes": 2, "device": "cpu"})["learner"]
    assert learner.argv[:4] == ("python", "-P", "-m", "accelerate.commands.launch")
    assert learner.argv[-3:] == (launch.HERE, "learner", "runs/r")
    assert learner.argv[learner.argv.index("--num_processes") + 1] == "2"
    assert learner.env["ACCELERATE_USE_CPU"] == "true"


def test_ranks_on_one_machine_meet_at_a_port_that_torch_binds_itself(tmp_path: Path) -> None:
    """Accelerate would pick a free port, close it, and have it bound later."""

    def standalone(text: str | None) -> bool:
        file = tmp_path / "accelerate.yaml"
        file.write_text(text or "")
        name = None if text is None else str(file)
        env = specs_of(learner={"num_processes": 2, "device": "cpu", "accelerate_config": name})["learner"].env
        return env.get("PET_STANDALONE") == "1" and env.get("PET_LOCAL_ADDR") == "localhost"

    assert standalone(None)
    assert standalone("num_machines: 1\nnum_processes: 2\n")
    assert not standalone("machine_rank: 0\nnum_machines: 2\n")
    assert "PET_STANDALONE" not in specs_of(learner={"device": "cpu"})["learner"].env


def test_gpus_are_given_to_roles_by_their_environment() -> None:
    specs = specs_of(
        actor={"count": 2, "gpus": [0, 1, 2, 3], "tensor_parallel_size": 2},
        learner={"num_processes": 2, "gpus": [4, 5], "accelerate_config": "a.yaml"},
    )
    assert specs["actor-1"].env["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert specs["learner"].env["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert specs["buffer"].env["CUDA_VISIBLE_DEVICES"] == ""
    assert "--config_file" in specs["learner"].argv


def test_gpus_are_numbered_as_nvidia_smi_does_within_what_a_cluster_allots() -> None:
    def shown(**environ: str) -> dict[str, str]:
        config = build({"actor": {"count": 1, "gpus": [1]}})
        specs = role_specs(config, Path("runs/r"), has_cuda=lambda: True, python="python", environ=environ)
        return {key: value for key, value in specs[-1].env.items() if key.startswith("CUDA")}

    assert shown() == {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert shown(CUDA_VISIBLE_DEVICES="GPU-aa,GPU-bb")["CUDA_VISIBLE_DEVICES"] == "GPU-bb"
    assert shown(CUDA_VISIBLE_DEVICES="4,6", CUDA_DEVICE_ORDER="FASTEST_FIRST") == {
        "CUDA_VISIBLE_DEVICES": "6",
        "CUDA_DEVICE_ORDER": "FASTEST_FIRST",
    }
    with pytest.raises(SetupError, match=r"GPU 1 is asked for, but CUDA_VISIBLE_DEVICES = '4' allots 1"):
        shown(CUDA_VISIBLE_DEVICES="4")


def test_members_are_the_session_and_all_descendants() -> None:
    running = [
        processes.Process(10, parent=1, session=10, started=0),
        processes.Process(11, parent=10, session=10, started=0),
        processes.Process(12, parent=11, session=12, started=0),  # a launcher's rank, in a session of its own
        processes.Process(13, parent=1, session=10, started=0),  # an orphan of the session
        processes.Process(20, parent=1, session=20, started=0),
    ]
    assert sorted(p.pid for p in processes.members(10, running)) == [10, 11, 12, 13]


def test_the_last_lines_of_a_long_log_are_read_from_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"{i}\n" for i in range(100_000)))
    assert last_lines(path, 3) == ["99997", "99998", "99999"]
    assert last_lines(tmp_path / "none", 3) == []


def _runs(pid: int) -> bool:
    return any(p.pid == pid for p in processes.processes())


def test_a_process_that_has_ended_is_not_counted_as_running() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
    assert not _runs(process.pid)
    process.wait()


@pytest.mark.parametrize(("parent", "code"), [("os.getppid()", 0), ("1 + os.getppid()", 1)])
def test_a_process_whose_parent_died_before_the_tie_was_made_ends_at_once(parent: str, code: int) -> None:
    words = f"import os; from atpo_async.run.processes import die_with_parent as tie; assert tie(9, {parent})"
    assert subprocess.run([sys.executable, "-c", words], check=False, timeout=DEADLINE_S).returncode == code
