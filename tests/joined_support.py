"""A launcher whose learner and actors join by address: they get the configuration and the buffer's address, and where
this process may make mount namespaces, an empty folder in place of the run's."""

from __future__ import annotations

import asyncio
import functools
import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

from atpo_async.links import addresses
from atpo_async.ops import notices
from atpo_async.ops.exits import ERROR_FILE
from atpo_async.ops.launchers.base import StartOrder
from atpo_async.ops.launchers.processes import LocalRole, ProcessLauncher
from atpo_async.run import launch
from atpo_async.run.endpoints import EndpointsFile
from atpo_async.run.files import write_atomic


class JoinedLauncher(ProcessLauncher):
    """Starts the buffer in the run's folder, and the other roles without it.

    Args:
        config: the configuration that they bring.
        folder: of the learner's files; each attempt finds there what the one before has left.
    """

    def __init__(self, *, config: str, folder: str) -> None:
        self._config = config
        self._folder = folder

    async def start(self, order: StartOrder) -> LocalRole:
        if order.role == "buffer":
            return await super().start(order)
        run = Path(order.log).parent.parent
        where = "learner" if order.role == "learner" else "actors"
        endpoint = ""
        while not endpoint:
            endpoint = getattr(EndpointsFile(run, write_atomic).now(), where)
            await asyncio.sleep(0.02)
        words = ["--config", self._config, "--join", addresses.reached_from_here(endpoint).removeprefix("tcp://")]
        if where == "learner":
            words += ["--dir", self._folder]
        else:
            words += ["--name", order.role]
        argv = launch.command(where, *words)
        # Files of the supervisor's in the run's folder, which these roles do not see: the log says why one ended.
        env = {name: value for name, value in order.env.items() if name not in (ERROR_FILE, notices.FILE)}
        return await super().start(replace(order, argv=hidden(argv, run) if may_hide() else argv, env=env))


def hidden(argv: tuple[str, ...], run: Path) -> tuple[str, ...]:
    """A command that sees an empty folder where the run's is."""
    mount = f"mount -t tmpfs none {shlex.quote(str(run))} && exec {shlex.join(argv)}"
    return ("unshare", "--mount", "sh", "-c", mount)


@functools.cache
def may_hide() -> bool:
    """Whether this process may make mount namespaces."""
    if os.name != "posix" or os.geteuid() != 0:
        return False
    try:
        return subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode == 0
    except OSError:
        return False
