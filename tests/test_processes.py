"""Processes of a role: what they use, whose they are, and how all of them are ended."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from atpo_async.run import processes

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

OWNER = """
import time
from multiprocessing.shared_memory import SharedMemory
memory = SharedMemory(create=True, size=64)
print(memory.name, flush=True)
time.sleep(1000)
"""


def test_what_killed_processes_had_in_shared_memory_goes_with_them() -> None:
    mark = uuid.uuid4().hex
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, processes.ROLE_MARK: mark},
        start_new_session=True,
    )
    assert owner.stdout is not None
    file = Path("/dev/shm") / owner.stdout.readline().strip()
    assert file.is_file()
    # The owner and its resource tracker.  Between fork and exec a process shows no environment for an instant.
    deadline = time.monotonic() + 60.0
    while len(processes.marked(mark)) != 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(processes.marked(mark)) == 2
    # Far beyond what the tracker takes to end by itself.
    assert processes.kill_all(owner.pid, mark, timeout_s=60.0) == 2
    owner.communicate()
    assert processes.marked(mark) == []
    assert not file.exists()


@contextmanager
def child(**environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process with this environment that has come to its own program; it is killed at the end."""
    # A start that takes less than a tick of the system's count would be counted as none.
    works = "import os, time\nwhile time.process_time() < 0.05: pass\nos.close(1); time.sleep(1000)"
    words = [sys.executable, "-c", works]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout is not None
        assert process.stdout.read() == b""
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_process_says_what_it_was_started_with_whose_it_is_and_what_it_uses() -> None:
    with child(COLOUR="blue") as process:
        assert processes.environment(process.pid)["COLOUR"] == "blue"
        assert processes.owner(process.pid) == pwd.getpwuid(os.getuid()).pw_name
        assert processes.is_ours(process.pid)
        assert 1.0 < processes.memory_mb([process.pid]) < 1000.0
        assert processes.processor_s([process.pid]) > 0.0
        both = processes.processor_s([process.pid, os.getpid()])
        assert both > processes.processor_s([process.pid])


def test_of_a_process_that_has_gone_nothing_is_counted() -> None:
    with child() as process:
        pass
    gone = [process.pid]
    assert processes.environment(process.pid) == {}
    assert processes.owner(process.pid) == "unknown"
    assert processes.started(process.pid) is None
    assert processes.stopped(gone) == []
    assert (processes.memory_mb(gone), processes.processor_s(gone), processes.moved_mb(gone)) == (0.0, 0.0, 0.0)


def test_a_start_is_in_clock_ticks_since_boot_as_status_files_and_locks_of_older_runs_hold_it() -> None:
    with child() as process:
        ticks = processes.started(process.pid)
        assert ticks is not None
        since_boot_s = ticks / os.sysconf("SC_CLK_TCK")
        assert abs(psutil.boot_time() + since_boot_s - psutil.Process(process.pid).create_time()) < 2.0


def test_a_dead_process_that_nobody_has_waited_for_does_not_run() -> None:
    with child() as process:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert processes.started(process.pid) is None
        assert process.pid not in {p.pid for p in processes.processes()}
