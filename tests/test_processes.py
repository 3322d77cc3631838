"""Ending all that a role started, and what it had in shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

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
