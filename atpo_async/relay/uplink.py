"""A relay's own place in the run: it introduces itself upstream, again and again, and learns what is new there."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable

import msgspec

from atpo_async.config import LinksConfig
from atpo_async.core.errors import PeerLost, SetupError
from atpo_async.links.addresses import seen_from
from atpo_async.links.client import RoutedClient
from atpo_async.links.way import Way
from atpo_async.run.host import host_name
from atpo_async.status.waits import BoundedWait
from atpo_async.wire.messages import PROTOCOL, BufferToActor, Refused, RelayHello, Welcome
from atpo_async.wire.relayed import MAX_HOPS

log = logging.getLogger("atpo.relay")

ANSWER_S = 2.0
"""How long one request to join may take before it is asked anew."""


class Uplink:
    """A relay's link of its own to the buffer or to the next relay.

    Args:
        name: of the relay.
        way: to the buffer; only its first server is known.
        run: identity of the run that it serves; empty for whichever runs there.
        settings: of links.
        on_welcome: called with each welcome, its addresses as they are reached from here, and the key of the server in
            use.
    """

    def __init__(
        self, name: str, *, way: Way, run: str, settings: LinksConfig, on_welcome: Callable[[Welcome, str], None]
    ) -> None:
        self.identity = f"{name}-{secrets.token_hex(8)}"
        """Unlike that of any other relay: one that comes back here has gone in a circle."""
        self.link = RoutedClient(way, peer="buffer", identity=name, receives=BufferToActor, settings=settings)
        self.link.introduce_by(self._hello, self._welcomed)
        self.finished = False
        """The run is over."""
        self.joined = asyncio.Event()
        self._name, self._run, self._settings = name, run, settings
        self._on_welcome = on_welcome
        self._said = ""

    @property
    def run(self) -> str:
        """Identity of the run; empty where it is not known yet."""
        return self._run

    async def stay(self) -> None:
        """Introduce this relay once a heartbeat, until the run is over.

        Waits for: upstream's answer.  Unblocked by: that; given up after ``links.give_up_s`` without one.

        Raises:
            SetupError: upstream refuses it for good, or is none.
            WaitTimeout: there was no answer for so long.
        """
        wait = BoundedWait(
            f"relay {self._name}", "its place in the run", self._settings, time.monotonic, log=log, on="buffer"
        )
        while not self.finished:
            missing = await self._ask()
            if missing:
                if missing != self._said:
                    log.warning("waits: %s", missing)
                wait.again(missing)
            else:
                wait.moved()
            self._said = missing
            await asyncio.sleep(self._settings.heartbeat_s)

    def passed_on(self, hello: RelayHello) -> RelayHello | Refused:
        """What another relay says of itself, on its way upstream through this one."""
        if self.identity in hello.via:
            circle = " -> ".join((*hello.via[hello.via.index(self.identity) :], self.identity))
            return Refused(reason=f"relays that join one another in a circle lead to no buffer: {circle}")
        if len(hello.via) >= MAX_HOPS:
            return Refused(reason=f"relay {hello.relay} is more than {MAX_HOPS} relays away from the buffer")
        return msgspec.structs.replace(hello, via=(*hello.via, self.identity))

    def _hello(self) -> RelayHello:
        return RelayHello(protocol=PROTOCOL, run=self._run, relay=self._name, via=(self.identity,), host=host_name())

    async def _ask(self) -> str:
        """Why there is no answer; empty where there is one.  Raises SetupError."""
        where = self.link.endpoint
        try:
            answer = await self.link.request(self._hello(), timeout_s=ANSWER_S)
        except PeerLost:
            if trouble := self.link.trouble:
                return f"{where} does not let it in: {trouble}" + (" (docs/keys.md)" if "key" in trouble else "")
            return f"{where} does not answer" + ("" if self.link.connected else " (nothing listens there)")
        if isinstance(answer, Refused):
            hint = ""
            if "is unknown here" in answer.reason:
                hint = ": it is no port for actors; join the buffer's, or that of another relay"
            raise SetupError(f"{where} refuses relay {self._name}{hint} ({answer.reason})")
        if not isinstance(answer, Welcome):
            return f"{where} answers with {type(answer).__name__}"
        self._welcomed(answer)
        return ""

    def _welcomed(self, welcome: Welcome) -> None:
        if self._run and welcome.run != self._run:
            raise SetupError(f"{self.link.endpoint} serves run {welcome.run!r}, this relay run {self._run!r}")
        link = self.link
        link.way.learn(welcome.way)
        self._run = welcome.run
        self.finished = self.finished or welcome.finished
        if not self.joined.is_set():
            beyond = f", {len(link.way.rest) - 1} more on the way" if len(link.way.rest) > 1 else ""
            log.info("joined run %s at %s%s", welcome.run, link.endpoint, beyond)
        self.joined.set()
        found = msgspec.structs.replace(
            welcome,
            weights_endpoint=seen_from(link.endpoint, welcome.weights_endpoint),
            announce_endpoint=seen_from(link.endpoint, welcome.announce_endpoint),
        )
        self._on_welcome(found, link.way.current.server_key)
