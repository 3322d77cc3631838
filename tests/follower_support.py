"""A journal that is followed over loopback, followers of it, and what lies in the tables of either."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from atpo_async import config as configuration
from atpo_async.config import Config
from buffer.following.client import FollowerClient
from buffer.following.folder import FollowerFolder
from buffer.following.serving import FollowerSocket
from buffer.journal.journal import Journal
from buffer.journal.tables import Tables
from tests.waiting_support import LIMIT_S, until

RUN = "run-1"


def following_config(**sections: dict[str, Any]) -> Config:
    """Quick links, and a buffer that is followed."""
    links = {"heartbeat_s": 0.05, "deadline_s": 10.0, "give_up_s": 20.0, "max_message_bytes": 1 << 20}
    base: dict[str, dict[str, Any]] = {"links": links, "buffer": {"follower": True, "max_bytes": 1 << 24}}
    return configuration.build({name: base.get(name, {}) | sections.get(name, {}) for name in {*base, *sections}})


class Source:
    """A followed journal and its socket."""

    def __init__(self, journal: Journal, socket: FollowerSocket) -> None:
        self.journal, self.socket = journal, socket
        self.over = False

    @property
    def endpoint(self) -> str:
        return self.socket.server.endpoint

    @property
    def commits(self) -> int:
        assert self.journal.committed is not None
        return self.journal.committed.number


@contextlib.asynccontextmanager
async def source(
    folder: Path, config: Config | None = None, *, run: str = RUN, files: Path | None = None
) -> AsyncIterator[Source]:
    """A journal as a buffer has it: recovered, followed, with one commit."""
    config = config or following_config()
    journal = Journal(
        folder, run=run, max_bytes=config.buffer.max_bytes, gather_s=0.0, followed=True,
        follower_wait=config.buffer.follower_wait,
    )  # fmt: skip
    journal.recover()
    made: list[Source] = []
    socket = FollowerSocket(
        config, run=run, journal=journal, folder=files, finished=lambda: made[0].over, bound=lambda endpoint: None
    )
    made.append(Source(journal, socket))
    async with journal, socket:
        yield made[0]


@contextlib.asynccontextmanager
async def follower(
    folder: Path, endpoint: str, config: Config | None = None, *, name: str = "spare"
) -> AsyncIterator[asyncio.Task[bool]]:
    """A follower at work; its task ends with whether the run is over."""
    config = config or following_config()
    held = FollowerFolder(folder, sync=False)
    stopping = asyncio.Event()
    client = FollowerClient(held, endpoint=endpoint, name=name, settings=config.links, stopping=stopping)
    task = asyncio.create_task(client.follow(), name="follower")
    try:
        yield task
    finally:
        stopping.set()
        await asyncio.wait((task,), timeout=LIMIT_S)
        held.close()


async def has_all(source: Source, *, name: str = "spare") -> None:
    """Waits for: a follower to have every commit on disk."""
    followers = source.socket.followers
    await until(lambda: any(followers.lag(each).commits == 0 for each in followers.followers if each.name == name))


async def has_at_least(source: Source, commit: int) -> None:
    """Waits for: a follower to have the commits up to ``commit`` on disk."""
    await until(lambda: any(each.durable >= commit for each in source.socket.followers.followers))


def run_follower(folder: str, join: str) -> None:
    """A follower's process, as ``python -m buffer follow`` runs it."""
    from buffer.following import program

    words = ["--dir", folder, "--join", join, "--name", "spare", "--links.heartbeat_s=0.1", "--links.deadline_s=5"]
    sys.exit(program.main(words))


def contents(folder: Path) -> tuple[dict[bytes, bytes], ...]:
    """The entries of the three tables of a journal that no process has open."""
    tables = Tables(folder, max_bytes=1, sync=False, leased=lambda: True)
    try:
        with tables.env.begin() as txn:
            return tuple({bytes(k): bytes(v) for k, v in txn.cursor(db=db)} for db in tables.tables)
    finally:
        tables.close()
