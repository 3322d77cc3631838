"""Snapshots of roles: who makes them, who reads them, and what ``atpo status`` and SIGUSR1 say."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from atpo_async.cli import main
from atpo_async.config import build
from atpo_async.run import processes
from atpo_async.run.rundir import RunDir
from atpo_async.status import snapshot, waits
from atpo_async.status.facts import LINKS, publish_facts, published_facts, withdraw_facts
from atpo_async.status.reporter import Reporter, grouped
from atpo_async.status.snapshot import file_stem
from atpo_async.status.waits import waiting
from tests.hang_support import ROOT, SERVES, make_run, started, status, status_of, until, until_async, wait

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
LOG = logging.getLogger("test-status")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path)


# --- the snapshot ------------------------------------------------------------------------------------------------


def test_waits_for_the_same_thing_are_one_line_with_their_number_and_the_longest() -> None:
    alike = [
        {"who": f"tree {n}", "what": "an action", "on": "engine", "since_s": float(n), "limit_s": 120.0}
        for n in range(5)
    ]
    other = {"who": "actor", "what": "a lease", "on": "buffer", "since_s": 2.0, "limit_s": None}
    found = grouped([*alike, other])
    assert [(w.who, w.what, w.since_s, w.count) for w in found] == [
        ("tree 4", "an action", 4.0, 5),
        ("actor", "a lease", 2.0, 1),
    ]


async def test_a_role_writes_its_waits_its_progress_and_what_its_parts_publish(run: RunDir) -> None:
    publish_facts("mine", lambda: {"step": 3})
    publish_facts(f"{LINKS}here -> there", lambda: {"unacked": 7})
    try:
        with (
            waiting("the test", "a snapshot", on="nobody"),
            Reporter("r1", folder=run.path, log=LOG, every_s=0.02) as r,
        ):
            r.attach()
            waits.progress("snapshots")
            await until_async(lambda: (p := made(run)) is not None and p.loop_age_s is not None and p.facts)
            found = made(run)
    finally:
        withdraw_facts("mine")
        withdraw_facts(f"{LINKS}here -> there")
    assert found is not None
    assert "a snapshot" in {w.what for w in found.waits}
    assert found.progress["snapshots"] >= 1
    assert found.facts["mine"] == {"step": 3}
    assert found.links == {"here -> there": {"unacked": 7}}
    assert found.pid == os.getpid()


def made(run: RunDir) -> snapshot.StatusSnapshot | None:
    return snapshot.read(run.path)[0].get("r1")


async def test_the_last_snapshot_says_that_the_role_has_ended(run: RunDir) -> None:
    with Reporter("r1", folder=run.path, log=LOG, every_s=0.02) as reporter:
        reporter.attach()
    found = made(run)
    assert found is not None
    assert found.phase == snapshot.ENDED
    assert not [p for p in run.path.iterdir() if p.name.startswith(".r1")], "a part of a snapshot was left"


async def test_a_part_that_cannot_say_what_it_is_at_does_not_take_the_snapshot_away() -> None:
    def broken() -> dict[str, object]:
        raise RuntimeError("half closed")

    publish_facts("broken", broken)
    try:
        assert published_facts()["broken"] == {"error": "RuntimeError: half closed"}
    finally:
        withdraw_facts("broken")


def test_what_is_published_by_an_object_goes_with_it() -> None:
    class Part:
        def facts(self) -> dict[str, object]:
            return {"here": True}

    part = Part()
    publish_facts("part", part.facts)
    assert published_facts()["part"] == {"here": True}
    del part
    assert "part" not in published_facts()


async def test_facts_are_asked_in_the_loop_and_never_in_the_status_thread(run: RunDir) -> None:
    asked: set[int] = set()

    def facts() -> dict[str, object]:
        asked.add(threading.get_ident())
        return {"times": len(asked)}

    publish_facts("asked", facts)
    try:
        with Reporter("r1", folder=run.path, log=LOG, every_s=0.01) as reporter:
            reporter.attach()
            await until_async(lambda: (p := made(run)) is not None and p.sequence > 5 and asked)
    finally:
        withdraw_facts("asked")
    assert asked == {threading.get_ident()}


async def test_a_folder_that_cannot_be_written_is_said_once_and_the_role_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with Reporter("r1", folder=tmp_path / "file" / "status", log=LOG, every_s=0.01) as reporter:
        reporter.attach()
        await until_async(lambda: reporter.status().sequence > 10)
    assert len([r for r in caplog.records if "cannot be written" in r.message]) == 1


def test_a_name_that_is_no_file_name_gets_a_file_all_the_same() -> None:
    assert file_stem("actor/../../x") == "actor_.._.._x"


# --- SIGUSR1 ----------------------------------------------------------------------------------------------------

BUSY = """
    waits.phase("working")
    await asyncio.sleep(0)
    while True:
        pass
