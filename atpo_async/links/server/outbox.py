"""Bytes that a server has handed to its socket and libzmq has not sent yet: bounded for each peer and in all.

libzmq bounds its queues in messages.  With weights in them, a peer that asks and does not read would cost gigabytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Protocol

ALL_PEERS = 4
"""Times the bound of one peer: the bound of all peers together."""


class Sent(Protocol):
    """Whether libzmq has let go of a frame (``zmq.MessageTracker``)."""

    @property
    def done(self) -> bool: ...


class Outbox:
    """Bytes on their way, by peer.

    A peer that has nothing on its way may always be sent one message, until twice the bound of all is used up.  So
    peers that do not read cannot keep the others from being answered.

    Args:
        peer_bytes: of one peer, but for a single message that is larger.
    """

    def __init__(self, peer_bytes: int) -> None:
        self.peer_bytes = peer_bytes
        self.all_bytes = ALL_PEERS * peer_bytes
        self.unsent_bytes = 0
        """Of all peers, at the last look."""
        self.most_unsent_bytes = 0
        """The highest value of ``unsent_bytes`` so far."""
        self._peers: dict[bytes, deque[tuple[tuple[Sent, ...], int]]] = {}
        self._bytes: dict[bytes, int] = {}

    def unsent(self, peer: bytes) -> int:
        """Bytes on their way to one peer now."""
        queue = self._peers.get(peer)
        while queue and all(tracker.done for tracker in queue[0][0]):
            nbytes = queue.popleft()[1]
            self._bytes[peer] -= nbytes
            self.unsent_bytes -= nbytes
        if queue is not None and not queue:
            del self._peers[peer], self._bytes[peer]
        return self._bytes.get(peer, 0)

    def look(self) -> int:
        """Bytes on their way to all peers now."""
        for peer in list(self._peers):
            self.unsent(peer)
        return self.unsent_bytes

    def has_space(self, peer: bytes, nbytes: int) -> bool:
        """Whether so much more may be sent to a peer now."""
        unsent = self.unsent(peer)
        if unsent and unsent + nbytes > self.peer_bytes:
            return False
        bound = self.all_bytes if unsent else 2 * self.all_bytes
        return self.unsent_bytes + nbytes <= bound or self.look() + nbytes <= bound or self.unsent_bytes == 0

    def add(self, peer: bytes, trackers: Iterable[Sent], nbytes: int) -> None:
        """So much was handed over, in frames that are sent once all ``trackers`` are done."""
        self._peers.setdefault(peer, deque()).append((tuple(trackers), nbytes))
        self._bytes[peer] = self._bytes.get(peer, 0) + nbytes
        self.unsent_bytes += nbytes
        self.most_unsent_bytes = max(self.most_unsent_bytes, self.unsent_bytes)
