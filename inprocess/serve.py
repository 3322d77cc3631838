"""A worker: takes configurations from its standard input, runs one after another, and reports on its standard output.

Lines of JSON.  In: ``{"config": {…}, "log": FILE}``, a whole configuration and where its log goes.  Out, for each of
them: ``{"step": N, "success": X}`` after every batch, and at its end ``{"ended": true}``, or ``{"failed": WHY, "user":
BOOL}``, where ``user`` says that only the user can mend it.  ``{"ready": true}`` comes first.

The worker ends when its standard input does, in the middle of a run too: it lives no longer than what started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

from actors import interpreter
from actors.hosting import guard
from atpo_async import config as configuration
from atpo_async.core import texts
from atpo_async.core.errors import AtpoError
from atpo_async.ops.exits import EXIT_DONE, EXIT_USER
from atpo_async.ops.role import exit_code
from atpo_async.study.workers.settings import in_one_process
from inprocess import idle
from inprocess.run import run_once

EXIT_ABANDONED = 1
"""The standard input ended in the middle of a run."""

GARBAGE_OBJECTS = 100_000
"""So many more objects there are before garbage is searched for: trees hold thousands, and none of them in a cycle."""

log = logging.getLogger("inprocess")


class Lines:
    """The lines of the standard input; the process ends with it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._busy = threading.Event()
        threading.Thread(target=self._read, args=(stream,), name="standard input", daemon=True).start()

    def _read(self, stream: BinaryIO) -> None:
        for line in iter(stream.readline, b""):
            self._lines.put(line)
        if self._busy.is_set():
            os._exit(EXIT_ABANDONED)
        self._lines.put(None)

    def __iter__(self) -> Iterator[bytes]:
        """Waits for: the next line.  Unblocked by: that, or the end of the input."""
        while (line := self._lines.get()) is not None:
            self._busy.set()
            yield line

    def done(self) -> None:
        """What the last line asked for is done: its end may be told, after which the input may end."""
        self._busy.clear()


def serve() -> int:
    """Run what comes, to the end of the standard input; returns the exit code."""
    out = _own_output()

    def say(**fact: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            out.write(json.dumps(fact).encode() + b"\n")
            out.flush()

    interpreter.divide_time()
    gc.set_threshold(GARBAGE_OBJECTS, 50, 100)
    say(ready=True)
    lines = Lines(sys.stdin.buffer)
    for line in lines:
        try:
            asked = json.loads(line)
            with _logging_to(str(asked["log"])):
                ended = _result(asked["config"], say)
        except (ValueError, KeyError, TypeError, OSError) as exc:
            ended = {"failed": f"the worker was asked for what it cannot do: {texts.of_error(exc)}", "user": True}
        gc.collect()
        lines.done()
        say(**ended)
    return EXIT_DONE


def _result(data: Any, say: Any) -> dict[str, Any]:
    """Run a configuration; returns how it ended."""
    loop, selector = idle.new_loop()
    try:
        asyncio.set_event_loop(loop)
        config = in_one_process(configuration.build(data))
        with guard.stray_signals_end_nothing():
            loop.run_until_complete(
                run_once(config, selector, on_step=lambda step, success: say(step=step, success=success))
            )
        return {"ended": True}
    except AtpoError as exc:
        log.error("%s", texts.middle_cut(str(exc)))
        return {"failed": texts.middle_cut(str(exc)), "user": exit_code(exc) == EXIT_USER}
    except Exception as exc:
        log.error("%s", texts.trace_of(exc))
        return {"failed": texts.of_error(exc, most=1000), "user": False}
    finally:
        asyncio.set_event_loop(None)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def _own_output() -> BinaryIO:
    """The standard output under a descriptor of its own: what an environment prints goes to the standard error."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return out


@contextlib.contextmanager
def _logging_to(path: str) -> Iterator[None]:
    """While the block runs, what is logged or printed is appended to a file.  Raises OSError."""
    before = os.dup(2)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        for descriptor in (1, 2):
            os.dup2(file, descriptor)
        os.close(file)
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, force=True)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(texts.BoundedFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor in (1, 2):
            os.dup2(before, descriptor)
        os.close(before)
