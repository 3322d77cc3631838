"""The protocol of a weight transport: how the bytes of a version get from the learner to an actor.

A transport has two halves: the learner's publisher drives the ``Sender``, an actor's weights drive the ``Receiver``.
The rest is the same for every transport and stays outside: announcements and manifests, the choice of the file's
folder, the digests of what arrived, retries, the probe, and which versions there are (the newest two).
"""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from atpo_async.config import WeightsConfig
from atpo_async.core.errors import AtpoError
from atpo_async.wire.digests import file_digests
from atpo_async.wire.messages import (
    ActorToLearner,
    ChunkRequest,
    LearnerToActor,
    WeightsAnnounced,
    WeightsManifest,
)


class TransportUnavailable(AtpoError):
    """This transport cannot bring the version to this actor now; the message says why, and the next one is tried."""


class VersionWithdrawn(AtpoError):
    """A newer version has replaced the one that was being fetched."""


class Payload:
    """The bytes of a version or of a difference as an open file: they stay as long as this object, even if the file is
    removed.

    Args:
        source: path of the file, or a descriptor of it, which stays the caller's.
    """

    def __init__(self, source: Path | int) -> None:
        self._fd = os.dup(source) if isinstance(source, int) else os.open(source, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)

    @property
    def size(self) -> int:
        """Bytes."""
        return os.fstat(self._fd).st_size

    @property
    def digest(self) -> str:
        """BLAKE3 of all bytes, hex.  Raises OSError."""
        return file_digests(self._fd, [(0, self.size)])[0]

    def read(self, start: int, length: int) -> np.ndarray:
        """uint8[length]."""
        return np.frombuffer(os.pread(self._fd, length, start), dtype=np.uint8)

    def read_into(self, start: int, space: np.ndarray) -> None:
        """Fill uint8[N] with the bytes from ``start`` on.  Raises OSError, also where the file is shorter."""
        view = space.data
        while len(view):
            count = os.preadv(self._fd, [view], start)
            if count == 0:
                raise OSError(errno.EIO, f"a payload ends at byte {start}, {len(view)} bytes early")
            view, start = view[count:], start + count


class OfferedVersion(NamedTuple):
    """A version that the learner has written."""

    manifest: WeightsManifest
    path: Path
    """The whole payload; the file exists until the version is withdrawn, unless it is removed from outside."""
    payload: Payload
    """The same bytes, which stay even if the file is removed."""


class WantedVersion(NamedTuple):
    """A version that an actor is about to take up."""

    announced: WeightsAnnounced
    manifest: WeightsManifest


class SenderContext(NamedTuple):
    """What a transport gets from the learner that makes its half."""

    run: str
    settings: WeightsConfig


class ReceiverContext(NamedTuple):
    """What a transport gets from the actor that makes its half."""

    run: str
    settings: WeightsConfig
    ask: Callable[[ActorToLearner], Awaitable[LearnerToActor]]
    """One request to the learner and its answer.  Raises PeerLost after ``weights.fetch_timeout_s``."""


class Sender:
    """The learner's half.  Subclasses override ``offer``, and of the rest what they need.

    ``offer`` and ``withdraw`` are called in a thread of their own, one at a time, while training goes on: they delay
    the announcement of the version, and training only where they are not done when the next version is due.  ``place``
    and ``answer`` are called on the learner's event loop.
    """

    def offer(self, version: OfferedVersion) -> None:
        """Make a version available; it is announced when this has returned."""
        raise NotImplementedError

    def withdraw(self, version: int) -> None:
        """The learner no longer offers this version."""

    def place(self, version: OfferedVersion) -> str | None:
        """What the announcement passes to receivers (``WeightsAnnounced.shm_path``); None where they need nothing."""
        return None

    def answer(self, request: ChunkRequest, version: OfferedVersion) -> LearnerToActor | None:
        """The reply to an actor that asks for a part of a version; None where this transport serves no parts."""
        return None

    @property
    def counters(self) -> dict[str, float]:
        """Totals since the start, for metrics: reported as ``weights/<name>``."""
        return {}

    def close(self) -> None:
        """The learner ends.  Idempotent."""


class Receiver:
    """An actor's half.  Subclasses override ``fetch``, and of the rest what they need.  All on one event loop."""

    async def fetch(self, wanted: WantedVersion, target: Path) -> None:
        """Bring the payload of ``wanted`` to the file ``target``, whole; its size and digests are checked afterwards.

        Raises:
            TransportUnavailable: this transport cannot bring it now; the message says why.
            VersionWithdrawn: a newer version has replaced it.
            PeerLost: the learner did not answer in time; the version is tried again at the next poll.
            OSError: the folder of ``target`` cannot take it.
        """
        raise NotImplementedError

    def verified(self, wanted: WantedVersion, path: Path) -> None:
        """What ``fetch`` brought has passed its check.  The file is removed when the engine has read it: a receiver
        that needs it later, as a base for differences or to serve others, makes a link to it or opens it now."""

    def refused(self, wanted: WantedVersion) -> bool:
        """What ``fetch`` brought has failed its check.  True where another ``fetch`` would bring it in another way and
        is to follow at once; the version comes again at the next poll otherwise."""
        return False

    @property
    def base(self) -> int:
        """The version whose bytes this receiver still has and takes differences to; -1 where it takes none.  The
        manifest names the differences that lead on from there."""
        return -1

    def beside(self, wanted: WantedVersion) -> Path | None:
        """The folder beside which this actor's files are best made, so that they can be linked; None for any."""
        return None

    @property
    def counters(self) -> dict[str, float]:
        """Totals since the start, for metrics: reported as ``weights/<name>``."""
        return {}

    def close(self) -> None:
        """The actor ends, or looks for its learner elsewhere.  Idempotent."""


class Transport(Protocol):
    """What ``weights.transport`` names: a class or function that takes ``weights.transport_options`` by keyword and
    returns this.  Learner and actors each make their own from their own configuration."""

    def sender(self, context: SenderContext) -> Sender: ...

    def receiver(self, context: ReceiverContext) -> Receiver: ...
