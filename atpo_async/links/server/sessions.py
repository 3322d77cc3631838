"""A server's clients: one life of one of them, and who makes way when there are too many."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from atpo_async.wire import codec

Frames = Sequence[codec.Buffer]
"""Of one message."""

MAX_PEERS = 4096
MAX_PEERS_OF_A_KEY = 1024
"""So that one host cannot fill the table for all."""
GONE_BEATS = 5
"""Heartbeats without a sign of life after which a client makes way for another, where the table is full."""


@dataclass(slots=True, eq=False)
class Working:
    """A handler at work, or waiting for its turn: for the log."""

    what: str
    since: float
    reported_s: float = 0.0
    task: asyncio.Task[None] | None = None


@dataclass(slots=True, eq=False)
class Session:
    """One life of one client."""

    routing_id: bytes
    owner: str
    """The name of its key; empty without keys."""
    name: str
    """What handlers and logs call it."""
    nonce: int
    heard_at: float
    useful: bool = False
    """It has sent something that the handler took."""
    # Sends: base <= settled <= handled <= expected.  None until the client has said where it stands.
    expected: int | None = None
    handled: int = 0
    settled: int = 0
    base: int = 0
    queue: deque[tuple[Any, Frames]] = field(default_factory=deque)
    queued_bytes: int = 0
    begun: Any = None
    """What the handler's first attempt on the queue's first message came to: an awaitable, or its exception."""
    refusals: dict[int, str] = field(default_factory=dict)
    worker: asyncio.Task[None] | None = None
    working: Working | None = None
    due: bool = False
    # Requests.
    requests: dict[int, Working] = field(default_factory=dict)
    """Being worked on, and those that wait for it."""
    waiting: deque[tuple[int, Any, Frames]] = field(default_factory=deque)
    """Requests whose turn comes when earlier replies have left."""
    waiting_bytes: int = 0
    replies: OrderedDict[int, list[codec.Buffer]] = field(default_factory=OrderedDict)
    reply_bytes: int = 0
    held: deque[int] = field(default_factory=deque)
    """Requests whose replies wait for room on the way out."""
    largest_reply: int = 0
    """Bytes; halves with every smaller one."""

    @property
    def idle(self) -> bool:
        """Nothing of it is being worked on or left to acknowledge."""
        return self.worker is None and self.settled == self.handled and not self.requests


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerInfo:
    """A client as its server sees it."""

    identity: str
    """Its name; with keys the name of its key before it, ``gpu-7/actor-0``."""
    silent_s: float
    """Since its last sign of life."""
    queued: int
    """Sends taken and not handled yet."""
    unsettled: int
    """Sends handled and not settled yet; see ``Server``'s ``settled``."""
    requests: int
    """Requests being worked on."""


def find_room(sessions: Iterable[Session], owner: str, now: float, heartbeat_s: float) -> tuple[Session | None, str]:
    """Who has to make way for a newcomer, and why there is no room, where there is none and nobody has to.

    Those that never sent anything of use go first, the oldest of them; then those that have been silent for longer than
    any client of ours is, the longest silent first.

    Args:
        sessions: oldest first.
        owner: the newcomer's key; empty without keys.
    """
    everybody = list(sessions)
    own = [session for session in everybody if session.owner == owner] if owner else []
    if len(own) >= MAX_PEERS_OF_A_KEY:
        candidates, full = own, f"{MAX_PEERS_OF_A_KEY} of the key {owner!r}"
    elif len(everybody) >= MAX_PEERS:
        candidates, full = everybody, str(MAX_PEERS)
    else:
        return None, ""
    useless = next((session for session in candidates if session.idle and not session.useful), None)
    if useless is not None:
        return useless, ""
    gone = [s for s in candidates if s.idle and now - s.heard_at > GONE_BEATS * heartbeat_s]
    if gone:
        return min(gone, key=lambda session: session.heard_at), ""
    return None, f"the table of peers is full: {full}, all of them alive"