"""
ASLEEP = """
    waits.phase("working")
    await asyncio.sleep(0)
    time.sleep(1000)
"""
IDLE = """
    waits.phase("working")
    with waits.waiting("the role", "a message", on="buffer"):
        await context.stopping.wait()
"""


@pytest.mark.slow
@linux
@pytest.mark.parametrize("body", [IDLE, BUSY, ASLEEP], ids=["waits", "computes", "sleeps"])
def test_sigusr1_puts_the_status_into_the_log_whatever_the_loop_is_in(run: RunDir, body: str) -> None:
    with started(run, "learner", body) as (process, said):
        until(lambda: (p := status_of(run, "learner")) is not None and p.phase == "working", said)
        if body is not IDLE:
            until(lambda: (p := status_of(run, "learner")) is not None and p.held_up, said)
            found = status_of(run, "learner")
            assert found is not None
            assert found.stack
        process.send_signal(signal.SIGUSR1)
        until(lambda: f"learner (process {process.pid}): working" in said(), said)
        until(lambda: "thread MainThread:" in said(), said)
        assert ("the role for a message from buffer" in said()) == (body is IDLE)
        assert ("the loop stands still in:" in said()) == (body is not IDLE)
        assert process.poll() is None
        if body is IDLE:
            process.send_signal(signal.SIGTERM)
            process.wait()
            until(lambda: (p := status_of(run, "learner")) is not None and p.phase == snapshot.ENDED, said)


@linux
def test_programs_that_a_role_starts_inherit_nothing_of_sigusr1(run: RunDir) -> None:
    body = """
        import subprocess
        print(subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True).stdout, flush=True)
        await context.stopping.wait()
    """
    with started(run, "actor-0", body) as (_, said):
        until(lambda: "SigIgn" in said() and "SigCgt" in said(), said)
        masks = {
            name: int(value, 16)
            for name, _, value in (line.partition(":") for line in said().splitlines())
            if name in ("SigBlk", "SigIgn", "SigCgt")
        }
    assert all(not mask & 1 << signal.SIGUSR1 - 1 for mask in masks.values()), masks


# --- atpo status ------------------------------------------------------------------------------------------------


def told(capsys: pytest.CaptureFixture[str], run: RunDir, *words: str) -> str:
    assert main.main(["status", str(run.path), *words]) == 0
    # A narrow screen breaks lines in the middle of what is looked for.
    return " ".join(capsys.readouterr().out.split())


def put(run: RunDir, *statuses: snapshot.StatusSnapshot) -> None:
    folder = run.path / snapshot.FOLDER
    folder.mkdir(exist_ok=True)
    for made_up in statuses:
        (folder / f"{made_up.role}.json").write_bytes(msgspec.json.encode(made_up))


@linux
def test_status_of_a_running_run_names_its_roles_and_who_waits_for_whom(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    learner = IDLE.replace("a message", "batch 3")
    with started(run, "buffer", SERVES) as (buffer, _), started(run, "learner", learner) as (_, said):
        until(lambda: (p := status_of(run, "learner")) is not None and p.waits, said)
        until(lambda: (p := status_of(run, "buffer")) is not None and p.phase == "serving", said)
        text = told(capsys, run)
        assert "roles run without a supervisor" in text
        assert f"buffer runs {buffer.pid}" in text
        assert "→ learner waits" in text
        assert "for batch 3 from buffer, which is serving, and waits for no other role" in text
        found = json.loads("".join(told(capsys, run, "--json")))
        assert found["running"]
        assert found["roles"]["learner"]["waits"][0]["what"] == "batch 3"
        assert found["roles"]["buffer"]["state"] == "runs"
        os.kill(buffer.pid, signal.SIGSTOP)
        until(lambda: processes.stopped([buffer.pid]))
        text = told(capsys, run)
        assert f"from buffer, which is stopped by a signal (kill -CONT {buffer.pid} lets it go on)" in text


@contextlib.contextmanager
def held(run: RunDir) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the run, as a supervisor does."""
    code = f"""
import time
from atpo_async.run.rundir import RunDir
with RunDir.open({str(run.path)!r}).locked():
    print("held", flush=True)
    time.sleep(1000)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@linux
def test_a_stopped_supervisor_is_shown_as_stopped_with_the_way_out(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    put(run, status("buffer"))
    with held(run) as supervisor:
        assert f"running, supervised by process {supervisor.pid}" in told(capsys, run)
        assert json.loads(told(capsys, run, "--json"))["supervisor_state"] == "runs"
        supervisor.send_signal(signal.SIGSTOP)
        until(lambda: processes.stopped([supervisor.pid]))
        way_out = f"is stopped by a signal (kill -CONT {supervisor.pid} lets it go on)"
        text = told(capsys, run)
        assert f"its supervisor, process {supervisor.pid}, {way_out}; its roles go on" in text
        assert "running, supervised" not in text
        assert f"→ supervisor {way_out}" in text
        found = json.loads(told(capsys, run, "--json"))
        assert (found["supervisor"], found["supervisor_state"]) == (supervisor.pid, "stopped")
        assert found["waits"] == [f"supervisor {way_out}"]
        supervisor.send_signal(signal.SIGCONT)
        until(lambda: not processes.stopped([supervisor.pid]))
        assert f"running, supervised by process {supervisor.pid}" in told(capsys, run)
    assert json.loads(told(capsys, run, "--json"))["supervisor_state"] is None


def test_status_of_a_run_names_the_role_whose_loop_stands_still_and_where(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    held_up = {"loop_age_s": 4.2, "still_s": 4.2, "stack": ("loop.py:7 spin: x()",)}
    put(run, status("buffer", **held_up), status("learner", waits=(wait("batch 3", "buffer", 4.0),)))
    text = told(capsys, run)
    assert "→ learner waits 4.0 s for batch 3 from buffer, which stands still: its loop last ran 4.2 s ago" in text
    assert "buffer stands still in: loop.py:7 spin: x()" in text


def test_work_of_a_second_is_not_called_a_hang(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    put(run, status("learner", waits=(wait("learn", "torch", 1.0),)))
    text = told(capsys, run)
    assert "learn from torch 1.0 s" in text
    assert "has been at" not in text


def test_an_engine_that_loads_is_not_called_a_hang(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    loading = {"phase": "loading its engine", "phase_s": 20.0, "starting": True, "still_s": 20.0}
    put(run, status("actor-0", waits=(wait("the engine's start", "engine", 20.0),), **loading))
    text = told(capsys, run)
    assert "loading its engine for 20 s" in text
    assert "the engine's start from engine 20 s" in text
    assert "has been at" not in text


def test_the_times_of_a_role_that_writes_no_status_any_more_go_on(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = {"monotonic_s": time.monotonic() - 100.0, "phase_s": 20.0, "loop_age_s": 0.5}
    put(run, status("learner", waits=(wait("batch 3", "buffer", 4.0),), **silent))
    found = json.loads(told(capsys, run, "--json"))["roles"]["learner"]
    assert found["state"] == "silent"
    assert found["loop_age_s"] >= 100.5
    assert found["phase_s"] >= 120.0
    assert found["waits"][0]["since_s"] >= 104.0


@linux
def test_status_of_a_run_that_was_stopped_says_so(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with started(run, "buffer", SERVES) as (process, said):
        until(lambda: (p := status_of(run, "buffer")) is not None and p.phase == "serving", said)
        process.send_signal(signal.SIGTERM)
        process.wait()
    text = told(capsys, run)
    assert "not running; the last sign of a role is" in text
    assert "buffer ended, last seen" in text
    assert "it has no checkpoint" in text
    assert "killed or crashed" not in text
    assert "→" not in text


@linux
def test_status_of_a_run_whose_roles_were_killed_says_that_they_have_gone(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    with started(run, "buffer", SERVES) as (_, said):
        until(lambda: (p := status_of(run, "buffer")) is not None and p.phase == "serving", said)
    text = told(capsys, run)
    assert "not running" in text
    assert f"killed or crashed: buffer (logs: {run.path / 'logs'})" in text
    assert "buffer gone, last seen" in text


def test_status_of_a_run_that_has_done_its_steps_says_so(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    (run.checkpoints / "step-000040-v000040").mkdir(parents=True)
    put(run, status("learner", phase=snapshot.ENDED))
    assert "its last checkpoint is of step 40 of 100" in told(capsys, run)
    (run.checkpoints / "step-000100-v000100").mkdir()
    assert "its 100 steps are done" in told(capsys, run)


@linux
def test_a_process_that_took_over_the_id_of_a_role_is_not_taken_for_it(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    put(run, status("buffer", started=1))
    assert "buffer gone" in told(capsys, run)


def test_status_of_a_run_that_never_ran(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not running; none of its roles was ever started" in told(capsys, run)


def test_a_status_of_another_machine_is_stale_when_it_is_old_and_alive_when_it_is_not(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    put(run, status("actor-1", host="elsewhere", hostname="gpu7"))
    put(run, status("actor-2", host="elsewhere", hostname="gpu8", at=1.0))
    text = told(capsys, run)
    assert "actor-1 runs" in text
    assert "on gpu7" in text
    assert "actor-2 stale" in text


@pytest.mark.parametrize(
    "garbage", [b"", b"{", b"\xff\xfe\x00", b"[]", b'{"role": 3}', b'{"role": "learner"}', b"[" * 100_000]
)
def test_garbage_in_a_status_file_is_named_and_the_others_are_shown(
    run: RunDir, capsys: pytest.CaptureFixture[str], garbage: bytes
) -> None:
    put(run, status("buffer"))
    (run.path / snapshot.FOLDER / "learner.json").write_bytes(garbage)
    text = told(capsys, run)
    assert "status/learner.json is damaged and was left out" in text
    assert "buffer runs" in text
    assert list(json.loads(told(capsys, run, "--json"))["damaged"]) == ["learner.json"]


def test_what_a_link_says_is_shown_and_counts_as_waiting_for_its_peer(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    link = {
        "peer": "buffer",
        "window": 256,
        "unacked": 256,
        "trouble": "",
        "waits": [{"what": "Turn waits for space in a window of 256", "since_s": 41.0}],
    }
    put(run, status("actor-0", links={"actor-0 -> buffer": link}), status("buffer", phase="serving"))
    text = told(capsys, run)
    assert "actor-0 -> buffer: peer buffer, window 256, unacked 256" in text
    assert "trouble" not in text
    assert "→ actor-0 waits 41 s for Turn: space in a window of 256 from buffer" in text


def test_an_actor_that_joined_by_address_is_in_the_table(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    peers = [{"peer": "actor-0", "silent_s": 0.1}, {"peer": "actor-far-7", "silent_s": 0.4}]
    links = {
        "buffer at tcp://127.0.0.1:1": {"peers": peers},
        "buffer at tcp://127.0.0.1:2": {"peers": [{"peer": "learner", "silent_s": 0.2}]},
    }
    put(run, status("buffer", links=links), status("actor-0"))
    text = told(capsys, run)
    assert "actor-far-7 heard 0.4 s ago – joined by address" in text
    assert json.loads(told(capsys, run, "--json"))["joined"] == {"actor-far-7": {"silent_s": 0.4}}


def test_own_roles_with_the_hosts_key_relays_and_followers_are_no_actors_that_joined(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("client/actor-0", "client/actor-vm-7", "relay-1/relay-a", "relay-1/gpu-7/actor-0", "gpu-8/learner")
    links = {
        "buffer at tcp://h:1": {"name": "buffer", "peers": [{"peer": name, "silent_s": 0.1} for name in names]},
        "f at tcp://h:2": {"name": "buffer, followers", "peers": [{"peer": "copy/follower-b", "silent_s": 0.2}]},
    }
    facts = {"buffer": {"relays": {"relay-1/relay-a": "on h, 1 actors: relay-1/gpu-7/actor-0"}}}
    put(run, status("buffer", links=links, facts=facts), status("actor-0"))
    assert list(json.loads(told(capsys, run, "--json"))["joined"]) == ["client/actor-vm-7", "relay-1/gpu-7/actor-0"]


def test_a_role_that_has_gone_is_named_as_what_is_waited_for(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    put(run, status("learner", waits=(wait("batch 3", "buffer", 4.0),)), status("buffer", pid=1, started=7))
    assert "→ learner waits 4.0 s for batch 3 from buffer, which has gone" in told(capsys, run)


def test_a_link_that_says_nonsense_does_not_take_the_screen_away(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    link = {"peer": "buffer", "waits": [7, {"what": 1}, {"since_s": "x", "what": ""}, None]}
    put(run, status("actor-0", links={"l": link, "m": {"peer": 5, "waits": 3}}))
    assert "actor-0 runs" in told(capsys, run)


def test_markup_in_names_is_shown_as_it_is(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    put(run, status("actor-0", phase="[red]x[/y]", facts={"[bold]": {"a": "[/b]"}}))
    assert "[red]x[/y]" in told(capsys, run)


@pytest.mark.parametrize("word", ["nowhere", "file", "folder"])
def test_what_is_no_run_is_one_line_with_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    make_run(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    assert main.main(["status", str(tmp_path / word)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{tmp_path / word} is no run folder" in err
    assert f"runs are {tmp_path / 'r'}" in err


@pytest.mark.parametrize("words", [["status"], ["report"], ["eval"], ["train", "c.toml", "--from"]])
def test_a_run_that_is_not_there_is_answered_with_near_names_then_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text("")
    for age, name in enumerate(["zeta", "echo", "b", "c", "d", "e", "f", "g"]):
        made = RunDir.create(build({"run": {"dir": "runs", "name": name}}))
        os.utime(made.path / "run.json", (10_000 - age, 10_000 - age))
    assert main.main([*words, "echos"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    others = ", ".join(f"runs/{name}" for name in ["zeta", "b", "c", "d", "e"])
    assert f"; did you mean runs/echo?  Other runs are {others} and 2 more (the newest first)" in err
    assert main.main([*words, "runs/nope"]) == 2
    assert "; runs are runs/zeta, runs/echo, runs/b, runs/c, runs/d and 3 more" in capsys.readouterr().err


def test_status_takes_no_options_of_the_configuration(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["status", str(run.path), "--run.steps", "3"]) == 2
    assert "`atpo status` takes no options of the configuration" in capsys.readouterr().err


async def test_status_files_of_the_dead_are_forgotten_and_those_of_others_kept(run: RunDir) -> None:
    put(run, status("actor-0", started=1), status("actor-1"), status("actor-2", host="elsewhere"))
    await asyncio.to_thread(snapshot.forget_the_dead, run.path / snapshot.FOLDER)
    assert set(snapshot.read(run.path / snapshot.FOLDER)[0]) == {"actor-1", "actor-2"}
