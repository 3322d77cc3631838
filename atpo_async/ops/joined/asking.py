"""Requests of a joined learner, repeated until the buffer answers: over restarts of the buffer and broken links."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from typing import Any

from atpo_async.config import LinksConfig
from atpo_async.core.errors import BadMessage, PeerLost, SetupError, WaitTimeout
from atpo_async.links.client import Client
from atpo_async.run.replica import names
from atpo_async.status.waits import BoundedWait
from atpo_async.wire import joined as j
from atpo_async.wire.messages import PROTOCOL, BufferToLearner, NotYet, Refused

log = logging.getLogger("atpo.joined")

REQUEST_S = 15.0
"""For one answer; the buffer answers within seconds even where its disk is full."""
KNOCK_S = 5.0
"""For an answer while nothing is known of the buffer yet."""
PAUSE_S, PAUSE_MAX_S = 0.1, 5.0
REPEAT_S = 30.0
"""Between two log lines about a trouble that lasts."""
TAKEN_OVER_BEATS = 6
"""Heartbeats after which another learner that seems to be at work is believed to be."""


class Asker:
    """One rank's requests.  On one event loop; ``close`` at the end.

    Args:
        endpoint: of the buffer's socket for learners.
        settings: of the link.
        rank: of this learner.
    """

    def __init__(self, endpoint: str, *, settings: LinksConfig, rank: int) -> None:
        self.endpoint = endpoint
        self.rank = rank
        self.life = secrets.token_hex(8)
        self.trouble = ""
        """Why the last request was not answered; empty where it was."""
        self.run = self.replica = ""
        """As the buffer says, once this learner has joined."""
        self._settings = settings
        self._client: Client | None = None
        self._opening = asyncio.Lock()
        self._joining = asyncio.Lock()
        self._logged_at = -REPEAT_S

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def look(self) -> j.LearnerWelcome:
        """Which run is there.  Waits for: the buffer.  Unblocked by: its answer; given up after ``links.give_up_s``.

        Raises:
            SetupError: the buffer refuses, or it is no socket for learners.
            WaitTimeout: nothing answers.
        """
        welcome = await self._hello(joins=False, replica="")
        self.run = welcome.run
        return welcome

    async def join(self, replica: str) -> j.LearnerWelcome:
        """Take a place in the run, with a replica of this identity.

        Raises:
            SetupError: another learner is at work, or the buffer refuses.
            WaitTimeout: nothing answers any more.
        """
        welcome = await self._hello(joins=True, replica=replica)
        self.replica = welcome.replica
        return welcome

    async def ask(self, message: Any, *, wait: BoundedWait | None = None) -> Any:
        """The buffer's answer to a message of this life.  Waits for: the buffer, its disk.

        Args:
            wait: bounds it; None: as long as it takes.

        Raises:
            BadMessage: it refuses the message.
            PeerLost: another learner has taken this one's place.
            WaitTimeout: ``wait`` has ended.
        """
        pause_s = PAUSE_S
        while True:
            answer = await self._once(message, timeout_s=REQUEST_S)
            if isinstance(answer, j.HelloWanted):
                await self._join_again()
                continue
            if isinstance(answer, Refused):
                raise BadMessage(answer.reason)
            if not isinstance(answer, str | NotYet):
                self.trouble = ""
                return answer
            self._note(answer if isinstance(answer, str) else answer.waiting_for)
            if wait is not None:
                wait.again(self.trouble)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_MAX_S)

    # --- one request

    async def _once(self, message: Any, *, timeout_s: float) -> Any:
        """The answer, or why there is none."""
        client = await self._opened()
        try:
            return await client.request(message, timeout_s=timeout_s)
        except PeerLost as exc:
            if client.link_status()["failure"]:
                # For good: such a link answers nothing any more.
                async with self._opening:
                    if self._client is client:
                        self._client = None
                        await client.close()
            if trouble := client.trouble:
                return f"the buffer at {self.endpoint} does not let it in: {trouble}"
            return str(exc)
        except BadMessage as exc:
            return f"{self.endpoint} answers with what is no message of a buffer to a learner: {exc}"

    async def _opened(self) -> Client:
        async with self._opening:
            if self._client is None:
                client = Client(
                    self.endpoint,
                    peer="buffer",
                    identity=f"{names.role_of(self.rank)}-files-{self.life}",
                    receives=BufferToLearner,
                    settings=self._settings,
                )
                self._client = await client.__aenter__()
            return self._client

    def _note(self, why: str) -> None:
        self.trouble = why
        if time.monotonic() - self._logged_at > REPEAT_S:
            self._logged_at = time.monotonic()
            log.warning("what this learner writes does not reach the run's folder at the moment: %s", why)

    # --- being let in

    async def _hello(self, *, joins: bool, replica: str) -> j.LearnerWelcome:
        hello = j.LearnerHello(
            protocol=PROTOCOL,
            run=self.run,
            rank=self.rank,
            life=self.life,
            replica=replica,
            host=f"{socket.gethostname()} (process {os.getpid()})",
            joins=joins,
        )
        who = names.role_of(self.rank)
        wait = BoundedWait(who, "being let in", self._settings, time.monotonic, log=log, on="buffer")
        began, told = time.monotonic(), ""
        while True:
            answer = await self._once(hello, timeout_s=KNOCK_S)
            if isinstance(answer, j.LearnerWelcome):
                return answer
            if isinstance(answer, Refused):
                raise SetupError(f"{self.endpoint} refuses {who}: {answer.reason}{self._hint(answer.reason)}")
            if isinstance(answer, NotYet):
                # A learner that was killed seems alive for a few heartbeats.
                if time.monotonic() - began > TAKEN_OVER_BEATS * self._settings.heartbeat_s:
                    raise SetupError(f"the buffer at {self.endpoint} does not let {who} in: {answer.waiting_for}")
                answer = answer.waiting_for
            if not isinstance(answer, str):
                raise SetupError(f"{self.endpoint} answers {who} with {type(answer).__name__}: it is no buffer of ours")
            if answer != told:
                log.info("%s waits to be let in: %s", who, answer)
                told = answer
            wait.again(answer)
            await asyncio.sleep(PAUSE_S)

    def _hint(self, reason: str) -> str:
        if "learner_hello" not in reason:
            return ""
        return (
            "; this is no socket for learners: --join takes the address that `atpo train … --on hosts` prints for the "
            "learner, and the buffer's log names after 'learner at' (links.learner_port)"
        )

    async def _join_again(self) -> None:
        """The buffer has started anew.  Raises PeerLost where another learner has taken this one's place meanwhile."""
        async with self._joining:
            with contextlib.suppress(WaitTimeout):  # `ask` asks on, or gives up by its own wait
                try:
                    welcome = await self._hello(joins=True, replica=self.replica)
                except SetupError as exc:
                    raise PeerLost(str(exc)) from exc
                if welcome.replica != self.replica:
                    raise PeerLost("another learner has taken this one's place in the run")
