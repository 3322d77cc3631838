"""The supervisor of a run on a cluster: an actor of Ray that outlives its driver and its node's failure.

It trains in a thread, as ``atpo train`` does in a process; drivers attach to it for its lines and to stop it.  Where
its node comes back, Ray makes it again with the same arguments, and it goes on with the run.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from atpo_async.core.errors import AtpoError
from atpo_async.core.texts import of_error, trace_of
from atpo_async.ops.launchers.ray import cluster
from atpo_async.ops.launchers.ray.job.desk import Answer, Desk, Outcome

LOOK_S = 0.1
ANSWER_S = 1.0
"""How long a driver has no answer while there is nothing new."""
LEFT_S = 2.0
"""After the end of its work, for a driver that has not asked yet."""
CONCURRENT = 64
"""Calls under way at once: each driver has one, and each `atpo status`."""


class RunSupervisor:
    """The actor.

    Args:
        work: ``package.module:function``, which trains: called with the desk and ``arguments``; returns the outcome.
        look: ``package.module:function``, which makes what `atpo status` shows, called with ``arguments``.
        arguments: by keyword; no secrets, as Ray keeps them.
        folder: the driver's working folder; also this one's, where the node has it.
        facts: for drivers that attach.
    """

    def __init__(
        self, *, work: str, look: str, arguments: Mapping[str, Any], folder: str, facts: Mapping[str, str]
    ) -> None:
        if Path(folder).is_dir():
            os.chdir(folder)
        self._arguments = dict(arguments)
        self._look = look
        self._facts = dict(facts)
        self._desk = Desk(secrets.token_hex(4))
        self._own_handle = cluster.own_handle()
        # No daemon: what trains ends its roles before the interpreter does.
        self._thread = threading.Thread(target=self._work, args=(work,), name="train")
        self._thread.start()

    def _work(self, work: str) -> None:
        try:
            outcome = _function(work)(self._desk, **self._arguments)
        except AtpoError as exc:
            outcome = Outcome(code="failed", error=type(exc).__name__, message=str(exc))
        except KeyboardInterrupt:
            outcome = Outcome(code="interrupted")
        except BaseException as exc:
            self._desk.say(trace_of(exc))
            outcome = Outcome(code="failed", error="Exception", message=of_error(exc))
        self._desk.end(outcome)
        self._leave()

    def _leave(self) -> None:
        """End this actor for good.  Waits for: every driver to know the outcome; for ``LEFT_S``, one that comes."""
        time.sleep(LEFT_S if not self._desk.drivers else LOOK_S)
        while not self._desk.is_left:
            time.sleep(LOOK_S)
        cluster.end(self._own_handle)

    async def answer(self, driver: str, life: str, since: int) -> Answer:
        """Waits for: something new.  Unblocked by: that, ``ANSWER_S``."""
        waited_s = 0.0
        while True:
            found = self._desk.answer(driver, life, since)
            if found.events or found.outcome is not None or found.left_out or waited_s >= ANSWER_S:
                return found
            await asyncio.sleep(LOOK_S)
            waited_s += LOOK_S

    async def stop(self, again: str) -> None:
        """As Ctrl-C on one machine: with saving, and at once the second time."""
        self._desk.stop(again)

    async def facts(self) -> dict[str, str]:
        """What it was started with, and whether it has ended."""
        return {**self._facts, "ended": "yes" if self._desk.ended else "", "pid": str(os.getpid())}

    async def look(self) -> Any:
        """What `atpo status` shows."""
        return await asyncio.to_thread(_function(self._look), **self._arguments)


def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found
