"""Messages of relays, which pass on what actors and a buffer say to each other, and parts of those that they pass on.

A relay introduces itself upstream, to the buffer or to another relay, as an actor does.  What it passes on from others
carries which relays it came through; what it passes back says how to go on without it.
"""

from __future__ import annotations

import msgspec

from atpo_async.core.bounds import Id, Name, Text
from atpo_async.wire.message import Message

MAX_HOPS = 8
"""Relays between an actor and the buffer."""


class Hop(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A server on the way up to the buffer: a relay, or the buffer itself."""

    endpoint: Text
    server_key: Name = ""
    """Its public key (Z85); empty without keys, and for the key that the reader has as ``server.key``."""


class RelayHello(Message, frozen=True, tag="relay_hello"):
    """Relay introduces itself, and asks every few seconds what is new.  Answered by ``Welcome``, or by ``Refused``."""

    protocol: Id
    run: Name
    """The run it serves; empty to join whatever runs there."""
    relay: Name
    """What it calls itself."""
    via: tuple[Name, ...]
    """Identities of the relays that this came through, the one that sent it first.  A relay that finds its own there is
    part of a loop."""
    host: Name = ""
    """Name of its machine, for people."""
