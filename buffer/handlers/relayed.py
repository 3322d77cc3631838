"""Peers that come through relays: who may speak for others, and by which proof an actor goes on under another name.

With keys a peer is called after its key: ``gpu-7/actor-0``.  What a relay passes on is called after the relay's key and
after what the relay calls it: ``relay-1/gpu-7/actor-0``.  So a relay can say what it likes under its own name only.  An
actor that goes past a relay comes under another name; the ticket that the buffer gave it under the former one proves
that both are one process, and its leases go over to the new name.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from atpo_async.config import Config
from atpo_async.core.errors import SetupError
from atpo_async.links.keys import SERVER_KEY, load_pair, why_not_said
from atpo_async.wire import messages as m
from atpo_async.wire.relayed import MAX_HOPS

GONE_BEATS = 10
"""Heartbeats without a word of a relay after which it is no longer shown."""
MOST_RELAYS = 256
"""Known at a time: a relay's key may introduce itself under many names."""
_TICKET_CHARS = 40


class KnownRelay(NamedTuple):
    """A relay, as it says itself."""

    host: str
    heard_at: float


class RunContext(Protocol):
    """What a buffer, or the front of one with shards, has for this."""

    @property
    def config(self) -> Config: ...

    @property
    def run(self) -> str: ...


class RelayedPeers:
    """What the buffer knows of relays and of the peers behind them.

    Args:
        context: the buffer's.
    """

    def __init__(self, context: RunContext) -> None:
        self.is_relay: Callable[[str], bool] = lambda peer: True
        """Whether the key of a peer may be a relay's (``Server.is_relay``)."""
        self.moves = 0
        """Actors that have gone on under another name."""
        self._context = context
        self._relays: dict[str, KnownRelay] = {}
        keys_dir = context.config.links.keys_dir
        self._has_keys = keys_dir is not None
        secret = b""
        if keys_dir is not None:
            with contextlib.suppress(SetupError):  # said when the socket is bound, which needs it too
                secret = load_pair(keys_dir, SERVER_KEY)[1]
        # The same for every buffer of the run, also for one that is started again.
        self._secret = hashlib.sha256(b"atpo ticket\0" + secret + b"\0" + context.run.encode()).digest()

    # --- names

    def depth(self, peer: str) -> int:
        """How many relays a peer comes through, by its name."""
        return max(0, peer.count("/") - self._has_keys)

    def is_named_by_one(self, peer: str) -> bool:
        """Whether a relay has named a peer."""
        return self.depth(peer) > 0

    def refusal(self, peer: str, message: Any) -> str:
        """Why a peer may not send this; empty where it may."""
        if not self._has_keys:
            return ""
        return why_not_said(peer, is_relay=self.is_relay(peer), hello=isinstance(message, m.RelayHello))

    # --- tickets

    def ticket(self, peer: str) -> str:
        """What proves that its bearer may go on as ``peer`` under another name."""
        return hmac.new(self._secret, peer.encode(), hashlib.sha256).hexdigest()[:_TICKET_CHARS]

    def is_right(self, peer: str, ticket: str) -> bool:
        return hmac.compare_digest(self.ticket(peer).encode(), ticket.encode())

    # --- relays

    def hello(self, peer: str, hello: m.RelayHello, now: float) -> str:
        """A relay introduces itself.  Returns why it may not be one; empty where it may."""
        if hello.protocol != m.PROTOCOL:
            return f"relay {hello.relay} speaks protocol {hello.protocol}, this buffer {m.PROTOCOL}"
        if hello.run not in ("", self._context.run):
            return f"relay {hello.relay} belongs to run {hello.run!r}, this buffer to {self._context.run!r}"
        if len(hello.via) > MAX_HOPS:
            return f"relay {hello.relay} is {len(hello.via)} relays away from the buffer, {MAX_HOPS} are the most"
        self._relays[peer] = KnownRelay(hello.host, now)
        if len(self._relays) > MOST_RELAYS:
            del self._relays[min(self._relays, key=lambda name: self._relays[name].heard_at)]
        return ""

    def is_known(self, peer: str) -> bool:
        """Whether a peer is a relay itself, and no actor."""
        return peer in self._relays

    def facts(self, actors: list[str], now: float) -> dict[str, str]:
        """For the buffer's status: each relay that was heard from lately, where it runs, and which actors come through
        it.

        Args:
            actors: names of those that are alive.
            now: seconds.
        """
        found = {}
        for peer, relay in sorted(self._relays.items()):
            if now - relay.heard_at > GONE_BEATS * self._context.config.links.heartbeat_s:
                continue
            prefix = f"{peer.rpartition('/')[0] if self._has_keys else peer}/"
            through = sorted(name for name in actors if name.startswith(prefix) and name not in self._relays)
            found[peer] = f"on {relay.host or '?'}, {len(through)} actors: {', '.join(through) or 'none'}"
        return found
