"""A client that goes past a server that fell silent to the next one on the way, and introduces itself there first."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from atpo_async.config import LinksConfig
from atpo_async.core.errors import AtpoError
from atpo_async.links.client.client import Client
from atpo_async.links.client.requests import PendingRequest
from atpo_async.links.frames import REQUEST, encode_within
from atpo_async.links.link import Link
from atpo_async.links.parcels import Parcel
from atpo_async.links.way import Way
from atpo_async.wire import codec
from atpo_async.wire.messages import Refused

log = logging.getLogger("atpo.links")

SILENT_BEATS = 3
"""Heartbeats without a sign of life of a server that seems connected, after which the next one is tried."""
UNCONNECTED_BEATS = 2
"""The same without a connection: a process that was killed is gone past within two heartbeats."""


class RoutedClient(Client):
    """A ``Client`` that knows more than one server for what it sends.

    What is not acknowledged is sent again to the next server, in order, and open requests are asked again: the
    server at the end must take a repeated message as harmless.

    Args:
        way: the servers; the one in use is connected to first.
        beside: another open link of this process, whose ZeroMQ context and threads it shares.
        others: as of ``Client``, but for the endpoint.
    """

    def __init__(
        self,
        way: Way,
        *,
        peer: str,
        identity: str,
        receives: Any,
        settings: LinksConfig,
        locate: Callable[[], str] | None = None,
        beside: Link | None = None,
    ) -> None:
        super().__init__(
            way.current.endpoint, peer=peer, identity=identity, receives=receives, settings=settings, locate=locate
        )
        self.way = way
        self._beside = beside
        self._server_key = way.current.server_key
        self.is_muted: Callable[[], bool] = lambda: False
        """Asked before each ping: true while the peer that this client speaks for shows no sign of life."""
        self.num_moves = 0
        """How often it has gone on to another server."""
        self._greeting: Callable[[], Any] | None = None
        self._on_greeted: Callable[[Any], None] = lambda answer: None
        self._greets: tuple[int, PendingRequest] | None = None
        """The greeting under way, with its number; nothing else is sent meanwhile."""
        self._unconnected_beats = 0
        self._is_introduced = True
        """The server in use knows this client; until then it is sent nothing but the greeting."""
        self._is_turned_away = False
        """It has refused the greeting."""
        self._parcels: deque[Parcel] = deque()

    # --- for the owner

    def introduce_by(self, greeting: Callable[[], Any], on_greeted: Callable[[Any], None]) -> None:
        """From now on, where there is more than one server: every new connection begins with a greeting.

        Args:
            greeting: returns the request that introduces this client to a server.
            on_greeted: called with the answer, before anything else is sent there; ``Refused`` never gets there.
        """
        self._greeting, self._on_greeted = greeting, on_greeted

    async def pass_on(self, parcel: Parcel, frames: Sequence[codec.Buffer]) -> None:
        """``send`` a message as the frames that it came in; ``parcel`` arrives once it is acknowledged or refused.

        Waits for: a place in the window.  Raises PeerLost as ``send``.
        """
        await self._put(parcel, frames)
        self._parcels.append(parcel)

    def _on_done(self, message: Any, refusal: str | None) -> None:
        if isinstance(message, Parcel):
            self._parcels.popleft()
            message.arrive(refusal)
        else:
            super()._on_done(message, refusal)

    # --- connections

    def _on_connected(self) -> None:
        if self._greeting is not None and self.way.has_others:
            self._is_introduced = False
            self._begin_greeting(self._greeting)
        super()._on_connected()

    def _on_lost(self) -> None:
        self._is_introduced = self._greeting is None or not self.way.has_others
        super()._on_lost()

    def _follow(self) -> None:
        super()._follow()
        if self.endpoint and self.endpoint != self.way.current.endpoint:
            self.way.at(self.endpoint)

    def _ping(self) -> None:
        if not self.is_muted():
            super()._ping()

    def _renew(self, whose: str) -> None:
        if self.is_muted():
            self._silent_beats = 0  # it hears nothing because it says nothing
        super()._renew(whose)
        self._unconnected_beats = 0 if self._connected else self._unconnected_beats + 1
        due = self._silent_beats > SILENT_BEATS
        if self.way.has_others and (due or self._unconnected_beats >= UNCONNECTED_BEATS or self._is_turned_away):
            self._go_past()

    def _go_past(self) -> None:
        """Use the next server on the way."""
        former, trouble = self.endpoint, f" ({self._trouble})" if self._trouble else ""
        hop = self.way.step()
        self.num_moves += 1
        self._silent_beats = self._unconnected_beats = 0
        self._is_turned_away, self._is_introduced = False, self._greeting is None
        log.warning("%s goes past %s%s, to %s", self.identity, former, trouble, hop.endpoint)
        self.move(hop.endpoint, hop.server_key)

    # --- greetings

    def _begin_greeting(self, greeting: Callable[[], Any]) -> None:
        self._end_greeting()
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        pending = PendingRequest("greeting", time.monotonic(), encode_within(greeting(), self._limits), answer)
        self._greets = self._requests.add(pending), pending
        answer.add_done_callback(self._greeted)

    def _end_greeting(self) -> None:
        if self._greets is not None:
            number, pending = self._greets
            self._greets = None
            self._requests.remove(number)
            pending.answer.cancel()

    def _greeted(self, answer: asyncio.Future[Any]) -> None:
        if self._greets is None or self._greets[1].answer is not answer or answer.cancelled():
            return
        self._end_greeting()
        try:
            welcome = answer.result()
            if isinstance(welcome, Refused):
                raise AtpoError(welcome.reason)
            self._on_greeted(welcome)
        except AtpoError as exc:
            log.error("%s is turned away by %s: %s", self.identity, self.endpoint, exc)
            self._trouble, self._is_turned_away = str(exc), True
            return
        self._is_introduced = True
        self._window.start_over()
        self._requests.start_over()
        self._transmit()

    def _transmit(self) -> None:
        if self._is_introduced:
            super()._transmit()
            return
        self._transmitting = False
        if self._greets is None or self._pump is None or self._pump.closed:
            return
        number, pending = self._greets
        if not pending.transmitted:
            link = self._link(REQUEST, number, self._requests.floor)
            pending.transmitted = self._pump.send((link, *pending.frames))

    def _close_sockets(self) -> None:
        self._end_greeting()
        super()._close_sockets()
