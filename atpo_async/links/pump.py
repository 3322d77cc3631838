"""A ZeroMQ socket on the event loop: passes on incoming messages in bursts, and sends without waiting."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import zmq

from atpo_async.wire import codec

log = logging.getLogger("atpo.links")

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]

# As plain integers: these are used for every frame.
_NOBLOCK = int(zmq.NOBLOCK)
_NOBLOCK_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_ZERO_COPY_BYTES = 1 << 16
_TRACKED_BYTES = 1 << 12
"""Frames of replies that are smaller are not counted: their number is bounded."""

BURST = 8
"""Messages taken from a socket, or handled, before others on the loop get their turn (what travelled together is not
parted).  From a commit's end to the next one's beginning the loop goes round several times, so a round has to be short
(measured: 32 costs an eighth of the throughput)."""
_MAX_FRAMES = 16
"""Frames of a message; further ones, from a hostile peer, are read and discarded."""


class Pump:
    """A zmq socket on the event loop.

    zmq's descriptor is edge-triggered and shared by both directions: a send can swallow the edge of
    an input.  So after every send, and after a burst that may have left input behind, the socket is looked at again.

    Args:
        socket: non-blocking use only.
        on_message: called with the frames of a message and with the sender's user id, which the allow-list gave it;
            returns how many messages were in it, where that is not one.
        on_turn: called after each burst.
        users: whether there is an allow-list; else the user id is empty.
    """

    def __init__(
        self,
        socket: Socket,
        on_message: Callable[[list[codec.Buffer], str], int | None],
        on_turn: Callable[[], None] | None = None,
        *,
        users: bool = False,
    ) -> None:
        self._socket = socket
        self._on_message = on_message
        self._on_turn = on_turn
        self._users = users
        self._loop = asyncio.get_running_loop()
        self._scheduled = False
        self._behind_since: float | None = None
        """Since when the socket has had more messages than were taken from it; None where it has none."""
        self._fd = int(socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._turn)
        self.look_again()

    @property
    def closed(self) -> bool:
        return bool(self._socket.closed)

    @property
    def emptied_at(self) -> float:
        """When the socket last had no further message, which is now unless it is behind: all that had come by then was
        passed on."""
        return time.monotonic() if self._behind_since is None else self._behind_since

    def send(self, frames: Sequence[codec.Buffer]) -> bool:
        """Whether the socket took them; it does not when no peer is connected, or when the peer does not read."""
        send, last = self._socket.send, len(frames) - 1
        try:
            for i, frame in enumerate(frames):
                # Large frames go out without a copy; for small ones the copy is cheaper.
                send(frame, _NOBLOCK if i == last else _NOBLOCK_MORE, len(frame) < _ZERO_COPY_BYTES)
        except zmq.ZMQError as exc:
            if _not_taken(exc):
                return False
            raise
        if not self._scheduled:
            self.look_again()
        return True

    def send_tracked(self, frames: Sequence[codec.Buffer]) -> list[zmq.MessageTracker] | None:
        """``send``; returns trackers of the larger frames, done once libzmq has sent them; None where not taken."""
        trackers = []
        try:
            for i, frame in enumerate(frames):
                flags = _NOBLOCK if i == len(frames) - 1 else _NOBLOCK_MORE
                if len(frame) < _TRACKED_BYTES:
                    self._socket.send(frame, flags, True)
                    continue
                tracker = self._socket.send(
                    zmq.Frame(frame, track=True, copy=False, copy_threshold=0), flags, False, True
                )
                assert isinstance(tracker, zmq.MessageTracker)
                trackers.append(tracker)
        except zmq.ZMQError as exc:
            if _not_taken(exc):
                return None
            raise
        self.look_again()
        return trackers

    def look_again(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._turn)

    def close(self) -> None:
        if not self._socket.closed:
            self._loop.remove_reader(self._fd)
            self._socket.close(0)

    def _turn(self) -> None:
        self._scheduled = False
        receive, on_message, users = self._socket.recv, self._on_message, self._users
        taken = 0
        while taken < BURST:
            if self._socket.closed:
                return
            try:
                # As frame objects: those know whether more follow, asking the socket costs as much as a frame.
                frame = receive(_NOBLOCK, False)
                first = frame
                frames: list[codec.Buffer] = [frame.bytes]
                while frame.more:
                    frame = receive(_NOBLOCK, False)
                    if len(frames) < _MAX_FRAMES:
                        frames.append(frame.bytes if len(frame) < _ZERO_COPY_BYTES else frame.buffer)
            except zmq.Again:
                self._behind_since = None
                break
            taken += 1
            try:
                taken += (on_message(frames, str(first.get("User-Id")) if users else "") or 1) - 1
            # Whatever one message did, the ones behind it must still be read: no further edge would announce them.
            except Exception:
                log.exception("a frame could not be handled")
        else:
            if self._behind_since is None:
                self._behind_since = time.monotonic()
            self.look_again()
        if self._on_turn is not None:
            self._on_turn()


def _not_taken(exc: zmq.ZMQError) -> bool:
    """Whether a send failed because no peer is connected, or because the peer does not read."""
    return isinstance(exc, zmq.Again) or exc.errno == zmq.EHOSTUNREACH
