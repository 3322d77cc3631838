"""The launcher of a run on Ray, with real hosts and processes, on a cluster that is made up in this process."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from atpo_async.config import SupervisorConfig
from atpo_async.core.errors import RoleCrashed, SetupError
from atpo_async.links import keys as key_files
from atpo_async.ops.launchers.ray import waiting
from atpo_async.ops.launchers.ray.intake import Intake
from atpo_async.ops.launchers.ray.launcher import own_status
from atpo_async.ops.launchers.ray.messages import End, News, Start
from atpo_async.ops.launchers.ray.plan import Need
from atpo_async.ops.launchers.ray.run_keys import RunKeys
from atpo_async.ops.supervisor import Outcome, Supervisor
from atpo_async.run import processes
from atpo_async.run.rundir import RunDir
from atpo_async.status.chains import explain
from atpo_async.status.hangs import ObservedRole, Watch
from tests.hang_support import make_run, status_of, until_async
from tests.ray_support import MadeUpPlaces, launcher_of, script, with_model

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

WAITS = "import time\nprint('ready', flush=True)\ntime.sleep(1000)\n"
DONE = "pass"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "runs")


def holds(file: Path, words: bytes) -> bool:
    return file.exists() and words in file.read_bytes()


def supervisor_of(run: RunDir, places: MadeUpPlaces, *specs: Any, said: list[str], **settings: Any) -> Supervisor:
    fields = {"backoff_s": 0.01, "stop_grace_s": 0.5, **settings}
    launcher = launcher_of(run, places, said=said)
    return Supervisor(run, specs, settings=SupervisorConfig(**fields), launcher=launcher, say=said.append)


async def test_the_log_arrives_whole_and_in_order_and_the_run_ends_with_its_learner(run: RunDir) -> None:
    lines = 40_000
    burst = f"import sys\nfor n in range({lines}): print(n, 'x' * 40)\nprint('error text', file=sys.stderr)"
    said: list[str] = []
    supervisor = supervisor_of(run, MadeUpPlaces("a"), script("learner", burst, ends_run=True), said=said)
    assert await supervisor.run() is Outcome.DONE
    log = run.log_path("learner", 0).read_text().splitlines()
    assert [int(line.split()[0]) for line in log[:-1]] == list(range(lines))
    assert log[-1] == "error text"


async def test_what_a_role_says_last_is_the_supervisors_sentence_as_on_one_machine(run: RunDir) -> None:
    fails = """
        import json, os, sys
        open(os.environ["ATPO_ERROR_FILE"], "w").write(json.dumps({"code": 2, "error": "no such tokenizer"}))
        print("Traceback of an engine"); sys.exit(1)
    """
    said: list[str] = []
    supervisor = supervisor_of(run, MadeUpPlaces("a"), script("actor-0", fails), said=said)
    with pytest.raises(SetupError, match=r"actor-0: no such tokenizer .*actor-0.0.log"):
        await supervisor.run()
    assert "Traceback of an engine" in run.log_path("actor-0", 0).read_text()


async def test_a_signal_that_killed_a_role_is_named_and_the_role_is_given_up_with_its_log(run: RunDir) -> None:
    code = "import os, signal\nprint('CUDA error: device lost', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    said: list[str] = []
    supervisor = supervisor_of(run, MadeUpPlaces("a"), script("actor-0", code), said=said, max_restarts=1)
    with pytest.raises(RoleCrashed, match=r"killed by SIGKILL\n(.*\n)*.*CUDA error: device lost"):
        await supervisor.run()
    assert run.log_path("actor-0", 1).exists()


async def test_a_role_without_a_place_is_said_once_shown_in_the_status_and_starts_when_a_node_comes(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atpo_async.ops.launchers.ray.waiting.SAY_S", 0.0)
    monkeypatch.setattr("atpo_async.ops.launchers.ray.launcher.SHOW_S", 0.02)
    said: list[str] = []
    places = MadeUpPlaces()
    supervisor = supervisor_of(run, places, script("actor-0", WAITS), said=said)
    task = asyncio.create_task(supervisor.run())
    await until_async(lambda: (found := status_of(run, "actor-0")) is not None and found.sequence > 2)
    shown = status_of(run, "actor-0")
    assert shown is not None
    assert shown.phase == "pending: it has no place on the cluster"
    assert (shown.waits[0].what, shown.waits[0].on) == ("a place (1 CPU)", "the cluster")
    assert run.log_path("actor-0", 0).read_bytes() == b""
    places.add("b")
    await until_async(lambda: "ready" in run.log_path("actor-0", 0).read_text())
    supervisor.interrupt()
    assert await task is Outcome.INTERRUPTED
    about = [line for line in said if line.startswith("actor-0")]
    assert about == [
        "actor-0 waits for a place on the cluster (1 CPU); the others go on, and it starts when a node has that free",
        "actor-0 has its place, on node b (127.0.0.1)",
    ]


def test_a_role_that_waits_for_its_place_for_days_is_never_taken_for_stuck(run: RunDir) -> None:
    said: list[str] = []
    roles = waiting.Waiting(say=said.append, blank=own_status)
    watch = Watch(deadline_s=60.0, hang_s=450.0, every_s=1.0)
    for name in ("actor-0", "learner"):
        roles.begin(name, need="8 GPU", mark=f"r/{name}/0", now=0.0)
    for minute in range(0, 3 * 24 * 60, 5):
        for second in range(3):  # as often as it looks; a longer pause would set its clocks back
            now = 60.0 * minute + second
            shown = roles.look(now)
            observed = [ObservedRole(role=r, statuses=(s,), usage_known=False) for r, s in shown.items()]
            assert not [verdict for verdict in watch.look(observed, now) if verdict.ends]
    assert len(said) == 2
    sentence = "; ".join(explain(roles.look(now), {}))
    assert "actor-0" in sentence
    assert "a place (8 GPU) from the cluster" in sentence


async def test_a_stop_ends_a_role_that_has_no_place_and_gives_every_place_back(run: RunDir) -> None:
    places = MadeUpPlaces()
    launcher = launcher_of(run, places, said=[])
    specs = (script("learner", WAITS, ends_run=True), script("actor-0", WAITS))
    supervisor = Supervisor(run, specs, settings=SupervisorConfig(), launcher=launcher)
    task = asyncio.create_task(supervisor.run())
    await until_async(lambda: len(places.asked) == 2)
    supervisor.interrupt()
    assert await asyncio.wait_for(task, 20) is Outcome.INTERRUPTED
    launcher.close()
    assert sorted(places.given_back) == sorted(places.asked) == ["r/actor-0", "r/learner"]


async def test_a_role_that_crashes_keeps_its_place_which_others_would_take(run: RunDir) -> None:
    places = MadeUpPlaces("a")
    fails = script("actor-0", "raise SystemExit(3)")
    with pytest.raises(RoleCrashed):
        await supervisor_of(run, places, fails, said=[], max_restarts=2).run()
    assert len(places.orders) == 3
    assert places.asked == ["r/actor-0"]
    assert not places.given_back


async def test_a_learner_goes_to_the_node_of_its_checkpoints_unless_those_are_at_a_url(run: RunDir) -> None:
    asked: list[list[str]] = []

    class Asked(MadeUpPlaces):
        def ask(self, name: str, needs: Sequence[Need]) -> str:
            asked.append([str(need) for need in needs])
            return super().ask(name, needs)

    url = run.config.learner.model_copy(update={"checkpoint_url": "file:///checkpoints"})
    at_url = run.config.model_copy(update={"learner": url})
    for config, saved in ((run.config, False), (run.config, True), (at_url, True)):
        if saved:
            (run.checkpoints / "step-000003-v000003").mkdir(exist_ok=True)
        run.config = config
        await supervisor_of(run, Asked("a"), script("learner", DONE, ends_run=True), said=[]).run()
    assert asked == [["1 CPU"], ["1 CPU, node 127.0.0.1"], ["1 CPU"]]


async def test_a_node_that_is_lost_is_no_crash_of_the_role_which_starts_again_when_there_is_one(run: RunDir) -> None:
    said: list[str] = []
    places = MadeUpPlaces("a")
    supervisor = supervisor_of(run, places, script("actor-0", WAITS), said=said, max_restarts=0)
    task = asyncio.create_task(supervisor.run())
    for attempt, coming in ((0, "b"), (1, "c")):
        log = run.log_path("actor-0", attempt)
        await until_async(functools.partial(holds, log, b"ready"))
        del places.living[places.hosts["actor-0"]._node_id]
        places.dead.add("actor-0")
        places.add(coming)
    await until_async(lambda: run.log_path("actor-0", 2).exists())
    supervisor.interrupt()
    await task
    assert [line.partition(";")[0] for line in said if "ended" in line] == [
        "actor-0 ended: node a (127.0.0.1) is gone",
        "actor-0 ended: node b (127.0.0.1) is gone",
    ]


async def test_a_host_that_is_lost_on_a_living_node_counts_as_a_crash(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atpo_async.ops.launchers.ray.launcher.GONE_S", 0.0)
    places = MadeUpPlaces("a")
    supervisor = supervisor_of(run, places, script("actor-0", WAITS), said=[], max_restarts=0)
    task = asyncio.create_task(supervisor.run())
    log = run.log_path("actor-0", 0)
    await until_async(lambda: log.exists() and b"ready" in log.read_bytes())
    places.dead.add("actor-0")
    with pytest.raises(RoleCrashed, match=r"its host process on node a \(127.0.0.1\) is gone: the worker died"):
        await task


async def test_a_node_with_another_python_stops_the_run_with_both_versions(run: RunDir) -> None:
    places = MadeUpPlaces("a")
    places.greeting = {"python": "3.9"}
    supervisor = supervisor_of(run, places, script("actor-0", WAITS), said=[])
    with pytest.raises(SetupError, match=r"actor-0 cannot run on node .*Python is 3.9 there and"):
        await supervisor.run()


async def test_secrets_lie_in_the_hosts_private_folder_only_and_go_with_it(run: RunDir) -> None:
    shows = """
        import os, sys, time
        print("keys in", sys.argv[1], "at", sys.argv[2], flush=True)
        time.sleep(1000)
    """
    places = MadeUpPlaces("a", "b")
    said: list[str] = []
    specs = [
        script(name, shows, words=["{keys}", "{join}"], ends_run=name == "learner") for name in ("learner", "actor-0")
    ]
    supervisor = supervisor_of(run, places, *specs, said=said)
    task = asyncio.create_task(supervisor.run())
    logs = [run.log_path(name, 0) for name in ("learner", "actor-0")]
    await until_async(lambda: all(log.exists() and b"keys in" in log.read_bytes() for log in logs))
    learner, actor = (Path(log.read_text().split()[2]) for log in logs)
    await until_async(lambda: (learner / "actor-0.key").exists())  # the learner lets the actor in
    secrets: dict[Path, str] = {}
    for folder, names in ((learner, {"client", "server"}), (actor, {"client"})):
        found = list(folder.glob("*.key_secret"))
        assert {file.stem for file in found} == names
        assert {stat.S_IMODE(file.stat().st_mode) for file in found} == {0o600}
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        secrets |= {file: file.read_text().split("secret-key")[1].strip(' ="\n') for file in found}
    folder = run.scratch / "keys"
    assert (folder / "learners" / "learner.key").exists()
    assert (folder / "actor-0.key").exists()
    assert logs[0].read_text().split()[-1] == "127.0.0.1:2"  # the socket for learners, and for actors
    assert logs[1].read_text().split()[-1] == "127.0.0.1:1"
    told = [*map(repr, places.orders), *said, *(log.read_text() for log in logs)]
    assert not [line for line in told for secret in secrets.values() if secret in line]
    supervisor.interrupt()
    await task
    assert not learner.parent.exists()
    assert not actor.parent.exists()
    assert not (folder / "actor-0.key").exists()


def test_a_secret_is_not_shown_with_what_carries_it() -> None:
    assert "hush" not in repr(Start(join="", host="", server_key="", server_secret="hush"))


async def test_of_the_environment_only_what_the_supervisor_sets_travels(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "of this machine")
    places = MadeUpPlaces("a")
    supervisor = supervisor_of(run, places, script("learner", DONE, ends_run=True), said=[])
    await supervisor.run()
    (order,) = places.orders
    assert "MY_TOKEN" not in order.env
    assert order.env[processes.ROLE_MARK] == f"{run.run_id}/learner/0"
    assert order.hides_gpus


async def test_a_policy_that_the_node_lacks_is_sent_and_the_role_gets_its_folder(run: RunDir, tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    (policy / "more").mkdir(parents=True)
    files = {"config.json": b"{}", "model.safetensors": os.urandom(100_000), "more/empty.txt": b""}
    for name, data in files.items():
        (policy / name).write_bytes(data)
    run.config = with_model(run.config, policy)
    lists = """
        import pathlib, sys
        folder = pathlib.Path(sys.argv[1])
        print(folder, *sorted(f"{f.relative_to(folder)}={f.stat().st_size}" for f in folder.rglob("*") if f.is_file()))
    """
    spec = script("learner", lists, ends_run=True, words=["{policy}"])
    for lacks in (True, False):
        places = MadeUpPlaces("a")
        places.greeting = {"lacks_policy": lacks}
        await supervisor_of(run, places, spec, said=[]).run()
        folder, *found = run.log_path("learner", 0 if lacks else 1).read_text().split()
        assert found == ["config.json=2", "model.safetensors=100000", "more/empty.txt=0"]
        assert (folder == str(policy)) is not lacks


async def test_the_port_at_which_ranks_meet_is_held_until_they_listen_there(run: RunDir) -> None:
    listens = """
        import socket, sys
        where = ("127.0.0.1", int(sys.argv[1]))
        try:
            socket.socket().bind(where)
        except OSError as exc:
            print("others:", exc.strerror)
        with socket.create_server(where) as server:  # it sets SO_REUSEADDR, as torch's store does
            print("port:", server.getsockname()[1] == where[1])
    """
    places = MadeUpPlaces("a")
    await supervisor_of(run, places, script("learner", listens, ends_run=True, words=["{port}"]), said=[]).run()
    assert run.log_path("learner", 0).read_text().splitlines() == ["others: Address already in use", "port: True"]
    await supervisor_of(run, places, script("learner", DONE, ends_run=True), said=[]).run()
    assert (await places.hosts["learner"].greet()).meeting_port == 0  # on one node: torch's launcher binds one


async def test_everything_that_a_role_has_started_ends_with_it(run: RunDir) -> None:
    child = """
        import subprocess, sys, time
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
        print("child", process.pid, flush=True)
        time.sleep(1000)
    """
    supervisor = supervisor_of(run, MadeUpPlaces("a"), script("learner", child, ends_run=True), said=[])
    task = asyncio.create_task(supervisor.run())
    log = run.log_path("learner", 0)
    await until_async(lambda: log.exists() and b"child" in log.read_bytes())
    pid = int(log.read_text().split()[1])
    assert processes.started(pid) is not None
    supervisor.interrupt()
    supervisor.interrupt()
    await task
    await until_async(lambda: processes.started(pid) is None)


async def test_a_role_is_asked_to_end_and_may_save(run: RunDir) -> None:
    saves = """
        import signal, sys
        def save(*_):
            print("saved", flush=True); sys.exit(0)
        signal.signal(signal.SIGTERM, save)
        print("ready", flush=True)
        while True: signal.pause()
    """
    supervisor = supervisor_of(
        run, MadeUpPlaces("a"), script("learner", saves, ends_run=True), said=[], stop_grace_s=30.0
    )
    task = asyncio.create_task(supervisor.run())
    log = run.log_path("learner", 0)
    await until_async(lambda: log.exists() and b"ready" in log.read_bytes())
    supervisor.interrupt()
    await task
    assert log.read_text().splitlines()[-1] == "saved"


def test_only_files_of_the_kinds_that_a_role_writes_are_taken_in(tmp_path: Path) -> None:
    for name in ("status", "logs"):
        (tmp_path / name).mkdir()
    intake = Intake(
        tmp_path / "logs" / "a.0.log",
        status=tmp_path / "status",
        notices=tmp_path / "notices",
        error_file=tmp_path / "a.0.error",
    )
    bad = {"../run.json": b"{}", ".hidden.json": b"{}", "a.txt": b"", "/etc/x.json": b"", "x" * 200 + ".json": b""}
    intake.take(News(log=b"one\n", statuses={"a.json": b"{}", **bad}, notices=(b'["", "hello"]\n',)))
    intake.take(News(log=b"two\n"))
    doing = {".doing": b"step", ".1.doing": b"other", ".../../x.doing": b"no"}
    intake.end(End(code=1, error=json.dumps({"code": 1, "error": "x"}).encode(), doing=doing))
    assert intake.taken == 8
    assert (tmp_path / "logs" / "a.0.log").read_bytes() == b"one\ntwo\n"
    there = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file())
    assert there == ["a.0.1.doing", "a.0.doing", "a.0.error", "logs/a.0.log", "notices", "status/a.json"]
    intake.forget()
    assert not list((tmp_path / "status").iterdir())


def test_keys_of_the_users_folder_stay_and_those_of_hosts_go(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    for name in ("server", "client", "gpu-7"):
        key_files.make_keys(folder, name)
    (folder / "gpu-7.key_secret").unlink()
    theirs = tmp_path / "theirs"
    public = key_files.make_keys(theirs, "client")[0].read_text()
    keys = RunKeys(folder, made=False)
    keys.let_in("actor-0", public)
    keys.let_in("learner", public, learner=True)
    assert set(keys.admitted().values()) >= {key_files.load_public(theirs / "client.key").decode()}
    again = RunKeys(folder, made=False)  # the supervisor was lost, and starts again
    assert not (folder / "actor-0.key").exists()
    again.let_in("actor-0", public)
    with pytest.raises(SetupError, match=r"gpu-7\.key is another host's key"):
        again.let_in("gpu-7", public)
    again.remove()
    assert sorted(file.name for file in folder.rglob("*.key")) == ["client.key", "gpu-7.key", "server.key"]
