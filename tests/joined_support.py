"""A launcher whose learner and actors join by address: they get the configuration and the buffer's address, and where
this process may make mount namespaces, an empty folder in place of the run's."""

from __future__ import annotations

import asyncio
import functools
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from atpo_async.config import load
from atpo_async.links import addresses
from atpo_async.ops import notices
from atpo_async.ops.exits import ERROR_FILE
from atpo_async.ops.launchers.base import StartOrder
from atpo_async.ops.launchers.processes import LocalRole, ProcessLauncher
from atpo_async.ops.specs import Machines, RoleSpec, learner_spec
from atpo_async.run import launch
from atpo_async.run.endpoints import EndpointsFile
from atpo_async.run.files import write_atomic
from tests.links_support import reserved_port


class OnMachines:
    """The learner on several machines: one that ends brings the others to an end."""

    def __init__(self, parts: Sequence[LocalRole]) -> None:
        self.parts = parts
        self.pid, self.mark = parts[0].pid, parts[0].mark

    async def wait(self) -> int:
        waiting = [asyncio.create_task(part.wait()) for part in self.parts]
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        code = max((task.result() for task in done), key=abs)
        if code == 0:
            code = max(await asyncio.gather(*waiting), key=abs)
        for task in waiting:
            task.cancel()
        return code

    def ask_to_end(self, pids: Sequence[int]) -> None:
        for part in self.parts:
            part.ask_to_end(())


class JoinedLauncher(ProcessLauncher):
    """Starts the buffer in the run's folder, and the other roles without it.

    Args:
        config: the configuration that they bring.
        folder: of the learner's files, ``machine-<i>`` of each; an attempt finds there what the one before has left.
        machines: on which the learner's ranks run.
    """

    def __init__(self, *, config: str, folder: str, machines: int = 1) -> None:
        self._config = config
        self._folder = folder
        self._machines = machines

    async def start(self, order: StartOrder) -> LocalRole:
        if order.role == "buffer":
            return await super().start(order)
        run = order.log.parent.parent
        where = "learner" if order.role == "learner" else "actors"
        endpoint = ""
        while not endpoint:
            endpoint = getattr(EndpointsFile(run, write_atomic).now(), where)
            await asyncio.sleep(0.02)
        words = ["--config", self._config, "--join", addresses.reached_from_here(endpoint).removeprefix("tcp://")]
        # Files of the supervisor's in the run's folder, which these roles do not see: the log says why one ended.
        env = {name: value for name, value in order.env.items() if name not in (ERROR_FILE, notices.FILE)}
        order = replace(order, env=env)
        if where == "actors":
            return await self._apart(order, launch.command(where, *words, "--name", order.role), run)
        parts = []
        for spec, each in zip(self._learners(words), [order, *_others(order, self._machines - 1)], strict=True):
            parts.append(await self._apart(replace(each, env={**env, **spec.env}), spec.argv, run))
        return parts[0] if len(parts) == 1 else OnMachines(parts)  # type: ignore[return-value]

    def _learners(self, words: Sequence[str]) -> list[RoleSpec]:
        config, port = load(self._config), reserved_port()
        return [
            learner_spec(
                config,
                [*words, "--dir", str(Path(self._folder) / f"machine-{index}")],
                has_cuda=lambda: False,
                machines=Machines(count=self._machines, index=index, meet_at=f"127.0.0.1:{port}")
                if self._machines > 1
                else None,
            )
            for index in range(self._machines)
        ]

    async def _apart(self, order: StartOrder, argv: tuple[str, ...], run: Path) -> LocalRole:
        return await super().start(replace(order, argv=hidden(argv, run) if may_hide() else argv))


def _others(order: StartOrder, count: int) -> list[StartOrder]:
    """The same on further machines, with logs of their own."""
    return [replace(order, log=order.log.with_suffix(f".machine-{index + 1}.txt")) for index in range(count)]


def hidden(argv: Sequence[str], run: Path) -> tuple[str, ...]:
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


def environment_of(pid: int) -> Mapping[str, str]:
    """Of a process; empty where it is gone."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(entry.decode(errors="replace").partition("=")[::2] for entry in entries if b"=" in entry)
