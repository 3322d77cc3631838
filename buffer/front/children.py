"""Starts the shards of a buffer as processes of the front, and starts one again that ends or does not answer.

Whatever starts the buffer, a supervisor on this machine or on a cluster, or a user by hand, starts one process; so the
shards are always where the run's folder and the front are, and end with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from atpo_async.config import Config
from atpo_async.core.errors import RoleCrashed, SetupError
from atpo_async.ops.exits import ERROR_FILE, EXIT_USER, SUPERVISOR_PID
from atpo_async.run import launch
from atpo_async.run.rundir import RunDir
from buffer.front.shards import ShardLink, Shards

log = logging.getLogger("atpo.buffer")

PAUSE_S, MOST_PAUSE_S = 0.2, 10.0
"""Before a shard is started again, twice as long each time."""
STEADY_S = 60.0
"""A shard that ran for so long is not counted among those that do not come up."""
HANG_SHARE = 0.5
"""Of ``links.give_up_s``: a shard that is silent for longer is ended and started again, before the front gives up."""
LOOK_S = 1.0
END_S = 1.0
"""How long a shard has to end when it is asked to."""


class ShardProcesses:
    """The shards of one run.

    Args:
        config: the run's.
        rundir: the run.
        shards: the links to them, which say whether they answer.
        hang_s: a shard that is silent for longer is ended; by ``links.give_up_s`` where None.
    """

    def __init__(self, config: Config, rundir: RunDir, shards: Shards, *, hang_s: float | None = None) -> None:
        self._config, self._rundir, self._shards = config, rundir, shards
        self._hang_s = hang_s or config.supervisor.hang_s or HANG_SHARE * config.links.give_up_s
        self._running: dict[int, asyncio.subprocess.Process] = {}

    async def keep(self, link: ShardLink) -> None:
        """Run one shard.  Waits for: its end, or its silence.  Ended by: its end in good order.

        Raises:
            SetupError: it ended with what only the user can mend.
            RoleCrashed: it does not come up.
        """
        loop, failures = asyncio.get_running_loop(), 0
        while True:
            began, error = loop.time(), self._error_file(link)
            process = self._running[link.index] = await self._start(link, error)
            code = await self._ended(link, process)
            if code == 0:
                return
            said = _said(error)
            if code == EXIT_USER:
                raise SetupError(f"{link.name}: {said or 'it ended with an error for the user'}")
            failures = 1 if loop.time() - began > STEADY_S else failures + 1
            if failures > self._config.supervisor.max_restarts:
                raise RoleCrashed(f"{link.name} ended {failures} times, {_how(code)}: {said or 'see its log'}")
            pause_s = min(PAUSE_S * 2 ** (failures - 1), MOST_PAUSE_S)
            log.warning("%s ended, %s; starting it again in %g s %s", link.name, _how(code), pause_s, said)
            await asyncio.sleep(pause_s)

    async def end(self) -> None:
        """End all of them.  Waits for: their ends, for ``END_S``; what is left is killed."""
        for process in self._running.values():
            _signal(process, signal.SIGTERM)
        waits = [asyncio.ensure_future(process.wait()) for process in self._running.values()]
        if waits:
            await asyncio.wait(waits, timeout=END_S)
        for process in self._running.values():
            _signal(process, signal.SIGKILL)
        await asyncio.gather(*waits)

    def _error_file(self, link: ShardLink) -> Path:
        """Where a shard will say what it fails of; nothing is there."""
        file = self._rundir.scratch / f"{link.name}.error"
        file.unlink(missing_ok=True)
        return file

    async def _start(self, link: ShardLink, error: Path) -> asyncio.subprocess.Process:
        attempt = self._rundir.next_attempt(link.name)
        # A supervised role ends with the process that it names: here the front.
        env: Mapping[str, str] = {**os.environ, SUPERVISOR_PID: str(os.getpid()), ERROR_FILE: str(error)}
        words = launch.command("buffer", str(self._rundir.path), "--name", link.name, python=sys.executable)
        with self._rundir.log_path(link.name, attempt).open("ab") as out:
            return await asyncio.create_subprocess_exec(
                *words, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True
            )

    async def _ended(self, link: ShardLink, process: asyncio.subprocess.Process) -> int:
        """The exit code of a shard; of one that does not answer any more, once it is killed."""
        loop = asyncio.get_running_loop()
        began, waiting = loop.time(), asyncio.ensure_future(process.wait())
        try:
            while not waiting.done():
                await asyncio.wait((waiting,), timeout=LOOK_S)
                silent_s = min(link.client.silent_s, loop.time() - began)
                if silent_s > self._hang_s and not waiting.done():
                    log.error("%s has not answered for %.0f s; it is ended and started again", link.name, silent_s)
                    _signal(process, signal.SIGKILL)
            return waiting.result()
        finally:
            waiting.cancel()


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


def _how(code: int) -> str:
    return f"by signal {-code}" if code < 0 else f"with code {code}"


def _said(error: Path) -> str:
    """What a role has written of its error; empty where it has not."""
    try:
        return str(json.loads(error.read_text(encoding="utf-8"))["error"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
