"""The thread of a joined learner that speaks to the buffer about its files and the numbers of its versions.

It has an event loop of its own: what is written is passed on while the learner loads, trains, saves or hangs, and its
status reaches the run's folder meanwhile.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from atpo_async.config import LinksConfig
from atpo_async.core.errors import AtpoError, BadMessage, PeerLost, WaitTimeout
from atpo_async.ops.joined.asking import Asker
from atpo_async.ops.joined.sending import Sender
from atpo_async.run.replica import names
from atpo_async.run.replica.folder import Replica
from atpo_async.status import waits
from atpo_async.status.facts import publish_facts
from atpo_async.status.waits import BoundedWait
from atpo_async.wire import joined as j

log = logging.getLogger("atpo.joined")

EVERY_S = 0.25
"""Between two looks for something new."""
FAREWELL_S = 5.0
"""At the end: for what was written last."""

T = TypeVar("T")


class Uplink:
    """One rank's link for files and versions, in a thread of its own.  Implements ``run.replica.names.Passes``.

    Args:
        endpoint: of the buffer's socket for learners.
        settings: of the link.
        rank: of this learner.
    """

    def __init__(self, endpoint: str, *, settings: LinksConfig, rank: int) -> None:
        self._settings = settings
        self._who = names.role_of(rank)
        self.asker = Asker(endpoint, settings=settings, rank=rank)
        self._sender: Sender | None = None
        self._turn = asyncio.Lock()
        """One round at a time."""
        self._number = 0
        """Of the last question for a version."""
        self._failure: AtpoError | None = None
        """Why nothing is passed on any more."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="uplink", daemon=True)
        self._thread.start()
        self._task: concurrent.futures.Future[None] | None = None

    # --- from any other thread ---------------------------------------------------------------------------------

    def look(self) -> j.LearnerWelcome:
        """``Asker.look``."""
        return self._call(self.asker.look())

    def join(self, replica: str) -> j.LearnerWelcome:
        """``Asker.join``."""
        return self._call(self.asker.join(replica))

    def begin(self, replica: Replica, taken: dict[str, int]) -> None:
        """From now on pass on what is written in ``replica``, of which so much has arrived."""
        self._sender = Sender(replica, self.asker, taken=taken, max_message_bytes=self._settings.max_message_bytes)
        self._task = asyncio.run_coroutine_threadsafe(self._pass_on_for_ever(self._sender), self._loop)
        publish_facts("uplink", self._facts)

    def next_version(self) -> int:
        """As of ``RunDir``: the buffer counts.  Raises PeerLost."""
        self._number += 1
        return self._version("the number of its next version", number=self._number).version

    def skip_versions(self, upto: int) -> int:
        """As of ``RunDir``.  Raises PeerLost."""
        return self._version("the count of versions", number=0, above=upto, take=False).raised

    def pass_on(self) -> None:
        """Returns once all that was written by now is in the run's folder.  Waits for: the buffer, its disk.

        Raises PeerLost where nothing will get there any more.
        """
        with waits.waiting("the learner", "its files to reach the run's folder", on="buffer"):
            self._call(self._pass_all_on())

    def close(self, *, timeout_s: float = FAREWELL_S) -> None:
        """Pass on what is left, as far as that is possible in time, and end.  Idempotent."""
        if not self._thread.is_alive():
            return
        try:
            self._call(self._farewell(), timeout_s=timeout_s)
        except (TimeoutError, concurrent.futures.TimeoutError, AtpoError) as exc:
            behind = 0 if self._sender is None else self._sender.behind_bytes
            if behind and not isinstance(exc, PeerLost):
                log.warning(
                    "%d bytes that this learner wrote have not reached the run's folder; they do once it is started "
                    "again with the same folder (--dir)", behind,
                )  # fmt: skip
        finally:
            with contextlib.suppress(TimeoutError):  # the role's exit code comes after this
                self._call(self._end(), timeout_s=timeout_s)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout_s)

    def _call(self, work: Coroutine[Any, Any, T], *, timeout_s: float | None = None) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        finally:
            future.cancel()

    def _version(self, what: str, *, number: int, above: int = -1, take: bool = True) -> j.VersionGiven:
        return self._call(self._ask_version(what, number=number, above=above, take=take))

    def _facts(self) -> dict[str, object]:
        sender = self._sender
        return {"behind_bytes": 0 if sender is None else sender.behind_bytes, "trouble": self.asker.trouble or "no"}

    # --- on its own loop ---------------------------------------------------------------------------------------

    async def _ask_version(self, what: str, *, number: int, above: int, take: bool) -> j.VersionGiven:
        wait = BoundedWait(self._who, what, self._settings, time.monotonic, log=log, on="buffer")
        asker = self.asker
        wanted = j.VersionWanted(run=asker.run, life=asker.life, number=number, above=above, take=take)
        try:
            answer: j.VersionGiven = await asker.ask(wanted, wait=wait)
        except (BadMessage, WaitTimeout) as exc:
            raise PeerLost(f"{self._who} gets no number for its next version: {exc}") from exc
        return answer

    async def _pass_on_for_ever(self, sender: Sender) -> None:
        """Waits for: the clock, then the buffer.  Ended by: close(), another learner in this one's place."""
        while self._failure is None:
            moved = await self._round(sender, status=True)
            if not moved:
                await asyncio.sleep(EVERY_S)

    async def _round(self, sender: Sender, *, status: bool) -> bool:
        try:
            async with self._turn:
                return await sender.round(status=status)
        except PeerLost as exc:
            self._failure = exc
            log.error("nothing is passed on to the run's folder any more: %s", exc)
            raise
        # Whatever it was, what is written later must still get there.
        except Exception as exc:
            log.exception("what this learner wrote could not be passed on: %s", exc)
            await asyncio.sleep(EVERY_S)
            return False

    async def _pass_all_on(self) -> None:
        sender = self._sender
        if self._failure is not None:
            raise self._failure
        while sender is not None and await self._round(sender, status=False):
            pass

    async def _farewell(self) -> None:
        """Pass on the last lines and the last status, and say goodbye."""
        if self._sender is None or self._failure is not None:
            return
        await self._pass_all_on()
        await self._round(self._sender, status=True)
        await self.asker.ask(j.LearnerGone(run=self.asker.run, rank=self.asker.rank, life=self.asker.life))

    async def _end(self) -> None:
        if self._task is not None:
            self._task.cancel()
        await self.asker.close()
