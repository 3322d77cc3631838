"""Runs a process of this project and waits for its end: a warm start, an evaluation."""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from atpo_async.config import Config
from atpo_async.ops.exits import ERROR_PREFIX
from atpo_async.run import processes


@contextlib.contextmanager
def resolved_file(config: Config) -> Iterator[Path]:
    """The resolved configuration as a file for a process; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="atpo-") as folder:
        file = Path(folder) / "config.json"
        file.write_text(config.model_dump_json(indent=2), encoding="utf-8")
        yield file


def run_to_end(argv: Sequence[str], *, tell: Callable[[str], None] = lambda line: None) -> tuple[int, str]:
    """Run a process of this project in the foreground, passing on each line of its stderr.

    Returns 0 and its stdout, or its exit code and its last error line.  It ends with this process, and so does all that
    it started.
    """
    tie = functools.partial(processes.die_with_parent, parent_pid=os.getpid())
    mark = f"hand/{os.getpid()}/{os.urandom(4).hex()}"
    lines: collections.deque[str] = collections.deque(maxlen=50)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as out:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, processes.ROLE_MARK: mark},
            start_new_session=True,
            preexec_fn=tie if sys.platform.startswith("linux") else None,
        )
        stderr = process.stderr
        assert stderr is not None

        def listen() -> None:
            for line in stderr:
                if line.strip():
                    lines.append(line.rstrip())
                    tell(lines[-1])

        # In a thread: a child that the process leaves behind holds its stderr open until it is killed below.
        listener = threading.Thread(target=listen, name="stderr", daemon=True)
        listener.start()
        try:
            process.wait()
        except BaseException:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            raise
        finally:
            processes.kill_all(process.pid, mark)
            process.wait()
            listener.join(timeout=5)
        if process.returncode == 0:
            out.seek(0)
            return 0, out.read()
    said = next((line for line in reversed(lines) if line.startswith(ERROR_PREFIX)), lines[-1] if lines else "")
    return process.returncode, said.removeprefix(ERROR_PREFIX).removeprefix("warm start: ")
