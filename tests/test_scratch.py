from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from atpo_async.run.scratch import MARK, Scratch, sweep, sweep_dead

fcntl = pytest.importorskip("fcntl")

OWNER = """
import sys, time
from pathlib import Path
from atpo_async.run.scratch import Scratch
scratch = Scratch(Path(sys.argv[1]), "run.")
(scratch.path / "weights").write_bytes(b"w")
print(scratch.path, flush=True)
time.sleep(1000)
"""


def test_what_a_killed_process_left_is_swept_and_not_before(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        assert sweep(tmp_path, "run.") == []
        assert (folder / "weights").is_file()
    finally:
        owner.kill()
        owner.communicate()
    assert sweep(tmp_path, "run.") == [folder]
    assert not folder.exists()


def test_a_folder_goes_with_its_owner(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, "run.")
    assert scratch.path.is_dir()
    scratch.remove()
    scratch.remove()
    assert list(tmp_path.iterdir()) == []


def test_only_what_has_the_prefix_is_swept(tmp_path: Path) -> None:
    (tmp_path / "run.dead").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run.file").touch()
    assert sweep(tmp_path, "run.") == [tmp_path / "run.dead"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.file"]


def test_nothing_is_swept_where_there_is_nothing(tmp_path: Path) -> None:
    assert sweep(tmp_path / "absent", "run.") == []


@contextmanager
def owner(folder: Path, name: str) -> Iterator[Path]:
    """A process with a folder in ``folder``, which is killed at the end."""
    script = OWNER.replace('"run."', "sys.argv[2]")
    process = subprocess.Popen([sys.executable, "-c", script, str(folder), name], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Path(process.stdout.readline().strip())
    finally:
        process.kill()
        process.communicate()


def test_any_later_run_sweeps_what_killed_runs_left_and_nothing_else(tmp_path: Path) -> None:
    with owner(tmp_path, "atpo-living.") as living:
        with owner(tmp_path, "atpo-dead-1234.") as dead:
            assert sweep_dead(tmp_path) == []
        (tmp_path / "atpo-journal-x").mkdir()  # has no mark: whose it is nobody knows
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / MARK).touch()
        (tmp_path / "atpo-link").symlink_to(living)
        assert sweep_dead(tmp_path, tmp_path / "absent") == [dead]
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
            [living.name, "atpo-journal-x", "atpo-link", "other"]
        )
        assert (living / "weights").is_file()


def test_what_belongs_to_another_user_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with owner(tmp_path, "atpo-dead.") as dead:
        pass
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    assert sweep_dead(tmp_path) == []
    assert sweep(tmp_path, "atpo-") == []
    monkeypatch.setattr(os, "getuid", lambda: user)
    assert sweep_dead(tmp_path) == [dead]


def test_a_folder_that_takes_the_place_of_a_dead_one_while_it_is_swept_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with owner(tmp_path, "atpo-x.") as dead:
        pass
    dead.rename(tmp_path / "atpo-run")
    plain, made = fcntl.flock, list[Scratch]()

    def flock(lock: int, how: int) -> None:
        if not made:
            made.append(Scratch.__new__(Scratch))
            made[0].__init__(tmp_path, "atpo-run", exactly=True)  # type: ignore[misc]
        plain(lock, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert sweep_dead(tmp_path) == []
    assert made[0].exists
    made[0].remove()


def test_a_folder_of_a_given_name_takes_the_place_of_what_lies_there(tmp_path: Path) -> None:
    (tmp_path / "atpo-run").mkdir()
    (tmp_path / "atpo-run" / "old").touch()
    made = Scratch(tmp_path, "atpo-run", exactly=True)
    assert [p.name for p in made.path.iterdir()] == [MARK]
    assert made.exists
    made.path.rename(tmp_path / "elsewhere")
    assert not made.exists
    (tmp_path / "atpo-run").mkdir()
    assert not made.exists
    made.remove()
    assert (tmp_path / "atpo-run").is_dir(), "it is another one"
