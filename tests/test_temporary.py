"""Folders for temporary files: short enough for sockets, and one line where none can be written."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from actors.weights import copies
from atpo_async.config import build
from atpo_async.core.errors import SetupError
from atpo_async.run.rundir import RunDir
from atpo_async.run.temporary import MAX_FOLDER, MAX_SOCKET_PATH, make_temporary_folder_fit

DEADLINE_S = 60.0


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TMPDIR", os.environ.get("TMPDIR", tempfile.gettempdir()))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield
    # A link of the tests' own folder leads nowhere once that is gone.
    for link in Path("/tmp").glob(f"atpo-{os.getuid()}-*"):
        if link.is_symlink() and not link.exists():
            link.unlink()


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def long(short: Path) -> Path:
    folder = short / ("a" * 50) / ("b" * 50)
    folder.mkdir(parents=True)
    assert len(str(folder)) > 107
    return folder


def test_under_a_tmpdir_of_110_characters_sockets_work_and_its_files_stay_in_it(
    long: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(long))
    make_temporary_folder_fit(places=[str(short)])
    found = tempfile.gettempdir()
    assert found == os.environ["TMPDIR"]
    assert len(found) <= MAX_FOLDER
    assert Path(found).resolve() == long.resolve()
    path = f"{found}/{uuid.uuid4()}"  # as vLLM names its sockets
    assert len(path) <= MAX_SOCKET_PATH
    context = zmq.Context()
    try:
        context.socket(zmq.PULL).bind(f"ipc://{path}")
        assert (long / Path(path).name).exists()
    finally:
        context.destroy(linger=0)
    assert len(f"{found}/pymp-12345678/listener-12345678") <= MAX_SOCKET_PATH  # as multiprocessing does


def test_all_processes_with_one_tmpdir_use_one_link(long: Path, short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        monkeypatch.setenv("TMPDIR", str(long))
        monkeypatch.setattr(tempfile, "tempdir", None)
        make_temporary_folder_fit(places=[str(short)])
    assert len([entry for entry in short.iterdir() if entry.is_symlink()]) == 1


def test_a_link_that_leads_elsewhere_is_not_followed(
    long: Path, short: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(long))
    make_temporary_folder_fit(places=[str(short)])
    (link,) = [entry for entry in short.iterdir() if entry.is_symlink()]
    link.unlink()
    link.symlink_to(tmp_path)
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(SetupError, match=r"has a name of 1\d\d bytes.*set TMPDIR to a folder with a name of up to"):
        make_temporary_folder_fit(places=[str(short)])


def test_a_tmpdir_that_cannot_be_written_is_named_and_another_one_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    said: list[str] = []
    make_temporary_folder_fit(said.append)
    (line,) = said
    assert line.startswith(f"TMPDIR = '{tmp_path}/nowhere' cannot be written; temporary files go to ")
    assert os.environ["TMPDIR"] == tempfile.gettempdir() != str(tmp_path / "nowhere")
    make_temporary_folder_fit(said.append)
    assert len(said) == 1  # who is started from here need not say it again


def test_where_no_folder_can_be_written_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(SetupError, match=r"no folder for temporary files: .*No usable.*set TMPDIR"):
        make_temporary_folder_fit()


def test_a_role_uses_the_short_name_and_hands_it_on(long: Path) -> None:
    code = """
import os, sys, tempfile
from atpo_async.ops import role

async def main(context):
    print("uses", tempfile.gettempdir() == os.environ["TMPDIR"], len(tempfile.gettempdir()) < 48, flush=True)

role.run("buffer", main, [sys.argv[1]])
"""
    rundir = RunDir.create(build({"run": {"dir": str(long), "name": "r"}}))
    env = {**os.environ, "TMPDIR": str(long)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(rundir.path)],
        env=env, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "uses True True\n"), done.stderr


def test_a_scratch_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    rundir = RunDir.create(build({"run": {"dir": str(tmp_path), "name": "r"}}))
    (rundir.path / "scratch").write_text("in the way")
    with pytest.raises(SetupError, match=r"r/scratch cannot be made: File exists"):
        _ = rundir.scratch


def test_fetched_weights_go_where_they_can_and_it_is_one_line_where_they_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "SHARED_MEMORY", tmp_path / "none")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    scratch = copies.scratch_for("run", None)
    assert scratch.path.parent == tmp_path
    scratch.remove()

    def refuse(parent: Path, prefix: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(copies, "Scratch", refuse)
    with pytest.raises(SetupError, match=r"no folder for the weights that are fetched .*: Permission denied"):
        copies.scratch_for("run", None)
