"""The socket for followers of a journal: open before anything is acknowledged, and until they have everything."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from atpo_async.config import Config
from atpo_async.links import ports
from atpo_async.links.advertised import to_join
from atpo_async.links.keys import FOLLOWERS
from atpo_async.links.server import Server
from atpo_async.ops import notices
from atpo_async.status.facts import publish_facts, withdraw_facts
from atpo_async.wire.followers.messages import FollowerToBuffer
from buffer.following.sending import Followers
from buffer.following.small_files import SmallFiles
from buffer.journal.journal import Journal

log = logging.getLogger("atpo.buffer.followers")

TELL_AFTER_S = 5.0
"""A commit that no follower has for so long is told to the user, where acknowledgements wait for it."""
FACTS = "followers"
SETTLE_S = 5.0
LAST_ANSWER_S = 0.2
"""For the answers by which followers learn of the run's end."""


class FollowerSocket:
    """Serves followers.  Use as an async context, inside the journal's.

    Args:
        config: the run's, with ``buffer.follower``.
        run: run id.
        journal: recovered, and followed.
        folder: of the run; None: no small files go along.
        former_port: where it listened before; 0 for none.
        finished: whether the run is over.
        bound: called with the endpoint, before anything waits for a follower.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        config: Config,
        *,
        run: str,
        journal: Journal,
        folder: Path | None,
        former_port: int = 0,
        finished: Callable[[], bool],
        bound: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._journal = journal
        self._bound = bound
        links = config.links
        self.followers = Followers(
            journal, run=run, max_bytes=config.buffer.max_bytes, message_bytes=links.max_message_bytes,
            files=SmallFiles(folder), finished=finished, clock=clock,
        )  # fmt: skip
        self.server = Server(
            ports.to_bind(links, "follower"), name="buffer, followers", receives=FollowerToBuffer,
            handler=self.followers.handle, settings=links, only=FOLLOWERS, former_port=former_port,
            setting="links.follower_port",
        )  # fmt: skip
        self._telling: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.server.__aenter__()
        self._bound(self.server.endpoint)
        publish_facts(FACTS, self.followers.facts)
        where = to_join(self.server.endpoint, advertise=self._config.links.advertise)[0]
        log.info("a follower joins with `atpo follower --join %s --dir FOLDER`", where)
        if self._config.buffer.follower_wait:
            self._telling = asyncio.create_task(self._tell(where), name="tell what waits for followers")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        withdraw_facts(FACTS)
        if self._telling is not None:
            self._telling.cancel()
        if self._journal.broken is not None and not self._journal.broken.done():
            # The last commits; what follows this is the journal's end.
            self._journal.wait_no_more()
            with contextlib.suppress(TimeoutError):
                await self._journal.settle(timeout_s=SETTLE_S)
        await self.followers.catch_up()
        if any(each.told for each in self.followers.followers):
            await asyncio.sleep(LAST_ANSWER_S)
        await self.server.close()
        self.followers.close()

    async def _tell(self, where: str) -> None:
        """Tell the user each time that acknowledgements begin to wait.  Waits for: the clock.  Ended by: close."""
        told = False
        while True:
            await asyncio.sleep(TELL_AFTER_S)
            waits_s = self._journal.unmirrored_s
            if waits_s < TELL_AFTER_S:
                told = False
                continue
            if told:
                continue
            told = True
            notices.post(
                f"no follower has the journal's last commit for {waits_s:.0f} s, and nothing is acknowledged before "
                f"one has it (buffer.follower_wait): start one with `atpo follower --join {where} --dir FOLDER` on "
                "another machine",
                "no follower",
            )
