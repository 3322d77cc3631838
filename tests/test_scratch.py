from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from atpo_async.scratch import Scratch, sweep

pytest.importorskip("fcntl")

OWNER = """
import sys, time
from pathlib import Path
from atpo_async.scratch import Scratch
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
