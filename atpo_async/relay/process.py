"""The process of ``atpo relay``: logging, signals, and one line for an error."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from pathlib import Path

from atpo_async.config import Config
from atpo_async.core import texts
from atpo_async.links import advertised
from atpo_async.ops.lifeline import Signals
from atpo_async.relay.relay import Relay
from atpo_async.status.reporter import Reporter

log = logging.getLogger("atpo.relay")


def run(config: Config, *, join: str, name: str, folder: Path | None) -> None:
    """Serve until the run is over, or until a signal.

    Args:
        config: of it the sections ``links`` and ``weights``.
        join: endpoint of the buffer's socket for actors, or of another relay's.
        name: of the relay.
        folder: for the versions; None: in memory, or with the temporary files.

    Raises:
        AtpoError: as of ``Relay``.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, force=True)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(texts.BoundedFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    with Reporter(name, folder=None, log=log, on_signal=True) as reporter:
        asyncio.run(_serve(config, join, name, folder, reporter))


async def _serve(config: Config, join: str, name: str, folder: Path | None, reporter: Reporter) -> None:
    stopping, task = asyncio.Event(), asyncio.current_task()
    assert task is not None
    signals = Signals(stopping, cancel=task.cancel, log=log)
    for signum in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):  # not on Windows
            asyncio.get_running_loop().add_signal_handler(signum, signals.received, signum)
    reporter.attach()
    relay = Relay(join=join, name=name, links=config.links, weights=config.weights, stopping=stopping, folder=folder)
    async with relay:
        where = advertised.sentence(relay.actors.endpoint, advertise=config.links.advertise)
        print(f"actors join with --join {where}", flush=True)
        try:
            await relay.serve()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
