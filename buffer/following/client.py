"""A follower at work: it says where its copy stands, takes part after part, and begins again after any trouble."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import lmdb

from atpo_async.config import LinksConfig
from atpo_async.core.errors import BadMessage, PeerLost, SetupError
from atpo_async.links.client import Client
from atpo_async.status import waits
from atpo_async.wire.followers import messages as f
from atpo_async.wire.messages import PROTOCOL, Refused
from buffer.following.folder import FollowerFolder

log = logging.getLogger("atpo.follower")

WAIT_S = 1.0
"""How long the buffer may keep a request before it answers that nothing came."""
PAUSE_S, PAUSE_MAX_S = 0.2, 5.0
"""After trouble: the next attempt."""
WRITE_RETRY_S = 2.0


class _Anew(Exception):
    """What was under way is broken off; the follower says hello again."""


class FollowerClient:
    """Follows one buffer.

    Args:
        folder: of the copy.
        endpoint: of the buffer's socket for followers; empty where only ``locate`` knows.
        name: of this follower.
        settings: of the links.
        stopping: set to end.
        locate: where the buffer listens now; None where ``endpoint`` stays.
    """

    def __init__(
        self,
        folder: FollowerFolder,
        *,
        endpoint: str,
        name: str,
        settings: LinksConfig,
        stopping: asyncio.Event,
        locate: Callable[[], str] | None = None,
    ) -> None:
        self._folder = folder
        self._endpoint, self._name, self._settings, self._locate = endpoint, name, settings, locate
        self._stopping = stopping
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="follower")
        self._trouble = ""
        self._behind: int | None = None
        self._position = 0
        self._heard_at: float | None = None
        self._logged = ""

    def facts(self) -> dict[str, object]:
        """For this follower's status."""
        heard = "never" if self._heard_at is None else f"{time.monotonic() - self._heard_at:.1f} s ago"
        return {
            "commit": self._position,
            "behind": "unknown" if self._behind is None else self._behind,
            "buffer heard": heard,
            "trouble": self._trouble or "no",
        }

    async def follow(self) -> bool:
        """Follow until asked to stop, or until the run is over.  Returns whether it is.

        Raises:
            SetupError: the buffer refuses this copy for good.
        """
        stop = asyncio.create_task(self._stopping.wait(), name="stopping")
        work = asyncio.create_task(self._follow(), name="follow")
        try:
            await asyncio.wait((stop, work), return_when=asyncio.FIRST_COMPLETED)
            return work.done() and work.result()
        finally:
            for task in (stop, work):
                task.cancel()
            await asyncio.gather(stop, work, return_exceptions=True)
            # In the thread that began it.
            self._writer.submit(self._folder.abort)
            self._writer.shutdown(wait=True)

    async def _follow(self) -> bool:
        """Waits for: the buffer, which may be away for as long as it likes.  Ended by: the run's end."""
        pause_s = PAUSE_S
        while True:
            link = Client(
                self._endpoint, peer="buffer", identity=self._name, receives=f.BufferToFollower,
                settings=self._settings, locate=self._locate,
            )  # fmt: skip
            try:
                async with link:
                    while True:
                        with waits.waiting(self._name, "the buffer's commits", on="buffer"):
                            try:
                                if await self._follow_once(link):
                                    return True
                                pause_s = PAUSE_S
                            except _Anew as exc:
                                self._log(str(exc))
                        await asyncio.sleep(pause_s)
                        pause_s = min(2 * pause_s, PAUSE_MAX_S)
            except PeerLost as exc:
                # A link that has given up stays so; the copy is kept for as long as it takes.
                self._log(f"{exc}; it keeps its copy and tries on")
                await asyncio.sleep(PAUSE_S)

    def _log(self, line: str) -> None:
        if line and line != self._logged:
            log.warning("%s", line)
        self._logged = line

    async def _follow_once(self, link: Client) -> bool:
        """From a hello until something breaks it off.  True once the run is over."""
        hello = await self._in_thread(self._folder.hello, PROTOCOL)
        following = await self._asked(link, hello)
        if isinstance(following, Refused):
            raise SetupError(f"the buffer at {link.endpoint} does not let this follower follow: {following.reason}")
        if not isinstance(following, f.Following):
            raise _Anew(f"the buffer at {link.endpoint} answers hello with {type(following).__name__}")
        await self._written(self._folder.begin, following, link.endpoint)
        durable = 0 if following.copy else following.position
        what = f"copies the journal, of commit {following.position}" if following.copy else "goes on"
        log.info("follows run %s at %s: %s from commit %d", following.run, link.endpoint, what, durable)
        number = 0
        while True:
            request = f.FollowRequest(
                run=following.run, part=number, durable=durable, wait_s=WAIT_S, trouble=self._trouble[:1000]
            )
            part = await self._asked(link, request)
            if not isinstance(part, f.JournalPart):
                return False  # a buffer that was started again asks for a hello
            if part.part != number:
                raise _Anew(f"part {part.part} came in answer to a request for part {number}")
            await self._written(self._folder.take, part)
            self._trouble = ""
            waits.progress("parts")
            number += 1
            if part.ends:
                durable = part.position
            self._position, self._behind = durable, part.behind
            if part.finished:
                return True
            if part.kind == "again":
                return False

    async def _asked(self, link: Client, message: Any) -> Any:
        """Waits for: the buffer's answer."""
        try:
            answer = await link.request(message, timeout_s=WAIT_S + self._settings.deadline_s)
        except BadMessage as exc:
            raise _Anew(f"the buffer at {link.endpoint} sent what is none of a journal: {exc}") from None
        self._heard_at = time.monotonic()
        return answer

    async def _written(self, work: Callable[..., None], *args: Any) -> None:
        """Waits for: the disk.  Raises _Anew where it refuses, after a pause."""
        try:
            await self._in_thread(work, *args)
            await self._in_thread(self._folder.heard)
        except BadMessage as exc:
            raise _Anew(f"the buffer sent what is none of a journal: {exc}") from None
        except (lmdb.Error, OSError) as exc:
            self._trouble = f"{self._folder.path}: {exc}"
            await asyncio.sleep(WRITE_RETRY_S)
            raise _Anew(f"the copy in {self._trouble} cannot be written: free space there; it tries on") from None

    async def _in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._writer, work, *args)
