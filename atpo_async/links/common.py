"""What the two ends of a link agree on: settings, link frames, the size a message may have, and what they tell of
themselves.  Nothing here knows ZeroMQ."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atpo_async.config import LinksConfig
from atpo_async.core.errors import BadMessage
from atpo_async.wire import codec

LINK = struct.Struct("<2sBQQQ")
"""A link frame: magic, kind, the client's session, two numbers whose meaning depends on the kind."""
MAGIC = b"a1"
SEND, REQUEST, PING, ACK, REFUSE, REPLY, PONG, REPLACED, DENIED, SENDS, FULL = range(1, 12)
"""SENDS is several in a row in one frame, as records (``wire.records``): most of what a small message costs on
its way is what each frame costs at both ends, whatever is in it.  FULL is a server's that has no room for a further
client; the reason is in its second frame."""
MAX_SENDS = 64
SENDS_BYTES = 1 << 16
"""What a client puts into one SENDS at the most; a message that is larger goes alone, and without a copy."""

ID_SEPARATOR = b"\0"
"""In a routing id, between the client's name and bytes that nobody can guess."""
MAX_NAME_BYTES = 200

MAX_REASON = 2000
"""Characters of a refusal's reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """How links behave; the fields are those of ``[links]`` in the configuration."""

    window: int = 256
    heartbeat_s: float = 2.0
    deadline_s: float = 60.0
    give_up_s: float = 600.0
    max_message_bytes: int = 64 << 20
    keys_dir: Path | None = None

    @classmethod
    def from_config(cls, config: LinksConfig) -> LinkSettings:
        return cls(
            window=config.window,
            heartbeat_s=config.heartbeat_s,
            deadline_s=config.deadline_s,
            give_up_s=config.give_up_s,
            max_message_bytes=config.max_message_bytes,
            keys_dir=config.keys_dir,
        )

    @property
    def limits(self) -> codec.Limits:
        return codec.Limits(message_bytes=self.max_message_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkStats:
    """Counters of a client since it was opened."""

    waited_s: float
    """Summed over senders: time that send() waited for room in the window."""
    sent: int
    acked: int
    resent: int
    unacked: int
    refused: int


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


def encode_within(message: Any, limits: codec.Limits) -> list[codec.Buffer]:
    """Frames of a message that a receiver with the same limits takes.  Raises BadMessage if there are none."""
    frames = codec.encode(message)
    size = len(frames[0]) + len(frames[1])
    if size > limits.message_bytes or len(frames[0]) > limits.header_bytes:
        raise BadMessage(
            f"{type(message).__name__} of {size} bytes ({len(frames[0])} of header) exceeds links.max_message_bytes = "
            f"{limits.message_bytes} (an eighth of it for the header); raise it for every role"
        )
    return frames


def worth_a_line(count: int) -> bool:
    """Whether the ``count``-th of many alike is logged: the 1st, 2nd, 3rd, 10th, 100th, 1,000th, … is."""
    return count <= 3 or count == 10 ** (len(str(count)) - 1)
