"""Locked files: who is kept out, what it is told, and when the lock is given back."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from atpo_async.core.errors import SetupError
from atpo_async.run import locks

OURS = "from pathlib import Path; from atpo_async.run import locks; lock = locks.take(Path(PATH), 'them'); assert lock"
PLAIN = "import fcntl, os; fd = os.open(PATH, os.O_RDWR | os.O_CREAT); os.write(fd, b'them'); fcntl.flock(fd, 2)"
"""As programs lock that do not know filelock."""


@contextmanager
def locked_elsewhere(path: Path, code: str) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the file; it is killed at the end."""
    words = f"import sys, time; PATH = sys.argv[1]; {code}; print('locked', flush=True); time.sleep(1000)"
    process = subprocess.Popen([sys.executable, "-c", words, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def free_for_others(path: Path) -> bool:
    with path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.parametrize("code", [OURS, PLAIN], ids=["ours", "plain flock"])
def test_a_file_that_another_process_holds_is_refused_with_its_words_until_that_is_killed(
    tmp_path: Path, code: str
) -> None:
    path = tmp_path / "lock"
    with locked_elsewhere(path, code):
        with pytest.raises(SetupError, match=r"^in use by them$"), locks.held(path, in_use="in use by {}".format):
            pytest.fail("entered")
        assert locks.take(path, "us") is None
        assert locks.words_in(path) == "them"
    with locks.held(path, in_use="in use by {}".format):
        assert locks.words_in(path) == str(os.getpid())


def test_a_held_file_keeps_out_this_process_too_and_whoever_locks_without_filelock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locks.held(path, in_use="in use by {}".format):
        assert locks.take(path, "again") is None
        assert not free_for_others(path)
    assert free_for_others(path)


def test_a_program_that_the_holder_started_does_not_keep_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    child = "import subprocess; child = subprocess.Popen(['sleep', '1000'], stdout=2); print(child.pid, flush=True)"
    words = f"import sys; PATH = sys.argv[1]; {OURS}; {child}"
    pid = int(subprocess.run([sys.executable, "-c", words, str(path)], stdout=subprocess.PIPE, text=True).stdout)
    try:
        assert free_for_others(path)
    finally:
        os.kill(pid, 9)


def test_a_file_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.mkdir()
    with pytest.raises(SetupError, match=f"^{path} cannot be locked: Is a directory"), locks.held(path, in_use=str):
        pytest.fail("entered")


def test_of_two_that_want_to_be_alone_the_second_waits_for_the_first(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked_elsewhere(path, OURS) as first:
        code = (
            "import sys; from pathlib import Path; from atpo_async.run import locks\n"
            "with locks.alone(Path(sys.argv[1])): print(Path(sys.argv[2]).exists())"
        )
        words = [sys.executable, "-c", code, str(path), str(tmp_path / "over")]
        waiting = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        (tmp_path / "over").touch()
        first.kill()
        assert waiting.communicate()[0] == "True\n"
