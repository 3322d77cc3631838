"""The run folder: complete or not there, opened again with the same configuration, versions never twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from atpo_async.config import Config, build
from atpo_async.core.errors import ConfigError, RunMismatch, SetupError
from atpo_async.run import scratch
from atpo_async.run.endpoints import Endpoints
from atpo_async.run.files import write_atomic
from atpo_async.run.host import host_id
from atpo_async.run.metrics import MetricsWriter
from atpo_async.run.rundir import RunDir


def config_in(folder: Path, **sections: dict[str, object]) -> Config:
    run: dict[str, object] = {"dir": str(folder), "name": "r", **sections.pop("run", {})}
    return build({"run": run, **sections})


def learn(run: RunDir) -> None:
    """Something was trained in it."""
    with MetricsWriter(run.metrics_path, source="learner") as writer:
        writer.write(step=1, version=1, metrics={"train/loss": 1.0})


def test_a_new_run_has_its_parts_and_an_id(tmp_path: Path) -> None:
    run = RunDir.create(config_in(tmp_path))
    assert run.run_id.startswith("r-")
    assert sorted(p.name for p in run.path.iterdir()) == [
        "checkpoints", "config.json", "lock", "logs", "run.json", "versions.json",
    ]  # fmt: skip
    assert RunDir.open(run.path).config == run.config


def test_latest_is_the_run_started_last(tmp_path: Path) -> None:
    RunDir.create(config_in(tmp_path))
    second = RunDir.create(config_in(tmp_path, run={"name": "s"}))
    assert RunDir.open(tmp_path / "latest").run_id == second.run_id
    first = RunDir.create(config_in(tmp_path))
    assert RunDir.open(tmp_path / "latest").run_id == first.run_id


def test_latest_is_a_file_where_the_file_system_has_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    run = RunDir.create(config_in(tmp_path))
    assert (tmp_path / "latest").read_text() == "r\n"
    assert RunDir.open(tmp_path / "latest").path == run.path.resolve()


def test_opening_again_keeps_the_id_and_takes_what_may_change(tmp_path: Path) -> None:
    first = RunDir.create(config_in(tmp_path))
    again = RunDir.create(config_in(tmp_path, run={"steps": 7}, actor={"count": 3}, eval={"num_tasks": 5}))
    assert again.run_id == first.run_id
    assert RunDir.open(first.path).config.run.steps == 7


def test_another_configuration_is_refused_naming_each_field_both_values_and_the_way_out(tmp_path: Path) -> None:
    first = RunDir.create(config_in(tmp_path))
    learn(first)
    with pytest.raises(RunMismatch) as caught:
        RunDir.create(
            config_in(tmp_path, run={"seed": 2}, search={"temperature": 0.5}, learner={"lr": 0.5}, actor={"count": 2})
        )
    said = str(caught.value)
    assert "run.seed was 0, is 2; search.temperature was 1.0, is 0.5." in said
    assert "another --run.name" in said
    assert f"--from {first.path}" in said
    assert "actor.count" not in said
    assert "learner.lr" not in said
    assert RunDir.open(first.path).config == first.config


def test_a_fresh_start_in_a_folder_that_exists_is_refused(tmp_path: Path) -> None:
    RunDir.create(config_in(tmp_path))
    with pytest.raises(RunMismatch, match="exists already"):
        RunDir.create(config_in(tmp_path), resume=False)


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.txt").write_text("mine")
    with pytest.raises(SetupError, match="is no run folder"):
        RunDir.create(config_in(tmp_path))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["r", "thesis.txt"]


def test_nothing_is_left_when_a_folder_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(SetupError, match="No space left on device"):
        RunDir.create(config_in(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_half_made_folder_of_a_killed_process_is_removed_by_the_next_run(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    left = runs / ".x.0123abcd"
    (left / "logs").mkdir(parents=True)
    (left / ".config.json.17.89abcdef").touch()
    being_made = runs / ".y.4567abcd"
    (being_made / "logs").mkdir(parents=True)
    lock = scratch.hold(being_made)
    (runs / ".own.01234567").mkdir()
    (runs / ".own.01234567" / "mine").touch()
    (runs / ".git").mkdir()
    RunDir.create(config_in(runs, run={"name": "z"}))
    assert {p.name for p in runs.iterdir()} == {"z", "latest", ".y.4567abcd", ".own.01234567", ".git"}
    assert lock is not None
    os.close(lock)


def test_opening_a_folder_that_is_no_run_is_a_setup_error(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="is no run folder"):
        RunDir.open(tmp_path)
    run = RunDir.create(config_in(tmp_path))
    for name in ("config.json", "run.json"):
        for text in ("{", "[]", "{}"):
            (run.path / name).write_text(text)
            with pytest.raises(ConfigError, match=rf"{name} is damaged: .*; put it back from a copy; without it"):
                RunDir.open(run.path)
            with pytest.raises(ConfigError, match=rf"{name} is damaged: .*; put it back from a copy, or use another"):
                RunDir.open(run.path, to_begin=True)


def test_versions_count_from_zero_and_go_on_in_another_process(tmp_path: Path) -> None:
    run = RunDir.create(config_in(tmp_path))
    assert [run.next_version() for _ in range(3)] == [0, 1, 2]
    code = f"from atpo_async.run.rundir import RunDir; print(RunDir.open({str(run.path)!r}).next_version())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "3"
    assert RunDir.open(run.path).next_version() == 4


@pytest.mark.parametrize(("counted", "twice"), [(2, 5), (6, 1), (7, 0), (9, 0)])
def test_no_version_of_a_checkpoint_is_given_again_though_the_count_was_set_back(
    tmp_path: Path, counted: int, twice: int
) -> None:
    run = RunDir.create(config_in(tmp_path))
    (run.path / "version").write_text(f"{counted}\n")
    assert run.skip_versions(6) == twice
    assert run.next_version() == max(counted, 7)


def test_a_version_is_on_disk_before_it_is_handed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir.create(config_in(tmp_path))

    def crash(path: Path, data: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("atpo_async.run.rundir.write_atomic", crash)
        with pytest.raises(OSError, match="full"):
            run.next_version()
    assert run.next_version() == 0


def test_an_atomic_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write_atomic(path, "old")

    def fail(fd: int) -> None:
        raise OSError("no")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="no"):
            write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_endpoints_are_read_as_written_and_reading_none_is_a_setup_error(tmp_path: Path) -> None:
    run = RunDir.create(config_in(tmp_path))
    with pytest.raises(SetupError, match="start the buffer first"):
        run.read_endpoints()
    run.write_endpoints(Endpoints("tcp://a:1", "tcp://a:2", "tcp://a:3", "tcp://a:4"))
    assert run.read_endpoints().weights == "tcp://a:3"


def test_attempts_go_on_counting(tmp_path: Path) -> None:
    run = RunDir.create(config_in(tmp_path))
    assert run.next_attempt("actor-1") == 0
    run.log_path("actor-1", 9).touch()
    run.log_path("actor-10", 12).touch()
    assert run.next_attempt("actor-1") == 10


def test_a_second_supervisor_is_refused_while_the_first_holds_the_run(tmp_path: Path) -> None:
    run = RunDir.create(config_in(tmp_path))
    with run.locked(), pytest.raises(SetupError, match=f"in use by process {os.getpid()}"), run.locked():
        pass
    with run.locked():
        pass


def test_a_run_in_use_is_not_changed_by_whoever_is_refused(tmp_path: Path) -> None:
    run = RunDir.create(config_in(tmp_path))
    later = RunDir.create(config_in(tmp_path, run={"name": "later"}))
    with RunDir.held(config_in(tmp_path)):
        RunDir.create(config_in(tmp_path, run={"name": "later"}))
        (run.path / "versions.json").write_text("{}")
        before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
        with pytest.raises(SetupError, match=f"in use by process {os.getpid()}"):
            RunDir.create(config_in(tmp_path, run={"steps": 7}, eval={"num_tasks": 5}))
        assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before
        assert RunDir.open(tmp_path / "latest").run_id == later.run_id


def test_a_folder_in_which_nothing_was_trained_takes_a_new_configuration(tmp_path: Path) -> None:
    run = RunDir.create(config_in(tmp_path, environment={"name": "my.env:mke"}))
    run.next_version()  # the first weights were published before the actors failed
    with MetricsWriter(run.metrics_path, source="learner") as writer:
        writer.write(step=0, version=0, metrics={"weights/publish_s": 1.0})
        writer.write(step=1, version=1, metrics={"batch/trees": 0})
    run.log_path("actor-0", 0).write_text("no module my.env")
    for folder in (run.journal, run.path / "status"):
        folder.mkdir()
        (folder / "data").write_text("of the old tasks")
    again = RunDir.create(config_in(tmp_path, environment={"name": "my.env:make"}))
    assert RunDir.open(run.path).config.environment.name == "my.env:make"
    # Another run by its name on the wire and in shared memory: nobody of the old one can take part in it.
    assert again.run_id == RunDir.open(run.path).run_id != run.run_id
    assert again.next_version() == 0
    assert sorted(p.name for p in run.path.iterdir()) == [
        "checkpoints", "config.json", "lock", "logs", "metrics.0.jsonl", "run.json", "version", "versions.json",
    ]  # fmt: skip
    assert run.log_path("actor-0", 0).read_text() == "no module my.env"


def test_a_run_goes_on_with_settings_that_may_change(tmp_path: Path) -> None:
    run = RunDir.create(config_in(tmp_path))
    run.journal.mkdir()
    again = RunDir.create(config_in(tmp_path, learner={"lr": 0.5}))
    assert again.run_id == run.run_id
    assert run.journal.is_dir()


def test_a_run_in_which_something_was_trained_takes_no_new_configuration(tmp_path: Path) -> None:
    run = RunDir.create(config_in(tmp_path, environment={"name": "my.env:mke"}))
    learn(run)
    with pytest.raises(RunMismatch, match=r"environment.name was 'my.env:mke', is 'my.env:make'"):
        RunDir.create(config_in(tmp_path, environment={"name": "my.env:make"}))


def test_a_run_may_not_be_called_latest(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="latest"):
        RunDir.create(config_in(tmp_path, run={"name": "latest"}))


def test_two_processes_of_one_machine_agree_on_its_identity() -> None:
    code = "from atpo_async.run.host import host_id; print(host_id())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == host_id()
